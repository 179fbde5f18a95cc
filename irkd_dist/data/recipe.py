"""How training changes an image: the settings alone, so that the configuration has them without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import ConfigDict, Field

Alpha = Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Augment:
    """Augmentation of training images; the defaults are the paper's for a student."""

    padding: Annotated[int, Field(ge=0, le=4096)] = 4  # pixels of the random crop's padding ...
    # ... at this resolution, in proportion elsewhere; null: the same everywhere
    padding_at: Annotated[int, Field(gt=0, le=4096)] | None = 32
    flip: bool = True
    auto_augment: Share = 0.0  # share of images that AutoAugment (CIFAR-10 policy) changes
    erase: Share = 0.0  # share of images with a random rectangle erased
    mixup: Alpha = 0.0  # alpha of MixUp's Beta distribution
    cutmix: Alpha = 0.0  # alpha of CutMix's; both above 0: one of the two at random
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0  # label smoothing
    # epoch e shows draw e mod this of each sample, mixing partners included; null: a new draw every epoch
    draws: Annotated[int, Field(gt=0)] | None = None
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
