"""Batches from shards: sampler says which samples, augment what becomes of them, threads make them ahead.

Everything in a batch is a function of (seed, epoch, step, rank, world) and the shards; caches, threads and
prefetching change when the work is done, never its result.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import psutil
import torch
from torch import Tensor

from irkd_dist.data import augment as aug
from irkd_dist.data import sampler
from irkd_dist.data.shards import Encoding, Manifest, Split, decode, open_split
from irkd_dist.errors import UserError

PREFETCH = 4  # batches kept ready

Cache = Literal["none", "ram", "device"]
T = TypeVar("T")
_Parts = tuple[Tensor, Tensor | None, Tensor, Tensor | None]  # images, full, labels, targets


@dataclass(frozen=True)
class Augment:
    """What training does to an image: padding as it is at `padding_at` pixels, in proportion elsewhere."""

    mode: Literal["resize", "crop"] = "resize"
    padding: int = 4
    padding_at: int | None = 32  # None: the same padding at every resolution
    flip: bool = True
    auto_augment: float = 0.0  # probability that an image goes through AutoAugment
    erase: float = 0.0  # probability of random erasing
    mixup: float = 0.0  # alpha of the Beta distribution, 0: off
    cutmix: float = 0.0
    smoothing: float = 0.0

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


@dataclass
class Batch:
    """One rank's share of a global batch of `size` samples; n of them here, at least one.

    weight: in training world / size for a sample, so that the mean over ranks of sum(weight * loss) is the
    mean over the global batch; in evaluation 1. A rank without a sample of its own gets position 0, weight 0.
    """

    ids: np.ndarray  # (n,) index within the split
    images: Tensor  # (n, 3, r, r) float32, normalised
    labels: Tensor  # (n,) int64
    targets: Tensor | None  # (n, K) float32 when mixed or smoothed
    weight: Tensor  # (n,) float32
    positions: Tensor  # (n,) int64, place in the global batch; on the CPU, where they are compared
    size: int
    full: Tensor | None  # (n, 3, R, R) float32: the same view at full resolution; `images` itself if R = r
    epoch: int
    step: int


class Loader:
    """The batches of one split at one resolution.

    augment None means evaluation: in order, normalised only. Raises UserError for shards that are missing,
    damaged or not made for what is asked. Close it (or use `with`) to close the shards' files.

    too_large: whether decoded images are not kept, against `cache`, since they would not fit in memory.
    wait_s: seconds that the consumer has waited for batches; set it to 0 to start counting anew.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        split: str,
        resolution: int,
        *,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        augment: Augment | None,
        full_resolution: int | None = None,
        cache: Cache = "ram",
        device: str | torch.device = "cpu",
        workers: int = 2,
        verify: Literal["checksum", "size"] = "checksum",
        subset: int | None = None,
        centre_crop: bool = False,
    ) -> None:
        self.resolution, self.full_resolution = resolution, full_resolution
        self.batch, self.seed, self.rank, self.world = batch, seed, rank, world
        self.augment, self.centre_crop = augment, centre_crop
        self.device, self.workers = torch.device(device), max(workers, 1)
        self.mean, self.std, self.classes = manifest.mean, manifest.std, len(manifest.classes)
        self.wait_s = 0.0
        _check_mode(folder, manifest, augment)
        window = centre_crop if augment is None else augment.mode == "crop"  # a part of the image is seen
        stored = manifest.resolutions[-1] if window or manifest.mode == "crop" else resolution
        if window:
            _check_fits(folder, resolution, stored, augment)

        with contextlib.ExitStack() as files:

            def images(size: int) -> _Images:
                opened = open_split(folder, manifest, split, size, verify)
                files.callback(opened.close)
                rows = np.arange(len(opened)) if subset is None else balanced_subset(opened.labels, subset)
                return _Images(f"{folder} {split}", opened, rows, size, manifest.encoding)

            self._images = images(stored)
            # A view that is a window of the stored image has no other source of detail than that image.
            self._full = None
            if full_resolution not in (None, resolution) and not window:
                self._full = self._images if manifest.mode == "crop" else images(full_resolution)
            sources = {self._images, self._full or self._images}
            kept = [source.keep(cache, self.device, self.workers) for source in sources]
            self.too_large = not all(kept)
            self._files = files.pop_all()

        self.ids = self._images.ids
        self.labels = self._images.labels
        self.steps_per_epoch = sampler.steps_per_epoch(len(self.ids), batch)

    def __len__(self) -> int:
        return len(self.ids)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the shards' files."""
        self._files.close()

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from `start_step` on, made ahead by threads that end with the iterator.

        Raises UserError when a shard can no longer be read or an image cannot be decoded.
        """
        steps = range(start_step, self.steps_per_epoch)
        made = _ahead(lambda step: _mark(self._make(epoch, step)), steps, self.workers, self.device)
        with contextlib.closing(made):
            while True:
                start = time.perf_counter()
                batch = next(made, None)
                self.wait_s += time.perf_counter() - start
                if batch is None:
                    return
                yield _receive(*batch)

    def _make(self, epoch: int, step: int) -> Batch:
        rows = sampler.global_batch(
            self.seed, epoch, step, len(self), self.batch, shuffle=self.augment is not None
        )
        own, weight = self._own(len(rows))
        make = self._mixed if self.augment and self.augment.mixes else self._plain
        images, full, labels, targets = make(epoch, step, rows, own)
        return Batch(
            ids=self.ids[rows[own]],
            images=images,
            labels=labels,
            targets=targets,
            weight=weight.to(self.device),
            positions=torch.from_numpy(own),
            size=len(rows),
            full=full,
            epoch=epoch,
            step=step,
        )

    def _own(self, n: int) -> tuple[np.ndarray, Tensor]:
        """This rank's positions in a global batch of n samples, and their weights."""
        own = sampler.share(n, self.rank, self.world)
        if len(own) == 0:
            return np.zeros(1, np.int64), torch.zeros(1)
        return own, torch.full((len(own),), 1.0 if self.augment is None else self.world / n)

    def _plain(self, epoch: int, step: int, rows: np.ndarray, own: np.ndarray) -> _Parts:
        images, full = self._views(epoch, rows[own])
        labels, targets = self._tensor(self.labels[rows[own]]), None
        if self.augment and self.augment.smoothing > 0:
            targets = aug.mix_targets(labels, labels, 1.0, self.classes, self.augment.smoothing)
        return images, full, labels, targets

    def _mixed(self, epoch: int, step: int, rows: np.ndarray, own: np.ndarray) -> _Parts:
        assert self.augment is not None
        alphas, smoothing = (self.augment.mixup, self.augment.cutmix), self.augment.smoothing
        mix = aug.draw_mix(self.seed, epoch, step, *alphas, self.resolution)
        # Partners are loaded by the rank that needs them; a world of one has them in its batch already.
        mirror = len(rows) - 1 - own
        loaded = np.union1d(own, mirror)
        at, partner_at = (self._tensor(np.searchsorted(loaded, places)) for places in (own, mirror))
        views, full = self._views(epoch, rows[loaded])
        images = aug.apply_mix(views[at], views[partner_at], mix)
        if full is views:
            full = images
        elif full is not None:
            scaled = aug.scale_mix(mix, self.resolution, full.shape[-1])
            full = aug.apply_mix(full[at], full[partner_at], scaled)
        labels, partner_labels = (self._tensor(self.labels[rows[places]]) for places in (own, mirror))
        targets = aug.mix_targets(labels, partner_labels, mix.lam, self.classes, smoothing)
        return images, full, labels, targets

    def _views(self, epoch: int, rows: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """The samples' normalised images at the resolution and, if asked, at the full one."""
        pixels = self._pixels(self._images, self.resolution, epoch, rows)
        images = self._finish(pixels, epoch, rows)
        if self.full_resolution is None:
            return images, None
        if self.full_resolution == self.resolution:
            return images, images
        if self._full is None:
            pixels = aug.resize(pixels, self.full_resolution)
        else:
            pixels = self._pixels(self._full, self.full_resolution, epoch, rows)
        return images, self._finish(pixels, epoch, rows)

    def _pixels(self, source: _Images, size: int, epoch: int, rows: np.ndarray) -> Tensor:
        """uint8 (n, 3, size, size) on the device: cropped, flipped, through AutoAugment; or made to fit."""
        images = source.take(rows)
        if self.augment is None:
            return aug.centre_crop(images, size) if self.centre_crop else aug.resize(images, size)
        ids, padding = self.ids[rows], scaled_padding(self.augment, source.size)
        if padding or source.size != size:
            offsets = aug.crop_offsets(self.seed, epoch, ids, padding, size, source.size)
            images = aug.random_crop(images, offsets, padding, size)
        if self.augment.flip:
            images = aug.flip(images, aug.flip_mask(self.seed, epoch, ids))
        if self.augment.auto_augment > 0:
            images = aug.auto_augment(images, self.seed, epoch, ids, self.augment.auto_augment)
        return images

    def _finish(self, pixels: Tensor, epoch: int, rows: np.ndarray) -> Tensor:
        images = aug.normalize(pixels, self.mean, self.std)
        if self.augment is None or self.augment.erase <= 0:
            return images
        boxes = aug.erase_boxes(self.seed, epoch, self.ids[rows], self.augment.erase, self.resolution)
        return aug.erase(images, aug.scale_boxes(boxes, self.resolution, pixels.shape[-1]))

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device)


