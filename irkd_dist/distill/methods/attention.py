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
    # others (BEiT, EVA) add positions inside the attention, and do not call their qkv
    layers = [f"{name}.qkv" for name, module in model.named_modules() if isinstance(module, Attention)]
    token = getattr(model, "num_prefix_tokens", 0) and getattr(model, "cls_token", None) is not None
    if not token or not layers:
        lacks = "no attention layer with a joint qkv" if token else "no class token"
        what = f"class token's attention row, and the {role} ({type(model).__name__}) has {lacks}"
        raise UserError(f"saliency.method=attention reads the {what}; use gradient, grad_cam or hirescam")
    if path and path not in layers:
        what = f"{path!r} of the {role} is no attention layer with a joint qkv"
        raise UserError(f"saliency.method=attention: {what}, as {layers[0]!r} is")


def saliency_map(model: nn.Module, path: str, features: Tensor) -> Tensor:
    """The joint projection (B, T, 3 H d) -> softmax over all tokens, patch columns: (B, N)."""
    layer: Any = model.get_submodule(path.removesuffix(".qkv"))
    batch, tokens, _ = features.shape
    query, key, _ = features.reshape(batch, tokens, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    query, key = layer.q_norm(query[:, :, 0]), layer.k_norm(key)
    with torch.autocast(key.device.type, enabled=False):  # it would take the product back to bf16
        logits = (at_least_fp32(key) @ at_least_fp32(query)[..., None]).squeeze(-1) * float(layer.scale)
    return logits.softmax(dim=-1)[:, :, int(model.num_prefix_tokens) :].mean(dim=1)  # type: ignore[arg-type]
