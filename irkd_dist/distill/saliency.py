"""Saliency maps as tensors: the score that is differentiated, grids, normalisation, and the loss between maps.

A map M_l (B, h, w) is computed from a tap's features A_l, patch tokens only, and the gradient G_l = ds/dA_l of the
score s = sum over the batch of z_y (`taps.forward_with_maps`, by one of `methods`). Pure functions, alike for student
and teacher; maps, normalisation and softmax are in fp32 (fp64 for a model in fp64) whatever autocast computes in.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from irkd_dist.distill.losses import at_least_fp32

EPSILON = 1e-8
FLAT = 1e-6  # a map whose range is below this part of its largest value has no shape to align


def class_score(logits: Tensor, target: Tensor) -> Tensor:
    """Score s that saliency differentiates: sum over the batch of z_y, or of sum_c y_c z_c for soft labels.

    logits (B, K); target (B,) class numbers or (B, K) probabilities. Returns a scalar in fp32.
    """
    logits = at_least_fp32(logits)
    if target.ndim == 1:
        return logits.gather(1, target[:, None]).sum()
    return (logits * target).sum()


def linear_head_gradient(weight: Tensor, target: Tensor, tokens: int) -> Tensor:
    """Gradient of the score at the final norm of a mean-pooled model with a linear head: G = w_y / N.

    Closed form (no second derivative): weight (K, D), target (B,) or (B, K). Returns (B, 1, D), the same for each of
    the N = `tokens` patch tokens.
    """
    row = weight[target] if target.ndim == 1 else target.to(weight.dtype) @ weight
    return row[:, None, :] / tokens


def patch_tokens(features: Tensor, prefix_tokens: int, channels_last: bool = False) -> Tensor:
    """Drop the prefix tokens of (B, T, D), or flatten a grid (B, D, h, w) or (B, h, w, D): all give (B, N, D)."""
    if features.ndim == 4:
        return features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)
    return features[:, prefix_tokens:]


def resize_map(maps: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Resize maps (B, h', w') bilinearly to (B, *grid): a teacher's grid to the student's."""
    if maps.shape[1:] == grid:
        return maps
    return F.interpolate(maps[:, None], size=list(grid), mode="bilinear", align_corners=False)[:, 0]


def mean_map(maps: list[Tensor]) -> Tensor:
    """Maps (B, h, w) of several taps as one: each min-max normalised, on the largest of their grids, averaged."""
    grid = max((m.shape[1:] for m in maps), key=math.prod)
    return torch.stack([resize_map(normalize_map(m, "minmax")[0], grid) for m in maps]).mean(0)


def normalize_map(maps: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Normalise each sample's map: `minmax` (M - min) / (max - min + 1e-8), or `l2` M / (||M|| + 1e-8).

    maps (B, h, w) in fp32. Returns the maps and a mask (B,) of the samples whose map has a shape: one whose range is
    under 1e-6 of its largest value is flat, gets zeros and no gradient. A map with NaN stays NaN: it is no flat one.
    """
    flattened = maps.flatten(1)
    low, high = flattened.amin(dim=1, keepdim=True), flattened.amax(dim=1, keepdim=True)
    span = high - low
    # asked this way round, so that NaN has a shape
    shaped = ~(span <= FLAT * flattened.abs().amax(dim=1, keepdim=True)).detach()
    # Both branches of `where` are differentiated, so the flat samples need a harmless input, not only output.
    safe = torch.where(shaped, flattened, torch.zeros_like(flattened))
    if kind == "minmax":
        result = (safe - torch.where(shaped, low, 0.0)) / (torch.where(shaped, span, 1.0) + EPSILON)
    elif kind == "l2":
        # vector_norm's second derivative at zero is NaN: the flat rows divide by one
        square = torch.where(shaped, safe.square().sum(dim=1, keepdim=True), 1.0)
        result = safe / (square.sqrt() + EPSILON)
    else:
        raise ValueError(f"normalization {kind!r} is neither minmax nor l2")
    return result.view(maps.shape), shaped.squeeze(1)


def saliency_loss(student: list[Tensor], teacher: list[Tensor], kind: str) -> tuple[Tensor, Tensor]:
    """Squared error between normalised maps, averaged over the taps, one value a sample.

    Lists of maps, one (B, h, w) a tap, the teacher's detached and on the student's grid. Under `minmax` the squared
    error is averaged over the grid, under `l2` summed (averaging would shrink it sevenfold from 12 to 32 px). A flat
    map on either side gives zero; the divisor stays the number of taps. NaN on either side gives NaN.

    Returns:
        Loss (B,) and the number of flat maps, a scalar tensor.
    """
    total = student[0].new_zeros(student[0].shape[0])
    flat = torch.zeros((), device=total.device)
    for ours, theirs in zip(student, teacher, strict=True):
        ours, shaped = normalize_map(at_least_fp32(ours), kind)
        theirs, teacher_shaped = normalize_map(at_least_fp32(theirs.detach()), kind)
        error = (ours - theirs).square().flatten(1)
        error = error.mean(dim=1) if kind == "minmax" else error.sum(dim=1)
        both = shaped & teacher_shaped
        total = total + torch.where(both, error, torch.zeros_like(error))
        flat = flat + (~both).sum()
    return total / len(student), flat
