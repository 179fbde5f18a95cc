"""timm students and teachers by name, and their weights."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from irkd_dist.distill import small_resnet  # noqa: F401 - timm knows it by name then
from irkd_dist.distill.paper import PAPER_MODELS
from irkd_dist.distill.weights import require_finite
from irkd_dist.errors import UserError, one_line

# what makes a transformer take images of any size, by the module of timm it is in
ANY_SIZE: dict[str, dict[str, Any]] = {
    "vision_transformer": {"dynamic_img_size": True},
    "deit": {"dynamic_img_size": True},
    "eva": {"dynamic_img_size": True},
    "swin_transformer": {"strict_img_size": False},
    "swin_transformer_v2": {"strict_img_size": False},
}


def timm_arguments(
    name: str,
    classes: int,
    patch: int | None = None,
    image_size: int | None = None,
    distilled: bool | None = False,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    options: dict[str, Any] | None = None,
) -> tuple[str, dict[str, Any]]:
    """timm's name of a model, and what `timm.create_model` is given beside it; as `create_model`."""
    arguments: dict[str, Any] = {"num_classes": classes}
    if name in PAPER_MODELS:
        plain, with_token, overrides = PAPER_MODELS[name]
        architecture = with_token if distilled else plain
        arguments |= overrides
    else:
        architecture = name
        if not timm.is_model(name):
            close = difflib.get_close_matches(name, [*PAPER_MODELS, *timm.list_models()], n=3)
            hint = (
                f"; did you mean {' or '.join(close)}?" if close else "; `timm.list_models()` has the names"
            )
            raise UserError(f"no model is named {name!r}{hint}")
    family = timm.model_entrypoint(architecture).__module__.removeprefix("timm.models.")
    cfg = timm.get_pretrained_cfg(architecture)
    sized = family in ANY_SIZE or (cfg is not None and cfg.fixed_input_size)
    arguments |= ANY_SIZE.get(family, {})
    if sized and image_size is not None:
        arguments["img_size"] = image_size
    if sized and patch is not None:
        arguments["patch_size"] = patch
    elif patch is not None:
        raise UserError(f"model {name!r} takes no patch size (patch={patch}); leave patch out, or write null")
    if dropout and family in ("vision_transformer", "deit", "eva"):
        arguments |= {"proj_drop_rate": dropout, "pos_drop_rate": dropout}
    elif dropout:
        arguments["drop_rate"] = dropout
    if drop_path:
        arguments["drop_path_rate"] = drop_path
    arguments |= options or {}
    return architecture, arguments


def create_model(
    name: str,
    *,
    classes: int,
    patch: int | None = None,
    image_size: int | None = None,
    distilled: bool | None = False,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    pretrained: bool = False,
    options: dict[str, Any] | None = None,
) -> nn.Module:
    """Create a student or teacher: one of the paper's models or any timm model by name.

    A ViT (DeiT, EVA-02, Swin) takes any image size: its position embeddings, made for `image_size`, are interpolated
    to each stage's resolution. Other transformers are made for `image_size` alone. `distilled` adds DeiT's
    distillation token and head (Touvron et al. 2021); None: as timm's name says.
    `dropout` acts on projections and position embeddings, `options` go to timm as they are.

    Raises:
        UserError: no such model, or timm refuses the arguments.
    """
    architecture, arguments = timm_arguments(
        name, classes, patch, image_size, distilled, dropout, drop_path, options
    )
    try:
        model = timm.create_model(architecture, pretrained=pretrained, **arguments)
    except (
        TypeError, ValueError, RuntimeError, AssertionError, LookupError, ArithmeticError, AttributeError, OSError,
        MemoryError,
    ) as error:  # fmt: skip
        shown = {key: value for key, value in arguments.items() if key != "pretrained_cfg_overlay"}
        hint = (
            f"; patch={patch} was asked for: without it the model keeps its own" if patch is not None else ""
        )
        raise UserError(
            f"timm cannot create {architecture!r} with {shown}: {one_line(error)}{hint}"
        ) from error
    if distilled is not None and distilled != is_distilled(model):
        has = "has" if is_distilled(model) else "has no"
        raise UserError(
            f"model {name!r} {has} distillation token, but distilled={distilled} was asked for; write distilled: "
            f"{str(is_distilled(model)).lower()}"
        )
    if distilled:
        model.set_distilled_training(True)  # type: ignore[operator]
    return model


