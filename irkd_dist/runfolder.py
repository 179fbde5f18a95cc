"""A run folder: its names, and what it says of itself. Without torch; every reader stands on it.

Whoever reads a run folder may meet one that was cut short, altered, or made by somebody else: what cannot be read is
left out and named, never guessed.
"""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path
from typing import Any

from irkd_dist import files, plain
from irkd_dist.errors import UserError, reason, unreadable
from irkd_dist.typed import Check, checked, is_count, is_text, is_time, optional, parse_checked, wrong_type

CONFIG, EVENTS, SESSION, OWNER = "config.yaml", "events.jsonl", "session", "owner"
STATUS, RESTARTS = "status.json", "restarts.json"
CHECKPOINTS, BEST, MILESTONES = "checkpoints", "best", "milestones.txt"
STATE, STUDENT, OPTIMIZER = "state.json", "student.safetensors", "optimizer.safetensors"  # of a checkpoint
PROJECTIONS = (
    "feature_projections"  # begins the names of weights that serve the training alone (loss.features)
)
AVERAGE = "average.safetensors"  # beside them where optim.ema is on
WRITING = ".writing-"  # begins the name of a checkpoint that is not whole yet
PANELS, SAMPLES = "panels", "samples"
EVALUATION, EARLIER_EVALUATION = "evaluation", "evaluation.json"  # the second: of earlier releases
REPORT, FIGURES = "report.html", "figures"
TENSORBOARD, WANDB_ID, MLFLOW = "tensorboard", "wandb-id.txt", "mlflow"
STATES = ("running", "stopped", "finished", "failed")

# ---- names


def step_name(step: int) -> str:
    """Name of the checkpoint at a global step."""
    return f"step-{step:08d}"


def best_name(stage: int, step: int) -> str:
    """Path of a stage's best checkpoint, relative to the run folder."""
    return f"{BEST}/stage-{stage:02d}-{step_name(step)}"


def is_best_name(name: str) -> bool:
    """Whether it is a path that `best_name` gives."""
    return re.fullmatch(rf"{BEST}/stage-\d{{2,}}-step-\d{{8,}}", name, re.ASCII) is not None


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint, `step-00000008` or `stage-00-step-00000008`; -1 for another folder."""
    found = re.fullmatch(r"(?:stage-\d{2,}-)?step-(\d{8,18})", folder.name, re.ASCII)
    return int(found[1]) if found else -1


def stage_of(folder: Path) -> int | None:
    """The stage in the name of a best checkpoint, None for another folder."""
    found = re.fullmatch(r"stage-(\d{2,6})-step-\d{8,}", folder.name, re.ASCII)
    return int(found[1]) if found else None


def steps(folder: Path) -> list[Path]:
    """Checkpoints in a folder of them, newest first; they appear under their names only when they are whole."""
    return sorted((f for f in folder.glob("*step-*") if step_of(f) >= 0), key=step_of, reverse=True)


def bests(run: Path) -> list[Path]:
    """The best checkpoints of a run's stages, newest first."""
    return steps(run / BEST)


def run_of(path: Path) -> Path:
    """The run folder that a run or checkpoint path belongs to."""
    if not (path / STATE).is_file():
        return path
    folder = path.absolute().parent.parent
    return folder if (folder / CONFIG).is_file() else path


def check_trained(path: Path, key: str = "") -> None:
    """Raise UserError where a path is neither a run folder with checkpoints nor a checkpoint; `key` gave it."""
    if not (path / STATE).is_file() and not (path / CHECKPOINTS).is_dir():
        kinds = f"a run folder (with {CHECKPOINTS}/) nor a checkpoint ({STATE})"
        raise UserError(f"{f'{key}=' if key else ''}{path} is neither {kinds}")


def panel_file(run: Path, stage: int, epoch: int) -> Path:
    """Where the panels of a stage's epoch are kept."""
    return run / PANELS / f"stage-{stage:02d}-epoch-{epoch:03d}.npz"


