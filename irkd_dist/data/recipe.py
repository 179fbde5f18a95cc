"""How training changes an image: the settings alone, so that the configuration has them without torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

Alpha = Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Part = Annotated[float, Field(gt=0, le=1)]
Ratio = Annotated[float, Field(ge=0.01, le=100)]

# keys that a view's key has whatever they are; others where they are not the default, as in keys of earlier releases
_ALWAYS = ("padding", "padding_at", "flip", "auto_augment", "erase", "mixup", "cutmix", "smoothing")


@dataclass(frozen=True)
class Augment:
    """Augmentation of training images; the defaults are the paper's for a student."""

    padding: Annotated[int, Field(ge=0, le=4096)] = 4  # pixels of the random crop's padding ...
    # ... at this resolution, in proportion elsewhere; null: the same everywhere
    padding_at: Annotated[int, Field(gt=0, le=4096)] | None = 32
    flip: bool = True  # left to right, half of the images
    auto_augment: Share = 0.0  # share of images that AutoAugment changes
    erase: Share = 0.0  # share of images with a random rectangle erased
    mixup: Alpha = 0.0  # alpha of MixUp's Beta distribution
    cutmix: Alpha = 0.0  # alpha of CutMix's; both above 0: one of the two at random
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0  # label smoothing
    # epoch e shows draw e mod this of each sample, mixing partners included; null: a new draw every epoch
    draws: Annotated[int, Field(gt=0)] | None = None
    # padded: a crop of the padded image; resized: a random part, resized (torchvision's RandomResizedCrop)
    crop: Literal["padded", "resized"] = "padded"
    scale: tuple[Part, Part] = (0.08, 1.0)  # of crop=resized: its area, as a part of the image's
    ratio: tuple[Ratio, Ratio] = (3 / 4, 4 / 3)  # and its width by its height
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"  # of crop=resized
    policy: Literal["cifar10", "imagenet", "svhn"] = "cifar10"  # of AutoAugment
    rand_augment: Annotated[int, Field(ge=0, le=10)] = 0  # operations of RandAugment an image
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9  # theirs
    three_augment: Share = 0.0  # share of images that are grey, solarised or blurred (3-Augment, DeiT III)
    colour_jitter: Annotated[float, Field(ge=0, le=10)] = (
        0.0  # brightness, contrast, saturation: within 1 +- this
    )
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0  # within +- this, of the circle
    # times that a sample comes in a batch, each time with another draw; an epoch stays as long (Hoffer et al. 2020)
    repeats: Annotated[int, Field(gt=0, le=64)] = 1
    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def draw(self, epoch: int) -> int:
        """The draw that an epoch shows."""
        return epoch if self.draws is None else epoch % self.draws

    def padding_of(self, size: int) -> int:
        """Padding in pixels of images of `size` pixels."""
        return self.padding if self.padding_at is None else round(self.padding * size / self.padding_at)

    def key(self) -> dict[str, Any]:
        """Plain values that decide what a draw of a sample looks like; which draws there are is no part of it."""
        changed = {f.name for f in fields(self) if getattr(self, f.name) != f.default} - {"draws"}
        return {k: v for k, v in asdict(self).items() if k in _ALWAYS or k in changed}
