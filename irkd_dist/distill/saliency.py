"""Saliency maps: the four methods, their normalisation, and the one place that differentiates.

A map M_l (B, N) is computed from a tap's features A_l, patch tokens only, and the gradient G_l = ds/dA_l of the score
s = sum over the batch of z_y. Everything but `feature_gradients` is a pure function of tensors, alike for student
and teacher; maps, normalisation and softmax are in fp32 (fp64 for a model in fp64) whatever autocast computes in.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

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


def feature_gradients(
    score: Tensor,
    features: list[Tensor],
    *,
    create_graph: bool,
    context: AbstractContextManager[object] | None = None,
) -> list[Tensor]:
    """Differentiate the score with respect to each tap's features: the only inner gradient of the project.

    `create_graph` keeps the graph for the second derivative (the student in training). `context` is what an engine
    needs around the inner gradient, such as keeping sharded parameters gathered.
    A feature that the score does not depend on (a void tap) gives zeros.
    """
    with context or nullcontext():
        gradients = torch.autograd.grad(
            score, features, create_graph=create_graph, retain_graph=create_graph, allow_unused=True
        )
    return [
        torch.zeros_like(feature) if gradient is None else gradient
        for feature, gradient in zip(features, gradients, strict=True)
    ]


def linear_head_gradient(weight: Tensor, target: Tensor, tokens: int) -> Tensor:
    """Gradient of the score at the final norm of a mean-pooled model with a linear head: G = w_y / N.

    Closed form (no second derivative): weight (K, D), target (B,) or (B, K). Returns (B, 1, D), the same for each of
    the N = `tokens` patch tokens.
    """
    row = weight[target] if target.ndim == 1 else target.to(weight.dtype) @ weight
    return row[:, None, :] / tokens


def patch_tokens(features: Tensor, prefix_tokens: int) -> Tensor:
    """Drop the prefix tokens of (B, T, D), or flatten a convolutional map (B, D, h, w): both give (B, N, D)."""
    if features.ndim == 4:
        return features.flatten(2).transpose(1, 2)
    return features[:, prefix_tokens:]


def gradient_map(features: Tensor, gradient: Tensor) -> Tensor:
    """max over D of |G| (Simonyan et al. 2014; the paper's text). (B, N, D) twice -> (B, N)."""
    return at_least_fp32(gradient).abs().amax(dim=2).expand(features.shape[:2])


def grad_cam_map(features: Tensor, gradient: Tensor) -> Tensor:
    """ReLU of sum over D of mean_n(G) * A (Selvaraju et al. 2017; Del Amor et al. 2024). (B, N, D) -> (B, N)."""
    weights = at_least_fp32(gradient).mean(dim=1, keepdim=True)
    return (weights * at_least_fp32(features)).sum(dim=2).relu()


def hirescam_map(features: Tensor, gradient: Tensor) -> Tensor:
    """ReLU of sum over D of G * A (Draelos and Carin 2020). (B, N, D) twice -> (B, N)."""
    return (at_least_fp32(gradient) * at_least_fp32(features)).sum(dim=2).relu()


def attention_map(query: Tensor, keys: Tensor, scale: float, prefix_tokens: int) -> Tensor:
    """Class token's attention row after the softmax over all tokens: patch columns, mean over heads.

    query (B, H, d) of the class token, keys (B, H, T, d). Returns (B, N). First-order: no inner gradient.
    """
    with torch.autocast(keys.device.type, enabled=False):  # it would take the product back to bf16
        logits = (at_least_fp32(keys) @ at_least_fp32(query)[..., None]).squeeze(-1) * scale
    return logits.softmax(dim=-1)[:, :, prefix_tokens:].mean(dim=1)


GRADIENT_MAPS = {"gradient": gradient_map, "grad_cam": grad_cam_map, "hirescam": hirescam_map}


def resize_map(maps: Tensor, tokens: int) -> Tensor:
    """Resize square maps (B, N') bilinearly to (B, tokens): a teacher's grid to the student's."""
    if maps.shape[1] == tokens:
        return maps
    side, new_side = grid_side(maps.shape[1]), grid_side(tokens)
    grid = maps.reshape(-1, 1, side, side)
    return F.interpolate(grid, size=new_side, mode="bilinear", align_corners=False).flatten(1)


def grid_side(tokens: int) -> int:
    """Side of the square grid of patch tokens; ValueError if they form none."""
    side = round(tokens**0.5)
    if side * side != tokens:
        raise ValueError(f"{tokens} patch tokens form no square grid")
    return side


def normalize_map(maps: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Normalise each sample's map: `minmax` (M - min) / (max - min + 1e-8), or `l2` M / (||M|| + 1e-8).

    maps (B, N) in fp32. Returns the maps and a mask (B,) of the samples whose map has a shape: one whose range is
    under 1e-6 of its largest value is flat, gets zeros and no gradient.
    """
    low, high = maps.amin(dim=1, keepdim=True), maps.amax(dim=1, keepdim=True)
    span = high - low
    shaped = (span > FLAT * maps.abs().amax(dim=1, keepdim=True)).detach()
    # Both branches of `where` are differentiated, so the flat samples need a harmless input, not only output.
    safe = torch.where(shaped, maps, torch.zeros_like(maps))
    if kind == "minmax":
        result = (safe - torch.where(shaped, low, 0.0)) / (torch.where(shaped, span, 1.0) + EPSILON)
    elif kind == "l2":
        # vector_norm's second derivative at zero is NaN: the flat rows divide by one
        square = torch.where(shaped, safe.square().sum(dim=1, keepdim=True), 1.0)
        result = safe / (square.sqrt() + EPSILON)
    else:
        raise ValueError(f"normalization {kind!r} is neither minmax nor l2")
    return result, shaped.squeeze(1)


def saliency_loss(student: list[Tensor], teacher: list[Tensor], kind: str) -> tuple[Tensor, Tensor]:
    """Squared error between normalised maps, averaged over the taps, one value a sample.

    Lists of maps, one (B, N) a tap, the teacher's detached and on the student's grid. Under `minmax` the squared error
    is averaged over N, under `l2` summed (averaging would shrink it sevenfold from 12 to 32 px). A flat map on either
    side gives zero; the divisor stays the number of taps.

    Returns:
        Loss (B,) and the number of flat maps, a scalar tensor.
    """
    total = student[0].new_zeros(student[0].shape[0])
    flat = torch.zeros((), device=total.device)
    for ours, theirs in zip(student, teacher, strict=True):
        ours, shaped = normalize_map(at_least_fp32(ours), kind)
        theirs, teacher_shaped = normalize_map(at_least_fp32(theirs.detach()), kind)
        error = (ours - theirs).square()
        error = error.mean(dim=1) if kind == "minmax" else error.sum(dim=1)
        both = shaped & teacher_shaped
        total = total + torch.where(both, error, torch.zeros_like(error))
        flat = flat + (~both).sum()
    return total / len(student), flat
