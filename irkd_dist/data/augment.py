"""Augmentations on whole batches, every draw keyed by (seed, draw, sample id).

A sample's draw never depends on the batch it is in, nor on a generator that someone else may advance: any
world size, any number of workers and any restart give the same pixels. Draws are relative (a fraction of the
offsets, of the image), so that the same draw at another resolution gives the same view in proportion.
"""

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from irkd_dist.data.sampler import uniform

# Streams of `uniform`: a number, once used, keeps its meaning, or old runs no longer repeat.
CROP_Y, CROP_X, FLIP, ERASE, ERASE_AREA, ERASE_RATIO, ERASE_Y, ERASE_X = range(1, 9)
MIX_MODE, MIX_LAM, MIX_Y, MIX_X = range(9, 13)  # policies.py has 13 to 18 and those from 25 on
BOX_AREA, BOX_RATIO, BOX_Y, BOX_X = range(21, 25)
ERASE_ATTEMPTS = BOX_ATTEMPTS = 10  # area, ratio and place of attempt k are drawn from streams + 100 * k

Box = tuple[int, int, int, int]  # top, left, bottom, right


# ---- geometry


def crop_offsets(
    seed: int, draw: int, ids: np.ndarray, padding: int, size: int, stored: int | None = None
) -> np.ndarray:
    """Top left corners, (B, 2) int64 as (y, x), of size x size crops from padded images.

    `stored` is the side of the image before padding, `size` if not given. The corner is floor(u * places).
    """
    stored = size if stored is None else stored
    places = stored + 2 * padding - size + 1
    if places < 1:
        raise ValueError(f"a {size} px crop does not fit an image of {stored} px padded by {padding} px")
    u = np.stack([uniform(seed, draw, ids, CROP_Y), uniform(seed, draw, ids, CROP_X)], axis=1)
    return np.floor(u * places).astype(np.int64)


def random_crop(images: Tensor, offsets: np.ndarray, padding: int, size: int) -> Tensor:
    """Crops at `offsets` (B, 2) of images (B, C, H, W) padded with zeros -> (B, C, size, size)."""
    padded = F.pad(images, (padding,) * 4) if padding else images.contiguous()
    n, channels, height, width = padded.shape
    y, x = torch.from_numpy(offsets).to(images.device).unbind(1)
    planes = torch.arange(n * channels, device=images.device).view(n, channels, 1)
    rows = planes * height + y.view(n, 1, 1) + torch.arange(size, device=images.device)
    # Every row of every crop is one run of `size` bytes: indexing overlapping windows copies them run by run.
    windows = padded.view(-1).unfold(0, size, 1)
    return windows.index_select(0, (rows * width + x.view(n, 1, 1)).view(-1)).view(n, channels, size, size)


def crop_boxes(
    seed: int, draw: int, ids: np.ndarray, scale: tuple[float, float], ratio: tuple[float, float], size: int
) -> np.ndarray:
    """Random parts of size x size images, (B, 4) int64 as (top, left, bottom, right), for `resized_crop`.

    Inception's crop (Szegedy et al. 2014) as torchvision's RandomResizedCrop draws it: an area within `scale` of the
    image's, an aspect ratio within `ratio` (log uniform), the first of ten attempts that fits; else the largest
    central part whose ratio is allowed. Whether one fits does not depend on the size, so that views of a draw agree.
    """
    u_h, u_w = np.ones(len(ids)), np.ones(len(ids))  # height and width as parts of the image's
    if ratio[0] > 1:
        u_h /= ratio[0]
    elif ratio[1] < 1:
        u_w *= ratio[1]
    top, left = (1 - u_h) / 2, (1 - u_w) / 2
    open_ = np.ones(len(ids), dtype=bool)
    for attempt in range(BOX_ATTEMPTS):
        area, aspect, y, x = (
            uniform(seed, draw, ids, stream + 100 * attempt) for stream in (BOX_AREA, BOX_RATIO, BOX_Y, BOX_X)
        )
        area = scale[0] + (scale[1] - scale[0]) * area
        aspect = np.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * aspect)
        h, w = np.sqrt(area / aspect), np.sqrt(area * aspect)
        found = open_ & (h <= 1) & (w <= 1)
        for values, new in ((u_h, h), (u_w, w), (top, (1 - h) * y), (left, (1 - w) * x)):
            values[found] = new[found]
        open_ &= ~found
    tall, wide = (np.maximum(np.round(u * size), 1).astype(np.int64) for u in (u_h, u_w))
    first, second = (
        np.minimum(np.floor(start * size + 0.5).astype(np.int64), size - length)
        for start, length in ((top, tall), (left, wide))
    )
    return np.stack([first, second, first + tall, second + wide], axis=1)


