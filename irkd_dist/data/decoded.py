"""Decoded images of a split at one stored resolution, and what is kept of them."""

from __future__ import annotations

import hashlib
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from irkd_dist.data import memory, sampler
from irkd_dist.data.pixels import decode, sound
from irkd_dist.data.remote import Url
from irkd_dist.data.shards import Encoding, Manifest, Split, open_split
from irkd_dist.data.shared import Node, Region
from irkd_dist.errors import UserError

Cache = Literal["none", "ram", "device"]

GIB = 2**30


@dataclass(frozen=True)
class Dataset:
    """Which samples are read: a split of a folder of shards, or `subset` of its samples.

    order, block: of an epoch that is trained on, see `sampler.order` and `sampler.shard_order`.
    """

    folder: Path | Url
    manifest: Manifest
    split: str
    subset: int | None = None
    verify: Literal["checksum", "size"] = "checksum"
    order: Literal["exact", "shard"] = "exact"
    block: int = 8

    def open(self, resolution: int) -> Split:
        """The split's shards at a stored resolution; raises UserError as `shards.open_split` does."""
        return open_split(self.folder, self.manifest, self.split, resolution, self.verify)


@dataclass(frozen=True)
class Work:
    """Where and by whom batches are made: it changes when the work is done, never its result."""

    cache: Cache = "ram"
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    workers: int = 2
    node: Node | None = None  # with whom decoded images in RAM are shared


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


