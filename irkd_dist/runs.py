"""Run folders and the models in them: what training, evaluation, reports and teachers read alike."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from irkd_dist import checkpoint
from irkd_dist import config as configuration
from irkd_dist.config import Config
from irkd_dist.data import shards
from irkd_dist.distill import models
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


def create_student(config: Config, classes: int) -> tuple[nn.Module, dict[str, Any]]:
    """Build the configured student; returns it with the arguments that build it again (kept in checkpoints)."""
    spec = config.student
    arguments = {
        "name": spec.name,
        "classes": classes,
        "patch": spec.patch,
        "image_size": spec.image_size or max(s.resolution for s in configuration.stages(config)),
        "distilled": configuration.student_distilled(config),
        "dropout": spec.dropout,
        "drop_path": spec.drop_path,
        "options": spec.options,
    }
    model = models.create_model(**arguments, pretrained=spec.pretrained)
    if spec.weights is not None:
        models.load_weights(model, read_weights(Path(spec.weights)), f"student.weights={spec.weights}")
    return model, arguments


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


def read_weights(path: Path) -> dict[str, Tensor]:
    """Weights by name: from a checkpoint folder, a run folder (its best), or a safetensors file."""
    if path.is_dir():
        return checkpoint.load_student(checkpoint_of(path))
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"weights {path}: no such file or folder") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"weights {path} is not a safetensors file: {error}") from error


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
    if not spec.renormalize and max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) > 1e-3:
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
    if not spec.model.pretrained and spec.model.weights is None:
        raise UserError(
            f"teacher.model={spec.model.name} has no weights: give teacher.model.weights, or pretrained=true"
        )
    if spec.model.pretrained:
        import timm

        own = timm.get_pretrained_cfg(spec.model.name)
        if own is not None and own.num_classes != len(manifest.classes):
            raise UserError(
                f"teacher.model={spec.model.name}: its pretrained head has {own.num_classes} classes, the shards have "
                f"{len(manifest.classes)}; fine-tune it first (irkd train with student.pretrained=true)"
            )
    model = models.create_model(
        spec.model.name,
        classes=len(manifest.classes),
        patch=spec.model.patch,
        image_size=spec.model.image_size or max(manifest.resolutions),
        distilled=spec.model.distilled is True,
        pretrained=spec.model.pretrained,
        options=spec.model.options,
    )
    if spec.model.weights is not None:
        models.load_weights(
            model, read_weights(Path(spec.model.weights)), f"teacher.model.weights={spec.model.weights}"
        )
    return Network(
        model.eval(),
        manifest.classes,
        spec.mean or manifest.mean,
        spec.std or manifest.std,
        Path(spec.model.weights or "."),
    )


def _short(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{v:.4f}" for v in values) + ")"
