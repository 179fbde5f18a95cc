"""What evaluation sees of a picture of any shape: which square of it, at which scale. Without torch.

`irkd render` makes the square, `views.View` what is seen of it; `Geometry.square` does both to one picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from irkd_dist import typed
from irkd_dist.data import images
from irkd_dist.data.images import Fit
from irkd_dist.errors import UserError

if TYPE_CHECKING:
    from irkd_dist.data.shards import Manifest

Mode = Literal["resize", "crop"]

LEAST, MOST = 0.01, 1 << 16  # of crop_pct; of a side in pixels


def scaled(size: int, crop_pct: float) -> int:
    """Side in pixels of the whole image whose central `size` pixels are seen; timm's rule."""
    return math.floor(round(size / crop_pct, 6))


@dataclass(frozen=True)
class Geometry:
    """How pictures become the squares that evaluation sees; as it stands, their central square, resized.

    fit, crop_pct, mode and stored (sides in pixels) are the shards', as their manifest has them; nothing stored: each
    size is made of the picture itself. centre_crop: data.centre_crop, the middle of the largest stored image.
    """

    fit: Fit = "crop"
    crop_pct: float = 1.0
    mode: Mode = "resize"
    stored: tuple[int, ...] = ()
    centre_crop: bool = False

    @classmethod
    def of(cls, manifest: Manifest, centre_crop: bool) -> Geometry:
        """That of an evaluation on shards."""
        return cls(manifest.fit, manifest.crop_pct, manifest.mode, manifest.resolutions, centre_crop)

    @classmethod
    def parse(cls, kept: dict[str, Any]) -> Geometry:
        """That of JSON which `is_geometry`."""
        pct, stored = float(kept["crop_pct"]), tuple(kept["stored"])
        return cls(kept["fit"], pct, kept["mode"], stored, kept["centre_crop"])

    def sides(self, size: int) -> tuple[int, int]:
        """Sides in pixels of the stored square that images of `size` are made of, and of that square as it is scaled.

        The central `size` pixels of the second are seen.
        """
        largest = max(self.stored, default=size)
        cropped = self.mode == "resize" and self.crop_pct < 1
        side = scaled(size, self.crop_pct) if cropped else largest if self.centre_crop else size
        if self.mode == "crop" or self.centre_crop:
            return largest, side
        enough = [r for r in self.stored if r >= side] if cropped else []
        return min(enough, default=side), side

    def square(self, image: Image.Image, size: int) -> Image.Image:
        """What evaluation sees of a picture of any shape, `size` pixels a side.

        Raises:
            UserError: it sees a window at the stored scale, and the stored images are smaller than that.
        """
        stored, side = self.sides(size)
        if size > side:
            raise UserError(
                f"size={size} is larger than the {side} px that the shards stored: data.centre_crop sees a window of "
                f"them, {side} px at most"
            )
        square = images.fit(image, stored, self.fit)
        if stored != side:  # as augment.resize does
            square = square.resize((side, side), Image.Resampling.BILINEAR)
        left = round((side - size) / 2)
        return square if size == side else square.crop((left, left, left + size, left + size))


CENTRAL = Geometry()  # what is assumed where nothing is known


def is_geometry(value: object) -> bool:
    """Whether JSON holds a geometry, every value of it one that can be."""
    if (
        not isinstance(value, dict)
        or not {"fit", "crop_pct", "mode", "stored", "centre_crop"} <= value.keys()
    ):
        return False
    pct, stored = value["crop_pct"], value["stored"]
    return (
        value["fit"] in [*images.FITS]
        and value["mode"] in ("resize", "crop")
        and isinstance(value["centre_crop"], bool)
        and typed.is_number(pct)
        and LEAST <= pct <= 1
        and typed.list_of(typed.is_count)(stored)
        and all(0 < side <= MOST for side in stored)
    )
