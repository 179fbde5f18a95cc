"""timm students and teachers, and their taps: the places whose output saliency is computed from."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from irkd_dist.distill import saliency
from irkd_dist.distill.paper import PAPER_MODELS
from irkd_dist.distill.weights import require_finite
from irkd_dist.errors import UserError

Method = Literal["gradient", "grad_cam", "hirescam", "attention"]
# what makes a transformer take images of any size, by the module of timm it is in
ANY_SIZE: dict[str, dict[str, Any]] = {
    "vision_transformer": {"dynamic_img_size": True},
    "deit": {"dynamic_img_size": True},
    "eva": {"dynamic_img_size": True},
    "swin_transformer": {"strict_img_size": False},
    "swin_transformer_v2": {"strict_img_size": False},
}


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
            f"timm cannot create {architecture!r} with {shown}: {' '.join(str(error).split())}{hint}"
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


@dataclass(frozen=True)
class Tap:
    """One place in a model whose output gives a saliency map."""

    path: str  # module whose output is read, as in model.get_submodule(path)
    void: bool = False  # its map is zero or constant whatever the image: see `_is_void`


def tap_pairs(
    student: nn.Module, teacher: nn.Module, spec: str | list[Any], method: Method, strict_paper: bool = False
) -> list[tuple[Tap, Tap]]:
    """Resolve the configured taps to pairs (student tap, teacher tap).

    `spec` is `"all"` or a list. An item that is a pair `[s, t]` is taken as written; a single name (`first`,
    `second`, `last`) is resolved in each model; a single block number of the student is paired in proportion
    with the teacher's depth, as are all the student's blocks under `"all"`.

    Raises:
        UserError: a tap that a model does not have, or one where the method is not defined.
    """
    if isinstance(spec, str) and spec != "all":
        raise UserError(f"saliency.taps={spec!r}: give a list such as [first, second, last], or all")
    items = list(range(_depth(student, "all", "student"))) if spec == "all" else list(spec)
    pairs = []
    for item in items:
        if isinstance(item, list):
            if len(item) != 2:
                raise UserError(f"saliency.taps: {item} is not a pair [student tap, teacher tap]")
            first, second = item
        elif isinstance(item, int):
            depth, teacher_depth = _depth(student, item, "student"), _depth(teacher, item, "teacher")
            first, second = item, round(item * (teacher_depth - 1) / max(depth - 1, 1))
            if spec == "all" and item == depth - 1:
                first, second = "last", "last"
        else:
            first = second = item
        pairs.append(
            (
                resolve_tap(student, first, method, "student", strict_paper),
                resolve_tap(teacher, second, method, "teacher", strict_paper),
            )
        )
    return pairs


def resolve_tap(
    model: nn.Module, name: int | str, method: Method, role: str, strict_paper: bool = False
) -> Tap:
    """Resolve one tap name to a module path.

    Names: a block number, `first`, `second`, `last`, a block's `norm1` as `"3.norm1"`, `norm` (the final norm), or
    any module path. Where the last block's output is void (under every gradient method with a class-token or
    distillation head, see `_is_void`), `last` is that block's `norm1` output; `strict_paper` keeps the block's output.
    """
    text = str(name)
    if text in ("first", "second", "last") or re.fullmatch(r"\d+(\.norm1)?", text):
        depth = _depth(model, name, role)
        number, _, point = text.partition(".")
        block = {"first": 0, "second": 1, "last": depth - 1}.get(number)
        if block is None:
            block = int(number)
        if block >= depth:
            raise UserError(f"saliency.taps: {name!r}: the {role} has blocks 0 to {depth - 1}")
        if method == "attention":
            path = f"blocks.{block}.attn.qkv"
        elif point or (text == "last" and not strict_paper and _is_void(model, f"blocks.{block}", method)):
            path = f"blocks.{block}.norm1"
        else:
            path = f"blocks.{block}"
    else:
        path = text
    try:
        module = model.get_submodule(path)
    except AttributeError:
        names = ", ".join(n for n, _ in model.named_children())
        raise UserError(f"saliency.taps: the {role} has no module {path!r}; it has {names}") from None
    if method == "attention":
        _check_attention(model, path, role)
    elif "NHWC" in (getattr(model, "output_fmt", None), getattr(module, "output_fmt", None)):
        kind = f"{type(model).__name__}.{type(module).__name__}"
        raise UserError(f"saliency.taps: {role} {kind}: features in NHWC layout are not supported")
    return Tap(path, void=method != "attention" and _is_void(model, path, method))


def _depth(model: nn.Module, name: object, role: str) -> int:
    blocks = getattr(model, "blocks", None)
    if blocks is None:
        names = ", ".join(n for n, _ in model.named_children())
        raise UserError(
            f"saliency.taps: {name!r} needs a {role} with blocks, and {type(model).__name__} has none: "
            f"pair taps by module path, as [student tap, teacher tap] (children of the {role}: {names})"
        )
    return len(blocks)


def reads_only_prefix_tokens(model: nn.Module) -> bool:
    """Whether the head reads the class or distillation token alone, never the patch tokens."""
    return getattr(model, "num_prefix_tokens", 0) > 0 and getattr(model, "global_pool", "") == "token"


def _is_void(model: nn.Module, path: str, method: Method) -> bool:
    """Whether a ViT's head and the method leave a tap without a map, whatever the image.

    Zero: what comes after the last attention, where the head reads the prefix tokens alone.
    Zero but for rounding: `hirescam` where patch tokens are read through a norm alone, because a norm ignores its
    input's length, so that the sum of G * A vanishes. Constant: `gradient` where the head reads the tokens' mean.
    """
    blocks: Any = getattr(model, "blocks", ())
    last, before = f"blocks.{len(blocks) - 1}", f"blocks.{len(blocks) - 2}"
    final_norm = not isinstance(getattr(model, "norm", None), (nn.Identity, type(None)))
    prenorm = len(blocks) > 0 and isinstance(blocks[-1], Block)
    if reads_only_prefix_tokens(model):
        inside = path.removeprefix(last).removeprefix(".")
        after = path.startswith(last) and not re.match(r"norm1|attn\.(?!proj|norm)", inside)
        return path == "norm" or after or (method == "hirescam" and prenorm and path == before)
    if method == "hirescam":
        return prenorm and final_norm and path == last
    pooled = getattr(model, "global_pool", "") == "avg" and hasattr(model, "fc_norm")
    return method == "gradient" and pooled and (path == "norm" or (path == last and not final_norm))


def _check_attention(model: nn.Module, path: str, role: str) -> None:
    if not getattr(model, "num_prefix_tokens", 0) or getattr(model, "cls_token", None) is None:
        raise UserError(
            f"saliency.method=attention reads the class token's attention row, and the {role} "
            f"({type(model).__name__}) has no class token; use gradient, grad_cam or hirescam"
        )
    attention = model.get_submodule(path.removesuffix(".qkv"))
    # others (BEiT, EVA) add positions inside the attention, and do not call their qkv
    if not path.endswith(".qkv") or not isinstance(attention, Attention):
        raise UserError(
            f"saliency.method=attention: {path!r} of the {role} is no attention layer with a joint qkv"
        )


def class_token_query_keys(model: nn.Module, path: str, qkv: Tensor) -> tuple[Tensor, Tensor, float]:
    """Split a joint projection (B, T, 3 H d) into the class token's query (B, H, d) and the keys (B, H, T, d)."""
    attention: Any = model.get_submodule(path.removesuffix(".qkv"))
    batch, tokens, _ = qkv.shape
    query, key, _ = qkv.reshape(batch, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    return attention.q_norm(query[:, :, 0]), attention.k_norm(key), float(attention.scale)


def tapped_forward(
    model: nn.Module, images: Tensor, paths: list[str], *, leaf: bool = False
) -> tuple[Tensor | tuple[Tensor, Tensor], list[Tensor]]:
    """Run the model and keep the outputs of the tapped modules.

    With `leaf` (a frozen model) the first tapped output starts the graph, so that the gradient of the score with
    respect to the taps costs nothing before it.

    Returns:
        The model's output, and the features in the order of `paths`: (B, T, D) tokens or (B, D, h, w).
    """
    kept: dict[str, Tensor] = {}

    def keep(path: str):
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            if leaf and not output.requires_grad:
                output = output.detach().requires_grad_()
            kept[path] = output
            return output

        return hook

    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in dict.fromkeys(paths)]
    try:
        output = model(images)
    finally:
        for handle in handles:
            handle.remove()
    return output, [kept[path] for path in paths]


