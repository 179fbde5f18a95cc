"""Shards behind a URL as a split reads them: from the node's cache, downloaded ahead in the order of their use."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from irkd_dist.data import index, remote, store
from irkd_dist.data.index import Index
from irkd_dist.data.remote import Url
from irkd_dist.data.store import GIB, Stopped, Wanted
from irkd_dist.errors import Passing, UserError


class Remote:
    """The shards of a split at one resolution, where the split reads them; thread-safe.

    They are kept whole, unless more of them are in use at once than the cache has room for: then each sample is
    fetched alone.
    """

    def __init__(self, shards: Sequence[Wanted]) -> None:
        """Raises UserError when the cache has no room for the largest shard."""
        self.shards = shards
        self._settings = shards[0].url.settings
        self._store = store.of(self._settings)
        self._sizes = np.array([shard.size or 0 for shard in shards], np.int64)
        self._whole, self._at_once, self._room = True, len(shards), np.inf
        self._ahead, limit = _Ahead(), self._store.limit
        if limit is not None and self._sizes.max() > limit:
            largest = shards[int(self._sizes.argmax())]
            raise UserError(
                f"data.shard_cache.limit_gib={self._settings.limit_gib:g} has no room for one shard: {largest.url} has "
                f"{(largest.size or 0) / GIB:.3g} GiB; raise it, or render with smaller --samples-per-shard"
            )

    def expect(self, at_once: int, sources: int) -> str | None:
        """Prepare for so many shards in use at once, beside so many sources in all; what a user should know of it."""
        limit, needed = self._store.limit, int(np.sort(self._sizes)[::-1][:at_once].sum()) * sources
        self._at_once, self._room = at_once, np.inf if limit is None else limit / sources
        self._whole = limit is None or needed <= limit
        if self._whole:
            return None
        folder = str(self.shards[0].url).rpartition("/")[0]
        return (
            f"{folder}: {min(at_once, len(self.shards))} shards are in use at once, {needed / GIB:.3g} GiB, and "
            f"data.shard_cache.limit_gib={self._settings.limit_gib:g}: each image is fetched alone, each time; with a "
            "larger cache, or data.order=shard and a small data.order_block, shards are kept whole"
        )

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """A part of a shard."""
        wanted = self.shards[shard]
        if self._whole:
            self._ahead.used(shard)
            return self._store.read(wanted, offset, size)
        self._store.count("ranges")
        data = remote.read(wanted.url, offset, offset + size, lambda: self._store.count("retries"))
        self._store.count("bytes", len(data))
        if len(data) > max(size, remote.CHUNK):
            raise UserError(
                f"{wanted.url}: its server ignores ranges and sent {len(data):,} bytes for {size:,}, for each image; "
                f"raise data.shard_cache.limit_gib={self._settings.limit_gib:g}, so that shards are kept whole"
            )
        found = data[offset : offset + size] if len(data) > size else data
        if len(found) < size:
            raise Passing(
                f"{wanted.url} gave {len(found):,} bytes at {offset:,}, where the index has {size:,}"
            )
        return found

    def read_all(self, places: Sequence[tuple[int, int, int]]) -> list[bytes]:
        """Several parts, each (shard, offset, bytes); side by side where each is a request of its own."""
        if self._whole or len(places) < 2:
            return [self.read(*each) for each in places]
        with ThreadPoolExecutor(min(self._settings.downloads, len(places))) as pool:
            return list(pool.map(lambda each: self.read(*each), places))

    def prefetch(self, order: np.ndarray) -> None:
        """Download shards ahead in this order, the one in which they will be used first."""
        self._ahead.stop()
        if not self._whole or not len(order):
            return
        plan = _Plan(order.tolist(), np.cumsum(self._sizes[order]), self._room, self._at_once)
        self._ahead = _Ahead(plan, self._fetch, self._settings.downloads)

    def _fetch(self, shard: int, stop: Callable[[], bool]) -> bool:
        return self._store.fetch(self.shards[shard], wait=False, stop=stop)

    def where(self, shard: int) -> Url:
        return self.shards[shard].url

    def close(self) -> None:
        """Stop downloading."""
        self._ahead.stop()


class _Plan:
    """Which shards come, and how far ahead of those in use there is room for them."""

    def __init__(self, order: list[int], ends: np.ndarray, room: float, at_once: int) -> None:
        self.order, self._ends, self._room, self._at_once = order, ends, room, at_once
        self.place = {shard: i for i, shard in enumerate(order)}

    def fits(self, place: int, used: int) -> bool:
        """Whether a shard may come while the one at `used` is the last that was needed.

        A block has room until all shards of the next one were used: what is evicted then is not what has come ahead.
        """
        first = max((used + 1) // self._at_once - 1, 0) * self._at_once
        before = self._ends[first - 1] if first else 0
        return self._ends[place] - before <= self._room


class _Ahead:
    """Threads that download what a plan says; an error ends them: whoever needs the shard will meet it."""

    def __init__(
        self,
        plan: _Plan | None = None,
        fetch: Callable[[int, Callable[[], bool]], bool] = lambda shard, stop: True,
        threads: int = 0,
    ) -> None:
        self._plan, self._fetch = plan, fetch
        self._next, self._used, self._stopped = 0, 0, plan is None
        self._changed = threading.Condition()
        for _ in range(min(threads, len(plan.order)) if plan else 0):
            threading.Thread(target=self._work, daemon=True, name="irkd-download").start()

    def used(self, shard: int) -> None:
        """A shard is needed now."""
        if self._stopped or self._plan is None or self._plan.place.get(shard, -1) <= self._used:
            return
        with self._changed:
            self._used = max(self._used, self._plan.place[shard])
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _work(self) -> None:
        with contextlib.suppress(UserError, Stopped):
            while (shard := self._take()) is not None:
                self._fetch(shard, lambda: self._stopped)

    def _take(self) -> int | None:
        plan = self._plan
        assert plan is not None
        with self._changed:
            while (
                not self._stopped and self._next < len(plan.order) and not plan.fits(self._next, self._used)
            ):
                self._changed.wait()
            if self._stopped or self._next == len(plan.order):
                return None
            self._next += 1
            return plan.order[self._next - 1]


def indices(shards: Sequence[Wanted], listed: Sequence[str | None], encoding: str) -> list[Index]:
    """The index of each shard: `listed` has the sha256 of its file; None: it has none, and its tar is scanned once.

    Raises:
        UserError: one cannot be had.
        ValueError: one is no index of its shard, or a tar is not one of ours.
    """
    with ThreadPoolExecutor(shards[0].url.settings.downloads if shards else 1) as pool:
        return list(pool.map(lambda shard, sha256: _index(shard, sha256, encoding), shards, listed))


def _index(shard: Wanted, sha256: str | None, encoding: str) -> Index:
    kept, end = store.of(shard.url.settings), shard.size or 0
    if sha256 is not None:
        written = kept.read(Wanted(shard.url.parent / index.file_name(shard.url.name), sha256))
        if (found := index.decode(written, end, shard.sha256)) is not None:
            return found
    own = Wanted(shard.url, hashlib.sha256(f"index of {shard.sha256}".encode()).hexdigest())
    with contextlib.suppress(OSError, ValueError):
        if (found := index.decode(kept.path(own).read_bytes(), end, shard.sha256)) is not None:
            return found
    found = index.scan(lambda count, offset: kept.read(shard, offset, count), end, encoding)
    kept.keep(own, index.encode(found, shard.sha256))
    return found
