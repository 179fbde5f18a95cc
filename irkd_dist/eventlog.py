"""events.jsonl and samples/: what a run tells of itself, line by line. Without torch.

Whoever reads them may meet lines that were cut short or altered: these are left out and named, never guessed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from irkd_dist import files, runfolder
from irkd_dist.errors import UserError, unreadable
from irkd_dist.runfolder import EVENTS
from irkd_dist.typed import (
    Check,
    is_checked,
    is_count,
    is_mapping,
    is_number,
    is_real,
    is_text,
    is_time,
    list_of,
    optional,
    parse_checked,
    wrong_type,
)  # fmt: skip

Event = dict[str, Any]

_BASE: dict[str, Check] = {"event": is_text, "step": is_count, "time": is_time}
# of each kind: what its readers cannot do without
_NEEDED = {
    "train": ("stage", "images_per_s", "data_wait"),
    "evaluation": ("stage", "resolution", "epoch", "stage_epoch", "accuracy", "train_accuracy", "split"),
    "stage": ("stage",),
    "start": (),
    "resume": (),
    "teacher": ("resolutions", "accuracy"),
    "transition": ("stage", "reason"),
    "decision": ("config", "state", "decision"),
    "summary": ("seconds",),
    "probe": ("stage", "resolution", "epoch"),
    "flops": ("stage", "inference", "training"),
}
_TYPES: dict[str, Check] = {
    **dict.fromkeys(("stage", "resolution", "epoch", "stage_epoch", "epochs", "batch"), is_count),
    **dict.fromkeys(("steps_per_epoch", "world", "parameters"), is_count),
    **dict.fromkeys(("accuracy", "images_per_s", "data_wait", "seconds", "lr"), is_number),
    **dict.fromkeys(("alpha", "gamma", "flat_maps", "val_accuracy"), is_number),
    **dict.fromkeys(("test_accuracy", "test_accuracy_last"), is_number),
    **dict.fromkeys(("mse", "pointing", "inference", "training", "energy_j"), is_number),
    **dict.fromkeys(("cache_hits", "cache_misses"), is_count),
    **dict.fromkeys(("total", "ce", "kd", "saliency", "features", "correlation"), is_real),
    **dict.fromkeys(("split", "reason", "device", "precision", "torch", "config", "policy"), is_text),
    **dict.fromkeys(("command", "commit", "version"), is_text),
    **dict.fromkeys(("notes", "skipped"), list_of(is_text)),
    **dict.fromkeys(("state", "decision"), is_mapping),
    "train_accuracy": optional(is_number),  # an epoch may have had no step
    "teacher_parameters": optional(is_count),
    "resolutions": list_of(is_count),
}
_TEACHER = _TYPES | {"accuracy": list_of(is_number)}


@dataclass(frozen=True)
class Log:
    """The lines of events.jsonl as they were written, and which were left out, as (line from 1 on, why)."""

    events: list[Event]
    left_out: list[tuple[int, str]]
    unchecked: list[int]  # lines without a checksum, after the first that has one: only `irkd verify` minds

    def said(self) -> list[str]:
        """A sentence on what was left out, or none."""
        if not self.left_out:
            return []
        count, shown = len(self.left_out), "; ".join(f"line {n}: {why}" for n, why in self.left_out[:5])
        more = f"; and {count - 5} more" if count > 5 else ""
        what = f"{count} line{'s' * (count > 1)} of {EVENTS} cut short or altered, and left out"
        return [f"{what}: {shown}{more}"]


def parse_event(line: bytes) -> Event:
    """The event that a line holds.

    Raises:
        ValueError: it holds none, or was altered since; the message says why.
    """
    event = parse_checked(line)
    if not isinstance(event, dict) or not _BASE.keys() <= event.keys():
        raise ValueError("no event")
    problem = wrong_type(event, _BASE)
    kind = event["event"]
    if problem is None and kind in _NEEDED:
        missing = [key for key in _NEEDED[kind] if key not in event]
        problem = f"{kind} without {missing[0]}" if missing else None
        problem = problem or wrong_type(event, _TEACHER if kind == "teacher" else _TYPES)
    if problem is not None:
        raise ValueError(problem)
    return event


def read_log(run: Path) -> Log:
    """Every event of a run as it was written.

    Raises:
        UserError: the run has no events, or they cannot be read.
    """
    file = run / EVENTS
    try:
        data = files.read(file)
    except FileNotFoundError:
        raise UserError(f"{run} is no run folder: it has no {EVENTS}") from None
    except OSError as error:
        raise unreadable(file, error) from error
    events, left_out, unchecked, checked = [], [], [], False
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            events.append(parse_event(line))
        except ValueError as error:
            left_out.append((number, str(error)))
            continue
        if is_checked(line):
            checked = True
        elif checked:
            unchecked.append(number)
    return Log(events, left_out, unchecked)


def settled(events: list[Event]) -> list[Event]:
    """Each step once: what a resumed run did again replaces what it did before.

    The summary of a run that was extended holds until it trains again.
    """
    kept: list[Event] = []
    extended = False
    for event in events:
        extended = extended or event["event"] == "extend"
        if extended and event["event"] in ("stage", "train", "evaluation", "epoch", "summary"):
            kept, extended = [e for e in kept if e["event"] != "summary"], False
        if event["event"] == "start":
            kept = []
        if event["event"] in ("resume", "rollback"):
            kept = [e for e in kept if e["step"] <= event["step"]]
        kept.append(event)
    return kept


def read_events(run: Path) -> list[Event]:
    """Events of a run in order, each step once; lines that cannot be read are left out (`read_log` names them).

    Raises:
        UserError: the run has no events, or they cannot be read.
    """
    return settled(read_log(run).events)


def read_decisions(run: Path, config: str) -> dict[int, Event]:
    """Decisions that were written down under the configuration of this digest, by step, whatever was resumed since.

    Those that a roll-back went behind were of batches that are left out now.
    """
    events, found = read_log(run).events if (run / EVENTS).exists() else [], dict[int, Event]()
    for e in events:
        if e["event"] == "rollback":
            found = {step: kept for step, kept in found.items() if step <= e["step"]}
        elif e["event"] == "decision" and e["config"] == config:
            found[e["step"]] = e
    return found


def open_log(file: Path) -> BinaryIO:
    """Open a file of lines to append to, unbuffered; after a line that a kill cut short, a new one begins.

    Raises:
        UserError: it is no plain file.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists() and not (file.is_file() or file.is_dir()):  # opening a pipe would wait
        raise UserError(f"{file} is no plain file; remove it")
    handle = file.open("a+b", buffering=0)
    if handle.seek(0, os.SEEK_END):
        handle.seek(-1, os.SEEK_END)
        if handle.read(1) != b"\n":
            handle.write(b"\n")
    return handle


