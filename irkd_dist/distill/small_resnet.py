"""A convolutional network for small images, cheap to train and quick to run: the teacher of the CIFAR-10 recipes.

In the spirit of the CIFAR-10 speed records (Page 2018, "How to train your ResNet"; Jordan 2024, arXiv:2404.00498):
three stages that pool early, a second convolution in each that is added to the first, a global maximum at the end. It
takes images of 8 px and more, whatever their shape. timm knows it under its name once this module is imported.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

default_cfgs = generate_default_cfgs(
    {"small_resnet.untrained": {"num_classes": 10, "input_size": (3, 32, 32), "pool_size": None,
                                "first_conv": "stem.0", "classifier": "head"}}
)  # fmt: skip


class Stage(nn.Module):
    """Convolve, halve the side, and add a second convolution."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.first = _convolution(width_in, width, pool=True)
        self.second = _convolution(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, width, h / 2, w / 2)."""
        x = self.first(x)
        return x + self.second(x)


class SmallResNet(nn.Module):
    """Stem and three stages.

    Args:
        widths: channels of the stem and of each stage.
        scale: of the logits; a maximum over normalised channels would else begin with large ones.
        size: side in pixels to which images are resized first (bicubic), so that things have one scale for the
            convolutions whatever the stage's resolution; every image then costs as much as one of that side.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        widths: tuple[int, int, int, int] = (32, 64, 256, 256),
        drop_rate: float = 0.0,
        scale: float = 0.125,
        size: int | None = None,
    ) -> None:
        super().__init__()
        self.size = size
        self.num_classes, self.num_features, self.scale = num_classes, widths[-1], scale
        self.stem = _convolution(in_chans, widths[0])
        self.stages = nn.Sequential(*(Stage(a, b) for a, b in itertools.pairwise(widths)))
        self.feature_info = [
            {"module": f"stages.{i}", "num_chs": width, "reduction": 2 ** (i + 1)}
            for i, width in enumerate(widths[1:])
        ]
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(widths[-1], num_classes, bias=False)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, r, r) -> (B, C, s / 8, s / 8), s = `size` or r."""
        if self.size is not None and x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, size=self.size, mode="bicubic", antialias=True)
        return self.stages(self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, r, r) -> logits (B, K)."""
        pooled = self.pool(self.forward_features(x)).flatten(1)
        return self.head(self.drop(pooled)) * self.scale


def _convolution(width_in: int, width: int, pool: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(width_in, width, 3, padding=1, bias=False)]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []), nn.BatchNorm2d(width), nn.GELU())


@register_model
def small_resnet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """2.0 M parameters, 0.15 G multiplications and additions an image at 32 px."""
    return build_model_with_cfg(SmallResNet, "small_resnet", pretrained, **kwargs)
