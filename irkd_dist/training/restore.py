"""From a checkpoint to a live run, and back: one process reads, the others are told."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from irkd_dist import checkpoint, runfolder
from irkd_dist import config as configuration
from irkd_dist.config import Config, Stage
from irkd_dist.distill import models
from irkd_dist.errors import UserError
from irkd_dist.training import curriculum, distributed, engines
from irkd_dist.training.engines import Engine, fsdp2
from irkd_dist.training.parts import Parts
from irkd_dist.training.position import Position

EXTENDS = ("fixed.epochs", "curriculum.epochs", "curriculum.stages")  # what --extend may change
NO_RUN = checkpoint.Content({}, {}, {})


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on, and what the user should hear of it."""

    position: Position
    skipped: list[str]  # why newer checkpoints were not taken
    extended: list[str]  # keys that --extend has changed
    lost: list[str]  # best checkpoints that are gone or damaged, as `name: why`


def newest(
    engine: Engine, run: Path, up_to: int | None = None
) -> tuple[str | None, checkpoint.Content, list[str]]:
    """The newest complete checkpoint of a run, read by rank 0: its name, its content there and its state everywhere.

    Returns None and an empty content where there is none, and why each newer one was skipped.
    """
    found: checkpoint.Content = NO_RUN

    def look() -> tuple[str | None, list[str], dict[str, Any]]:
        nonlocal found
        folder, content, skipped = checkpoint.read_newest(run / runfolder.CHECKPOINTS, up_to)
        found = content or NO_RUN
        return folder.name if folder else None, skipped, found.state

    name, skipped, state = distributed.on_main(engine, look)
    return name, replace(found, state=state), skipped


def resume(parts: Parts, content: checkpoint.Content, skipped: list[str], extend: bool) -> Resumed:
    """Put the content of the newest checkpoint into the live parts.

    Raises:
        UserError: the run was started with other semantic keys, other data or another teacher.
    """
    state = content.state
    if not state:
        return Resumed(Position(), skipped, [], [])
    known, own = _known_keys(state["config"]), parts.identity["config"]
    changed = configuration.semantic_difference(known, own)
    extended = [c for c in changed if extend and c.startswith(EXTENDS)]
    before, same_teacher = _stages(known if extended else own), parts.identity["teacher_digest"]
    if extended:
        _check_extension(before, _stages(own))
        teachers = [stage.teacher for stage in parts.plan.stages[: len(before)]]
        if None not in teachers:
            same_teacher = teachers_digest(teachers, parts.config)  # of the stages that there were
    changed = [c for c in changed if c not in extended]
    for key, present, name in (
        ("data_digest", parts.identity["data_digest"], "data"),
        ("teacher_digest", same_teacher, "teacher"),
    ):
        # earlier releases kept no digest of a teacher by name
        if state[key] != present and not (state[key] is None and parts.config.teacher):
            changed.append(f"{name}: its content is not what the run was started with")
    if changed:
        raise UserError(
            f"{configuration.folder_of(parts.config)} was started with another configuration: {'; '.join(changed)}. "
            "Give the run another name (name=...), or restore these"
            + ("" if extend else "; --extend allows more epochs and stages")
        )
    folder = configuration.folder_of(parts.config)
    what = "the student, whose position embeddings are made for the largest stage"
    distributed.on_main(
        parts.engine, lambda: models.check_weights(parts.engine.shapes, content.student, str(folder), what)
    )
    load(parts.engine, content)
    lost = distributed.on_main(parts.engine, lambda: checkpoint.missing_bests(folder, state))
    position = without(place(parts.engine, state), lost)
    if extended:
        position = _extended(position, parts, before)
    return Resumed(position, skipped, extended, lost)


def without(position: Position, lost: list[str]) -> Position:
    """The position of a run whose best checkpoints `lost` are gone: the next epoch is the best of its stage again."""
    names = {text.partition(": ")[0] for text in lost}
    bests = tuple(b for b in position.stage_bests if b not in names)
    state = position.curriculum
    if state.best_checkpoint in names:
        state = replace(state, best_checkpoint=None, best_accuracy=-1.0)
    return replace(position, stage_bests=bests, curriculum=state)


def place(engine: Engine, state: dict[str, Any]) -> Position:
    """The position of a checkpoint; its sums are those over all processes, and are summed again: so rank 0 has them."""
    position = Position.from_state(state)
    return position if engine.main else replace(position, sums=())


def precision(engine: Engine, config: Config, state: dict[str, Any]) -> torch.dtype | None:
    """What the run computes in: under `auto` what it was started with, whatever this device would choose.

    Raises:
        UserError: it was started in bf16, and this device does not compute in it.
    """
    if config.precision == "auto" and "precision" in state:
        return engines.autocast_dtype(state["precision"], engine.device)
    return engine.autocast


def load(engine: Engine, content: checkpoint.Content, moments: bool = True) -> None:
    """Give rank 0's weights and, with `moments`, its moments to the live student and optimizer of all processes.

    So its averaged weights, where a moving average is kept; without any it begins anew at the weights.
    """
    average = distributed.broadcast_tensors(engine, content.average) if engine.average is not None else {}
    if average:
        engine.load_weights(average)
        engine.follow()
    engine.load_weights(distributed.broadcast_tensors(engine, content.student))
    if engine.average is not None and not average:
        engine.follow()
    if moments:
        engine.load_moments(distributed.broadcast_tensors(engine, content.optimizer))