def read_samples(run: Path) -> dict[int, list[int]]:
    """The samples that each step trained on, over all ranks, ascending; what was done again counts once.

    Lines that cannot be read, such as one that a kill cut short, are left out; `irkd verify` names them.
    """
    starts: dict[float, list[dict[str, Any]]] = {}
    for file in runfolder.samples_files(run):
        for line in files.read(file).split(b"\n"):
            if (record := parse_samples(line)) is not None:
                starts.setdefault(record["started"], []).append(record)
    steps: dict[int, list[int]] = {}
    for _, records in sorted(starts.items()):
        ours: dict[int, list[int]] = {}
        for record in records:
            if "from" in record:
                steps = {k: v for k, v in steps.items() if k < record["from"]}
            else:
                ours.setdefault(record["step"], []).extend(record["ids"])
        steps |= ours
    return {step: sorted(ids) for step, ids in sorted(steps.items())}


def parse_samples(line: bytes) -> dict[str, Any] | None:
    """A line of a file of samples, `{started, from}` or `{started, step, ids}`; None if it is none."""
    try:
        record = parse_checked(line)
    except ValueError:
        return None
    types = {"started": is_number, "from": is_count, "step": is_count, "ids": list_of(is_count)}
    if not isinstance(record, dict) or "started" not in record or wrong_type(record, types):
        return None
    return record if "from" in record or {"step", "ids"} <= record.keys() else None