def has_batch_norm(model: nn.Module) -> bool:
    """Whether it normalises over the batch, which takes two samples at least."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


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


def forward_with_maps(
    model: nn.Module,
    images: Tensor,
    paths: list[str],
    method: Method,
    target: Tensor,
    *,
    frozen: bool,
    context: AbstractContextManager[object] | None = None,
) -> tuple[Tensor | tuple[Tensor, Tensor], list[Tensor]]:
    """Run student or teacher and compute one saliency map a tap: the same function for both.

    images (B, 3, r, r), target (B,) class numbers or (B, K) probabilities. A `frozen` model (the teacher) gives
    detached, first-order maps; otherwise the maps can be differentiated again. `context` goes around the inner
    gradient (`saliency.feature_gradients`).

    Returns:
        The model's output, and for each path a map (B, N) in fp32, not normalised.
    """
    needs_gradient = method != "attention"
    with torch.set_grad_enabled(needs_gradient or not frozen):
        output, features = tapped_forward(model, images, paths, leaf=frozen and needs_gradient)
        if not needs_gradient:
            maps = [
                saliency.attention_map(*class_token_query_keys(model, path, qkv), _prefix_tokens(model))
                for path, qkv in zip(paths, features, strict=True)
            ]
            return output, maps
        closed = [path == "norm" and _mean_pooled_linear(model) for path in paths]
        differentiated = [f for f, known in zip(features, closed, strict=True) if not known]
        gradients = iter(
            saliency.feature_gradients(
                saliency.class_score(inference_logits(output), target),
                differentiated,
                create_graph=not frozen,
                context=context,
            )
            if differentiated
            else []
        )
        maps = []
        for feature, known in zip(features, closed, strict=True):
            feature_tokens = saliency.patch_tokens(feature, _prefix_tokens(model))
            if known:
                weight: Tensor = model.head.weight  # type: ignore[union-attr,assignment]
                gradient = saliency.linear_head_gradient(weight, target, feature_tokens.shape[1])
            else:
                gradient = saliency.patch_tokens(next(gradients), _prefix_tokens(model))
            maps.append(saliency.GRADIENT_MAPS[method](feature_tokens, gradient))
    if frozen:
        return _detached(output), [m.detach() for m in maps]
    return output, maps


def _prefix_tokens(model: nn.Module) -> int:
    return int(getattr(model, "num_prefix_tokens", 0))


def _mean_pooled_linear(model: nn.Module) -> bool:
    """Whether the logits are linear in the mean of the final norm's patch tokens."""
    drop = getattr(getattr(model, "head_drop", None), "p", 0.0)
    return (
        getattr(model, "global_pool", "") == "avg"
        and not getattr(model, "pool_include_prefix", False)
        and isinstance(getattr(model, "fc_norm", None), nn.Identity)
        and isinstance(getattr(model, "head", None), nn.Linear)
        and (drop == 0.0 or not model.training)
    )


def _detached(output: Tensor | tuple[Tensor, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
    return tuple(o.detach() for o in output) if isinstance(output, tuple) else output.detach()  # type: ignore[return-value]