def resized_crop(
    images: Tensor, boxes: np.ndarray, size: int, interpolation: Literal["bilinear", "bicubic"]
) -> Tensor:
    """Parts `boxes` (B, 4) of images (B, C, S, S) uint8 -> (B, C, size, size), antialiased, one by one."""
    how = InterpolationMode(interpolation)
    parts = (
        tvf.resized_crop(image, y, x, bottom - y, right - x, [size, size], how, antialias=True)
        for image, (y, x, bottom, right) in zip(images, boxes.tolist(), strict=True)
    )
    return torch.stack([*parts])


def flip_mask(seed: int, draw: int, ids: np.ndarray) -> np.ndarray:
    """Which samples are flipped, (B,) bool, each with probability 1/2."""
    return uniform(seed, draw, ids, FLIP) < 0.5


def flip(images: Tensor, mask: np.ndarray) -> Tensor:
    """Images (B, C, H, W), those in `mask` (B,) mirrored left to right."""
    n = len(images)
    index = torch.from_numpy(np.arange(n) + n * mask).to(images.device)
    return torch.cat([images, images.flip(-1)]).index_select(0, index)


def centre_crop(images: Tensor, size: int) -> Tensor:
    """The middle (B, C, size, size) of images (B, C, S, S), S >= size; rounded as in torchvision."""
    return tvf.center_crop(images, [size, size]).contiguous()


def resize(images: Tensor, size: int) -> Tensor:
    """Images (B, C, S, S) uint8 at another size, bilinear, antialiased."""
    if images.shape[-1] == size:
        return images
    return tvf.resize(images, [size, size], antialias=True)


# ---- pixels


def normalize(
    images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype = torch.float32
) -> Tensor:
    """(x / 255 - mean) / std of images (B, 3, H, W) uint8, computed in float32, returned as `dtype`."""
    shift = torch.tensor(mean, device=images.device).mul_(255).view(-1, 1, 1)
    scale = torch.tensor(std, device=images.device).mul_(255).reciprocal_().view(-1, 1, 1)
    return images.to(torch.float32).sub_(shift).mul_(scale).to(dtype)


def erase_boxes(seed: int, draw: int, ids: np.ndarray, p: float, size: int) -> np.ndarray:
    """Rectangles to erase, (B, 4) int64 as (top, left, bottom, right); all zero where nothing is erased.

    Zhong et al. 2020 with torchvision's defaults: area 0.02 to 0.33 of the image, aspect ratio 0.3 to 3.3
    (log uniform), the first of ten attempts that fits.
    """
    boxes = np.zeros((len(ids), 4), dtype=np.int64)
    open_ = uniform(seed, draw, ids, ERASE) < p
    for attempt in range(ERASE_ATTEMPTS):
        if not open_.any():
            break
        area, ratio, y, x = (
            uniform(seed, draw, ids, stream + 100 * attempt)
            for stream in (ERASE_AREA, ERASE_RATIO, ERASE_Y, ERASE_X)
        )
        pixels = size * size * (0.02 + (0.33 - 0.02) * area)
        aspect = np.exp(math.log(0.3) + (math.log(3.3) - math.log(0.3)) * ratio)
        h = np.round(np.sqrt(pixels * aspect)).astype(np.int64)
        w = np.round(np.sqrt(pixels / aspect)).astype(np.int64)
        found = open_ & (h < size) & (w < size)
        top = np.floor(y * (size - h + 1)).astype(np.int64)
        left = np.floor(x * (size - w + 1)).astype(np.int64)
        boxes[found] = np.stack([top, left, top + h, left + w], axis=1)[found]
        open_ &= ~found
    return boxes


