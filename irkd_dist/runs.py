"""Run folders and the models in them: what training, evaluation, reports and teachers read alike."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from irkd_dist import checkpoint
from irkd_dist import config as configuration
from irkd_dist.config import Config
from irkd_dist.data import shards
from irkd_dist.distill import hub, models, start, weights
from irkd_dist.distill.paper import PAPER_MODELS
from irkd_dist.errors import UserError

CONFIG, CHECKPOINTS, BEST = "config.yaml", "checkpoints", "best"
STATUS, SAMPLES, SESSION = "status.json", "samples", "session"
folder_of = configuration.folder_of


@dataclass(frozen=True)
class Network:
    """A trained network with what it was trained for."""

    model: nn.Module
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    folder: Path  # the checkpoint it came from
    notes: tuple[str, ...] = ()  # what was chosen, changed and left out when it was loaded


def write_status(run: Path, state: str, step: int, world: int, reason: str = "") -> None:
    """Say in `status.json` how a run stands: running, stopped (wants to go on), finished, or failed (does not).

    A run that is `running` and has no process was killed. Whoever starts runs again decides by this, not by exit codes.
    """
    text = json.dumps(
        {"state": state, "step": step, "time": round(time.time(), 1), "reason": reason, "world": world}
    )
    with contextlib.suppress(OSError):  # a full disk must not end the run
        temporary = run / f".{STATUS}"
        temporary.write_text(text + "\n")
        temporary.replace(run / STATUS)


def load_config(run: Path) -> Config:
    """The configuration that a run was started with."""
    if not (run / CONFIG).is_file():
        raise UserError(f"{run} is no run folder: it has no {CONFIG}")
    return configuration.read(run / CONFIG)


def checkpoint_of(path: Path, which: str = "best") -> Path:
    """The checkpoint that `path` means: itself, or of a run folder the last stage's best one, or the last.

    Raises:
        UserError: neither a run nor a checkpoint, or a run without a complete checkpoint.
    """
    if (path / checkpoint.STATE).is_file():
        return path
    if not (path / CHECKPOINTS).is_dir():
        raise UserError(
            f"{path} is neither a run folder (with {CHECKPOINTS}/) nor a checkpoint ({checkpoint.STATE})"
        )
    newest, skipped = checkpoint.newest(path / CHECKPOINTS)
    if newest is None:
        raise UserError(f"{path} has no complete checkpoint" + "".join(f"; {s}" for s in skipped))
    best = checkpoint.load_state(newest)["curriculum"]["best_checkpoint"]
    return path / best if which == "best" and best else newest


def run_of(path: Path) -> Path:
    """The run folder that a run or checkpoint path belongs to."""
    return path.parent.parent if (path / checkpoint.STATE).is_file() else path


def create_student(config: Config, classes: int) -> tuple[nn.Module, dict[str, Any], list[str]]:
    """Build the configured student with the weights it starts from.

    Returns:
        The network, the arguments that build it again (kept in checkpoints), and notes on its weights.
    """
    spec = config.student
    named = hub.look_up(spec.name, "student.name")
    arguments = {
        "name": named.architecture,
        "classes": classes,
        "patch": spec.patch,
        "image_size": spec.image_size or max(s.resolution for s in configuration.stages(config)),
        "distilled": configuration.student_distilled(config),
        "dropout": spec.dropout,
        "drop_path": spec.drop_path,
        "options": {**named.options, **spec.options},
    }
    model, notes = start.create(spec, "student", named, arguments, read_weights)
    return model, arguments, notes


def load_network(folder: Path) -> Network:
    """Build a checkpoint's network and load its weights; `folder` is a checkpoint folder."""
    state = checkpoint.load_state(folder)
    arguments = dict(state["model"])
    distilled = arguments["distilled"]
    model = models.create_model(**arguments)
    if distilled:  # outside training both heads are averaged
        model.set_distilled_training(False)  # type: ignore[operator]
    models.load_weights(model, checkpoint.load_student(folder), str(folder))
    return Network(model.eval(), tuple(state["classes"]), tuple(state["mean"]), tuple(state["std"]), folder)


def read_weights(path: Path, where: str) -> tuple[dict[str, Tensor], list[str]]:
    """Weights by name, and notes: of a checkpoint folder, a run folder (its best), or as `weights.read` takes them."""
    ours = own_checkpoint(path)
    return (checkpoint.load_student(ours), []) if ours is not None else weights.read(path, where)


def own_checkpoint(path: Path) -> Path | None:
    """The checkpoint of ours that a path of weights means, if it does."""
    if path.name == checkpoint.STUDENT and (path.parent / checkpoint.STATE).is_file():
        return path.parent
    if (path / checkpoint.STATE).is_file() or (path / CHECKPOINTS).is_dir():
        return checkpoint_of(path)
    return None


