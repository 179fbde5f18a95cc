"""Samples that are read by number: what batches are made of, wherever they lie."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Protocol

import numpy as np

from irkd_dist import files
from irkd_dist.data.index import Index
from irkd_dist.errors import UserError, unreadable

OPEN_FILES = 128  # of all splits of a process together: a large set has thousands, a process may open 1,024


class Samples(Protocol):
    """N labelled images, read by number from any thread.

    keys: N strings; labels: (N,) int64.
    """

    @property
    def keys(self) -> list[str]: ...

    @property
    def labels(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def image(self, i: int) -> bytes:
        """The encoded image of sample i. Raises UserError when it cannot be read any more."""
        ...

    def mask(self, i: int) -> bytes | None:
        """The object mask of sample i as PNG bytes (8-bit, 0 or 255), None where there is none."""
        ...

    def where(self, i: int) -> Path | str:
        """What holds sample i, for messages: a shard's file."""
        ...

    def close(self) -> None:
        """Let go of files; reading afterwards is an error."""
        ...


class Split:
    """The samples of one split at one resolution in its shards, `paths[n]` indexed by `indices[n]`.

    Reads are positioned reads, so that a file cut short while in use is an error and not a bus error.
    """

    def __init__(self, paths: list[Path], indices: list[Index]) -> None:
        self.keys = [key for part in indices for key in part.keys]
        self.labels = np.concatenate([part.labels for part in indices] or [np.zeros(0, np.int64)])
        self._shard = np.repeat(np.arange(len(indices)), [len(part) for part in indices])
        none = np.zeros((0, 2), np.int64)
        self._image = np.concatenate([part.image for part in indices] or [none])
        self._mask = np.concatenate([part.mask for part in indices] or [none])
        self._files: list[_File] | None = [_file(path) for path in paths]

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, i: int) -> bytes:
        return self._read(int(self._shard[i]), self._image[i])

    def mask(self, i: int) -> bytes | None:
        if self._mask[i, 1] < 0:
            return None
        return self._read(int(self._shard[i]), self._mask[i])

    def where(self, i: int) -> Path:
        return self._opened()[int(self._shard[i])][0]

    def _read(self, shard: int, place: np.ndarray) -> bytes:
        file, (offset, size) = self._opened()[shard], place.tolist()
        try:
            opened = _open.get(file)  # held while it is read
            data = os.pread(opened.number, size, offset)
        except OSError as error:
            raise unreadable(file[0], error) from error
        if len(data) != size:
            raise _changed(file[0], "cut short")
        return data

    def _opened(self) -> list[_File]:
        if self._files is None:
            raise ValueError("these samples were closed")
        return self._files

    def close(self) -> None:
        _open.forget(self._files or [])
        self._files = None


_File = tuple[Path, int, int]  # path, bytes, time of the last change: what it was when the split was opened


def _file(path: Path) -> _File:
    try:
        found = files.regular(path)
    except OSError as error:
        raise unreadable(path, error) from error
    return path, found.st_size, found.st_mtime_ns


def _changed(path: Path, how: str) -> UserError:
    return UserError(
        f"{path} was {how} while in use; render again: the same `irkd render` command replaces what is damaged"
    )


class _Descriptor:
    """An open file, closed when nobody holds it: a thread may read from one that is no longer kept."""

    def __init__(self, file: _File) -> None:
        path, size, changed = file
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        found = os.fstat(self.number)
        if (found.st_size, found.st_mtime_ns) != (size, changed):
            raise _changed(path, "cut short" if found.st_size < size else "replaced")

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class _OpenFiles:
    """The files read last; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[_File, _Descriptor] = OrderedDict()

    def get(self, file: _File) -> _Descriptor:
        with self._lock:
            if found := self._kept.get(file):
                self._kept.move_to_end(file)
                return found
        opened = _Descriptor(file)  # not under the lock: a file system may take its time
        with self._lock:
            self._kept[file] = opened
            while len(self._kept) > OPEN_FILES:
                self._kept.popitem(last=False)
        return opened

    def forget(self, gone: list[_File]) -> None:
        with self._lock:
            for file in gone:
                self._kept.pop(file, None)


_open = _OpenFiles()