def erase(images: Tensor, boxes: np.ndarray) -> Tensor:
    """Normalised images (B, C, H, W) with `boxes` (B, 4) set to 0, in place."""
    if not boxes.any():
        return images
    top, left, bottom, right = torch.from_numpy(boxes).to(images.device).view(-1, 4, 1).unbind(1)
    y = torch.arange(images.shape[-2], device=images.device)
    x = torch.arange(images.shape[-1], device=images.device)
    rows, columns = (y >= top) & (y < bottom), (x >= left) & (x < right)
    return images.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


def scale_boxes(boxes: np.ndarray, size: int, to: int) -> np.ndarray:
    """Boxes of a size x size image on a to x to image of the same view, rounded to pixels."""
    return np.round(boxes * (to / size)).astype(np.int64)


# ---- MixUp and CutMix


class Mix(NamedTuple):
    """How a batch, or a sample, is mixed: share of the own image, and the box that the partner fills (None: MixUp)."""

    lam: float
    box: Box | None


def draw_mix(
    seed: int, draw: int, keys: np.ndarray, mixup_alpha: float, cutmix_alpha: float, size: int
) -> list[Mix]:
    """A mix for each key, of size x size images: MixUp, CutMix, or one at random if both alphas > 0.

    A key is the step of a global batch that is mixed as one, or the id of a sample that is mixed for itself.
    lam ~ Beta(alpha, alpha); CutMix corrects it to the area of its box (Zhang et al. 2018, Yun et al. 2019).
    """
    mode, lam, y, x = (uniform(seed, draw, keys, stream) for stream in (MIX_MODE, MIX_LAM, MIX_Y, MIX_X))
    cut = (cutmix_alpha > 0) & ((mode < 0.5) | (mixup_alpha <= 0))
    alpha = np.where(cut, cutmix_alpha, mixup_alpha)
    centres = np.stack([y, x], axis=1) * size
    return [_mix(*each, size) for each in zip(lam, alpha, cut, centres.astype(int).tolist(), strict=True)]


def _mix(u: float, alpha: float, cut: bool, centre: list[int], size: int) -> Mix:
    if alpha <= 0:
        return Mix(1.0, None)
    # RandomState's streams are frozen for good (NEP 19), those of Generator are not.
    lam = float(np.random.RandomState(int(u * 2**32)).beta(alpha, alpha))
    if not cut:
        return Mix(lam, None)
    top, left, bottom, right = box = cutmix_box(lam, centre[0], centre[1], size)
    return Mix(1 - (bottom - top) * (right - left) / size**2, box)


def cutmix_box(lam: float, y: int, x: int, size: int) -> Box:
    """The square of area 1 - lam centred at (y, x), clipped at the image's edges; rounded as in timm."""
    cut = int(size * math.sqrt(1 - lam))
    low, high = cut // 2, (cut + 1) // 2
    return max(y - low, 0), max(x - low, 0), min(y + high, size), min(x + high, size)


def apply_mix(images: Tensor, partner_images: Tensor, mix: list[Mix]) -> Tensor:
    """Images (B, C, H, W) mixed with their partners: all alike by the one mix, or each by its own of B."""
    if len(mix) > 1:
        pairs = zip(images.split(1), partner_images.split(1), mix, strict=True)
        return torch.cat([apply_mix(own, partner, [each]) for own, partner, each in pairs])
    lam, box = mix[0]
    if box is None:
        return images * lam + partner_images * (1 - lam)
    top, left, bottom, right = box
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = partner_images[..., top:bottom, left:right]
    return mixed


def scale_mix(mix: Mix, size: int, to: int) -> Mix:
    """The same mix for the same views at to x to pixels; lam stays, as the labels have it."""
    if mix.box is None or size == to:
        return mix
    top, left, bottom, right = (int(v) for v in scale_boxes(np.array(mix.box), size, to))
    return Mix(mix.lam, (top, left, bottom, right))


def soft_labels(
    labels: Tensor, partner_labels: Tensor, lam: np.ndarray, classes: int, smoothing: float
) -> Tensor:
    """Soft labels (B, K) float32: lam of the label, 1 - lam of the partner's, smoothed by smoothing / K.

    lam (1,) or (B,) float64.
    """
    off = smoothing / classes
    own, partner = (F.one_hot(l, classes).float() * (1 - smoothing) + off for l in (labels, partner_labels))
    ours, theirs = (torch.from_numpy(part).float().to(own.device)[:, None] for part in (lam, 1 - lam))
    return own * ours + partner * theirs
