"""AdamW's parameter groups, the learning rate as a function of the step, and what a stage change does to both."""

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


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def reset(optimizer: torch.optim.Optimizer) -> None:
    """Forget all moments and step counts in place: the next step is a new AdamW's first."""
    optimizer.state.clear()


def moments_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state as `exp_avg.<parameter>`, `exp_avg_sq.<parameter>`, `step.<parameter>`, on the CPU."""
    result = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            result[f"{key}.{name}"] = value.detach().to("cpu", torch.float32, copy=True).contiguous()
    return result


def load_moments(model: nn.Module, optimizer: torch.optim.Optimizer, moments: dict[str, Tensor]) -> None:
    """Put back what `moments_by_name` gave; a parameter without entries starts anew."""
    reset(optimizer)
    for name, parameter in model.named_parameters():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if (value := moments.get(f"{key}.{name}")) is not None:
                # AdamW keeps its step counter on the CPU unless it is fused
                on = parameter.device if key != "step" or optimizer.defaults.get("fused") else "cpu"
                optimizer.state[parameter][key] = value.to(on, copy=True)
