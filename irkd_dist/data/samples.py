"""Samples that are read by number: what batches are made of, wherever they lie."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from irkd_dist import files
from irkd_dist.data.index import Index
from irkd_dist.data.remote import Url
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

    def where(self, i: int) -> Path | Url | str:
        """What holds sample i, for messages: a shard's file."""
        ...

    def close(self) -> None:
        """Let go of files; reading afterwards is an error."""
        ...


class Shards(Protocol):
    """The tars of a split, read by number from any thread: on this machine, or behind a URL (streaming.Remote)."""

    def read(self, shard: int, offset: int, size: int) -> bytes: ...
    def read_all(self, places: Sequence[tuple[int, int, int]]) -> list[bytes]: ...
    def where(self, shard: int) -> Path | Url: ...
    def expect(self, at_once: int, sources: int) -> str | None: ...
    def prefetch(self, order: np.ndarray) -> None: ...
    def close(self) -> None: ...


class Split:
    """The samples of one split at one resolution in its shards, each indexed by one of `indices`.

    shard: (N,) int64, which one each sample is in.
    """

    def __init__(self, shards: Sequence[Path] | Shards, indices: list[Index]) -> None:
        self.keys = [key for part in indices for key in part.keys]
        self.labels = np.concatenate([part.labels for part in indices] or [np.zeros(0, np.int64)])
        self.shard = np.repeat(np.arange(len(indices)), [len(part) for part in indices])
        none = np.zeros((0, 2), np.int64)
        self._image = np.concatenate([part.image for part in indices] or [none])
        self._mask = np.concatenate([part.mask for part in indices] or [none])
        self._shards: Shards | None = Local(shards) if isinstance(shards, Sequence) else shards

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, i: int) -> bytes:
        return self._opened().read(int(self.shard[i]), *self._image[i].tolist())

    def images(self, ids: Sequence[int]) -> list[bytes]:
        """The encoded images of several samples."""
        return self._opened().read_all([(int(self.shard[i]), *self._image[i].tolist()) for i in ids])

    def mask(self, i: int) -> bytes | None:
        if self._mask[i, 1] < 0:
            return None
        return self._opened().read(int(self.shard[i]), *self._mask[i].tolist())

    def where(self, i: int) -> Path | Url:
        return self._opened().where(int(self.shard[i]))

    def expect(self, at_once: int, sources: int = 1) -> str | None:
        """Prepare for reads out of so many shards at once, as one of so many sources; a note, where that is slow."""
        return self._opened().expect(at_once, sources)

    def prefetch(self, ids: np.ndarray) -> None:
        """Have the samples' shards come, in the order of these ids, where they are not on this machine."""
        shards, first = np.unique(self.shard[ids], return_index=True)
        self._opened().prefetch(shards[np.argsort(first)])

    def _opened(self) -> Shards:
        if self._shards is None:
            raise ValueError("these samples were closed")
        return self._shards

    def close(self) -> None:
        if self._shards is not None:
            self._shards.close()
        self._shards = None


class Local:
    """Tars on this machine.

    Reads are positioned reads, so that a file cut short while in use is an error and not a bus error.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files = [_file(path) for path in paths]

    def read(self, shard: int, offset: int, size: int) -> bytes:
        file = self._files[shard]
        try:
            opened = _open.get(file)  # held while it is read
            data = os.pread(opened.number, size, offset)
        except OSError as error:
            raise unreadable(file[0], error) from error
        if len(data) != size:
            raise _changed(file[0], "cut short")
        return data

    def read_all(self, places: Sequence[tuple[int, int, int]]) -> list[bytes]:
        return [self.read(*place) for place in places]

    def where(self, shard: int) -> Path:
        return self._files[shard][0]

    def expect(self, at_once: int, sources: int) -> None:
        pass

    def prefetch(self, order: np.ndarray) -> None:
        pass

    def close(self) -> None:
        _open.forget(self._files)


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