class Images:
    """Decoded images of a data set at a stored size: take(rows) gives uint8 (n, 3, size, size) on the device.

    Threads and processes may take at once: a row filled twice gets the same pixels. Images in RAM are one copy for the
    processes of a node, each of which fills what it is the first to take.

    kept: where decoded images stay, as it was decided; note: why that is not what was asked for. by_shard: how many
    rows are in each shard, which they follow.
    """

    _region: Region | None = None

    def __init__(self, data: Dataset, size: int, work: Work) -> None:
        """Raises UserError as `Dataset.open` does; with cache "device" also for an image that cannot be read."""
        self._split = data.open(size)
        self._name = f"{data.folder} {data.split}"
        self._encoding: Encoding = data.manifest.encoding
        self._device = work.device
        self._cache: Tensor | None = None
        self.size, self._shape = size, torch.Size([3, size, size])
        try:
            labels = self._split.labels
            everything = np.arange(len(labels))
            self.ids = everything if data.subset is None else balanced_subset(labels, data.subset)
            self.labels = labels[self.ids]
            self.by_shard = np.bincount(self._split.shard[self.ids], minlength=1)
            self._filled = np.zeros(len(self.ids), dtype=bool)
            self._sound = np.full(len(labels), -1)  # checksums of images that were found so
            self.note: str | None = None
            self.kept = self._decide(work.cache, work.node, f"{data!r} at {size} px")
            if self._region is not None:
                self._cache = self._in_region(self._region)
            elif self.kept != "none":
                place = work.device if self.kept == "device" else "cpu"
                self._cache = torch.empty(len(self.ids), *self._shape, dtype=torch.uint8, device=place)
                if self.kept == "device":
                    self._fill_all(self._cache, work.workers)
        except BaseException:
            self.close()
            raise

    @property
    def unfilled(self) -> int:
        """Bytes of RAM that were promised to these images and are not in use yet."""
        if self._cache is None or self._cache.device.type != "cpu":
            return 0
        return int(np.count_nonzero(~self._filled)) * self._shape.numel()

    @property
    def shared(self) -> bool:
        """Whether the images are one copy for all processes of the node."""
        return self._region is not None

    def expect(self, at_once: int, sources: int = 1) -> str | None:
        """Prepare for reads out of so many shards at once, as one of so many sources; a note, where that is slow."""
        return self._split.expect(at_once, sources)

    def prefetch(self, rows: np.ndarray) -> None:
        """Have the shards of these rows come, in their order, where they are not on this machine or decoded."""
        self._split.prefetch(self.ids[rows if self._cache is None else rows[~self._filled[rows]]])

    def close(self) -> None:
        """Close the files and let the images go."""
        self._split.close()
        self._cache, self._filled = None, np.zeros(0, bool)
        if self._region is not None:
            self._region.close()
            self._region = None  # the last that has its bytes: a stage to come needs the room

    def take(self, rows: np.ndarray) -> Tensor:
        """The images of some rows."""
        cache = self._cache
        if cache is None:
            return self._put(self._decode(rows))
        self._fill(cache, rows)
        return self._put(cache.index_select(0, torch.from_numpy(rows).to(cache.device)))

    def _decide(self, wanted: Cache, node: Node | None, what: str) -> Cache:
        """Where decoded images are kept; over the epochs that is nearly all of them."""
        size = len(self.ids) * self._shape.numel()
        if wanted == "device" and self._device.type == "cuda":
            if size <= memory.DEVICE * (left := memory.left_on(self._device)):
                return "device"
            self._say(
                f"{wanted}: they take {size / GIB:.2f} GiB of {left / GIB:.2f} left on it", "in RAM instead"
            )
            wanted = "ram"
        if wanted == "ram" and node is not None:
            return self._decide_shared(node, what, size)
        if wanted != "none" and not memory.promise(self, size):
            left = memory.left()
            self._say(
                f"{wanted}: they take {size / GIB:.2f} GiB of {left / GIB:.2f} left a process", "not at all"
            )
            return "none"
        return wanted

    def _decide_shared(self, node: Node, what: str, size: int) -> Cache:
        """The first process of a node decides for all; a byte an image says whether it is there."""
        name = hashlib.sha256(what.encode()).hexdigest()[:16]
        left = memory.left(shared=True)
        self._region = node.region(name, size + len(self.ids), may=size <= memory.RAM * left)
        if self._region is None:
            self._say(f"ram: they take {size / GIB:.2f} GiB of {left / GIB:.2f} left a node", "not at all")
            return "none"
        memory.note(self)
        return "ram"

    def _in_region(self, region: Region) -> Tensor:
        n, pixels = len(self.ids), len(self.ids) * self._shape.numel()
        self._filled = np.frombuffer(region.bytes, bool, n, offset=pixels)
        return torch.frombuffer(region.bytes, dtype=torch.uint8, count=pixels).view(n, *self._shape)

    def _say(self, why: str, instead: str) -> None:
        self.note = f"{self._name} at {self.size} px: decoded images are kept {instead}, not data.cache={why}"

    def _fill_all(self, cache: Tensor, workers: int) -> None:
        parts = np.array_split(np.arange(len(self.ids)), -(-len(self.ids) // 1024))
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda rows: self._fill(cache, rows), parts))
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the loader's threads read on streams of their own

    def _fill(self, cache: Tensor, rows: np.ndarray) -> None:
        missing = rows[~self._filled[rows]]
        if len(missing):
            cache[torch.from_numpy(missing).to(cache.device)] = self._decode(missing).to(cache.device)
            self._filled[missing] = True

    def _decode(self, rows: np.ndarray) -> Tensor:
        ids = self.ids[rows].tolist()
        images = [self._decode_one(i, data) for i, data in zip(ids, self._split.images(ids), strict=True)]
        for i, image in zip(ids, images, strict=True):
            if image.shape != self._shape:
                raise self._unreadable(i, f"its shape is {tuple(image.shape)}, not {tuple(self._shape)}")
        return torch.stack(images)

    def _decode_one(self, i: int, data: bytes) -> Tensor:
        # looked through once, and again only when the bytes are others: a fifth of the time at 32 px
        checksum = zlib.crc32(data)
        if self._sound[i] != checksum and sound(data, self._encoding):
            self._sound[i] = checksum
        try:
            return decode(data, self._encoding, bool(self._sound[i] == checksum))
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
