"""ReLU of the sum over channels of mean_n(G) * A (Selvaraju et al. 2017; Del Amor et al. 2024)."""

from __future__ import annotations

from torch import Tensor

from irkd_dist.distill.losses import at_least_fp32

INNER_GRADIENT = True
VOID = ("unread",)


def saliency_map(features: Tensor, gradient: Tensor) -> Tensor:
    """(B, N, D) twice -> (B, N)."""
    weights = at_least_fp32(gradient).mean(dim=1, keepdim=True)
    return (weights * at_least_fp32(features)).sum(dim=2).relu()
