"""The class token's attention row: patch columns, mean over heads (the notebook of the paper's best run)."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn

from irkd_dist.distill.losses import at_least_fp32
from irkd_dist.errors import UserError

INNER_GRADIENT = False
BLOCK_TAP = ".attn.qkv"


def check(model: nn.Module, path: str, role: str) -> None:
    """Refuse a model without a class token, and a module that is no joint projection of an attention layer."""
    if not getattr(model, "num_prefix_tokens", 0) or getattr(model, "cls_token", None) is None:
        raise UserError(
            f"saliency.method=attention reads the class token's attention row, and the {role} "
            f"({type(model).__name__}) has no class token; use gradient, grad_cam or hirescam"
        )
    # others (BEiT, EVA) add positions inside the attention, and do not call their qkv
    layers = {f"{name}.qkv" for name, module in model.named_modules() if isinstance(module, Attention)}
    if not layers:
        raise UserError(
            f"saliency.method=attention: the {role} ({type(model).__name__}) has no attention layer with a joint qkv, "
            "whose row of the class token could be read; use gradient, grad_cam or hirescam"
        )
    if path and path not in layers:
        raise UserError(
            f"saliency.method=attention: {path!r} of the {role} is no attention layer with a joint qkv; it has "
            f"{', '.join(sorted(layers)[:3])}, ..."
        )


def saliency_map(model: nn.Module, path: str, features: Tensor) -> Tensor:
    """The joint projection (B, T, 3 H d) -> softmax over all tokens, patch columns: (B, N)."""
    layer: Any = model.get_submodule(path.removesuffix(".qkv"))
    batch, tokens, _ = features.shape
    query, key, _ = features.reshape(batch, tokens, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    query, key = layer.q_norm(query[:, :, 0]), layer.k_norm(key)
    with torch.autocast(key.device.type, enabled=False):  # it would take the product back to bf16
        logits = (at_least_fp32(key) @ at_least_fp32(query)[..., None]).squeeze(-1) * float(layer.scale)
    return logits.softmax(dim=-1)[:, :, int(model.num_prefix_tokens) :].mean(dim=1)  # type: ignore[arg-type]
