"""Files for readers and writers of data: only regular ones are opened, and writes are whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from irkd_dist import runfolder
from irkd_dist.errors import UserError

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
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` whole (written, fsynced, renamed) or not at all.

    Raises UserError when it cannot be written, naming the free space; the temporary file is removed.
    """
    try:
        with runfolder.whole(path, path.with_name(path.name + ".tmp")) as file:
            yield file
    except OSError as error:
        reason = f"{error.strerror or error}{_free_space(path.parent)}"
        raise UserError(f"cannot write {path}: {reason}") from error


def _free_space(folder: Path) -> str:
    try:
        return f"; {shutil.disk_usage(folder).free / 2**20:,.1f} MiB free there"
    except OSError:
        return ""
