"""Batches of views: sampler says which samples, views what is seen of them, threads make them ahead.

Everything in a batch is a function of (seed, epoch, step, slice, slices) and the shards; caches, threads and
prefetching change when the work is done, never its result.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from irkd_dist.data import augment as aug
from irkd_dist.data import sampler
from irkd_dist.data.decoded import Dataset, Work
from irkd_dist.data.sampler import Share
from irkd_dist.data.views import View, Views
from irkd_dist.errors import UserError

T = TypeVar("T")

_IN_ORDER = 4  # shards that steps made side by side read out of, where samples come in order


@dataclass
class Batch:
    """One slice of a global batch of `size` samples; n of them here, at least one.

    weight: in training slices / size for a sample, so that the mean over slices of sum(weight * loss) is the
    mean over the global batch; in evaluation 1. A slice without a sample of its own gets position 0, weight 0.
    """

    ids: np.ndarray  # (n,) index within the split
    images: Tensor  # (n, 3, r, r) float32, normalised
    labels: Tensor  # (n,) int64
    soft_labels: Tensor | None  # (n, K) float32 when mixed or smoothed
    weight: Tensor  # (n,) float32
    positions: Tensor  # (n,) int64, place in the global batch; on the CPU, where they are compared
    size: int
    full: Tensor | None  # (n, 3, R, R) float32: the same view at full resolution; `images` itself if R = r
    epoch: int
    step: int
    draw: int  # with Loader.view_key() and an id: what decides a sample's images and soft label


class Loader:
    """The batches of a data set under one view.

    A view that augments is trained on, in an order of each epoch's own; one that does not is evaluated, in order.
    `least`: a last batch of fewer samples joins the one before it (see `sampler.bounds`); models with BatchNorm need
    2 for each slice and micro-batch. With `scales` each step is at one resolution out of these and the view's, drawn by
    (seed, epoch, step). Raises UserError for shards that are missing, damaged or not made for what is
    asked, and for batches below `least`. Close it (or use `with`) to close the shards' files.

    scales: the resolutions that a step's is drawn from; one, unless there are several.
    notes: what decided against `work.cache`, a line each; kept: where decoded images stay, by stored resolution.
    wait_s: seconds that the consumer has waited for batches; set it to 0 to start counting anew.
    """

    def __init__(
        self,
        data: Dataset,
        view: View,
        *,
        batch: int,
        seed: int,
        scales: Sequence[int] = (),
        share: Share = Share(),  # noqa: B008 - immutable
        work: Work = Work(),  # noqa: B008
        least: int = 1,
    ) -> None:
        self.view, self.resolution = view, view.resolution
        self.repeats = view.augment.repeats if view.augment is not None else 1
        self.batch, self.seed, self.share, self.least = batch, seed, share, least
        self.device, self.workers = torch.device(work.device), max(work.workers, 1)
        self.classes = len(data.manifest.classes)
        self.wait_s = 0.0
        self.scales = (view.resolution, *scales)
        self._all: dict[int, Views] = {}
        with contextlib.ExitStack() as opened:
            for size in dict.fromkeys(self.scales):
                self._all[size] = Views(data, replace(view, resolution=size), seed, work)
                opened.callback(self._all[size].close)
            self._opened = opened.pop_all()
        self._views = self._all[view.resolution]
        self._by_shard, self._block = tuple(self._views.images.by_shard.tolist()), None
        at_once = len(self._by_shard) if view.augment is not None else _IN_ORDER
        if data.order == "shard" and view.augment is not None:
            self._block = at_once = data.block
        sources = [source for views in self._all.values() for source in views.sources]
        slow = [source.expect(at_once, len(sources)) for source in sources]
        self.notes = [note for views in self._all.values() for note in views.notes]
        self.notes += [note for note in slow if note]
        self.kept = {size: where for views in self._all.values() for size, where in views.kept.items()}
        self.ids, self.labels = self._views.images.ids, self._views.images.labels
        if min(batch, len(self.ids)) < least:
            self.close()
            raise UserError(
                f"a batch of {min(batch, len(self.ids))} is too small: BatchNorm needs {least} samples, 2 for each "
                "slice and micro-batch; use a larger data.batch, or fewer slices or micro-batches"
            )
        self.steps_per_epoch = sampler.steps_per_epoch(len(self.ids), batch, least)
        self.notes += self._one_sided()

    def __len__(self) -> int:
        return len(self.ids)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the shards' files and let decoded images go."""
        self._opened.close()

    def view_key(self) -> dict[str, Any]:
        """What, with the shards' digest, `Batch.draw` and a sample's id, decides its images and soft label.

        Plain values. Which samples there are and the batch's size belong to it only where partners come from them.
        """
        augment = self.view.augment
        pairs: dict[str, Any] | None = None
        if augment and augment.mixes:
            of_batch = {"of": "batch", "batch": self.batch, "least": self.least}
            of_batch |= {} if self._block is None else {"order": ["shard", self._block]}
            pairs = {"samples": len(self), **({"of": "split"} if augment.draws else of_batch)}
        own = {"classes": self.classes, "pairs": pairs, "device": self.device.type}
        return {**self._views.key(), **own}

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """`steps` of a share with one slice: its batch of each step."""
        if len(self.share.own) != 1:
            raise ValueError(
                f"a share of {len(self.share.own)} slices has as many batches a step: use steps()"
            )
        return self._steps(epoch, start_step, lambda batches: batches[0])

    def steps(
        self, epoch: int, start_step: int = 0, chosen: Sequence[int] | None = None
    ) -> Iterator[list[Batch]]:
        """The batches of each of the share's slices, step by step of one epoch from `start_step` on, or the chosen.

        They are made ahead by threads that end with the iterator. Raises UserError when a shard can no longer be
        read or an image cannot be decoded.
        """
        return self._steps(epoch, start_step, lambda batches: batches, chosen)

    def samples(self, epoch: int, step: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Ids and positions, ascending, of the share's samples at a step, and the size of the global batch."""
        rows = self._rows(epoch, step)
        own = np.sort(np.concatenate([self._own(len(rows), part)[0] for part in self.share.own]))
        return self.ids[rows[own] // self.repeats], own, len(rows)

    def _steps(
        self,
        epoch: int,
        start_step: int,
        form: Callable[[list[Batch]], T],
        chosen: Sequence[int] | None = None,
    ) -> Generator[T, None, None]:
        steps = range(start_step, self.steps_per_epoch) if chosen is None else chosen
        self._prefetch(epoch, steps)
        made = _ahead(lambda step: _mark(self._make(epoch, step)), steps, self.workers, self.device)
        with contextlib.closing(made):
            while True:
                start = time.perf_counter()
                step = next(made, None)
                self.wait_s += time.perf_counter() - start
                if step is None:
                    return
                yield form(_receive(*step))

    def pick(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Images (n, 3, r, r) and labels (n,) of these rows, whatever this process's share is."""
        return self._views.take(0, rows)[0], self._tensor(self.labels[rows])

    def _make(self, epoch: int, step: int) -> list[Batch]:
        rows = self._rows(epoch, step)
        return [self._slice(epoch, step, rows, part) for part in self.share.own]

    def _rows(self, epoch: int, step: int) -> np.ndarray:
        """The global batch, each as row * repeats + which of its repeats: the row, where each comes once."""
        shuffle, bounds = self.view.augment is not None, (len(self), self.batch, self.least)
        if self.repeats == 1 and self._block is None:
            return sampler.global_batch(self.seed, epoch, step, *bounds[:2], shuffle, self.least)
        start, stop = sampler.bounds(*bounds)[step : step + 2]
        at = np.arange(start, stop)
        return self._order(epoch)[at // self.repeats] * self.repeats + at % self.repeats

    def _order(self, epoch: int) -> np.ndarray:
        """The rows in the order of an epoch that is trained on."""
        if self._block is None:
            return sampler.order(self.seed, epoch, len(self))
        return sampler.shard_order(self.seed, epoch, self._by_shard, self._block)

    def _one_sided(self) -> list[str]:
        """What a user should know of shards that hold a class after another, where blocks of them are shuffled."""
        if self._block is None or len(self._by_shard) <= self._block:
            return []
        size = sum(self._by_shard) * self._block // len(self._by_shard)
        first = self.labels[self._order(0)[:size]]
        found, due = len(np.unique(first)), sampler.classes_by_chance(self.labels, size)
        if found >= due / 2:
            return []
        return [
            f"warning: data.order=shard: the first {size:,} images of an epoch have {found} classes, {due:.0f} are to "
            "be expected: shards hold a class after another; render with --shuffle, or use a larger data.order_block"
        ]

    def _prefetch(self, epoch: int, steps: Sequence[int]) -> None:
        """Have the shards of these steps come, all ranks' samples: they share them on a node."""
        for views in self._all.values():
            rows = [self._rows(epoch, s) // self.repeats for s in steps if self._at(epoch, s) is views]
            for source in views.sources if rows else ():
                source.prefetch(np.concatenate(rows))

    def _at(self, epoch: int, step: int) -> Views:
        """What is seen at a step."""
        if len(self.scales) == 1:
            return self._views
        return self._all[self.scales[sampler.scale(self.seed, epoch, step, len(self.scales))]]

    def _own(self, n: int, part: int) -> tuple[np.ndarray, bool]:
        """Positions of a slice in a global batch of n samples, and whether they are its own; else the first one."""
        own = sampler.share(n, part, self.share.parts)
        return (own, True) if len(own) else (np.zeros(1, np.int64), False)

    def _slice(self, epoch: int, step: int, rows: np.ndarray, part: int) -> Batch:
        n, augment, views = len(rows), self.view.augment, self._at(epoch, step)
        own, has_some = self._own(n, part)
        weight = 0.0 if not has_some else self.share.parts / n if augment else 1.0
        draw = augment.draw(epoch) if augment else 0
        if augment and augment.mixes:
            images, full, soft_labels = self._mixed(views, draw, step, rows, own)
        else:
            images, full = self._look(views, draw, rows[own])
            soft_labels = (
                self._soft_labels(rows[own], rows[own], [1.0]) if augment and augment.smoothing else None
            )
        return Batch(
            ids=self.ids[rows[own] // self.repeats],
            images=images,
            labels=self._tensor(self.labels[rows[own] // self.repeats]),
            soft_labels=soft_labels,
            weight=torch.full((len(own),), weight).to(self.device),
            positions=torch.from_numpy(own),
            size=n,
            full=full,
            epoch=epoch,
            step=step,
            draw=draw,
        )

    def _look(self, views: Views, draw: int, rows: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """Images and full images of what `_rows` gives: repeat k of a sample is draw + k * 2^32 of it."""
        if self.repeats == 1:
            return views.take(draw, rows)
        at = [np.flatnonzero(rows % self.repeats == k) for k in range(self.repeats)]
        taken = [views.take(draw + (k << 32), rows[i] // self.repeats) for k, i in enumerate(at) if len(i)]
        back = self._tensor(np.argsort(np.concatenate(at)))
        images = torch.cat([image for image, _ in taken])[back]
        if taken[0][1] is None or taken[0][1] is taken[0][0]:
            return images, None if taken[0][1] is None else images
        return images, torch.cat([full for _, full in taken if full is not None])[back]

    def _mixed(
        self, views: Views, draw: int, step: int, rows: np.ndarray, own: np.ndarray
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Images, full images and soft labels of mixed samples."""
        samples, size = rows[own], views.view.resolution
        partners, mix = self._partners(draw, step, rows, own, size)
        # Partners are loaded by the rank that needs them; a world of one may have them in its batch already.
        loaded = np.union1d(samples, partners)
        at, partner_at = (self._tensor(np.searchsorted(loaded, each)) for each in (samples, partners))
        seen, full = self._look(views, draw, loaded)
        images = aug.apply_mix(seen[at], seen[partner_at], mix)
        if full is seen:
            full = images
        elif full is not None:
            scaled = [aug.scale_mix(each, size, full.shape[-1]) for each in mix]
            full = aug.apply_mix(full[at], full[partner_at], scaled)
        return images, full, self._soft_labels(samples, partners, [each.lam for each in mix])

    def _partners(
        self, draw: int, step: int, rows: np.ndarray, own: np.ndarray, size: int
    ) -> tuple[np.ndarray, list[aug.Mix]]:
        """The rows that samples are mixed with, and how: all alike, or each for itself.

        A draw that comes again must not depend on who else is in the batch, so that then partners come from the
        whole split; else it is the mirror position in the global batch, as in timm.
        """
        augment = self.view.augment
        assert augment is not None
        alphas = (augment.mixup, augment.cutmix)
        if augment.draws is None:
            return rows[len(rows) - 1 - own], aug.draw_mix(self.seed, draw, np.array([step]), *alphas, size)
        partners = sampler.partners(self.seed, draw, len(self))[rows[own]]
        return partners, aug.draw_mix(self.seed, draw, self.ids[rows[own]], *alphas, size)

    def _soft_labels(self, rows: np.ndarray, partners: np.ndarray, lam: list[float]) -> Tensor:
        assert self.view.augment is not None
        labels, partner_labels = (
            self._tensor(self.labels[each // self.repeats]) for each in (rows, partners)
        )
        return aug.soft_labels(
            labels, partner_labels, np.array(lam), self.classes, self.view.augment.smoothing
        )

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device)


# ---- prefetching


def _ahead(
    make: Callable[[int], T], steps: Sequence[int], workers: int, device: torch.device
) -> Generator[T, None, None]:
    """Yield make(step) for each step in order, made by threads a few steps ahead.

    A thread makes a whole step: none waits for another. Errors come out here; closing ends the threads.
    """
    ahead = max(4, 2 * workers)
    with ThreadPoolExecutor(workers, thread_name_prefix="irkd-loader") as pool:
        _start(pool, workers, device)
        todo = iter(steps)
        ready = collections.deque(pool.submit(make, step) for step in itertools.islice(todo, ahead))
        try:
            while ready:
                item = ready.popleft().result()
                ready.extend(pool.submit(make, step) for step in itertools.islice(todo, 1))
                yield item
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start(pool: ThreadPoolExecutor, workers: int, device: torch.device) -> None:
    """Start the pool's threads, each with one OpenMP thread: more would fight with the training's."""
    started, own_threads = threading.Barrier(workers + 1), torch.get_num_threads()

    def start() -> None:
        try:
            torch.get_num_threads()  # a first use resets the number to the global one: not later
            torch.set_num_threads(1)
            if device.type == "cuda":
                torch.cuda.set_device(device)  # pinned memory would else open a context on GPU 0
                # copies need not wait for training's kernels
                torch.cuda.set_stream(torch.cuda.Stream(device))
        finally:
            started.wait()  # every task gets a thread of its own, since none ends before all have begun

    tasks = [pool.submit(start) for _ in range(workers)]
    started.wait()
    torch.set_num_threads(own_threads)  # the calls above also set what threads to come begin with
    for task in tasks:
        task.result()


def _mark(batches: list[Batch]) -> tuple[list[Batch], torch.cuda.Event | None]:
    """The batches and the moment on the loader's own CUDA stream from which they may be read."""
    if not batches[0].images.is_cuda:
        return batches, None
    written = torch.cuda.Event()
    written.record()
    return batches, written


def _receive(batches: list[Batch], written: torch.cuda.Event | None) -> list[Batch]:
    if written is not None:
        stream = torch.cuda.current_stream(batches[0].images.device)
        stream.wait_event(written)
        for batch in batches:
            for tensor in (batch.images, batch.labels, batch.soft_labels, batch.weight, batch.full):
                if tensor is not None:  # its memory is not given to another batch while still in use
                    tensor.record_stream(stream)
    return batches
