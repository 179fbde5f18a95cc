"""Trained networks: what measuring, reporting, exporting and teaching need of one, from its folder alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from irkd_dist import checkpoint, runfolder, typed
from irkd_dist import config as configuration
from irkd_dist.config import Config
from irkd_dist.data import shards
from irkd_dist.data.geometry import CENTRAL, Geometry
from irkd_dist.distill import models, taps
from irkd_dist.errors import UserError


@dataclass(frozen=True)
class Network:
    """A trained network with what it was trained for.

    mean, std: of its input, (x - mean) / std of values in 0..1; size: of its images in pixels, at the end of its
    training. taps: module paths that its saliency is read from, by `method`; none where it has no saliency.
    """

    model: nn.Module
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    size: int
    taps: tuple[str, ...]
    method: str
    folder: Path  # the checkpoint it came from
    # of that checkpoint; empty for a model that is no run's
    state: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what was skipped on the way to it, and why


def load(path: Path, which: str = "best", averaged: bool = True, on_meta: bool = False) -> Network:
    """Load a network from a checkpoint, or from a run folder: the best of its last stage, or its `last`.

    Its weights are the moving average where there is one (optim.ema); averaged=False: those that were trained; on_meta:
    none, under a `torch.device("meta")`.

    Raises:
        UserError: no such run or checkpoint, or it is damaged; the message names the file.
    """
    folder, skipped = checkpoint.find(path, which)
    state = checkpoint.load_state(folder)
    weights = {} if on_meta else checkpoint.load_student(folder, averaged)
    content = checkpoint.Content(weights, {}, state)
    missing = [key for key in ("model", "classes", "mean", "std", "config") if key not in state]
    if missing:
        raise UserError(f"{folder / runfolder.STATE} is altered: it has no {missing[0]}")
    if problem := checkpoint.unsound(content):
        raise UserError(f"{folder}: {problem}: nothing can be done with it")
    config = configuration.from_dict(state["config"], str(folder / runfolder.STATE))
    model = _create(state["model"], folder)
    if not on_meta:
        models.load_weights(model, content.student, str(folder))
    taps, method = state.get("taps"), state.get("method", config.loss.saliency.method)
    if taps is None:  # an earlier release's: resolved as its training did
        taps = taps_alone(config, model)
    mean, std = ((v[0], v[1], v[2]) for v in (state["mean"], state["std"]))
    size = _size(folder, state, config)
    return Network(
        model.eval(), tuple(state["classes"]), mean, std, size, tuple(taps), method, folder, state, tuple(skipped)
    )  # fmt: skip


def geometry(network: Network) -> tuple[Geometry, str | None]:
    """How its evaluation prepares pictures, and a line for the user where that is not known but assumed.

    A checkpoint of an earlier release does not say it: then its shards do, where they lie in a folder unchanged.
    """
    if (kept := network.state.get("geometry")) is not None:
        return Geometry.parse(kept), None
    config = configuration.from_dict(network.state["config"], str(network.folder / runfolder.STATE))
    try:
        folder = configuration.shards_of(config)
        if not isinstance(folder, Path):
            raise UserError(f"its shards ({folder}) are in no folder here")
        manifest = shards.load_manifest(folder)
        if network.state.get("data_digest") not in (None, shards.data_digest(manifest)):
            raise UserError(f"the shards in {folder} are not those that it was trained on")
        return Geometry.of(manifest, config.data.centre_crop), None
    except UserError as error:
        return CENTRAL, (
            f"{network.folder} does not say how its pictures were cut, as checkpoints of earlier releases, and {error}"
            "; the central square is assumed, and is wrong for shards of --fit, --crop-pct or data.centre_crop"
        )


_ARGUMENTS: dict[str, typed.Check] = {
    "name": typed.is_text, "classes": typed.is_count, "patch": typed.optional(typed.is_count),
    "image_size": typed.optional(typed.is_count), "distilled": lambda v: isinstance(v, bool),
    "dropout": typed.is_number, "drop_path": typed.is_number, "options": typed.is_mapping,
}  # fmt: skip


def _create(arguments: Any, folder: Path) -> nn.Module:
    problem = typed.wrong_type(arguments, _ARGUMENTS) if isinstance(arguments, dict) else "it is no mapping"
    missing = [key for key in ("name", "classes", "distilled") if problem is None and key not in arguments]
    if problem or missing:
        problem = problem or f"it has no {missing[0]}"
        raise UserError(f"{folder / runfolder.STATE} is altered: model: {problem}")
    try:
        model = models.create_model(**arguments)
    except TypeError as error:
        raise UserError(f"{folder / runfolder.STATE} is altered: model: {error}") from error
    if arguments["distilled"]:  # outside training both heads are averaged
        model.set_distilled_training(False)  # type: ignore[operator]
    return model


def _size(folder: Path, state: dict[str, Any], config: Config) -> int:
    """Side in pixels of the images of a checkpoint's stage."""
    stages = configuration.stages(config)
    stage = runfolder.stage_of(folder)
    stage = state.get("curriculum", {}).get("stage", 0) if stage is None else stage
    return stages[min(stage, len(stages) - 1)].resolution


