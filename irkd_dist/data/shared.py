"""Memory that the processes of a node have in common: anonymous, so that nothing is left however they end."""

from __future__ import annotations

import collections
import contextlib
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store


@dataclass(frozen=True)
class Region:
    """Bytes, zero at first, and the file without a name that others open them by."""

    bytes: mmap.mmap
    file: BinaryIO

    def close(self) -> None:
        """Let nobody else in; the bytes live as long as somebody has them."""
        self.file.close()


class Node:
    """The processes of a run that share this machine's memory; they meet in the launcher's store.

    Whoever comes first with a key makes the region and waits for nobody, so that processes need not come in step; the
    others open it through /proc, which has it as long as that process has. A file system for shared memory (/dev/shm)
    is not used: containers have a small one.
    """

    def __init__(self, store: Store) -> None:
        self._store, self._asked = store, collections.Counter[str]()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._here = f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}/{os.getuid()}"

    def region(self, what: str, size: int, may: bool) -> Region | None:
        """The same region for the n-th call with `what` in each process. Raises OSError as the system does.

        `may`: whether it may be made, if nobody has. None: it is not to be made, as the first one decided.
        """
        self._asked[what] += 1
        for attempt in range(1000):  # a region whose maker has let go of it is followed by another
            key = f"irkd-memory/{self._here}/{what}/{self._asked[what]}/{attempt}"
            if self._store.add(f"{key}/asked", 1) == 1:
                return self._make(key, size if may else 0)
            told = self._store.get(key).decode()  # waits for whoever was first
            if told == "none":
                return None
            with contextlib.suppress(OSError, ValueError):
                return _open(told, size)
        raise OSError(f"no memory shared by the processes of this node for {what}")

    def _make(self, key: str, size: int) -> Region | None:
        told = "none"
        try:
            if size == 0:
                return None
            name = f"irkd-{os.getpid()}-{sum(self._asked.values())}"
            file = os.fdopen(os.memfd_create(name), "r+b", buffering=0)
            file.truncate(size)
            region = Region(mmap.mmap(file.fileno(), size), file)  # type: ignore[arg-type]
            told = f"{os.getpid()}/{file.fileno()}/{name}"
            return region
        finally:
            self._store.set(key, told)


def _open(told: str, size: int) -> Region:
    """Raises OSError or ValueError when it is gone, or another file has its number by now."""
    process, number, name = told.split("/")
    file = open(f"/proc/{process}/fd/{number}", "r+b", buffering=0)  # noqa: SIM115
    if os.readlink(f"/proc/self/fd/{file.fileno()}") != f"/memfd:{name} (deleted)":
        file.close()
        raise OSError(f"process {process} has another file now")
    return Region(mmap.mmap(file.fileno(), size), file)  # type: ignore[arg-type]