def load_into(engine: Engine, folder: Path, moments: bool = True) -> dict[str, Any]:
    """Load a checkpoint folder, read by rank 0, into the live student and optimizer; returns its state."""
    content = NO_RUN

    def read() -> dict[str, Any]:
        nonlocal content
        content = checkpoint.read(folder)
        models.check_weights(engine.shapes, content.student, str(folder))
        return content.state

    state = distributed.on_main(engine, read)
    load(engine, content, moments)
    return state


def snapshot(parts: Parts, position: Position) -> checkpoint.Content:
    """All of a checkpoint, on the CPU of rank 0; every rank must call it."""
    engine, average = parts.engine, {}
    weights, moments = engine.weights(), engine.moments()
    if engine.average is not None:
        with engine.averaged():
            average = engine.weights()
    return checkpoint.Content(weights, moments, {**position.state_dict(), **parts.identity}, average)


def load_stage_teacher(parts: Parts, stage: int) -> None:
    """Give the teacher the weights of this stage's checkpoint, where the schedule changes them."""
    teacher, folders = parts.teacher, [s.teacher for s in parts.plan.stages]
    folder = folders[stage]
    if teacher is None or folder is None or len(set(folders)) == 1:
        return
    content: dict[str, Tensor] = {}

    def read() -> None:
        content.update(checkpoint.load_student(Path(folder), _averaged(parts.config)))

    distributed.on_main(parts.engine, read)
    weights, where = (
        distributed.broadcast_tensors(parts.engine, content),
        f"teacher of stage {stage}: {folder}",
    )
    if teacher_sharded(parts.config, parts.engine):
        models.check_weights({k: v.shape for k, v in teacher.model.state_dict().items()}, weights, where)
        models.require_finite(weights, where)
        fsdp2.load_sharded(teacher.model, weights)
    else:
        teacher.load(weights, where)


def teacher_sharded(config: Config, engine: Engine) -> bool:
    """Whether the teacher's parameters are spread over the processes."""
    return config.teacher is not None and config.teacher.shard and engine.world > 1


def weights_digest(model: nn.Module) -> str:
    """Of all weights and buffers, whole where they are spread over processes; then every process must call it."""
    result = hashlib.sha256()
    for value in model.state_dict().values():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        result.update(whole.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return result.hexdigest()


def _known_keys(tree: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's configuration with the keys that this release added, at their defaults."""
    try:
        return configuration.to_dict(configuration.from_dict(tree, "checkpoint"))
    except UserError:
        return tree


def _stages(tree: dict[str, Any]) -> list[tuple[Stage, int]]:
    """The stages of a configuration, each with its batch."""
    config = configuration.from_dict(tree, "run")
    return [(s, configuration.stage_batch(config, s.resolution)) for s in configuration.stages(config)]


def _check_extension(old: list[tuple[Stage, int]], new: list[tuple[Stage, int]]) -> None:
    """More may be asked for than before, never less or other: what is trained cannot be taken back."""
    last = len(old) - 1
    longer = len(new) > last and (new[last][0].epochs or 0) >= (old[last][0].epochs or 0)
    same = longer and [*old[:last], (replace(old[last][0], epochs=new[last][0].epochs), old[last][1])]
    if same != new[: len(old)]:
        shown = [[(s.resolution, s.epochs, batch) for s, batch in stages] for stages in (old, new)]
        raise UserError(
            f"--extend: the run has stages (px, epochs, batch) {shown[0]}, the configuration has {shown[1]}: only the "
            "last stage may have more epochs, and stages may follow it; nothing else of a stage may change"
        )


def _extended(position: Position, parts: Parts, before: list[tuple[Stage, int]]) -> Position:
    """The position of a run that has more to do than it had; a stage that is done gives way to the one that follows."""
    done, stages = position.curriculum, parts.plan.stages
    longer = stages[done.stage].epochs > (before[done.stage][0].epochs or 0)
    if not position.finished or longer:
        return replace(position, finished=False)
    if done.stage + 1 == len(stages):  # what was changed makes no difference
        return position
    if parts.plan.start_from == "best" and done.best_checkpoint:
        load_into(parts.engine, configuration.folder_of(parts.config) / done.best_checkpoint)
    state = curriculum.State(stage=done.stage + 1)
    return replace(position.next_stage(done.best_checkpoint), curriculum=state, finished=False)


def teachers_digest(folders: Sequence[str | Path | None], config: Config) -> str:
    """Of the weights in the stages' teacher checkpoints."""
    digests = [teacher_digest(checkpoint.load_state(Path(f)), config) if f else None for f in folders]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]


def teacher_digest(state: dict[str, Any], config: Config) -> str:
    """Of the weights that a teacher's checkpoint gives."""
    return state["sha256"][checkpoint.weights_file(state, _averaged(config))]


def _averaged(config: Config) -> bool:
    return config.teacher is None or config.teacher.averaged