def check_classes(classes: tuple[str, ...], manifest: shards.Manifest, folder: str, where: str) -> None:
    """Refuse a network whose classes are not those of the shards in `folder`, in their order; `where` names it."""
    if len(classes) != len(manifest.classes):
        raise UserError(
            f"{where} was trained for {len(classes)} classes, the shards in {folder} have {len(manifest.classes)}: "
            "they go with another data set"
        )
    for i, (theirs, ours) in enumerate(zip(classes, manifest.classes, strict=True)):
        if theirs != ours:
            raise UserError(
                f"{where}: its class {i} is {theirs!r}, the shards' is {ours!r}: its logits would mean other classes"
            )


# ---- where saliency is read


def tap_pairs(
    config: Config, student: nn.Module, teacher: nn.Module, teacher_size: int | None = None
) -> tuple[list[tuple[taps.Tap, taps.Tap]], list[str]]:
    """The configured taps that have a map in both networks, and what a user should know of them.

    teacher_size: side in pixels of what the teacher sees; None: what the student sees at the largest stage.

    Raises:
        UserError: with saliency in the loss, a tap that a network does not have, or none that has a map.
    """
    spec, side = config.loss.saliency, configuration.resolutions(config)[-1]
    try:
        sizes = (side, teacher_size or side)
        pairs = taps.tap_pairs(student, teacher, spec.taps, spec.method, spec.strict_paper, sizes)
    except UserError:
        if spec.gamma:
            raise
        return [], []  # taps serve the panels only
    notes = []
    kept = [pair for pair in pairs if spec.strict_paper or not (pair[0].void or pair[1].void)]
    void = [f"{s.path} | {t.path}" for s, t in pairs if s.void or t.void]
    if spec.gamma:
        if void and not kept:
            raise UserError(
                f"saliency.taps: every tap is void ({', '.join(void)}): its map is zero; use last, or a lower block"
            )
        notes.append("taps (student | teacher): " + ", ".join(f"{s.path} | {t.path}" for s, t in kept))
        if void:
            what = "kept, as strict_paper asks" if spec.strict_paper else "left out of the average"
            notes.append(
                f"void taps, their map is zero or constant whatever the weights: {', '.join(void)}; {what}"
            )
    return kept, notes


def taps_alone(config: Config, student: nn.Module) -> list[str]:
    """The student's taps without a teacher beside it; none where a tap cannot be resolved."""
    spec = config.loss.saliency
    own = [item[0] if isinstance(item, list) else item for item in spec.taps if item != []]
    wanted = spec.taps if isinstance(spec.taps, str) else own
    strict = spec.strict_paper and config.teacher is not None  # void taps are kept for the loss alone
    side = configuration.resolutions(config)[-1]
    try:
        pairs = taps.tap_pairs(student, student, wanted, spec.method, strict, (side, side))
    except UserError:
        return []
    return [s.path for s, _ in pairs if strict or not s.void]
