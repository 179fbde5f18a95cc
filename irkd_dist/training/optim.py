"""AdamW's parameter groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: weights with decay; biases, norms, tokens and position embeddings without."""
    exempt = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        free = parameter.ndim < 2 or name in exempt or name.endswith(("pos_embed", "_token"))
        (no_decay if free else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]


def lr_factor(
    kind: Literal["constant", "cosine", "one_cycle"],
    step: int,
    steps: int,
    warmup: float = 0.0,
    start: float = 0.0,
    final: float = 0.0,
) -> float:
    """Learning rate at `step` (0-based) of `steps`, as a part of the peak.

    `warmup` is a part of the span: linear from `start`, a cosine for `one_cycle` (Smith and Topin 2018), reaching the
    peak at its last step. After it `cosine` and `one_cycle` fall to `final` at the last step; `constant` stays.
    """
    rising = round(warmup * steps)
    if step < rising:
        part = (step + 1) / rising
        if kind == "one_cycle":
            part = (1 - math.cos(math.pi * part)) / 2
        return start + (1 - start) * part
    if kind == "constant":
        return 1.0
    # the peak is the warm-up's last step, or without one the first step
    part = (step - rising + 1) / (steps - rising) if rising else step / max(steps - 1, 1)
    part = min(part, 1.0)
    return final + (1 - final) * (1 + math.cos(math.pi * part)) / 2


def rewarm_factor(step: int, steps: int) -> float:
    """Linear warm-up over the first `steps` steps of a stage (policy `rewarm`); 1 after them."""
    return min((step + 1) / steps, 1.0)


def ema_decay(decay: float, warmup: bool, step: int) -> float:
    """Decay of the moving average at `step` (0-based), as timm's ModelEmaV3 with its defaults has it.

    0 at the first: the average begins with the weights after it.
    """
    if step == 0:
        return 0.0
    return min(decay, 1 - (1 + step) ** (-2 / 3)) if warmup else decay


def move_average(average: list[Tensor], live: list[Tensor], weight: Tensor) -> None:
    """average += weight * (live - average) in place; what is no floating-point number is copied. weight: a scalar."""
    pairs = [(a, b) for a, b in zip(average, live, strict=True) if a.is_floating_point()]
    ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    torch._foreach_lerp_(ours, theirs, [weight] * len(pairs))  # type: ignore[attr-defined]
    for a, b in zip(average, live, strict=True):
        if not a.is_floating_point():
            a.copy_(b)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
