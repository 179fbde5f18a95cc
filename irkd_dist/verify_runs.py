"""What is wrong with the files of a run folder or a checkpoint: every one of them is read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from irkd_dist import checkpoint, eventlog, files, runfolder
from irkd_dist import config as configuration
from irkd_dist.errors import Passing, UserError, unreadable
from irkd_dist.report import evaluations
from irkd_dist.training import panels

REQUIRED = ("model", "classes", "mean", "std", "config", "curriculum", "data_digest")  # in a state.json


def run(folder: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> list[str]:
    """A line for each bad file of a run folder, which it names; none if all are whole.

    `progress` is called with (checkpoints done, in all).

    Raises:
        Passing: the file system does not answer.
    """
    found = [*_config(folder), *_events(folder), *_samples(folder)]
    for problem in (runfolder.read_status(folder)[1], runfolder.read_restarts(folder)[1]):
        found += [f"{folder}/{problem}"] if problem else []
    kept = [*runfolder.steps(folder / runfolder.CHECKPOINTS), *runfolder.bests(folder)]
    step = runfolder.read_status(folder)[0].get("step", 0)
    if step and not runfolder.steps(folder / runfolder.CHECKPOINTS):
        found.append(
            f"{folder / runfolder.CHECKPOINTS}: no checkpoint is there, and the run came to step {step:,}"
        )
    for done, one in enumerate(kept):
        progress(done, len(kept))
        found += checkpoint_folder(one)
    progress(len(kept), len(kept))
    with contextlib.suppress(UserError):  # named above
        state = checkpoint.load_state(kept[0]) if kept else {}
        found += [f"{folder / text}" for text in checkpoint.missing_bests(folder, state)]
        found += _other_config(folder, state.get("config"))
    found += [f"{folder}: {problem}" for problem in panels.load(folder)[1]]
    for file in runfolder.evaluation_files(folder):
        try:
            _, problem = evaluations.read_evaluation(file)
            found += [f"{folder}: {problem}"] if problem else []
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            found.append(f"{file} is not what irkd evaluate writes: {error}")
    return list(dict.fromkeys(found))


def checkpoint_folder(folder: Path) -> list[str]:
    """A line for what is wrong with a checkpoint's files; none if it is whole and its weights are finite."""
    try:
        content = checkpoint.read(folder)
    except Passing:
        raise
    except UserError as error:
        return [str(error)]
    missing = [key for key in REQUIRED if key not in content.state]
    found = [f"{folder / runfolder.STATE}: it has no {', '.join(missing)}"] if missing else []
    problem = checkpoint.unsound(content)
    return found + ([f"{folder}: {problem}"] if problem else [])


def _config(folder: Path) -> list[str]:
    try:
        configuration.from_dict(runfolder.read_config(folder), str(folder / runfolder.CONFIG))
    except UserError as error:
        return [str(error)]
    return []


def _other_config(folder: Path, trained: dict[str, Any] | None) -> list[str]:
    """Where the configuration beside the checkpoints is not the one that the newest was trained with."""
    if trained is None:
        return []
    own = configuration.from_dict(runfolder.read_config(folder), str(folder / runfolder.CONFIG))
    known = configuration.from_dict(trained, str(folder))  # with the keys that came since, at their defaults
    changed = configuration.semantic_difference(configuration.to_dict(known), configuration.to_dict(own))
    what = f"{folder / runfolder.CONFIG}: not that of the newest checkpoint: "
    return [what + "; ".join(changed)] if changed else []


def _events(folder: Path) -> list[str]:
    try:
        log = eventlog.read_log(folder)
    except UserError as error:
        return [str(error)]
    file = folder / runfolder.EVENTS
    found = [f"{file} line {number}: {why}" for number, why in log.left_out]
    return found + [
        f"{file} line {number}: it has no checksum, those before it have" for number in log.unchecked
    ]


def _samples(folder: Path) -> list[str]:
    found = []
    for file in sorted((folder / runfolder.SAMPLES).glob("*.jsonl")):
        try:
            lines = files.read(file).split(b"\n")
        except OSError as error:
            found.append(str(unreadable(file, error)))
            continue
        bad = [n for n, line in enumerate(lines, 1) if line.strip() and eventlog.parse_samples(line) is None]
        found += [f"{file} line {n}: no record of samples" for n in bad]
    return found
