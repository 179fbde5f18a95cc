"""Any image of a source -> 8-bit RGB as a viewer shows it, then square. What had to be changed is told by name."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from irkd_dist import files
from irkd_dist.data.sources.base import Raw

Fit = Literal["crop", "squash", "pad"]

FILTER = Image.Resampling.LANCZOS  # Pillow widens its support when it shrinks: antialiased
FITS: dict[Fit, str] = {
    "crop": "their centre is cut out", "squash": "they are squashed", "pad": "they are put on black"
}  # fmt: skip
WHITES = (1, 255, 65535)  # what floats and 32-bit numbers, whose type does not say it, may have for white
FACTS = {
    "not_square": "not square",
    "enlarged": "smaller than the largest resolution, and enlarged",
    "turned": "turned as their EXIF orientation says",
    "alpha": "with transparency, which is dropped",
    "deep": "of more than 8 bits a channel, scaled to 8",
    "dark": "of 16 bits with no value above 255, so black",
    **{f"white_{white}": f"of floats or 32-bit numbers, white at {white} (--white)" for white in WHITES},
    "frames": "of several frames, the first taken",
    "grey": "grey, stored as RGB",
}
_EXIF_ORIENTATION = 0x0112
# not ImageOps.exif_transpose: it writes the other tags anew, and fails where one of them is malformed
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


OBJECT = 128  # the least value of a mask where the object is


@dataclass(frozen=True)
class Loaded:
    """An image as RGB, its object mask (mode L), and which of FACTS are true of it."""

    image: Image.Image
    mask: Image.Image | None
    facts: frozenset[str]


def load(raw: Raw, white: int | None = None) -> Loaded:
    """Decode to 8-bit RGB, whatever the file's mode; orientation tags are applied. Raises what Pillow raises.

    white: of floats and 32-bit numbers; None: the least of WHITES that is not exceeded.
    """
    facts: set[str] = set()
    array, before, turn = raw.image, None, None
    if isinstance(array, bytes) and array.startswith(b"\x93NUMPY"):
        array = np.load(io.BytesIO(array), allow_pickle=False)
    if isinstance(array, np.ndarray):
        image, facts = from_array(array, white), _depth(array, white)
    else:
        image = Image.open(_file(array))
        facts |= {"frames"} if getattr(image, "is_animated", False) else set()
        facts |= {"turned"} if image.getexif().get(_EXIF_ORIENTATION, 1) in range(2, 9) else set()
        facts |= {"deep"} if any(";16" in str(tile[3]) for tile in image.tile) else set()
        image.load()  # which turns a TIFF itself
        form, before, turn = image.format, image.size, _TURNS.get(image.getexif().get(_EXIF_ORIENTATION, 1))
        image = image if turn is None else image.transpose(turn)
        image.format = form  # a copy has none
        facts |= _depth(_numbers(image), white) if image.mode.startswith(("I", "F")) else set()
    facts |= {"grey"} if image.mode in ("1", "L", "LA") or image.mode.startswith(("I", "F")) else set()
    facts |= {"alpha"} if image.has_transparency_data else set()
    facts |= {"not_square"} if image.width != image.height else set()
    mask = _mask(raw.mask)
    if mask is not None and mask.size != image.size:
        mask = _placed(mask, image.size, before, turn)
    return Loaded(rgb(image, white), mask, frozenset(facts))


def _placed(
    mask: Image.Image, size: tuple[int, int], before: tuple[int, int] | None, turn: Image.Transpose | None
) -> Image.Image:
    """A mask of another size than its image as it is seen: drawn before the image was turned, or at another scale.

    Raises:
        ValueError: it is of another shape.
    """
    if turn is not None and mask.size == before:
        return mask.transpose(turn)
    if abs(mask.width * size[1] - mask.height * size[0]) > 0.02 * mask.width * size[1]:
        shape, wanted = ("x".join(map(str, s)) for s in (mask.size, size))
        raise ValueError(f"its mask has {shape} pixels, the image {wanted}")
    return mask


def _depth(pixels: np.ndarray, white: int | None) -> set[str]:
    facts = {"deep"} if pixels.dtype.itemsize > 1 else set()
    if pixels.dtype in (bool, np.uint8) or not pixels.max():  # black is black whatever white is
        return facts
    if _is_16_bits(pixels):
        return facts | ({"dark"} if pixels.max() <= 255 else set())
    return facts | {f"white_{white or _guessed_white(pixels)}"}


def _is_16_bits(pixels: np.ndarray) -> bool:
    return pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2


def _guessed_white(pixels: np.ndarray) -> int | None:
    """The least of WHITES that no value exceeds, 1 only of floats; None where there is none."""
    low, high = pixels.min(), pixels.max()
    floats = pixels.dtype.kind == "f"
    return next((w for w in WHITES if low >= 0 and high <= w and (floats or w > 1)), None)


def _numbers(image: Image.Image) -> np.ndarray:
    """Pixels of more than 8 bits; some releases of Pillow have a PNG's 16 bits in 32."""
    pixels = np.asarray(image)
    return pixels.astype(np.uint16) if image.mode == "I" and image.format == "PNG" else pixels


