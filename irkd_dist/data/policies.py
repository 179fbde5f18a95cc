"""AutoAugment, RandAugment, 3-Augment and colour jitter on batches, every draw keyed by (seed, draw, sample id).

The operations are torchvision's; its classes draw from torch's global generator, which dropout in the training thread
advances too. These draw by sample id, and run each operation once for all the images that drew it.
"""

import itertools
import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from irkd_dist.data.sampler import uniform

# Streams of `uniform`: a number, once used, keeps its meaning, or old runs no longer repeat.
POLICY_USED, POLICY, POLICY_APPLY, POLICY_SIGN = 13, 14, (15, 16), (17, 18)
RAND_OPERATION, RAND_SIGN = 25, 26  # of the k-th operation: + 100 * k
THREE_USED, THREE, THREE_SIGMA = 27, 28, 29
JITTER_FACTORS, JITTER_ORDER = (30, 31, 32, 33), 34  # brightness, contrast, saturation, hue

Name = Literal["cifar10", "imagenet", "svhn"]
_Policy = tuple[tuple[tuple[str, float, int], tuple[str, float, int]], ...]

# Cubuk et al. 2019, appendix: pairs of (operation, probability, magnitude 0 to 9).
CIFAR10: _Policy = (
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
IMAGENET: _Policy = (
    (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 0)),
    (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
    (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
    (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
    (("equalize", 0.4, 0), ("rotate", 0.8, 8)),
    (("solarize", 0.6, 3), ("equalize", 0.6, 0)),
    (("posterize", 0.8, 5), ("equalize", 1.0, 0)),
    (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
    (("equalize", 0.6, 0), ("posterize", 0.4, 6)),
    (("rotate", 0.8, 8), ("color", 0.4, 0)),
    (("rotate", 0.4, 9), ("equalize", 0.6, 0)),
    (("equalize", 0.0, 0), ("equalize", 0.8, 0)),
    (("invert", 0.6, 0), ("equalize", 1.0, 0)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("rotate", 0.8, 8), ("color", 1.0, 2)),
    (("color", 0.8, 8), ("solarize", 0.8, 7)),
    (("sharpness", 0.4, 7), ("invert", 0.6, 0)),
    (("shear_x", 0.6, 5), ("equalize", 1.0, 0)),
    (("color", 0.4, 0), ("equalize", 0.6, 0)),
    (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 0)),
    (("invert", 0.6, 0), ("equalize", 1.0, 0)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
)
SVHN: _Policy = (
    (("shear_x", 0.9, 4), ("invert", 0.2, 0)),
    (("shear_y", 0.9, 8), ("invert", 0.7, 0)),
    (("equalize", 0.6, 0), ("solarize", 0.6, 6)),
    (("invert", 0.9, 0), ("equalize", 0.6, 0)),
    (("equalize", 0.6, 0), ("rotate", 0.9, 3)),
    (("shear_x", 0.9, 4), ("autocontrast", 0.8, 0)),
    (("shear_y", 0.9, 8), ("invert", 0.4, 0)),
    (("shear_y", 0.9, 5), ("solarize", 0.2, 6)),
    (("invert", 0.9, 0), ("autocontrast", 0.8, 0)),
    (("equalize", 0.6, 0), ("rotate", 0.9, 3)),
    (("shear_x", 0.9, 4), ("solarize", 0.3, 3)),
    (("shear_y", 0.8, 8), ("invert", 0.7, 0)),
    (("equalize", 0.9, 0), ("translate_y", 0.6, 6)),
    (("invert", 0.9, 0), ("equalize", 0.6, 0)),
    (("contrast", 0.3, 3), ("rotate", 0.8, 4)),
    (("invert", 0.8, 0), ("translate_y", 0.0, 2)),
    (("shear_y", 0.7, 6), ("solarize", 0.4, 8)),
    (("invert", 0.6, 0), ("rotate", 0.8, 4)),
    (("shear_y", 0.3, 7), ("translate_x", 0.9, 3)),
    (("shear_x", 0.1, 6), ("invert", 0.6, 0)),
    (("solarize", 0.7, 2), ("translate_y", 0.6, 7)),
    (("shear_y", 0.8, 4), ("invert", 0.8, 0)),
    (("shear_x", 0.7, 9), ("translate_y", 0.8, 3)),
    (("shear_y", 0.8, 5), ("autocontrast", 0.7, 0)),
    (("shear_x", 0.7, 2), ("invert", 0.1, 0)),
)
TABLES: dict[Name, _Policy] = {"cifar10": CIFAR10, "imagenet": IMAGENET, "svhn": SVHN}

RAND_OPERATIONS = (  # of which RandAugment takes each with the same chance (Cubuk et al. 2020)
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast",
    "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip
RAND_LEVELS = 31  # magnitudes 0 to 30
BLUR_AT = 224  # px that the sigma of 3-Augment's blur is meant for


def auto_augment(
    images: Tensor, seed: int, draw: int, ids: np.ndarray, probability: float, name: Name = "cifar10"
) -> Tensor:
    """A policy of AutoAugment on images (B, 3, H, W) uint8, each with `probability` (1: always)."""
    table = TABLES[name]
    used = uniform(seed, draw, ids, POLICY_USED) < probability
    policy = (uniform(seed, draw, ids, POLICY) * len(table)).astype(np.int64)
    for half in (0, 1):
        chance = np.array([pair[half][1] for pair in table])[policy]
        applied = used & (uniform(seed, draw, ids, POLICY_APPLY[half]) < chance)
        negative = uniform(seed, draw, ids, POLICY_SIGN[half]) < 0.5
        groups: dict[tuple[str, int, bool], list[int]] = {}
        for i in np.flatnonzero(applied):
            operation_name, _, level = table[policy[i]][half]
            groups.setdefault((operation_name, level, bool(negative[i])), []).append(int(i))
        for (operation_name, level, minus), members in groups.items():
            images = _changed(images, members, operation_name, level, minus, 10)
    return images


def rand_augment(
    images: Tensor, seed: int, draw: int, ids: np.ndarray, operations: int, magnitude: int
) -> Tensor:
    """RandAugment on images (B, 3, H, W) uint8: so many operations one after the other, of magnitude 0 to 30."""
    for k in range(operations):
        chosen = (uniform(seed, draw, ids, RAND_OPERATION + 100 * k) * len(RAND_OPERATIONS)).astype(np.int64)
        negative = uniform(seed, draw, ids, RAND_SIGN + 100 * k) < 0.5
        for (number, name), minus in itertools.product(enumerate(RAND_OPERATIONS), (False, True)):
            members = np.flatnonzero((chosen == number) & (negative == minus)).tolist()
            if members and name != "identity":
                images = _changed(images, members, name, magnitude, minus, RAND_LEVELS)
    return images


def three_augment(images: Tensor, seed: int, draw: int, ids: np.ndarray, probability: float) -> Tensor:
    """3-Augment (DeiT III, Touvron et al. 2022) on images (B, 3, H, W) uint8, each with `probability`.

    One of grey, solarised at 128, and blurred by a Gaussian whose sigma is 0.1 to 2 px in an image of 224 px, in
    proportion elsewhere.
    """
    used = uniform(seed, draw, ids, THREE_USED) < probability
    kind = (uniform(seed, draw, ids, THREE) * 3).astype(np.int64)
    size = images.shape[-1]
    sigma = (0.1 + 1.9 * uniform(seed, draw, ids, THREE_SIGMA)) * size / BLUR_AT
    changed = list(images.unbind(0))
    for i in np.flatnonzero(used):
        match kind[i]:
            case 0:
                changed[i] = tvf.rgb_to_grayscale(images[i], num_output_channels=3)
            case 1:
                changed[i] = tvf.solarize(images[i], 128)
            case _:
                changed[i] = tvf.gaussian_blur(images[i], blur_kernel(sigma[i], size), [float(sigma[i])])
    return torch.stack(changed)


def blur_kernel(sigma: float, size: int) -> list[int]:
    """Sides of a Gaussian's kernel: odd, three sigma to each side, as far as an image of `size` px has room."""
    return [1 + 2 * min(math.ceil(3 * sigma), size - 1)] * 2


def colour_jitter(
    images: Tensor, seed: int, draw: int, ids: np.ndarray, strength: tuple[float, float, float, float]
) -> Tensor:
    """Brightness, contrast, saturation and hue of images (B, 3, H, W) uint8, each by its own strength, in any order.

    As torchvision's ColorJitter: factors within 1 - strength (at least 0) and 1 + strength, hue within +- strength.
    """
    names = ("brightness", "contrast", "saturation", "hue")
    factors = [
        jitter_factor(uniform(seed, draw, ids, stream), strong, name)
        for stream, strong, name in zip(JITTER_FACTORS, strength, names, strict=True)
    ]
    orders = [*itertools.permutations(range(4))]
    order = (uniform(seed, draw, ids, JITTER_ORDER) * len(orders)).astype(np.int64)
    return torch.stack(
        [
            jitter(image, orders[order[i]], [float(f[i]) for f in factors], strength)
            for i, image in enumerate(images)
        ]
    )


def jitter_factor(u: np.ndarray, strength: float, name: str) -> np.ndarray:
    """What u in 0..1 stands for."""
    low, high = (-strength, strength) if name == "hue" else (max(1 - strength, 0.0), 1 + strength)
    return low + (high - low) * u


def jitter(
    image: Tensor, order: tuple[int, ...], factors: list[float], strength: tuple[float, ...]
) -> Tensor:
    """One image (3, H, W) with its factors in an order; those of strength 0 are left out."""
    change = (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation, tvf.adjust_hue)
    for number in order:
        if strength[number] > 0:
            image = change[number](image, factors[number])
    return image


def _changed(images: Tensor, members: list[int], name: str, level: int, minus: bool, levels: int) -> Tensor:
    index = torch.tensor(members, device=images.device)
    return images.index_copy(0, index, operation(images.index_select(0, index), name, level, minus, levels))


def operation(images: Tensor, name: str, level: int, negative: bool = False, levels: int = 10) -> Tensor:
    """One operation at magnitude `level` of `levels` (0 to levels - 1) on images (B, 3, H, W) uint8."""

    def amount(top: float) -> float:  # in float32 as torchvision has it: pixels are truncated, a hair decides
        return (-1 if negative else 1) * float(torch.linspace(0.0, top, levels)[level])

    shift = 150.0 / 331.0 * images.shape[-1]
    match name:
        case "shear_x":
            angle = math.degrees(math.atan(amount(0.3)))
            return tvf.affine(images, 0.0, [0, 0], 1.0, [angle, 0.0], center=[0, 0])
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
            return tvf.posterize(images, round(8 - 4 * level / (levels - 1)))
        case "solarize":
            return tvf.solarize(images, 255 * float(torch.linspace(1.0, 0.0, levels)[level]))
        case "autocontrast":
            return tvf.autocontrast(images)
        case "equalize":
            return tvf.equalize(images)
        case "invert":
            return tvf.invert(images)
    raise ValueError(f"no operation of AutoAugment is called {name!r}")
