"""ReLU of the sum over channels of G * A (Draelos and Carin 2020)."""

from __future__ import annotations

from torch import Tensor

from irkd_dist.distill.losses import at_least_fp32

INNER_GRADIENT = True
VOID = ("unread", "norm")  # a norm ignores its input's length, so that the sum of G * A vanishes


def saliency_map(features: Tensor, gradient: Tensor) -> Tensor:
    """(B, N, D) twice -> (B, N)."""
    return (at_least_fp32(gradient) * at_least_fp32(features)).sum(dim=2).relu()