def scaled_padding(augment: Augment, size: int) -> int:
    """Padding in pixels of images of `size` pixels."""
    if augment.padding_at is None:
        return augment.padding
    return round(augment.padding * size / augment.padding_at)


def balanced_subset(labels: np.ndarray, count: int) -> np.ndarray:
    """`count` sample ids, ascending, the same number of each class (one more or less): always the same ones.

    Raises UserError when there are fewer than `count`, or none is asked for.
    """
    if not 0 < count <= len(labels):
        raise UserError(f"subset={count} is not a part of the split; use 1 to {len(labels)}, its size")
    shuffled = sampler.order(0, 0, len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    sorted_labels = labels[by_class]
    turn = np.empty(len(labels), np.int64)  # a sample's turn within its class
    turn[by_class] = np.arange(len(labels)) - np.searchsorted(sorted_labels, sorted_labels)
    return np.sort(shuffled[np.argsort(turn[shuffled], kind="stable")][:count])


def _check_mode(folder: Path, manifest: Manifest, augment: Augment | None) -> None:
    if augment is not None and augment.mode == "resize" and manifest.mode == "crop":
        raise UserError(
            f"the shards in {folder} were rendered for mode crop (full-size images only), training asks for "
            "mode resize; use mode crop, or render them with --mode resize"
        )


def _check_fits(folder: Path, resolution: int, stored: int, augment: Augment | None) -> None:
    room = stored + (2 * scaled_padding(augment, stored) if augment else 0)
    if resolution > room:
        raise UserError(
            f"resolution={resolution} is larger than the images in {folder} ({stored} px, {room} px with "
            f"padding); a crop can have {room} px at most"
        )


# ---- decoded images


class _Images:
    """Decoded images of a split, or of some of it: take(rows) gives uint8 (n, 3, size, size) on the device.

    Threads may take at once: the rows of different steps differ, and a row filled twice gets the same pixels.
    """

    def __init__(self, name: str, split: Split, ids: np.ndarray, size: int, encoding: Encoding) -> None:
        self.ids, self.labels, self.size = ids, split.labels[ids], size
        self._name, self._split, self._shape = name, split, torch.Size([3, size, size])
        self._encoding: Encoding = encoding
        self._device = torch.device("cpu")
        self._cached = np.zeros(len(ids), dtype=bool)
        self._cache: Tensor | None = None

    def keep(self, cache: Cache, device: torch.device, workers: int) -> bool:
        """Set where the images go and what is kept of them; "device" reads them all, now.

        Returns:
            False if they are to be kept in memory, and there is not enough of it for all processes of this host.
        """
        self._device = device
        if cache == "none":
            return True
        # Pages are taken from the system as they are filled; over the epochs that is nearly all of them, on every rank.
        needed = len(self.ids) * self._shape.numel() * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if cache == "ram" and needed > 0.8 * memory_left():
            return False
        self._cache = store = torch.empty(len(self.ids), *self._shape, dtype=torch.uint8)
        if cache == "device":
            parts = np.array_split(np.arange(len(self.ids)), -(-len(self.ids) // 1024))
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(self._fill, parts))
            self._cache = store.to(device)
        return True

    def take(self, rows: np.ndarray) -> Tensor:
        if self._cache is None:
            return self._put(self._decode(rows))
        self._fill(rows)
        return self._put(self._cache.index_select(0, torch.from_numpy(rows).to(self._cache.device)))

    def _fill(self, rows: np.ndarray) -> None:
        missing = rows[~self._cached[rows]]
        if len(missing) and self._cache is not None:
            self._cache[torch.from_numpy(missing)] = self._decode(missing)
            self._cached[missing] = True

    def _decode(self, rows: np.ndarray) -> Tensor:
        ids = self.ids[rows].tolist()
        images = [self._decode_one(i) for i in ids]
        for i, image in zip(ids, images, strict=True):
            if image.shape != self._shape:
                raise self._unreadable(i, f"its shape is {tuple(image.shape)}, not {tuple(self._shape)}")
        return torch.stack(images)

    def _decode_one(self, i: int) -> Tensor:
        try:
            return decode(self._split.image(i), self._encoding)
        except ValueError as error:
            raise self._unreadable(i, str(error)) from error

    def _unreadable(self, i: int, why: str) -> UserError:
        return UserError(
            f"{self._name} at {self.size} px: sample {self._split.keys[i]} cannot be read: {why}; "
            f"it is in {self._split.where(i)}; render again: the same `irkd render` command replaces what is damaged"
        )

    def _put(self, images: Tensor) -> Tensor:
        if self._device.type == "cuda" and images.device.type == "cpu":
            return images.pin_memory().to(self._device, non_blocking=True)
        return images.to(self._device)


def memory_left() -> int:
    """Bytes that this host has left, or that the control groups of the process (SLURM's, a container's) allow."""
    left = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        group = Path("/sys/fs/cgroup", next(line[4:] for line in lines if line.startswith("0::/")))
        for folder in (group, *group.parents):
            if (limit := folder / "memory.max").is_file() and (text := limit.read_text().strip()) != "max":
                left = min(left, int(text))
    return left


# ---- prefetching


def _ahead(
    make: Callable[[int], T], steps: range, workers: int, device: torch.device
) -> Generator[T, None, None]:
    """Yield make(step) for each step in order, made by threads up to PREFETCH steps ahead.

    A thread makes a whole step: none waits for another. Errors come out here; closing ends the threads.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="irkd-loader") as pool:
        _start(pool, workers, device)
        todo = iter(steps)
        ready = collections.deque(pool.submit(make, step) for step in itertools.islice(todo, PREFETCH))
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
                torch.cuda.set_stream(
                    torch.cuda.Stream(device)
                )  # copies need not wait for training's kernels
        finally:
            started.wait()  # every task gets a thread of its own, since none ends before all have begun

    tasks = [pool.submit(start) for _ in range(workers)]
    started.wait()
    torch.set_num_threads(own_threads)  # the calls above also set what threads to come begin with
    for task in tasks:
        task.result()


def _mark(batch: Batch) -> tuple[Batch, torch.cuda.Event | None]:
    """The batch and the moment on the loader's own CUDA stream from which it may be read."""
    if not batch.images.is_cuda:
        return batch, None
    written = torch.cuda.Event()
    written.record()
    return batch, written


def _receive(batch: Batch, written: torch.cuda.Event | None) -> Batch:
    if written is not None:
        stream = torch.cuda.current_stream(batch.images.device)
        stream.wait_event(written)
        for tensor in (batch.images, batch.labels, batch.targets, batch.weight, batch.full):
            if tensor is not None:
                tensor.record_stream(stream)  # its memory is not given to another batch while still in use
    return batch
