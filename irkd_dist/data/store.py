"""Files of others on this node's disk: whole and checked by their sha256, downloaded once for all its processes.

A file is named after its sha256, so that runs, resolutions and mirrors share it. A download is locked by `flock` on
what is there of it, which the kernel lets go of when the holder is killed: the next one goes on from its last byte.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from irkd_dist import files
from irkd_dist.data import remote
from irkd_dist.data.remote import Settings, Url
from irkd_dist.errors import AWAY, Passing, UserError, printable, reason, say

GIB = 2**30

_TOUCH_S = 0.2  # a file's last use is known to this
_WAIT_S = 30.0  # for room or another process, before it is said
_AGAIN = 100  # times that a file may be evicted between its download and its use


@dataclass(frozen=True)
class Wanted:
    """A file behind a URL, and what it must be. size None: not known before it is there; it is read in one request."""

    url: Url
    sha256: str
    size: int | None = None


@dataclass
class Counts:
    """What was done since it was last asked; seconds are of downloads, which may run side by side."""

    downloads: int = 0
    bytes: int = 0
    seconds: float = 0.0
    hits: int = 0  # samples read from files that were there
    ranges: int = 0  # samples fetched alone
    evictions: int = 0
    retries: int = 0
    damaged: int = 0  # files that were not what they must be, and were fetched again


@dataclass(frozen=True)
class _Part:
    """What is there of a file."""

    number: int
    path: Path


class Stopped(Exception):
    """A download was given up; what is there of it stays."""


class Store:
    """The files kept in a folder, by sha256; thread-safe, and safe with other processes that use the folder."""

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.folder, self.limit = folder, limit
        self._counts, self._lock = Counts(), threading.Lock()
        self._touched: dict[str, float] = {}

    def path(self, wanted: Wanted) -> Path:
        """Where a file is, once it is there."""
        return self.folder / wanted.sha256[:2] / wanted.sha256

    def take_counts(self) -> Counts:
        """What was done since the last call."""
        with self._lock:
            taken, self._counts = self._counts, Counts()
        return taken

    def count(self, what: str, number: float = 1) -> None:
        with self._lock:
            setattr(self._counts, what, getattr(self._counts, what) + number)

    def read(self, wanted: Wanted, offset: int = 0, count: int | None = None) -> bytes:
        """A part of a file, or all of it, fetched first if it is not there; shorter where the file ends before."""
        for _ in range(_AGAIN):
            try:
                number = os.open(self.path(wanted), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                self.fetch(wanted)
                continue
            except OSError as error:
                raise self._failed(error) from error
            try:
                there = os.fstat(number).st_size
                if wanted.size not in (None, there):
                    self.count("damaged")
                    self.path(wanted).unlink(missing_ok=True)
                    continue
                self._touch(number, wanted.sha256)
                self.count("hits")
                return os.pread(number, there if count is None else count, offset)
            except OSError as error:
                raise self._failed(error) from error
            finally:
                os.close(number)
        raise UserError(
            f"{wanted.url} is evicted from {self.folder} as soon as it is there: raise data.shard_cache.limit_gib"
        )

    def fetch(self, wanted: Wanted, wait: bool = True, stop: Callable[[], bool] = lambda: False) -> bool:
        """Have a file in the folder; False if, without `wait`, somebody else downloads it or needs the room.

        Raises:
            UserError: it cannot be had, is not what it must be, or there is no room for it.
            Stopped: `stop` said so.
        """
        path, tell_at = self.path(wanted), time.monotonic() + _WAIT_S
        try:
            while not _used(path):
                with self._claimed(path, wanted.size, wait) as part:
                    if part is not None and self._room(part):
                        began = time.monotonic()
                        self._download(wanted, part, path, stop)
                        self.count("downloads")
                        self.count("seconds", time.monotonic() - began)
                        return True
                if not wait:
                    return path.exists()
                if stop():
                    raise Stopped
                if time.monotonic() > tell_at:
                    tell_at = math.inf
                    room = (
                        ""
                        if self.limit is None
                        else f", of which data.shard_cache.limit_gib allows {self.limit / GIB:.3g} GiB"
                    )
                    say(
                        printable(
                            f"waiting for room, or for another process, in {self.folder}{room}: {wanted.url}"
                        )
                    )
                time.sleep(0.02)  # others' downloads leave their room
        except OSError as error:
            raise self._failed(error) from error
        return True

    def keep(self, wanted: Wanted, content: bytes) -> None:
        """Put a file of our own making in the folder."""
        files.write(self.path(wanted), content)

    # ---- one download

    @contextlib.contextmanager
    def _claimed(self, path: Path, size: int | None, wait: bool) -> Iterator[_Part | None]:
        """What is there of a file, locked for this thread alone; None: the whole is there, or it is taken."""
        part = path.with_name(f"{path.name}-{size or 0}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        number = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            mine = _is(number, part)  # else it was renamed or removed while we waited
            if mine and path.exists():
                part.unlink()
            yield _Part(number, part) if mine and not path.exists() else None
        except BlockingIOError:
            yield None
        finally:
            os.close(number)

    def _download(self, wanted: Wanted, part: _Part, path: Path, stop: Callable[[], bool]) -> None:
        for _ in range(2):
            if wanted.size is None:
                os.ftruncate(part.number, 0)
                _write(part.number, self._get(wanted, None, None), 0)
            else:
                self._fill(wanted, part.number, wanted.size, stop)
            if _sha256(part.number) == wanted.sha256:
                os.fsync(part.number)
                os.replace(part.path, path)
                return
            self.count("damaged")
            os.ftruncate(part.number, 0)
        raise UserError(
            f"{wanted.url} is not what the manifest says: its sha256 is another one, downloaded twice; upload the "
            "folder that irkd render wrote anew"
        )

    def _fill(self, wanted: Wanted, number: int, size: int, stop: Callable[[], bool]) -> None:
        """Go on with a download from the last byte that is there."""
        done = os.fstat(number).st_size
        while done < size:
            if stop():
                raise Stopped
            end = min(done + remote.CHUNK, size)
            data = self._get(wanted, done, end)
            whole = len(data) > end - done  # the server ignores ranges
            if not data or (whole and len(data) != size):
                there = len(data) if whole else done
                raise UserError(f"{wanted.url} has {there:,} bytes, the manifest says {size:,}")
            _write(number, data, 0 if whole else done)
            done = size if whole else done + len(data)

    def _get(self, wanted: Wanted, start: int | None, end: int | None) -> bytes:
        data = remote.read(wanted.url, start, end, lambda: self.count("retries"))
        self.count("bytes", len(data))
        return data

    # ---- room

    def _room(self, part: _Part) -> bool:
        """Evict what was not used for longest until a download fits; False: others' downloads must end first."""
        if self.limit is None:
            return True
        with open(self.folder / ".evicting", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            entries = sorted(self._entries())
            excess = sum(size for _, size, _ in entries) - self.limit
            for _, size, entry in entries:
                if excess > 0 and entry != part.path and _removed(entry):
                    excess -= size
                    self.count("evictions", entry.suffix != ".part")
            if excess > 0 and not os.fstat(part.number).st_size:
                part.path.unlink()  # it takes no room while it waits
            return excess <= 0

    def _entries(self) -> Iterator[tuple[int, int, Path]]:
        """(last use, bytes, file) of all that is kept; a download counts as what it will be."""
        for entry in self.folder.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):
                found = entry.stat()
                whole = entry.name.removesuffix(".part").partition("-")[2] if entry.suffix == ".part" else "0"
                yield found.st_mtime_ns, max(found.st_size, int(whole) if whole.isdigit() else 0), entry

    def _touch(self, number: int, name: str) -> None:
        now = time.monotonic()
        if now - self._touched.get(name, -1.0) > _TOUCH_S:
            self._touched[name] = now
            with contextlib.suppress(OSError):  # a read-only folder may be shared
                os.utime(number)

    def _failed(self, error: OSError) -> UserError:
        hint = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = f"{files.free_space(self.folder)}; make room, or set data.shard_cache.limit_gib"
        kind = Passing if error.errno in AWAY else UserError
        return kind(f"data.shard_cache.folder: {self.folder} cannot be used: {reason(error)}{hint}")


def home() -> Path:
    """Where a user's files of others are kept, unless a configuration says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "irkd"


@functools.cache
def of(settings: Settings) -> Store:
    """The store of this process for these settings."""
    default = home() / "shards"
    limit = None if settings.limit_gib is None else int(settings.limit_gib * GIB)
    return Store(Path(settings.folder) if settings.folder else default, limit)


def summed(counts: list[Counts]) -> Counts:
    """What several processes did."""
    return Counts(**{f.name: sum(getattr(c, f.name) for c in counts) for f in fields(Counts)})


def _is(number: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(number), os.stat(path))
    except FileNotFoundError:
        return False


def _used(path: Path) -> bool:
    """Whether a file is there; if so it was used just now."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    except OSError:  # a read-only folder may be shared
        return path.exists()
    return True


def _removed(entry: Path) -> bool:
    """Remove a file, unless it is a download that is going on."""
    try:
        if entry.suffix == ".part":
            with open(entry, "r+b") as file:  # NFS gives no exclusive lock to who only reads
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                entry.unlink()
        else:
            entry.unlink()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _write(number: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(number, view, offset)
        view, offset = view[written:], offset + written


def _sha256(number: int) -> str:
    with open(number, "rb", closefd=False) as file:
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()
