"""Checkpoints that belong to no engine: weights and moments by name in safetensors, the rest in JSON.

A checkpoint is written to a temporary folder, synced, and renamed; state.json holds the checksums of all its files.
So a folder that has the final name and whose checksums agree is whole, and nothing else is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from irkd_dist import faults, files, runfolder, typed
from irkd_dist.data import geometry
from irkd_dist.errors import Passing, UserError, unreadable
from irkd_dist.runfolder import AVERAGE, OPTIMIZER, STATE, STUDENT

FORMAT_VERSION = 1
# the line of state.json that holds its own checksum: of the text with that line empty
_OWN = f'"{STATE}": "%s"'


def save(
    folder: Path,
    student: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    state: dict[str, Any],
    average: dict[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint; it appears under its name only when it is whole.

    student: full fp32 weights by parameter name; optimizer: moments by `kind.parameter`; state: JSON values;
    average: weights as `student`, where a moving average of them is kept.

    Raises:
        UserError: the disk is full or not writable; the folder's earlier content is untouched.
    """
    temporary = folder.with_name(runfolder.WRITING + folder.name)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _save_tensors(student, temporary / STUDENT)
        faults.inject("write", state.get("step", -1))
        _save_tensors(optimizer, temporary / OPTIMIZER)
        if average:
            _save_tensors(average, temporary / AVERAGE)
        names = (STUDENT, OPTIMIZER, *((AVERAGE,) if average else ()))
        digests = {name: _sync_and_digest(temporary / name) for name in names}
        digests[STATE] = ""
        text = json.dumps({"version": FORMAT_VERSION, "sha256": digests, **state}, indent=1)
        own = hashlib.sha256(text.encode()).hexdigest()
        (temporary / STATE).write_text(text.replace(_OWN % "", _OWN % own, 1))
        _sync_and_digest(temporary / STATE)
        files.sync_folder(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
        files.sync_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        faults.heal()
        shutil.rmtree(temporary, ignore_errors=True)
        free = files.free_space(folder.parent)
        raise UserError(
            f"cannot write checkpoint {folder}: {error}{free}; earlier checkpoints are untouched"
        ) from error


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds: see `save`."""

    student: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    average: dict[str, Tensor] = field(default_factory=dict)  # empty where none is kept


def load_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint folder.

    Raises:
        UserError: it is missing, not JSON, altered, or of another version.
    """
    file = folder / STATE
    try:
        data = files.read(file)
        state = typed.parse(data)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} is no checkpoint: it has no {STATE}") from None
    except OSError as error:
        raise unreadable(file, error) from error
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}") from error
    if not isinstance(state, dict):
        raise UserError(f"{file} is altered: it holds no mapping")
    if state.get("version") != FORMAT_VERSION:
        raise UserError(
            f"{folder} is of checkpoint version {state.get('version')}; this release reads {FORMAT_VERSION}"
        )
    if problem := _altered(state, data):
        raise UserError(f"{file} is altered: {problem}")
    return state


def _altered(state: dict[str, Any], data: bytes) -> str | None:
    """What is wrong with the content of a state.json; one of an earlier release has no checksum of its own."""
    digests = state.get("sha256", {})
    if not isinstance(digests, dict) or not {STATE, STUDENT, OPTIMIZER, AVERAGE} >= digests.keys():
        return "its checksums are not those of a checkpoint's files"
    if (own := digests.get(STATE)) is not None:
        whole = data.replace((_OWN % own).encode(), (_OWN % "").encode(), 1)
        if own != hashlib.sha256(whole).hexdigest():
            return "its checksum differs"
    elif f'"{STATE}": "'.encode() in data:
        return "its checksum is not where it belongs"
    return typed.wrong_type(state, _TYPES) or typed.wrong_type(state.get("curriculum", {}), _CURRICULUM_TYPES)


_counts, _numbers = typed.list_of(typed.is_count), typed.list_of(typed.is_number)


def _is_best(value: object) -> bool:
    return isinstance(value, str) and runfolder.is_best_name(value)


def _is_normalisation(value: object) -> bool:
    return _numbers(value) and len(value) == 3  # type: ignore[arg-type]


