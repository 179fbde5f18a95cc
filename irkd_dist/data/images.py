"""Any image of a source -> 8-bit RGB as a viewer shows it, then square. What had to be changed is told by name."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from irkd_dist import files
from irkd_dist.data.sources.base import Raw

Fit = Literal["crop", "squash", "pad"]

FILTER = Image.Resampling.LANCZOS  # Pillow widens its support when it shrinks: antialiased
FITS: dict[Fit, str] = {
    "crop": "their centre is cut out",
    "squash": "they are squashed",
    "pad": "they are put on black",
}
FACTS = {
    "not_square": "not square",
    "enlarged": "smaller than the largest resolution, and enlarged",
    "turned": "turned as their EXIF orientation says",
    "alpha": "with transparency, which is dropped",
    "deep": "of more than 8 bits a channel, scaled to 8",
    "dark": "of 16 bits with no value above 255, so black",
    "frames": "of several frames, the first taken",
    "grey": "grey, stored as RGB",
}
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Loaded:
    """An image as RGB, its object mask (mode L), and which of FACTS are true of it."""

    image: Image.Image
    mask: Image.Image | None
    facts: frozenset[str]


def load(raw: Raw) -> Loaded:
    """Decode to 8-bit RGB, whatever the file's mode; orientation tags are applied. Raises what Pillow raises."""
    facts: set[str] = set()
    if isinstance(raw.image, np.ndarray):
        image, facts = from_array(raw.image), _depth(raw.image)
    elif isinstance(raw.image, bytes) and raw.image.startswith(b"\x93NUMPY"):
        array = np.load(io.BytesIO(raw.image), allow_pickle=False)
        image, facts = from_array(array), _depth(array)
    else:
        image = Image.open(_file(raw.image))
        facts |= {"frames"} if getattr(image, "is_animated", False) else set()
        facts |= {"turned"} if image.getexif().get(_EXIF_ORIENTATION, 1) in range(2, 9) else set()
        facts |= {"deep"} if any(";16" in str(tile[3]) for tile in image.tile) else set()
        image.load()
        image = ImageOps.exif_transpose(image)
        facts |= _depth(np.asarray(image)) if image.mode.startswith(("I", "F")) else set()
    facts |= {"grey"} if image.mode in ("1", "L", "LA") or image.mode.startswith(("I", "F")) else set()
    facts |= {"alpha"} if image.has_transparency_data else set()
    facts |= {"not_square"} if image.width != image.height else set()
    return Loaded(rgb(image), _mask(raw.mask), frozenset(facts))


def _depth(pixels: np.ndarray) -> set[str]:
    if pixels.dtype.itemsize < 2:
        return set()
    return {"deep", "dark"} if _is_16_bits(pixels) and 0 < pixels.max() <= 255 else {"deep"}


def _is_16_bits(pixels: np.ndarray) -> bool:
    return pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2


def _file(image: bytes | Path) -> io.BytesIO | Path:
    if isinstance(image, bytes):
        return io.BytesIO(image)
    files.regular(image)
    return image


def _mask(mask: np.ndarray | bytes | None) -> Image.Image | None:
    if mask is None or isinstance(mask, np.ndarray):
        return mask if mask is None else Image.fromarray(mask)
    return Image.open(io.BytesIO(mask)).convert("L")


def from_array(array: np.ndarray) -> Image.Image:
    """An array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of any number type. Raises ValueError for others."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or 0 in array.shape or array.shape[2:] not in ((), (3,), (4,)):
        raise ValueError(f"an array of shape {array.shape} is no image; (H, W) and (H, W, 3) are")
    return Image.fromarray(eight_bits(array))


def rgb(image: Image.Image) -> Image.Image:
    """The image in mode RGB; alpha is dropped, the colours beneath stay. Raises ValueError for unknown ranges."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):  # Pillow's own conversion clips at 255
        image = Image.fromarray(eight_bits(np.asarray(image)))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def eight_bits(pixels: np.ndarray) -> np.ndarray:
    """Pixels of any number type as uint8, by their type and range.

    bool: black and white; 16 bits unsigned: their high byte; floats within 0..1: times 255; other numbers within
    0..255 as they are, within 0..65535 their high byte. Raises ValueError for other ranges, NaN, infinity.
    """
    if pixels.dtype == bool:
        return np.where(pixels, 255, 0).astype(np.uint8)
    if pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels)
    if pixels.dtype.kind not in "iuf":
        raise ValueError(f"pixels of type {pixels.dtype} are no image")
    low, high = pixels.min(), pixels.max()
    if pixels.dtype.kind == "f" and low >= 0 and high <= 1:
        return np.round(pixels.astype(np.float64) * 255).astype(np.uint8)
    if low >= 0 and high <= 255 and not _is_16_bits(pixels):
        return np.round(pixels).astype(np.uint8)
    if low >= 0 and high <= 65535:
        return (pixels.astype(np.uint32) >> 8).astype(np.uint8)
    raise ValueError(f"its pixels go from {low:g} to {high:g}, which is none of 0..1, 0..255 and 0..65535")


def fit(image: Image.Image, size: int, how: Fit) -> Image.Image:
    """A square of `size` pixels, antialiased: the largest central square, the whole squashed, or on black."""
    width, height = image.size
    if width == height or how == "squash":
        return image if image.size == (size, size) else image.resize((size, size), FILTER)
    if how == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        return image if image.size == (size, size) else image.resize((size, size), FILTER)
    scaled = [max(1, round(side * size / max(width, height))) for side in (width, height)]
    square = Image.new(image.mode, (size, size))
    square.paste(
        image.resize((scaled[0], scaled[1]), FILTER), ((size - scaled[0]) // 2, (size - scaled[1]) // 2)
    )
    return square
