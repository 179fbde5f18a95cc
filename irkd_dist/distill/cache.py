"""What a teacher has said is kept: the same sample shown the same way is asked about once, by whatever run.

A teacher's answer is a function of its weights and of the view of a sample, except in its last bits: those depend on
the shape of the batch that it was computed in. So with a cache, whatever its mode, a teacher computes chunks of one
size; a chunk's rows do not depend on one another (docs/cache.md has the measurements). Then it does not matter who
has computed an answer, beside which others, in which world.
"""

from __future__ import annotations

import collections
import itertools
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from irkd_dist.distill.cache_files import Store
from irkd_dist.distill.cache_shards import Layout
from irkd_dist.distill.cache_writer import Writer, as_array
from irkd_dist.distill.module import Targets
from irkd_dist.distill.teacher import Teacher

Mode = Literal["off", "read", "write", "auto"]
T = TypeVar("T")

FORMS = {"exact": ("exact", "exact"), "compact": ("half", "bytes")}  # of logits, of maps


@dataclass(frozen=True)
class Keys:
    """What decides a teacher's logits, and the maps of each tap: plain values."""

    logits: dict[str, Any]
    maps: list[dict[str, Any]]  # none where no maps are asked for


@dataclass(frozen=True)
class Wanted:
    """Of which samples of a step answers are read: ids, and whether of the first `aligned` maps too."""

    draw: int
    ids: np.ndarray
    aligned: int
    logits: bool


@dataclass
class Counts:
    """Since the last time it was asked: samples found and computed, seconds that training waited for the cache."""

    hits: int = 0
    misses: int = 0
    wait_s: float = 0.0

    def take(self) -> tuple[int, int, float]:
        """The counts; they begin anew."""
        taken = self.hits, self.misses, self.wait_s
        self.hits, self.misses, self.wait_s = 0, 0, 0.0
        return taken


@dataclass
class _Kept:
    """Answers that were found, by ascending sample id."""

    ids: np.ndarray
    parts: list[np.ndarray]

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Where each sample's answer is; -1: nowhere."""
        if not len(self.ids):
            return np.full(len(ids), -1)
        at = np.searchsorted(self.ids, ids).clip(max=len(self.ids) - 1)
        return np.where(self.ids[at] == ids, at, -1)


_NOTHING = _Kept(np.empty(0, np.int64), [])


