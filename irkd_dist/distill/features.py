"""Alignment of a student's features with its teacher's through a learned linear projection (Romero et al. 2015).

The projections are a submodule of the student, so that every engine trains, averages and saves them with it; what
reads a checkpoint for anything but going on with it leaves them out (`checkpoint.without`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from irkd_dist.distill import places
from irkd_dist.distill.losses import at_least_fp32
from irkd_dist.errors import UserError
from irkd_dist.runfolder import PROJECTIONS

KEEPERS = "_irkd_keepers"  # attribute of a model: its keepers by path


class Keeper:
    """A forward hook that stays: while it is open it keeps what its module gives, once for each forward."""

    def __init__(self) -> None:
        self.open = False
        self.kept: list[Tensor] = []

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.open:
            self.kept.append(output)


def put_keepers(model: nn.Module, paths: tuple[str, ...]) -> list[Keeper]:
    """Put keepers at module paths into a model, where it has none yet; returns those of `paths`."""
    keepers: dict[str, Keeper] | None = getattr(model, KEEPERS, None)
    if keepers is None:  # asked this way since torch 2.11 cannot compile __dict__'s methods
        keepers = {}
        setattr(model, KEEPERS, keepers)
    for path in paths:
        if path not in keepers:
            keepers[path] = Keeper()
            model.get_submodule(path).register_forward_hook(keepers[path])
    return [keepers[path] for path in paths]


@contextmanager
def keeping(model: nn.Module, paths: tuple[str, ...]) -> Iterator[list[Keeper]]:
    """Inside, the modules at `paths` keep what they give: read it with `grids` before leaving."""
    keepers = put_keepers(model, paths)
    for keeper in keepers:
        keeper.open = True
    try:
        yield keepers
    finally:
        for keeper in keepers:
            keeper.open, keeper.kept = False, []


@contextmanager
def closed(keepers: list[Keeper], inside: AbstractContextManager[object]) -> Iterator[None]:
    """Inside, keepers keep nothing: a gradient computes checkpointed blocks again. `inside` is entered too."""
    for keeper in keepers:
        keeper.open = False
    try:
        with inside:
            yield
    finally:
        for keeper in keepers:
            keeper.open = True


def grids(
    model: nn.Module, paths: tuple[str, ...], keepers: list[Keeper], size: tuple[int, int]
) -> list[Tensor]:
    """What keepers have, of all forwards as one batch: patch tokens (B, h, w, D) of images of `size`, one a path.

    Raises:
        UserError: a module is not called, gives no tensor, or no patch tokens.
    """
    found = []
    for path, keeper in zip(paths, keepers, strict=True):
        if not keeper.kept or not isinstance(keeper.kept[0], Tensor):
            what = (
                "is not called" if not keeper.kept else f"gives a {type(keeper.kept[0]).__name__}, no tensor"
            )
            raise UserError(
                f"loss.features.taps: {path!r} of {type(model).__name__} {what}; tap another module"
            )
        tokens, grid = places.tokens(model, path, torch.cat(keeper.kept), size)
        found.append(tokens.unflatten(1, grid))
    return found


def pairs(student: nn.Module, teacher: nn.Module, spec: list[Any]) -> list[tuple[str, str]]:
    """Resolve `loss.features.taps` to module paths (student's, teacher's), as `taps.tap_pairs` does for maps.

    An item is `first`, `second`, `last`, a number of a block or stage, a module path, or a pair of them; a number
    alone is paired in proportion with the teacher's depth.

    Raises:
        UserError: a tap that a model does not have.
    """
    found = []
    for item in spec:
        if isinstance(item, list) and len(item) != 2:
            raise UserError(f"loss.features.taps: {item} is not a pair [student tap, teacher tap]")
        first, second = item if isinstance(item, list) else (item, item)
        if isinstance(item, int):
            ours, theirs = (
                len(places.places(m, item, r)) for m, r in ((student, "student"), (teacher, "teacher"))
            )
            second = round(item * (theirs - 1) / max(ours - 1, 1))
        found.append((_path(student, first, "student"), _path(teacher, second, "teacher")))
    return found


def _path(model: nn.Module, name: int | str, role: str) -> str:
    if isinstance(name, str) and name not in ("first", "second", "last"):
        if name not in dict(model.named_modules()):
            names = ", ".join(n for n, _ in model.named_children())
            raise UserError(f"loss.features.taps: the {role} has no module {name!r}; it has {names}")
        return name
    found = places.places(model, name, role)
    number = {"first": 0, "second": 1, "last": len(found) - 1}.get(str(name), name)
    if not isinstance(number, int) or not 0 <= number < len(found):
        raise UserError(f"loss.features.taps: {name!r}: the {role} has blocks 0 to {len(found) - 1}")
    return found[number]


def widths(
    model: nn.Module, paths: tuple[str, ...], side: int, autocast: torch.dtype | None = None
) -> list[int]:
    """Channels of the features at each path; runs the model on one blank image of `side` pixels.

    autocast: of a frozen teacher, some of whose weights are in that type.
    """
    some, training = next(model.parameters()), model.training
    device, dtype = some.device, some.dtype if autocast is None else torch.float32
    cast = torch.autocast(device.type, autocast, enabled=autocast is not None)
    with torch.no_grad(), cast, keeping(model.eval(), paths) as kept:
        model(torch.zeros(1, 3, side, side, device=device, dtype=dtype))
        found = [f.shape[3] for f in grids(model, paths, kept, (side, side))]
    model.train(training)
    return found


def attach(student: nn.Module, ours: list[int], theirs: list[int], seed: int) -> None:
    """Give a student a linear projection for each pair, from its channels to the teacher's; a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        linear = [nn.Linear(a, b) for a, b in zip(ours, theirs, strict=True)]
    student.add_module(PROJECTIONS, nn.ModuleList(linear))


def loss(
    student: list[Tensor], teacher: list[Tensor], projections: nn.Module, kind: Literal["cosine", "mse"]
) -> Tensor:
    """Distance of projected student features from the teacher's, averaged over patches and pairs: (B,) in fp32.

    student, teacher: (B, h, w, D) a pair; the teacher's are resized bilinearly to the student's grid.
    `cosine`: 1 - cos, a patch; `mse`: squared error, averaged over the channels.
    """
    total = at_least_fp32(student[0]).new_zeros(len(student[0]))
    layers: Any = projections
    for ours, theirs, layer in zip(student, teacher, layers, strict=True):
        mine = at_least_fp32(layer(ours))
        other = resize(at_least_fp32(theirs.detach()), (ours.shape[1], ours.shape[2]))
        total = total + _error(mine, other, kind).mean((1, 2))
    return total / len(student)


def _error(ours: Tensor, theirs: Tensor, kind: str) -> Tensor:
    return (
        1 - F.cosine_similarity(ours, theirs, dim=3) if kind == "cosine" else (ours - theirs).square().mean(3)
    )


def resize(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize (B, h', w', D) bilinearly to (B, *grid, D)."""
    if tuple(features.shape[1:3]) == grid:
        return features
    channels_first = features.permute(0, 3, 1, 2)
    return F.interpolate(channels_first, size=[*grid], mode="bilinear", align_corners=False).permute(
        0, 2, 3, 1
    )