_TYPES = {
    **dict.fromkeys(("epoch_step", "epoch", "step", "stage_step"), typed.is_count),
    **dict.fromkeys(("skipped", "left_out"), _counts),
    **dict.fromkeys(("curriculum", "model", "config"), typed.is_mapping),
    **dict.fromkeys(("mean", "std"), _is_normalisation),
    **dict.fromkeys(("classes", "taps"), typed.list_of(typed.is_text)),
    **dict.fromkeys(("data_digest", "package_version", "method"), typed.is_text),
    "teacher_digest": typed.optional(typed.is_text),
    "geometry": typed.optional(geometry.is_geometry),
    "stage_bests": typed.list_of(_is_best),
    "sums": typed.list_of(typed.is_real),
    "seconds": typed.is_number,
    "finished": lambda value: isinstance(value, bool),
}
_CURRICULUM_TYPES = {
    **dict.fromkeys(("stage", "epoch", "best_epoch"), typed.is_count),
    **dict.fromkeys(("seconds", "tokens", "best_accuracy"), typed.is_number),
    "best_checkpoint": typed.optional(_is_best),
}


def read(folder: Path, moments: bool = True) -> Content:
    """Read a checkpoint, each file once: its checksum is taken of what was read. Without `moments` there are none.

    Raises:
        UserError: a file is missing, truncated or altered; the message names it.
    """
    state = load_state(folder)
    optimizer = _read(folder / OPTIMIZER, state) if moments else {}
    average = _read(folder / AVERAGE, state) if AVERAGE in state.get("sha256", {}) else {}
    return Content(_read(folder / STUDENT, state), optimizer, state, average)


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """`read`, as (student weights, moments, state)."""
    content = read(folder)
    return content.student, content.optimizer, content.state


def weights_file(state: dict[str, Any], averaged: bool = True) -> str:
    """The file of a checkpoint with the weights to use: averaged ones where it has them, unless `averaged` is off."""
    return AVERAGE if averaged and AVERAGE in state.get("sha256", {}) else STUDENT


def load_student(folder: Path, averaged: bool = True) -> dict[str, Tensor]:
    """Read a student's weights alone, those of `weights_file`, without the projections of its features."""
    state = load_state(folder)
    return without(_read(folder / weights_file(state, averaged), state))


def check_file(file: Path) -> None:
    """Compare a file of a checkpoint with its checksum, in pieces: it may be larger than memory.

    Raises:
        UserError: it is missing or altered.
    """
    state = load_state(file.parent)
    try:
        with file.open("rb") as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(file, error) from error
    if found != state.get("sha256", {}).get(file.name):
        raise UserError(f"{file} is altered or truncated: its checksum differs from the one in {STATE}")