def _file(image: bytes | Path) -> io.BytesIO | Path:
    if isinstance(image, bytes):
        return io.BytesIO(image)
    files.regular(image)
    return image


def _mask(mask: np.ndarray | bytes | None) -> Image.Image | None:
    if mask is None or isinstance(mask, np.ndarray):
        return mask if mask is None else Image.fromarray(mask)
    found = Image.open(io.BytesIO(mask))
    grey = found.convert("L")
    if 0 < (largest := int(np.asarray(grey).max())) < OBJECT:
        kind = ", of a palette" if found.mode == "P" else ""
        raise ValueError(
            f"its mask has no value above {largest}{kind}, and the object is {OBJECT} or more: save it as 0 and 255"
        )
    return grey


def from_array(array: np.ndarray, white: int | None = None) -> Image.Image:
    """An array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of any number type. Raises ValueError for others."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or 0 in array.shape or array.shape[2:] not in ((), (3,), (4,)):
        raise ValueError(f"an array of shape {array.shape} is no image; (H, W) and (H, W, 3) are")
    return Image.fromarray(eight_bits(array, white))


def rgb(image: Image.Image, white: int | None = None) -> Image.Image:
    """The image in mode RGB; alpha is dropped, the colours beneath stay. Raises ValueError for unknown ranges."""
    if image.mode.startswith(("I", "F")):  # Pillow's own conversion clips at 255
        image = Image.fromarray(eight_bits(_numbers(image), white))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def eight_bits(pixels: np.ndarray, white: int | None = None) -> np.ndarray:
    """Pixels of any number type as uint8.

    bool: black and white; 16 bits unsigned: their high byte; others by what is white: 1: times 255; 255: as they are;
    65535: their high byte. Raises ValueError for values beyond it, below 0, NaN, infinity.
    """
    if pixels.dtype == bool:
        return np.where(pixels, 255, 0).astype(np.uint8)
    if pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels)
    if pixels.dtype.kind not in "iuf":
        raise ValueError(f"pixels of type {pixels.dtype} are no image")
    low, high = pixels.min(), pixels.max()
    at = 65535 if _is_16_bits(pixels) else white or _guessed_white(pixels)
    if at is None or not (low >= 0 and high <= at):
        wanted = f"not within 0..{at} (--white)" if at else "which is none of 0..1, 0..255 and 0..65535"
        raise ValueError(f"its pixels go from {low:g} to {high:g}, {wanted}")
    if at == 65535:
        return (pixels.astype(np.uint32) >> 8).astype(np.uint8)
    return np.round(pixels.astype(np.float64) * (255 / at)).astype(np.uint8)


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