def sizes_it_takes(model: nn.Module) -> str:
    """What to advise where a model does not take an image: nothing if it takes any size."""
    made_for_one = (getattr(model, "pretrained_cfg", None) or {}).get("fixed_input_size")
    if not made_for_one or type(model).__module__.removeprefix("timm.models.") in ANY_SIZE:
        return ""
    return (
        "; it is made for one size: train it at one resolution (fixed), or take a vit_, deit_, eva02_, swin_ or "
        "convolutional model"
    )


def is_distilled(model: nn.Module) -> bool:
    """Whether the model has a distillation head and so returns (class, distillation) logits in training."""
    return getattr(model, "head_dist", None) is not None


def patch_size(model: nn.Module) -> int | None:
    """Side of a patch in pixels; None for a model without patches (a convolutional one)."""
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "patch_size", None)
    if size is None:
        return None
    return int(size[0]) if isinstance(size, (tuple, list)) else int(size)


def inference_logits(output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """The logits used at inference, (B, K): of a distilled model, the mean of both heads (DeiT)."""
    return (output[0] + output[1]) / 2 if isinstance(output, tuple) else output


def without_fused_attention(model: nn.Module) -> nn.Module:
    """Switch timm's attention to explicit products: the fused kernels have no second derivative.

    PyTorch's own math backend would do, but on a CPU it computes in fp32; these products follow autocast.
    """
    for module in model.modules():
        if getattr(module, "fused_attn", False):
            module.fused_attn = False  # type: ignore[assignment]
    return model


def has_batch_norm(model: nn.Module) -> bool:
    """Whether it normalises over the batch, which takes two samples at least."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def channels_last(model: nn.Module) -> nn.Module:
    """Keep a convolutional model's weights as its kernels read them, in place; others are left as they are.

    Its outputs are the same up to rounding.
    """
    if patch_size(model) is None and any(isinstance(m, nn.Conv2d) for m in model.modules()):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def parameter_count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Load a full state dict.

    Raises:
        UserError: entries differ or are not finite; it names the first ones.
    """
    check_weights({k: v.shape for k, v in model.state_dict().items()}, weights, where, type(model).__name__)
    require_finite(weights, where)
    with torch.no_grad():
        model.load_state_dict(weights)


def check_weights(
    own: Mapping[str, torch.Size], weights: Mapping[str, Tensor], where: str, what: str = "the model"
) -> None:
    """Compare the shapes of a model's state dict with a file's.

    Raises:
        UserError: they differ; it names the first differing entries.
    """
    wrong = [k for k in own if k not in weights or weights[k].shape != own[k]]
    wrong += [k for k in weights if k not in own]
    if wrong:
        shown = ", ".join(
            f"{k} (model {tuple(own[k]) if k in own else 'none'}, "
            f"file {tuple(weights[k].shape) if k in weights else 'none'})"
            for k in wrong[:3]
        )
        raise UserError(f"{where} does not fit {what}: {len(wrong)} entries differ: {shown}")


def checkpoint_blocks(model: nn.Module) -> None:
    """Let a model's blocks keep no activations: a backward computes them again, with the same random draws.

    Not reentrant, so that gradients of gradients are right: saliency differentiates through them.

    Raises:
        UserError: the model has no blocks.
    """
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)):
        raise UserError(f"optim.checkpoint_blocks=true: {type(model).__name__} has no blocks; leave it out")
    for block in blocks:
        block.forward = functools.partial(_run_block, block, block.forward)


def _run_block(block: nn.Module, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    if not block.training:  # a tap may begin the graph within it
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def set_drop_path(model: nn.Module, rate: float, created: float) -> None:
    """Set the rate of drop path of a model that was created with `created`, the largest it may have."""
    for module in model.modules():
        if isinstance(module, DropPath) and created > 0:
            full = module.__dict__.setdefault("_created_with", module.drop_prob)
            module.drop_prob = full * rate / created