def without(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a student alone, without the projections of its features (loss.features), which no one else needs."""
    return {k: v for k, v in weights.items() if not k.startswith(f"{runfolder.PROJECTIONS}.")}


def name(step: int) -> str:
    """Folder name of the checkpoint at a global step."""
    return runfolder.step_name(step)


def unsound(content: Content) -> str | None:
    """The first tensor of a snapshot that is not finite, as `weight NAME is not finite`; None if all are.

    A buffer, which has no moments, may hold infinities (masks do), but no NaN.
    """
    trained = {key.partition(".")[2] for key in content.optimizer}
    named = {"weight": content.student, "averaged weight": content.average, "moment": content.optimizer}
    for kind, tensors in named.items():
        for key, value in tensors.items():
            if not value.is_floating_point() or not value.numel():
                continue
            low, high = torch.aminmax(value.float() if value.itemsize < 2 else value)  # of fp8 torch has none
            buffer = kind != "moment" and bool(trained) and key not in trained
            if low.isnan() or (not buffer and not (low.isfinite() and high.isfinite())):
                return f"{kind} {key} is not finite"
    return None


def read_newest(folder: Path, up_to: int | None = None) -> tuple[Path | None, Content | None, list[str]]:
    """The newest sound checkpoint in a folder of them (`up_to` a step), its content, and why newer ones were skipped.

    Each file is read once. Sound: whole, of right types, and without a NaN or infinity in weights and moments.

    Raises:
        Passing: the file system does not answer.
    """
    skipped = []
    for candidate in runfolder.steps(folder):
        if up_to is not None and runfolder.step_of(candidate) > up_to:
            continue
        try:
            content = read(candidate)
        except Passing:
            raise  # it may be whole: going on from an older one would throw work away
        except UserError as error:
            skipped.append(str(error))
            continue
        if (problem := unsound(content)) is None:
            return candidate, content, skipped
        skipped.append(f"{candidate}: {problem}")
    return None, None, skipped


def newest(folder: Path, up_to: int | None = None) -> tuple[Path | None, list[str]]:
    """`read_newest` without the content."""
    found, _, skipped = read_newest(folder, up_to)
    return found, skipped


def find(path: Path, which: str = "best") -> tuple[Path, list[str]]:
    """The checkpoint that `path` means: itself, or of a run folder the last stage's best one, or the last.

    Also what was skipped on the way to it, and why.

    Raises:
        UserError: neither a run nor a checkpoint, or a run without a complete checkpoint, or its best is gone.
    """
    runfolder.check_trained(path)
    if (path / STATE).is_file():
        return path, []
    found, content, skipped = read_newest(path / runfolder.CHECKPOINTS)
    if found is None or content is None:
        raise UserError(f"{path} has no complete checkpoint" + "".join(f"; {s}" for s in skipped))
    best = content.state.get("curriculum", {}).get("best_checkpoint")
    if which != "best" or best is None:
        return found, skipped
    if not (path / best / STATE).is_file():
        raise UserError(
            f"{path}: {best}, the best checkpoint of its last stage, is gone; the newest is {found.name}: name that, "
            "or take the last one (--which last)"
        )
    return path / best, skipped


def missing_bests(run: Path, state: dict[str, Any]) -> list[str]:
    """The best checkpoints that a state counts on and that its run folder lacks, each as `name: why`.

    That of the present stage is read as a whole, since the run will need it; of those of ended stages, state.json.
    """
    present = state.get("curriculum", {}).get("best_checkpoint")
    found = []
    named: list[str] = [*state.get("stage_bests", []), *([present] if present else [])]
    for best in dict.fromkeys(named):
        try:
            problem = unsound(read(run / best)) if best == present else load_state(run / best) and None
        except Passing:
            raise
        except UserError as error:
            found.append(f"{best}: {error}")
        else:
            found += [f"{best}: {problem}"] if problem else []
    return found


def prune(folder: Path, present: str, keep: int, always: set[str]) -> None:
    """Delete all but the newest `keep` checkpoints up to `present` and those named in `always`.

    A later one than the present is damaged, else the run would have gone on from it: it takes no whole one's place.
    """
    last = runfolder.step_of(Path(present))
    ours = [f for f in runfolder.steps(folder) if runfolder.step_of(f) <= last]
    for old in ours[keep:]:
        if old.name not in always:
            shutil.rmtree(old, ignore_errors=True)
    for unfinished in folder.glob(f"{runfolder.WRITING}*"):
        shutil.rmtree(unfinished, ignore_errors=True)


def prune_all_but(folder: Path, names: set[str]) -> None:
    """Delete every checkpoint in a folder but those named."""
    for old in runfolder.steps(folder):
        if old.name not in names:
            shutil.rmtree(old, ignore_errors=True)


def _save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, file)
    # it keeps them to their owner; the folder beside them is as open as the user's umask says
    file.chmod(file.parent.stat().st_mode & 0o666)


def _read(file: Path, state: dict[str, Any]) -> dict[str, Tensor]:
    try:
        data = files.read(file)
    except FileNotFoundError:
        raise UserError(f"{file} is missing") from None
    except OSError as error:
        raise unreadable(file, error) from error
    if hashlib.sha256(data).hexdigest() != state.get("sha256", {}).get(file.name):
        raise UserError(f"{file} is altered or truncated: its checksum differs from the one in {STATE}")
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def _sync_and_digest(file: Path) -> str:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
        return hashlib.file_digest(handle, "sha256").hexdigest()