def load_teacher(config: Config, manifest: shards.Manifest) -> Network:
    """The configured teacher, checked against the shards.

    Raises:
        UserError: another number or order of classes, another normalisation, or a patch grid that does not fit a stage.
    """
    spec = config.teacher
    assert spec is not None
    if spec.run is not None:
        network = load_network(checkpoint_of(Path(spec.run)))
        where = f"teacher.run={spec.run}"
    else:
        assert spec.model is not None
        network = _timm_teacher(config, manifest)
        where = f"teacher.model={spec.model.name}"
    if len(network.classes) != len(manifest.classes):
        raise UserError(
            f"{where} was trained for {len(network.classes)} classes, the shards in {config.data.shards} have "
            f"{len(manifest.classes)}: train a teacher on these shards"
        )
    if network.classes != manifest.classes:
        first = next(
            i
            for i, pair in enumerate(zip(network.classes, manifest.classes, strict=True))
            if pair[0] != pair[1]
        )
        raise UserError(
            f"{where}: its class {first} is {network.classes[first]!r}, the shards' is {manifest.classes[first]!r}: "
            "its logits would mean other classes"
        )
    ours = (*manifest.mean, *manifest.std)
    theirs = (*network.mean, *network.std)
    if not spec.renormalize and not _near(ours, theirs):
        raise UserError(
            f"{where} was trained with mean {_short(network.mean)}, std {_short(network.std)}; the shards have "
            f"{_short(manifest.mean)}, {_short(manifest.std)}: teacher.renormalize=true feeds it its own"
        )
    patch = models.patch_size(network.model)
    if patch is not None and spec.view == "matched":
        configuration.check_resolutions(config, patch, "teacher")
    elif patch is not None and max(manifest.resolutions) % patch:
        raise UserError(
            f"teacher.view=full: the shards' {max(manifest.resolutions)} px is not a multiple of its patch {patch}"
        )
    return network


def _timm_teacher(config: Config, manifest: shards.Manifest) -> Network:
    spec = config.teacher
    assert spec is not None
    assert spec.model is not None
    own, where = spec.model, f"teacher.model={spec.model.name}"
    named = hub.look_up(own.name, "teacher.model.name")
    comes_with_weights = named.weights is not None or bool(named.repository)
    if not own.pretrained and own.weights is None and not comes_with_weights:
        raise UserError(f"{where} has no weights: give teacher.model.weights, or pretrained=true")
    classes = named.cfg.get("num_classes")
    if own.weights is None and classes is not None and classes != len(manifest.classes):
        raise UserError(
            f"{where}: its pretrained head has {classes} classes, the shards have {len(manifest.classes)}; fine-tune "
            "it first (irkd train with student.pretrained=true)"
        )
    arguments = {
        "name": named.architecture,
        "classes": len(manifest.classes),
        "patch": own.patch,
        "image_size": own.image_size or max(manifest.resolutions),
        "distilled": None
        if own.distilled == "auto" and own.name not in PAPER_MODELS
        else own.distilled is True,
        "options": {**named.options, **own.options},
    }
    model, notes = start.create(
        replace(own, pretrained=own.pretrained or comes_with_weights),
        "teacher.model",
        named,
        arguments,
        read_weights,
    )
    if models.is_distilled(model):  # outside training both heads are averaged
        model.set_distilled_training(False)  # type: ignore[operator]
    mean, std, said = _teachers_normalisation(config, manifest, named)
    folder = Path(own.weights or ".")
    return Network(model.eval(), manifest.classes, mean, std, folder, (*notes, *said))


def _teachers_normalisation(
    config: Config, manifest: shards.Manifest, named: hub.Named
) -> tuple[tuple[float, float, float], tuple[float, float, float], list[str]]:
    """Mean and std that a teacher by name was trained with, as far as anything says so, and what to tell of them."""
    spec = config.teacher
    assert spec is not None
    assert spec.model is not None
    if spec.mean is not None and spec.std is not None:
        return spec.mean, spec.std, []
    found = start.own_normalisation(spec.model, named)
    ours = own_checkpoint(Path(spec.model.weights)) if spec.model.weights is not None else None
    if ours is not None:
        state = checkpoint.load_state(ours)
        found = tuple(state["mean"]), tuple(state["std"]), f"its checkpoint {ours}"
    if found is None or _near((*found[0], *found[1]), (*manifest.mean, *manifest.std)):
        return manifest.mean, manifest.std, []
    mean, std, why = found
    theirs = f"mean {_short(mean)} and std {_short(std)}, as {why} has it"
    shown = f"the shards' {_short(manifest.mean)} and {_short(manifest.std)}"
    if not spec.renormalize:
        note = f"the teacher's own {theirs}, are not used, as teacher.renormalize=false asks: it is fed with {shown}"
        return manifest.mean, manifest.std, [note]
    note = f"the teacher is fed with {theirs}, not with {shown}; teacher.mean and teacher.std give others"
    return mean, std, [f"{note}, teacher.renormalize=false the shards'"]


def _near(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) <= 1e-3


def _short(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{v:.4f}" for v in values) + ")"
