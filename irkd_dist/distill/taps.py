"""Taps: the places in a model whose output saliency is computed from, and the forward that gives maps."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo.config  # timm has imported it already
from torch import Tensor, nn

from irkd_dist.distill import methods, places, saliency
from irkd_dist.distill.models import inference_logits
from irkd_dist.distill.points import Output, put_taps, tapped_forward  # noqa: F401 - put_taps
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
    student: nn.Module, teacher: nn.Module, spec: str | list[Any], method: str, strict_paper: bool = False,
    sizes: tuple[int | None, int | None] = (None, None),
) -> list[tuple[Tap, Tap]]:  # fmt: skip
    """Resolve the configured taps to pairs (student tap, teacher tap).

    `spec` is `"all"` or a list. An item that is a pair `[s, t]` is taken as written; a single name (`first`,
    `second`, `last`) is resolved in each model; a single block number of the student is paired in proportion
    with the teacher's depth, as are all the student's blocks under `"all"`. sizes: side in pixels of the images that
    each sees (None: what it is made for).

    Raises:
        UserError: a tap that a model does not have, or one where the method is not defined.
    """
    if isinstance(spec, str) and spec != "all":
        raise UserError(f"saliency.taps={spec!r}: give a list such as [first, second, last], or all")
    for model, role in ((student, "student"), (teacher, "teacher")):
        methods.check(model, method, role)
    items = list(range(len(places.places(student, "all", "student")))) if spec == "all" else list(spec)
    pairs = []
    for item in items:
        if isinstance(item, list):
            if len(item) != 2:
                raise UserError(f"saliency.taps: {item} is not a pair [student tap, teacher tap]")
            first, second = item
        elif isinstance(item, int):
            blocks = len(places.places(student, item, "student"))
            teacher_blocks = len(places.places(teacher, item, "teacher"))
            if not 0 <= item < blocks:
                raise UserError(f"saliency.taps: {item}: the student has blocks 0 to {blocks - 1}")
            first, second = item, round(item * (teacher_blocks - 1) / max(blocks - 1, 1))
            if spec == "all" and item == blocks - 1:
                first, second = "last", "last"
        else:
            first = second = item
        pairs.append(
            (
                resolve_tap(student, first, method, "student", strict_paper, sizes[0]),
                resolve_tap(teacher, second, method, "teacher", strict_paper, sizes[1]),
            )
        )
    return pairs


def resolve_tap(
    model: nn.Module, name: int | str, method: str, role: str, strict_paper: bool = False, size: int | None = None
) -> Tap:  # fmt: skip
    """Resolve one tap name to a module path.

    Names: a block or stage number, `first`, `second`, `last`, a block's `norm1` as `"3.norm1"`, `norm` (the final
    norm), or any module path. Where the last block's output is void (under every gradient method with a class-token or
    distillation head, see `places.readings`), `last` is that block's `norm1` output, or else the last block or stage
    that is not; `strict_paper` keeps the block's output. size: as `tap_pairs`.
    """
    text = str(name)
    how = methods.load(method)
    if text in ("first", "second", "last") or re.fullmatch(r"\d+(\.norm1)?", text):
        blocks = places.places(model, name, role)
        number, _, point = text.partition(".")
        block = {"first": 0, "second": 1, "last": len(blocks) - 1}.get(number)
        if block is None:
            block = int(number)
        if block >= len(blocks):
            raise UserError(f"saliency.taps: {name!r}: the {role} has blocks 0 to {len(blocks) - 1}")
        path = blocks[block]
        if not how.INNER_GRADIENT:
            path += how.BLOCK_TAP
        elif point:
            path += ".norm1"
        elif text == "last" and not strict_paper:
            path = _last(model, blocks, method, size)
    else:
        path = text
    try:
        model.get_submodule(path)
    except AttributeError:
        names = ", ".join(n for n, _ in model.named_children())
        raise UserError(f"saliency.taps: the {role} has no module {path!r}; it has {names}") from None
    if not how.INNER_GRADIENT:
        how.check(model, path, role)
    return Tap(path, void=_is_void(model, path, method, size))


def _last(model: nn.Module, blocks: list[str], method: str, size: int | None) -> str:
    """The last place with a map: of the last block, of its norm1, of the block before, and so on."""
    modules = dict(model.named_modules())
    for path in reversed(blocks):
        inside = f"{path}.norm1"
        for candidate in (path, *([inside] if inside in modules else [])):
            if not _is_void(model, candidate, method, size):
                return candidate
    return blocks[-1]


def _is_void(model: nn.Module, path: str, method: str, size: int | None) -> bool:
    how = methods.load(method)
    return how.INNER_GRADIENT and bool(places.readings(model, path, size) & {*how.VOID})


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
                m.unflatten(1, places.token_grid(model, path, m.shape[1], size))
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
            tokens, grid = places.tokens(model, path, feature, size)
            if i in gradients:
                gradient, _ = places.tokens(model, path, gradients[i], size)
            else:
                weight: Tensor = model.head.weight  # type: ignore[union-attr,assignment]
                gradient = saliency.linear_head_gradient(weight, target, tokens.shape[1])
            maps.append(how.saliency_map(tokens, gradient).unflatten(1, grid))
    if frozen:
        return _detached(output), [m.detach() for m in maps]
    return output, maps


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
