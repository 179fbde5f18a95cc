"""A Vision Transformer, its saliency maps and their loss by hand: one sample at a time, without hooks.

The reference that the product is tested against. Everything is written with elementary operations on the
weights of a timm model, so that a tapped tensor is simply a value on the way from the image to the logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from irkd_dist.distill import models

CLASSES = 5
SIZE = 16  # px that position embeddings are made for
PATCH = 4
HEADS = ("class_token", "distilled", "mean", "mean_fc_norm")
METHODS = ("gradient", "grad_cam", "hirescam", "attention")
DEFINED = [(h, m) for h in HEADS for m in METHODS if (h, m) != ("mean", "attention")]  # no class token


def build(
    head: str, depth: int = 3, dim: int = 16, heads: int = 2, patch: int = PATCH, seed: int = 0, **more: Any
) -> Any:
    """A tiny fp64 ViT in evaluation mode, its weights drawn wide enough that nothing is near zero."""
    pooled = {
        "mean": {"global_pool": "avg", "class_token": False, "fc_norm": False},
        "mean_fc_norm": {"global_pool": "avg"},  # keeps its class token, which the head does not read
    }.get(head, {})
    model = models.create_model(
        "custom",
        classes=CLASSES,
        patch=patch,
        image_size=SIZE,
        distilled=head == "distilled",
        options={"embed_dim": dim, "depth": depth, "num_heads": heads, "mlp_ratio": 2, **pooled, **more},
    )
    return randomise(models.without_fused_attention(model).double().eval(), seed)


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Draw every parameter anew: matrices by their fan-in, norms around 1, all else around 0."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=draws, dtype=p.dtype)
            if p.ndim > 1 and not name.endswith(("token", "pos_embed")):
                p.copy_(noise * (3.0 if name.startswith("head") else 1.2) / math.sqrt(p[0].numel()))
            else:
                p.copy_(0.3 * noise + float("norm" in name and name.endswith("weight")))
    return model


def inputs(batch: int, resolution: int, seed: int, soft: bool = False) -> tuple[Tensor, Tensor]:
    """fp64 images and labels, or probabilities."""
    draws = torch.Generator().manual_seed(1000 + seed)
    images = torch.randn(batch, 3, resolution, resolution, generator=draws, dtype=torch.float64)
    if soft:
        return images, torch.rand(batch, CLASSES, generator=draws, dtype=torch.float64).softmax(1)
    return images, torch.randint(CLASSES, (batch,), generator=draws)


def all_taps(head: str, method: str, depth: int) -> list[str]:
    """Every place in the model where a map is defined and not void (see test_models.py)."""
    if method == "attention":
        return [f"blocks.{i}.attn.qkv" for i in range(depth)]
    taps = [f"blocks.{i}.norm1" for i in range(depth)] + [f"blocks.{i}" for i in range(depth)] + ["norm"]
    return [path for path in taps if path not in void_taps(head, method, depth)]


def void_taps(head: str, method: str, depth: int) -> list[str]:
    """Block outputs and final norm whose map is zero or constant for any image."""
    last, before = f"blocks.{depth - 1}", f"blocks.{depth - 2}"
    if head in ("class_token", "distilled"):  # nothing reads the patches after the last attention
        return [last, "norm", *([before] if method == "hirescam" else [])]
    if method == "hirescam":  # read through the final norm alone, which ignores length: sum of G * A is 0
        return [last] if head == "mean" else []
    if method == "gradient":  # a mean gives every patch the same gradient
        return ["norm"] if head == "mean" else [last, "norm"]
    return []


# -- one sample through the network ----------------------------------------------------------------


def forward(model: Any, image: Tensor, pos_dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], dict]:
    """Logits of each head, and every intermediate value by name, of one image (3, r, r).

    timm interpolates position embeddings in fp32 whatever their type; finite differences need fp64.
    """
    seen: dict[str, Tensor] = {}
    patches = F.conv2d(image[None], model.patch_embed.proj.weight, model.patch_embed.proj.bias, _side(model))
    tokens = patches[0].flatten(1).T
    prefix = [t[0] for t in (model.cls_token, getattr(model, "dist_token", None)) if t is not None]
    x = torch.cat([*prefix, tokens]) + _positions(model, len(prefix), patches.shape[-1], pos_dtype)
    for i, block in enumerate(model.blocks):
        normed = _norm(block.norm1, x)
        seen[f"blocks.{i}.norm1"] = normed
        mixed, seen[f"blocks.{i}.attn.qkv"] = _attention(block.attn, normed)
        x = x + mixed
        hidden = F.gelu(_linear(block.mlp.fc1, _norm(block.norm2, x)))
        x = x + _linear(block.mlp.fc2, hidden)
        seen[f"blocks.{i}"] = x
    seen["norm"] = x = _norm(model.norm, x)
    if model.global_pool == "avg":
        return [_linear(model.head, _norm(model.fc_norm, x[len(prefix) :].mean(0)))], seen
    heads = [model.head] if len(prefix) == 1 else [model.head, model.head_dist]
    return [_linear(head, x[i]) for i, head in enumerate(heads)], seen


def _side(model: Any) -> int:
    return model.patch_embed.proj.kernel_size[0]


def _positions(model: Any, prefix: int, side: int, dtype: torch.dtype) -> Tensor:
    own, grid = model.pos_embed[0, :prefix], model.pos_embed[0, prefix:]
    old = math.isqrt(len(grid))
    if old != side:
        square = grid.T.reshape(1, -1, old, old).to(dtype)
        square = F.interpolate(square, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
        grid = square[0].flatten(1).T.to(own.dtype)
    return torch.cat([own, grid])


def _linear(layer: Any, x: Tensor) -> Tensor:
    return x @ layer.weight.T + layer.bias


def _norm(layer: Any, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Identity):
        return x
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias


def _attention(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    query, key, value = _linear(layer.qkv, x).chunk(3, dim=-1)
    width = query.shape[-1] // layer.num_heads
    outputs, rows = [], []
    for head in range(layer.num_heads):
        part = slice(head * width, (head + 1) * width)
        q, k = _norm(layer.q_norm, query[:, part]), _norm(layer.k_norm, key[:, part])
        probability = (q @ k.T / math.sqrt(width)).exp()
        probability = probability / probability.sum(-1, keepdim=True)
        outputs.append(probability @ value[:, part])
        rows.append(probability[0])
    return _linear(layer.proj, torch.cat(outputs, dim=-1)), torch.stack(rows)


# -- maps and loss of one sample -------------------------------------------------------------------


def maps(model: Any, image: Tensor, label: Tensor, paths: list[str], method: str, **how: Any) -> list[Tensor]:
    """One sample's map (N,) at every path, differentiable again."""
    return [m for _, m in _raw_maps(model, image, label, paths, method, **how)]