class CachedTeacher:
    """A teacher that remembers, on disk.

    Args:
        teacher: what computes.
        folder: of the cache.
        mode: off: compute all; read; write: compute all and keep it; auto: compute what is missing and keep it.
        storage: exact, or compact (fp16 logits, 8-bit maps, of computed answers too, so that all are alike).
        chunk: samples that are computed at once, whatever the batch is.
        limit: bytes that the whole cache may take; None: what the disk has.
        most: the most of each process's numbers, for a teacher whose processes compute together; None: they do not.
    """

    def __init__(
        self, teacher: Teacher, folder: Path, mode: Mode, storage: Literal["exact", "compact"], chunk: int,
        limit: int | None = None, most: Callable[[list[int]], list[int]] | None = None,
    ) -> None:  # fmt: skip
        self.teacher, self.folder, self.mode = teacher, folder, mode
        self.counts, self.errors = (
            Counts(),
            [0.0, 0.0],
        )  # largest error of compact logits and maps, part of the range
        self._storage, self._chunk, self._most = storage, chunk, most
        self._logits: Store | None = None
        self._grids: list[tuple[int, ...]] = []
        self._maps: list[Store] = []  # one a tap: students with other taps may have some of them in common
        self._now: tuple[_Kept, _Kept] = (_NOTHING, _NOTHING)
        self.writer = Writer(folder, limit) if mode in ("write", "auto") else None

    @property
    def stores(self) -> list[Store]:
        """Those that are in use: of logits, and of each tap's maps where they are asked for."""
        return [self._logits, *self._maps] if self._logits is not None else []

    def enter(self, keys: Keys, samples: int, again: bool, grids: list[tuple[int, ...]]) -> None:
        """Begin a stage. samples: of the split; again: whether its draws come again; grids: (h, w) of each tap's maps.

        Raises:
            UserError: the folder is no cache, of another format, or a key in it is not what its name says.
        """
        self.flush()
        self._now, self._grids = (_NOTHING, _NOTHING), grids
        if self.mode == "off":
            return
        self._logits = Store(self.folder, keys.logits, samples, again)
        self._maps = [Store(self.folder, each, samples, again) for each in keys.maps]

    def look(self, draw: int) -> None:
        """See what others have written of a draw by now."""
        for store in self.stores:
            store.forget_all_but(draw)
            store.look(draw)

    def complete(self, wanted: Wanted) -> bool:
        """Whether all that is wanted is on the disk, as far as is known."""
        assert self._logits is not None
        maps = wanted.ids[: wanted.aligned]
        return (not wanted.logits or bool(self._logits.has(wanted.draw, wanted.ids).all())) and all(
            store.has(wanted.draw, maps).all() for store in self._maps
        )

    def write_soon(self) -> None:
        """Write what was computed, without waiting for it."""
        if self.writer is not None:
            self.writer.write_soon()

    def flush(self) -> None:
        """Return when all that was computed is on the disk, or given up."""
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        """Write the rest, and end the thread that writes."""
        if self.writer is not None:
            self.writer.close()

    def news(self) -> list[str]:
        """What went wrong since the last call, in words: damage, a full disk, the limit."""
        told = [text for store in self.stores for text in store.damage]
        for store in self.stores:
            store.damage = []
        told = [f"{text}; computed again" for text in told]
        return told + ([] if self.writer is None else self.writer.news())

    def ahead(self, batches: Iterator[T], wanted: Iterable[Wanted], threads: int) -> Generator[T, None, None]:
        """The batches of `batches` in order, each when what the cache has of it is in memory: threads read ahead."""
        if self.mode not in ("read", "auto"):
            yield from batches
            return
        todo, lead = iter(wanted), max(4, 2 * threads)
        with ThreadPoolExecutor(max(threads, 1), thread_name_prefix="irkd-cache") as pool:
            ready = collections.deque(pool.submit(self._read, w) for w in itertools.islice(todo, lead))
            try:
                for batch in batches:
                    started = time.perf_counter()
                    self._now = ready.popleft().result()
                    ready.extend(pool.submit(self._read, w) for w in itertools.islice(todo, 1))
                    self.counts.wait_s += time.perf_counter() - started
                    yield batch
            finally:
                self._now = _NOTHING, _NOTHING
                pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, wanted: Wanted) -> tuple[_Kept, _Kept]:
        assert self._logits is not None
        logits = _kept([self._logits], wanted.draw, wanted.ids) if wanted.logits else _NOTHING
        return logits, _kept(self._maps, wanted.draw, wanted.ids[: wanted.aligned])

    def __call__(
        self,
        images: Tensor,
        target: Tensor,
        ids: np.ndarray,
        draw: int,
        aligned: int = 0,
        logits: bool = True,
    ) -> Targets:
        """What `Teacher` says of images (B, 3, r, r): from the cache where it was read, else computed and kept.

        ids: of the samples (B,), within the split; draw: how they are shown.
        """
        started = time.perf_counter()
        kept_logits, kept_maps = self._now
        at, at_maps = kept_logits.rows(ids), kept_maps.rows(ids[:aligned])
        lacking = np.flatnonzero(at_maps < 0)  # they get their logits along with the maps
        plain = np.setdiff1d(np.flatnonzero(at < 0), lacking) if logits else np.empty(0, np.int64)
        self.counts.wait_s += time.perf_counter() - started
        with_maps, without = self._compute(images, target, lacking, plain)

        started = time.perf_counter()
        for rows, said in ((lacking, with_maps), (plain, without)):
            self._keep(draw, ids[rows], said)
        with_maps, without = self._as_read(with_maps), self._as_read(without)
        device = images.device
        result = Targets()
        if logits:
            computed = [(lacking, with_maps.logits), (plain, without.logits)]
            result.logits = _assemble(len(ids), at, kept_logits.parts[:1], computed, device)
        if aligned:
            count = len(self.teacher.paths)
            parts = with_maps.maps or [None] * count
            kept = kept_maps.parts or [None] * count
            result.maps = [
                _assemble(aligned, at_maps, [] if k is None else [k], [(lacking, m)], device).view(-1, *grid)
                for k, m, grid in zip(kept, parts, self._grids, strict=True)
            ]
        computed_count = len(lacking) + len(plain)
        self.counts.misses += computed_count
        self.counts.hits += (len(ids) if logits else aligned) - computed_count
        self.counts.wait_s += time.perf_counter() - started
        return result

    def _compute(
        self, images: Tensor, target: Tensor, with_maps: np.ndarray, plain: np.ndarray
    ) -> tuple[Targets, Targets]:
        rounds = [-(-len(rows) // self._chunk) for rows in (with_maps, plain)]
        if self._most is not None:
            rounds = self._most(rounds)
        return (
            self._in_chunks(images, target, with_maps, rounds[0], maps=True),
            self._in_chunks(images, target, plain, rounds[1], maps=False),
        )

    def _in_chunks(
        self, images: Tensor, target: Tensor, rows: np.ndarray, rounds: int, maps: bool
    ) -> Targets:
        """The teacher on rows of the batch in so many chunks of one size, filled up with their first row."""
        logits, parts = [], []
        for i in range(rounds):
            own = rows[i * self._chunk : (i + 1) * self._chunk]
            filling = np.full(self._chunk - len(own), own[0] if len(own) else 0)
            index = _to(np.concatenate([own, filling]), images.device)
            said = self.teacher(images[index], target[index], self._chunk if maps else 0)
            assert said.logits is not None
            if len(own):
                logits.append(said.logits[: len(own)])
                parts.append([m[: len(own)].flatten(1) for m in said.maps or ()])
                self._grids = [tuple(m.shape[1:]) for m in said.maps or ()] or self._grids
        if not logits:
            return Targets()
        return Targets(torch.cat(logits), [torch.cat(p) for p in zip(*parts, strict=True)] if maps else None)

    def _as_read(self, said: Targets) -> Targets:
        """Computed answers as they would be read: under compact storage what it leaves of them."""
        if self._storage == "exact" or said.logits is None:
            return said
        logits, maps = (
            self._through(kind, parts) for kind, parts in enumerate(([said.logits], said.maps or []))
        )
        return Targets(logits[0], maps or None)

    def _through(self, kind: int, parts: list[Tensor]) -> list[Tensor]:
        if not parts:
            return []
        arrays = [as_array(p) for p in parts]
        layout = Layout(tuple(a.shape[1] for a in arrays), FORMS[self._storage][kind])
        left = layout.decode(layout.encode(arrays))
        self.errors[kind] = max(self.errors[kind], *(_error(a, b) for a, b in zip(arrays, left, strict=True)))
        return [_to(a, p.device) for a, p in zip(left, parts, strict=True)]

    def _keep(self, draw: int, ids: np.ndarray, said: Targets) -> None:
        if self.writer is None or self.writer.stopped or said.logits is None:
            return
        logits, maps = FORMS[self._storage]
        answers = zip(
            self.stores, [(said.logits, logits), *((m, maps) for m in said.maps or ())], strict=False
        )
        for store, (values, form) in answers:
            free = store.claim(draw, ids)
            if free.any():
                own = _to(np.flatnonzero(free), values.device)
                self.writer.put(store, form, draw, ids[free], [values[own]])


def _kept(stores: list[Store], draw: int, ids: np.ndarray) -> _Kept:
    """What all of the stores have of the samples."""
    if not stores or not len(ids):
        return _NOTHING
    ids, parts = np.unique(ids), []
    for store in stores:
        found, values = store.read(draw, ids)
        if not found.any():
            return _NOTHING
        ids, parts = ids[found], [p[found] for p in parts] + values
    return _Kept(ids, parts)


def _assemble(
    size: int, at: np.ndarray, kept: list[np.ndarray], computed: list[tuple[np.ndarray, Tensor | None]],
    device: torch.device,
) -> Tensor:  # fmt: skip
    """(size, length): row i from kept[0][at[i]] where at[i] >= 0, the others from what was computed."""
    said = [(rows, values) for rows, values in computed if values is not None and len(rows)]
    if not said:
        return _to(kept[0][at], device)
    length = said[0][1].shape[1]
    result = torch.empty(size, length, dtype=said[0][1].dtype, device=device)
    there = np.flatnonzero(at >= 0)
    if len(there):
        result[_to(there, device)] = _to(kept[0][at[there]], device)
    for rows, values in said:
        result[_to(rows, device)] = values
    return result


def _to(values: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _error(exact: np.ndarray, left: np.ndarray) -> float:
    """The largest difference, as a part of the range of a row."""
    span = exact.max(axis=1) - exact.min(axis=1)
    return float((np.abs(exact - left).max(axis=1) / np.maximum(span, 1e-30)).max())
