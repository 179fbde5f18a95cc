"""Tap points: put into a model once, they stay, and keep their modules' outputs while it is run for its maps.

Names of weights, copies of the model and an engine's wrapping are as without them; torch.compile takes them along.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from irkd_dist.errors import UserError

Output = Tensor | tuple[Tensor, Tensor]
POINTS = "_irkd_tap_points"  # attribute of a model: its tap points by path


class TapPoint:
    """A forward hook that stays: keeps its module's output while it is open.

    Where nothing before it asks for a gradient (a frozen model), the output starts the graph: the gradient of the score
    with respect to the taps costs nothing before the first, neither time nor activations.
    """

    def __init__(self, channels_last: bool, channels: frozenset[int]) -> None:
        self.channels_last = channels_last  # of a 4-d output, unless one of its dimensions tells
        self.channels = channels  # numbers of channels that the model is known to have
        self.open = False
        self.kept: Tensor | None = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        if not self.open:
            return None
        if isinstance(output, Tensor) and torch.is_grad_enabled() and not output.requires_grad:
            output = output.detach().requires_grad_()
        self.kept = output
        return output

    def is_channels_last(self, shape: torch.Size) -> bool:
        """Whether (B, a, b, c) is (B, h, w, D): by the known numbers of channels, else by the model's format."""
        first, last = shape[1] in self.channels, shape[-1] in self.channels
        return last if first != last else self.channels_last


def put_taps(model: nn.Module, paths: Iterable[str]) -> dict[str, TapPoint]:
    """Put tap points at module paths into a model, where it has none yet; returns all it has."""
    points: dict[str, TapPoint] | None = getattr(model, POINTS, None)
    if points is None:  # asked this way since torch 2.11 cannot compile __dict__'s methods
        points = {}
        setattr(model, POINTS, points)
    for path in paths:
        if path not in points:
            module = model.get_submodule(path)
            points[path] = TapPoint(_channels_last(model, module), _channels(model))
            module.register_forward_hook(points[path])
    return points


def _channels_last(model: nn.Module, module: nn.Module) -> bool:
    if isinstance(module, Mlp):
        module = module.fc2
    if isinstance(module, nn.Linear) or type(module) is nn.LayerNorm:
        return True
    if isinstance(module, (nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d)):  # timm's LayerNorm2d is a LayerNorm
        return False
    formats = (getattr(m, "output_fmt", None) for m in (module, model))
    return next((str(f).endswith("NHWC") for f in formats if f is not None), False)


def _channels(model: nn.Module) -> frozenset[int]:
    info = feature_info(model)
    sizes = [i["num_chs"] for i in info] + [getattr(model, k, None) for k in ("embed_dim", "num_features")]
    return frozenset(s for s in sizes if isinstance(s, int))


def feature_info(model: nn.Module) -> list[dict[str, Any]]:
    """What timm says of a model's stages: `module` (path), `num_chs`, `reduction` of each; empty if nothing."""
    info: Any = getattr(model, "feature_info", [])
    return list(getattr(info, "info", info))


def tapped_forward(model: nn.Module, images: Tensor, paths: list[str]) -> tuple[Output, list[Tensor]]:
    """Run the model and keep the outputs of the tapped modules.

    Returns:
        The model's output, and the features in the order of `paths`: (B, T, D) tokens, (B, D, h, w) or (B, h, w, D).

    Raises:
        UserError: the model's forward does not call a tapped module.
    """
    points = put_taps(model, paths)
    used = [points[path] for path in paths]
    for point in used:
        point.open = True
    try:
        output = model(images)
        features = [point.kept for point in used]
    finally:
        for point in used:
            point.open, point.kept = False, None
    kept = []
    for path, feature in zip(paths, features, strict=True):
        if feature is None:
            names = ", ".join(n for n, _ in model.named_children())
            raise UserError(
                f"saliency.taps: {type(model).__name__} does not call its module {path!r}; tap one that it does "
                f"(its children: {names})"
            )
        if not isinstance(feature, Tensor):
            what = f"gives a {type(feature).__name__}, no tensor"
            raise UserError(
                f"saliency.taps: {path!r} of {type(model).__name__} {what}; tap a module inside it"
            )
        kept.append(feature)
    return output, kept
