"""Taps: the places in a model whose output saliency is computed from, and the forward that gives maps."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo.config  # timm has imported it already
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from irkd_dist.distill import methods, saliency
from irkd_dist.distill.models import inference_logits
from irkd_dist.distill.points import Output, put_taps, tapped_forward
from irkd_dist.errors import UserError

# torch.compile then takes the inner gradient into the graph of the forward, the outer backward through it included
if hasattr(torch._dynamo.config, "trace_autograd_ops"):
    torch._dynamo.config.trace_autograd_ops = True


@dataclass(frozen=True)
class Tap:
    """One place in a model whose output gives a saliency map."""

    path: str  # module whose output is read, as in model.get_submodule(path)
    void: bool = False  # its map is zero or constant whatever the image: see `reading`


def tap_pairs(
    student: nn.Module, teacher: nn.Module, spec: str | list[Any], method: str, strict_paper: bool = False
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
    items = list(range(depth(student, "all", "student"))) if spec == "all" else list(spec)
    pairs = []
    for item in items:
        if isinstance(item, list):
            if len(item) != 2:
                raise UserError(f"saliency.taps: {item} is not a pair [student tap, teacher tap]")
            first, second = item
        elif isinstance(item, int):
            blocks, teacher_blocks = depth(student, item, "student"), depth(teacher, item, "teacher")
            if not 0 <= item < blocks:
                raise UserError(f"saliency.taps: {item}: the student has blocks 0 to {blocks - 1}")
            first, second = item, round(item * (teacher_blocks - 1) / max(blocks - 1, 1))
            if spec == "all" and item == blocks - 1:
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


def resolve_tap(model: nn.Module, name: int | str, method: str, role: str, strict_paper: bool = False) -> Tap:
    """Resolve one tap name to a module path.

    Names: a block number, `first`, `second`, `last`, a block's `norm1` as `"3.norm1"`, `norm` (the final norm), or
    any module path. Where the last block's output is void (under every gradient method with a class-token or
    distillation head, see `reading`), `last` is that block's `norm1` output; `strict_paper` keeps the block's output.
    """
    text = str(name)
    if text in ("first", "second", "last") or re.fullmatch(r"\d+(\.norm1)?", text):
        blocks = depth(model, name, role)
        number, _, point = text.partition(".")
        block = {"first": 0, "second": 1, "last": blocks - 1}.get(number)
        if block is None:
            block = int(number)
        if block >= blocks:
            raise UserError(f"saliency.taps: {name!r}: the {role} has blocks 0 to {blocks - 1}")
        how = methods.load(method)
        if not how.INNER_GRADIENT:
            path = f"blocks.{block}{how.BLOCK_TAP}"
        elif point or (text == "last" and not strict_paper and _is_void(model, f"blocks.{block}", method)):
            path = f"blocks.{block}.norm1"
        else:
            path = f"blocks.{block}"
    else:
        path = text
    try:
        model.get_submodule(path)
    except AttributeError:
        names = ", ".join(n for n, _ in model.named_children())
        raise UserError(f"saliency.taps: the {role} has no module {path!r}; it has {names}") from None
    how = methods.load(method)
    if not how.INNER_GRADIENT:
        how.check(model, path, role)
    return Tap(path, void=_is_void(model, path, method))


def depth(model: nn.Module, name: object, role: str) -> int:
    """Number of a transformer's blocks; `name`, the tap that asks, and `role` go into the error where it has none."""
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


def reading(model: nn.Module, path: str) -> str:
    """How the patch tokens at a tap of a ViT reach the logits.

    `unread`: not at all, after the last attention where the head reads the prefix tokens alone. `norm`: through a norm
    alone, which ignores its input's length. `mean`: the head reads their mean. `other`: any other way, or no ViT.
    """
    blocks: Any = getattr(model, "blocks", ())
    last, before = f"blocks.{len(blocks) - 1}", f"blocks.{len(blocks) - 2}"
    final_norm = not isinstance(getattr(model, "norm", None), (nn.Identity, type(None)))
    prenorm = len(blocks) > 0 and isinstance(blocks[-1], Block)
    if reads_only_prefix_tokens(model):
        inside = path.removeprefix(last).removeprefix(".")
        after = path.startswith(last) and not re.match(r"norm1|attn\.(?!proj|norm)", inside)
        if path == "norm" or after:
            return "unread"
        return "norm" if prenorm and path == before else "other"
    if prenorm and final_norm and path == last:
        return "norm"
    pooled = getattr(model, "global_pool", "") == "avg" and hasattr(model, "fc_norm")
    return "mean" if pooled and (path == "norm" or (path == last and not final_norm)) else "other"


def _is_void(model: nn.Module, path: str, method: str) -> bool:
    how = methods.load(method)
    return how.INNER_GRADIENT and reading(model, path) in how.VOID


# ---- maps


class MissingGradient(UserError):
    """The score does not depend on a tap that was not known to be void."""


def _missing(path: str) -> MissingGradient:
    return MissingGradient(
        f"saliency.taps: the class score does not depend on the output of {path!r}: there is no gradient to make a "
        "map of; tap another module"
    )