def panel_files(run: Path) -> list[tuple[int, int, Path]]:
    """(stage, epoch, file) of each panel, in order."""
    found = []
    for file in (run / PANELS).glob("stage-*-epoch-*.npz"):
        if match := re.fullmatch(r"stage-(\d{2,6})-epoch-(\d{3,9})", file.stem, re.ASCII):
            found.append((int(match[1]), int(match[2]), file))
    return sorted(found)


def samples_file(run: Path, rank: int) -> Path:
    """Where a rank writes down the samples of its steps (`track.samples`)."""
    return run / SAMPLES / f"rank-{rank:05d}.jsonl"


def samples_files(run: Path) -> list[Path]:
    """The files that `samples_file` names."""
    return sorted((run / SAMPLES).glob("rank-*.jsonl"))


def evaluation_files(run: Path) -> list[Path]:
    """Every result of `irkd evaluate`, in order of names; that of an earlier release last."""
    return [f for f in [*sorted((run / EVALUATION).glob("*.json")), run / EARLIER_EVALUATION] if f.is_file()]


def read_word(file: Path) -> str:
    """The text of a small file, such as `owner`; empty where there is none."""
    try:
        return files.read(file).decode("utf-8", "backslashreplace").strip()
    except OSError:
        return ""


def span(seconds: float) -> str:
    """A length of time in its two largest units."""
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= size:
            rest = int(seconds % size // part)
            return f"{int(seconds // size)} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{seconds:.0f} s"


# ---- how a run stands


def write_status(run: Path, state: str, step: int, world: int, reason: str = "") -> None:
    """Say in `status.json` how a run stands: running, stopped (wants to go on), finished, or failed (does not).

    A run that is `running` and has no process was killed. Whoever starts runs again decides by this, not by exit codes.
    """
    told = {"state": state, "step": step, "time": round(time.time(), 1), "reason": reason, "world": world}
    with contextlib.suppress(UserError):  # a full disk must not end the run
        files.write(run / STATUS, checked(told))


def read_status(run: Path) -> tuple[dict[str, Any], str]:
    """What a run said of itself, empty where it has not or where that is damaged; and then what is wrong with it."""
    types = {
        "state": lambda v: v in STATES, "step": is_count, "time": is_time, "reason": is_text, "world": is_count
    }  # fmt: skip
    return _read_small(run / STATUS, types, needed="state")


def read_restarts(run: Path) -> tuple[dict[str, Any], str]:
    """The count of restarts as `irkd requeue` keeps it, as `read_status`."""
    types = {"restarts": is_count, "without_progress": is_count, "step": optional(is_count)}
    return _read_small(run / RESTARTS, types)


def _read_small(file: Path, types: dict[str, Check], needed: str | None = None) -> tuple[dict[str, Any], str]:
    try:
        value = parse_checked(files.read(file))
    except FileNotFoundError:
        return {}, ""
    except OSError as error:
        return {}, f"{file.name} cannot be read: {reason(error)}"
    except ValueError as error:  # cut off by what ended the job, or altered
        return {}, f"{file.name} is damaged: {error}"
    problem = wrong_type(value, types) if isinstance(value, dict) else "it holds no mapping"
    if problem is None and needed is not None and needed not in value:
        problem = f"it has no {needed}"
    return (value, "") if problem is None else ({}, f"{file.name} is damaged: {problem}")


def read_config(run: Path) -> dict[str, Any]:
    """The values of a run folder's configuration; `${...}` in them stays as it is: it is somebody else's text.

    Raises:
        UserError: it has none, or it cannot be read.
    """
    file = run / CONFIG
    try:
        content = files.read(file)
    except (FileNotFoundError, NotADirectoryError):
        why = f"it has no {CONFIG}" if run.is_dir() else "there is no such folder"
        raise UserError(f"{run} is no run folder: {why}") from None
    except OSError as error:
        raise unreadable(file, error) from error
    values = plain.parse(content, f"{file} cannot be read")
    if not isinstance(values, dict):
        raise UserError(f"{file} cannot be read: it holds no mapping")
    return values
