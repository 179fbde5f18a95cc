"""Augmentations on whole batches, every draw keyed by (seed, draw, sample id).

A sample's draw never depends on the batch it is in, nor on a generator that someone else may advance: any
world size, any number of workers and any restart give the same pixels. Draws are relative (a fraction of the
offsets, of the image), so that the same draw at another resolution gives the same view in proportion.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from irkd_dist.data.sampler import uniform

# Streams of `uniform`: a number, once used, keeps its meaning, or old runs no longer repeat.
CROP_Y, CROP_X, FLIP, ERASE, ERASE_AREA, ERASE_RATIO, ERASE_Y, ERASE_X = range(1, 9)
MIX_MODE, MIX_LAM, MIX_Y, MIX_X = range(9, 13)
POLICY_USED, POLICY, POLICY_APPLY, POLICY_SIGN = 13, 14, (15, 16), (17, 18)
ERASE_ATTEMPTS = 10  # the area, ratio and place of attempt k are drawn from streams + 100 * k

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


# ---- AutoAugment

# Cubuk et al. 2019, table 7 (CIFAR-10): pairs of (operation, probability, magnitude 0 to 9).
CIFAR10_POLICY: tuple[tuple[tuple[str, float, int], tuple[str, float, int]], ...] = (
    (("invert", 0.1, 0), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.5, 0), ("equalize", 0.9, 0)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 0), ("equalize", 0.5, 0)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 0), ("autocontrast", 0.4, 0)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 0)),
    (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalize", 0.2, 0), ("equalize", 0.6, 0)),
    (("color", 0.9, 9), ("equalize", 0.6, 0)),
    (("autocontrast", 0.8, 0), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, 0)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.9, 0), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 0), ("invert", 0.1, 0)),
    (("translate_y", 0.7, 9), ("autocontrast", 0.9, 0)),
)


def auto_augment(images: Tensor, seed: int, draw: int, ids: np.ndarray, probability: float) -> Tensor:
    """AutoAugment's CIFAR-10 policy on images (B, 3, H, W) uint8, each with `probability` (1: always).

    torchvision's class draws from torch's global generator, which dropout in the training thread advances
    too; this one draws by sample id, and runs each operation once for all the images that drew it.
    """
    used = uniform(seed, draw, ids, POLICY_USED) < probability
    policy = (uniform(seed, draw, ids, POLICY) * len(CIFAR10_POLICY)).astype(np.int64)
    for half in (0, 1):
        chance = np.array([pair[half][1] for pair in CIFAR10_POLICY])[policy]
        applied = used & (uniform(seed, draw, ids, POLICY_APPLY[half]) < chance)
        negative = uniform(seed, draw, ids, POLICY_SIGN[half]) < 0.5
        groups: dict[tuple[str, int, bool], list[int]] = {}
        for i in np.flatnonzero(applied):
            name, _, level = CIFAR10_POLICY[policy[i]][half]
            groups.setdefault((name, level, bool(negative[i])), []).append(int(i))
        for (name, level, minus), members in groups.items():
            index = torch.tensor(members, device=images.device)
            changed = policy_operation(images.index_select(0, index), name, level, minus)
            images = images.index_copy(0, index, changed)
    return images


def policy_operation(images: Tensor, name: str, level: int, negative: bool = False) -> Tensor:
    """One AutoAugment operation at magnitude `level` (0 to 9) on images (B, 3, H, W) uint8."""

    def amount(top: float) -> float:  # in float32 as torchvision has it: pixels are truncated, a hair decides
        return (-1 if negative else 1) * float(torch.linspace(0.0, top, 10)[level])

    shift = 150.0 / 331.0 * images.shape[-1]
    match name:
        case "shear_y":
            angle = math.degrees(math.atan(amount(0.3)))
            return tvf.affine(images, 0.0, [0, 0], 1.0, [0.0, angle], center=[0, 0])
        case "translate_x":
            return tvf.affine(images, 0.0, [int(amount(shift)), 0], 1.0, [0.0, 0.0])
        case "translate_y":
            return tvf.affine(images, 0.0, [0, int(amount(shift))], 1.0, [0.0, 0.0])
        case "rotate":
            return tvf.rotate(images, amount(30.0))
        case "brightness":
            return tvf.adjust_brightness(images, 1 + amount(0.9))
        case "color":
            return tvf.adjust_saturation(images, 1 + amount(0.9))
        case "contrast":
            return tvf.adjust_contrast(images, 1 + amount(0.9))
        case "sharpness":
            return tvf.adjust_sharpness(images, 1 + amount(0.9))
        case "posterize":
            return tvf.posterize(images, round(8 - 4 * level / 9))
        case "solarize":
            return tvf.solarize(images, 255 * float(torch.linspace(1.0, 0.0, 10)[level]))
        case "autocontrast":
            return tvf.autocontrast(images)
        case "equalize":
            return tvf.equalize(images)
        case "invert":
            return tvf.invert(images)
    raise ValueError(f"no AutoAugment operation is called {name!r}")


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