def feature_gradients(
    score: Tensor,
    features: list[Tensor],
    paths: list[str],
    *,
    create_graph: bool,
    context: AbstractContextManager[object] | None = None,
) -> list[Tensor]:
    """Differentiate the score with respect to each tap's features: the only inner gradient of the project.

    `create_graph` keeps the graph for the second derivative (the student in training). `context` is what an engine
    needs around the inner gradient, such as keeping sharded parameters gathered.

    Raises:
        MissingGradient: the score does not depend on a feature.
    """
    if not score.requires_grad:
        raise _missing(paths[0])
    with nullcontext() if context is None else context:
        gradients = torch.autograd.grad(
            score, features, create_graph=create_graph, retain_graph=create_graph, allow_unused=True
        )
    for path, gradient in zip(paths, gradients, strict=True):
        if gradient is None:
            raise _missing(path)
    return list(gradients)


def token_grid(model: nn.Module, path: str, tokens: int, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a tap's patch tokens on images of `size` (height, width).

    Raises:
        UserError: they form no grid of the image's shape.
    """
    height, width = size
    patch: Any = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is not None:
        down, right = patch if isinstance(patch, (tuple, list)) else (patch, patch)
        rows, columns = -(-height // down), -(-width // right)
        if rows * columns == tokens:
            return rows, columns
    rows = max(round((tokens * height / width) ** 0.5), 1)
    columns = tokens // rows
    if tokens == 0 or rows * columns != tokens or rows * width != columns * height:
        raise UserError(
            f"saliency.taps: {path!r} gives {tokens} patch tokens, which form no grid on images of {height} x {width} "
            "pixels; tap another module"
        )
    return rows, columns


def forward_with_maps(
    model: nn.Module,
    images: Tensor,
    paths: list[str],
    method: str,
    target: Tensor,
    *,
    frozen: bool,
    context: AbstractContextManager[object] | None = None,
) -> tuple[Output, list[Tensor]]:
    """Run student or teacher and compute one saliency map a tap: the same function for both.

    images (B, 3, r, r), target (B,) class numbers or (B, K) probabilities. A `frozen` model (the teacher) gives
    detached, first-order maps; otherwise the maps can be differentiated again. `context` goes around the inner
    gradient (`feature_gradients`).

    Returns:
        The model's output, and for each path a map (B, h, w) in fp32, not normalised.

    Raises:
        MissingGradient: the score does not depend on a tap.
        UserError: a tap gives no patch tokens, or none that form a grid.
    """
    how, size = methods.load(method), (images.shape[2], images.shape[3])
    if not how.INNER_GRADIENT:
        with torch.set_grad_enabled(not frozen):
            output, features = tapped_forward(model, images, paths)
            flat = [how.saliency_map(model, path, f) for path, f in zip(paths, features, strict=True)]
            maps = [
                m.unflatten(1, token_grid(model, path, m.shape[1], size))
                for path, m in zip(paths, flat, strict=True)
            ]
        return output, maps
    with torch.enable_grad():
        output, features = tapped_forward(model, images, paths)
        closed = [path == "norm" and _mean_pooled_linear(model) for path in paths]
        differentiated = [i for i, known in enumerate(closed) if not known]
        gradients: dict[int, Tensor] = {}
        if differentiated:
            score = saliency.class_score(inference_logits(output), target)
            asked, where = [features[i] for i in differentiated], [paths[i] for i in differentiated]
            found = feature_gradients(score, asked, where, create_graph=not frozen, context=context)
            gradients = dict(zip(differentiated, found, strict=True))
        maps = []
        for i, (path, feature) in enumerate(zip(paths, features, strict=True)):
            tokens, grid = _patches(model, path, feature, size)
            if i in gradients:
                gradient, _ = _patches(model, path, gradients[i], size)
            else:
                weight: Tensor = model.head.weight  # type: ignore[union-attr,assignment]
                gradient = saliency.linear_head_gradient(weight, target, tokens.shape[1])
            maps.append(how.saliency_map(tokens, gradient).unflatten(1, grid))
    if frozen:
        return _detached(output), [m.detach() for m in maps]
    return output, maps


def _patches(
    model: nn.Module, path: str, features: Tensor, size: tuple[int, int]
) -> tuple[Tensor, tuple[int, int]]:
    """Patch tokens (B, N, D) of a tap's features, and their rows and columns."""
    prefix = int(getattr(model, "num_prefix_tokens", 0))
    if features.ndim == 4:
        last = put_taps(model, [path])[path].is_channels_last(features.shape)
        grid = features.shape[1:3] if last else features.shape[2:4]
        return saliency.patch_tokens(features, prefix, last), (grid[0], grid[1])
    if features.ndim != 3:
        raise UserError(f"saliency.taps: {path!r} gives {tuple(features.shape)}, no patch tokens and no grid")
    tokens = saliency.patch_tokens(features, prefix)
    return tokens, token_grid(model, path, tokens.shape[1], size)


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


def _detached(output: Output) -> Output:
    return tuple(o.detach() for o in output) if isinstance(output, tuple) else output.detach()  # type: ignore[return-value]
