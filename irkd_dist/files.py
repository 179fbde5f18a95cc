"""Files: only regular ones are read, and what is written appears whole or not at all. Without torch."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from irkd_dist.errors import UserError, reason

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


def regular(path: str | Path) -> os.stat_result:
    """The stat of a regular file. Raises OSError for all else: to open a FIFO may wait for ever."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, not a file", str(path))
    return found


def read(path: Path) -> bytes:
    """The bytes of a regular file. Raises OSError."""
    regular(path)
    return path.read_bytes()


@contextlib.contextmanager
def whole(path: Path, mine: bool = False) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` whole (written, synced, renamed) or not at all.

    It is written beside it first: under a hidden name of this process's own, or, where no other process may write the
    same file (`mine`), under one that the next try takes again, so that a kill leaves nothing for good.

    Raises:
        UserError: it cannot be written; the message names the free space.
    """
    temporary = path.with_name(f"{path.name}.tmp" if mine else f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {path}: {reason(error)}{free_space(path.parent)}") from error
        raise


def write(path: Path, content: str | bytes | memoryview, mine: bool = False) -> None:
    """Write a whole file, see `whole`; what UTF-8 cannot hold (a name of other bytes) is written as `\\udcff`."""
    with whole(path, mine) as file:
        file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)


def sync_folder(folder: Path) -> None:
    """Return when the names in a folder are on the disk itself."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_space(folder: Path) -> str:
    """What to add to the message of a write that failed; nothing where the disk does not say."""
    try:
        return f"; {shutil.disk_usage(folder).free / 2**20:,.1f} MiB free there"
    except OSError:
        return ""
