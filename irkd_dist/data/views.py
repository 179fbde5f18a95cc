"""What of a sample is seen: which stored resolution is read, and how its pixels become an image.

A view's draw of a sample is a function of (seed, draw, sample id) and the shards, never of the batch it is in.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from irkd_dist.data import augment as aug
from irkd_dist.data import policies
from irkd_dist.data.decoded import Dataset, Images, Work
from irkd_dist.data.geometry import Geometry
from irkd_dist.data.recipe import Augment
from irkd_dist.data.shards import Manifest, Mode
from irkd_dist.errors import UserError

VERSION = 1  # of what a view's key stands for: another number where the same settings give other pixels


@dataclass(frozen=True)
class View:
    """How samples are seen.

    augment None: as evaluation sees them, normalised only. mode "crop": training sees random windows of the
    largest stored image; centre_crop: evaluation sees the window in its middle. full: the resolution of a second
    image of the same view, which a teacher may see.
    """

    resolution: int
    augment: Augment | None = None
    full: int | None = None
    mode: Mode = "resize"
    centre_crop: bool = False

    @property
    def window(self) -> bool:
        """Whether a part of the stored image is seen, at its scale."""
        if self.augment is None:
            return self.centre_crop
        return self.mode == "crop" and self.augment.crop == "padded"

    def stored(self, manifest: Manifest) -> tuple[int, int | None]:
        """The stored resolutions that the image and the full image are made of.

        None: the full image is the image, there is none, or it is enlarged from a window, which has no other
        source of detail than the stored image.
        """
        largest = manifest.resolutions[-1]
        whole = manifest.mode == "crop"
        image = largest if self.window or whole else manifest.stored(self.resolution) or self.resolution
        if self.window or self.full in (None, self.resolution):
            return image, None
        assert self.full is not None
        return image, largest if whole else manifest.stored(self.full) or self.full


class Views:
    """The samples of a data set as a view shows them, on the device; close it to close the shards' files.

    images: those that the view's images are made of; sources: with those of the full image. notes: what was not kept
    as asked, and why.
    """

    def __init__(self, data: Dataset, view: View, seed: int, work: Work) -> None:
        """Raises UserError for shards that are missing, damaged, or not made for the view."""
        self.view, self.seed, self._data = view, seed, data
        self._mean, self._std = data.manifest.mean, data.manifest.std
        self._geometry = Geometry.of(data.manifest, view.centre_crop)
        self._cropped = data.manifest.mode == "resize" and data.manifest.crop_pct < 1
        stored, full = view.stored(data.manifest)
        _check(data, view, stored)
        with contextlib.ExitStack() as files:

            def images(size: int) -> Images:
                opened = Images(data, size, work)
                files.callback(opened.close)
                return opened

            self.images = images(stored)
            self._full = self.images if full == stored else images(full) if full is not None else None
            self._files = files.pop_all()
        self.sources = [self.images] if self._full in (None, self.images) else [self.images, self._full]
        self.notes = [source.note for source in self.sources if source.note]
        self.kept = {source.size: source.kept for source in self.sources}

    def close(self) -> None:
        """Close the shards' files."""
        self._files.close()

    def take(self, draw: int, rows: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """The samples' normalised images at the resolution and, if asked, at the full one: float32 (n, 3, r, r)."""
        view = self.view
        pixels = self._pixels(self.images, view.resolution, draw, rows)
        images = self._finish(pixels, draw, rows)
        if view.full is None:
            return images, None
        if view.full == view.resolution:
            return images, images
        if self._full is None:
            pixels = aug.resize(pixels, view.full)
        else:
            pixels = self._pixels(self._full, view.full, draw, rows)
        return images, self._finish(pixels, draw, rows)

    def key(self) -> dict[str, Any]:
        """Plain values that, with the shards' digest, decide a sample's image at a draw."""
        view, manifest = self.view, self._data.manifest
        augment = None if view.augment is None else json.loads(json.dumps(view.augment.key()))
        return {
            "version": VERSION,
            "split": self._data.split,
            "resolution": view.resolution,
            "full": view.full,
            "stored": list(view.stored(manifest)),
            "mode": view.mode if augment else None,
            "centre_crop": None if augment else view.centre_crop,
            "augment": augment,
            "seed": self.seed if augment else None,
            "mean": list(manifest.mean),
            "std": list(manifest.std),
            **({"crop_pct": manifest.crop_pct} if self._cropped else {}),
        }

    def _pixels(self, source: Images, size: int, draw: int, rows: np.ndarray) -> Tensor:
        """uint8 (n, 3, size, size) on the device: cropped, flipped, through AutoAugment; or made to fit."""
        images, augment = source.take(rows), self.view.augment
        if augment is None:
            return aug.centre_crop(aug.resize(images, self._geometry.sides(size)[1]), size)
        side = source.size
        if self._cropped and augment.crop == "padded":
            side = self._data.manifest.scaled(size)
            images = aug.resize(images, side)
        ids, padding = source.ids[rows], augment.padding_of(side)
        if augment.crop == "resized":
            boxes = aug.crop_boxes(self.seed, draw, ids, augment.scale, augment.ratio, side)
            images = aug.resized_crop(images, boxes, size, augment.interpolation)
        elif padding or side != size:
            offsets = aug.crop_offsets(self.seed, draw, ids, padding, size, side)
            images = aug.random_crop(images, offsets, padding, size)
        if augment.flip:
            images = aug.flip(images, aug.flip_mask(self.seed, draw, ids))
        return self._recoloured(images, augment, draw, ids)

    def _recoloured(self, images: Tensor, augment: Augment, draw: int, ids: np.ndarray) -> Tensor:
        at = (self.seed, draw, ids)
        if augment.auto_augment > 0:
            images = policies.auto_augment(images, *at, augment.auto_augment, augment.policy)
        if augment.rand_augment:
            images = policies.rand_augment(images, *at, augment.rand_augment, augment.magnitude)
        if augment.three_augment > 0:
            images = policies.three_augment(images, *at, augment.three_augment)
        if augment.colour_jitter or augment.hue:
            s = augment.colour_jitter
            images = policies.colour_jitter(images, *at, (s, s, s, augment.hue))
        return images

    def _finish(self, pixels: Tensor, draw: int, rows: np.ndarray) -> Tensor:
        images, augment = aug.normalize(pixels, self._mean, self._std), self.view.augment
        if augment is None or augment.erase == 0:
            return images
        size = self.view.resolution
        boxes = aug.erase_boxes(self.seed, draw, self.images.ids[rows], augment.erase, size)
        return aug.erase(images, aug.scale_boxes(boxes, size, images.shape[-1]))


def _check(data: Dataset, view: View, stored: int) -> None:
    augment = view.augment
    if augment is not None and view.mode == "resize" and data.manifest.mode == "crop":
        raise UserError(
            f"the shards in {data.folder} were rendered for mode crop (full-size images only), training asks for "
            "mode resize; use mode crop, or render them with --mode resize"
        )
    room = stored + (2 * augment.padding_of(stored) if augment else 0)
    if view.window and view.resolution > room:
        raise UserError(
            f"resolution={view.resolution} is larger than the images in {data.folder} ({stored} px, {room} px with "
            f"padding); a crop can have {room} px at most"
        )