def _raw_maps(
    model: Any, image: Tensor, label: Tensor, paths: list[str], method: str, **how: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each path what the map is made from (|G| of (N, D), or the sum before the ReLU), and the map."""
    heads, seen = forward(model, image, **how)
    prefix = int(model.cls_token is not None) + int(getattr(model, "dist_token", None) is not None)
    logits = sum(heads) / len(heads)
    score = logits[label] if label.ndim == 0 else (label * logits).sum()
    if method == "attention":
        for path in paths:
            row = seen[path][:, prefix:].mean(0)
            yield row, row
        return
    tapped = [seen[path] for path in paths]
    gradients = torch.autograd.grad(score, tapped, create_graph=True, allow_unused=True)
    for features, gradient in zip(tapped, gradients, strict=True):
        gradient = torch.zeros_like(features) if gradient is None else gradient
        gradient, features = gradient[prefix:], features[prefix:]
        if method == "gradient":
            yield gradient.abs(), gradient.abs().max(dim=1).values
        else:
            weights = gradient.mean(0) if method == "grad_cam" else gradient
            total = (weights * features).sum(1)
            yield total, total.clamp(min=0)


def normalised(m: Tensor, kind: str) -> Tensor | None:
    """The formulas of method.md, section 5; None for a flat map."""
    if m.max() - m.min() <= 1e-6 * m.abs().max():
        return None
    if kind == "minmax":
        return (m - m.min()) / (m.max() - m.min() + 1e-8)
    return m / ((m * m).sum().sqrt() + 1e-8)


def resized(m: Tensor, tokens: int) -> Tensor:
    """Bilinear resize of a square map, pixel centres at halves, point by point."""
    old, new = math.isqrt(len(m)), math.isqrt(tokens)
    if old == new:
        return m
    grid, out = m.reshape(old, old), []
    for i in range(tokens):
        (y0, y1, fy), (x0, x1, fx) = _between(i // new, old, new), _between(i % new, old, new)
        top = (1 - fx) * grid[y0, x0] + fx * grid[y0, x1]
        out.append((1 - fy) * top + fy * ((1 - fx) * grid[y1, x0] + fx * grid[y1, x1]))
    return torch.stack(out)


def _between(i: int, old: int, new: int) -> tuple[int, int, float]:
    place = max((i + 0.5) * old / new - 0.5, 0.0)
    low = int(place)
    return low, min(low + 1, old - 1), place - low


def loss(ours: list[Tensor], theirs: list[Tensor], kind: str) -> Tensor:
    """Saliency loss of one sample: squared error of normalised maps, over the number of taps."""
    total = ours[0].new_zeros(())
    for a, b in zip(ours, theirs, strict=True):
        x, y = normalised(a, kind), normalised(resized(b.detach().flatten(), len(a)), kind)
        if x is not None and y is not None:
            squares = (x - y) ** 2
            total = total + (squares.mean() if kind == "minmax" else squares.sum())
    return total / len(ours)


def smallest_gap(model: Any, images: Tensor, labels: Tensor, paths: list[str], method: str) -> float:
    """Distance to the nearest kink: sign and runner-up of the max over D, ReLU at 0, extremes."""
    gaps = []
    for image, label in zip(images, labels, strict=True):
        for before, m in _raw_maps(model, image, label, paths, method, pos_dtype=torch.float64):
            if method == "gradient":
                first, second = before.topk(2, dim=1).values.T
                gaps += [(first - second).min(), first.min()]
            elif method != "attention":
                gaps.append(before.abs().min())
            up = m.detach().sort().values
            if up[-1] == 0:  # all below the ReLU, by the gap above: flat there and around
                continue
            gaps.append(up[-1] - up[-2])
            if up[0] > 0 or method in (
                "gradient",
                "attention",
            ):  # zeros after the ReLU are a plateau, not a kink
                gaps.append(up[1] - up[0])
    return float(torch.stack(gaps).min().detach())


def kinds(model: nn.Module) -> dict[str, str]:
    """One parameter of every kind of tensor (names without block numbers), from the blocks in turn."""
    found: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        kind = ".".join("*" if part.isdigit() else part for part in name.split("."))
        found.setdefault(kind, []).append(name)
    return {kind: names[i % len(names)] for i, (kind, names) in enumerate(found.items())}
