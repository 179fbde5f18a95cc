"""max over channels of |G| (Simonyan et al. 2014; the paper's text)."""

from __future__ import annotations

from torch import Tensor

from irkd_dist.distill.losses import at_least_fp32

INNER_GRADIENT = True
VOID = ("unread", "mean")  # a mean gives every patch the same gradient


def saliency_map(features: Tensor, gradient: Tensor) -> Tensor:
    """(B, N, D) twice -> (B, N)."""
    return at_least_fp32(gradient).abs().amax(dim=2).expand(features.shape[:2])
