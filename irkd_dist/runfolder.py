"""A run folder: its names, whole-file writes, and what it says of itself. Without torch; every reader stands on it.

Whoever reads a run folder may meet one that was cut short, altered, or made by somebody else: what cannot be read is
left out and named, never guessed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import stat
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from irkd_dist import plain
from irkd_dist.errors import UserError, unreadable

CONFIG, EVENTS, SESSION, OWNER = "config.yaml", "events.jsonl", "session", "owner"
STATUS, RESTARTS = "status.json", "restarts.json"
CHECKPOINTS, BEST, MILESTONES = "checkpoints", "best", "milestones.txt"
STATE, STUDENT, OPTIMIZER = "state.json", "student.safetensors", "optimizer.safetensors"  # of a checkpoint
WRITING = ".writing-"  # begins the name of a checkpoint that is not whole yet
PANELS, SAMPLES = "panels", "samples"
EVALUATION, EARLIER_EVALUATION = "evaluation", "evaluation.json"  # the second: of earlier releases
REPORT, FIGURES = "report.html", "figures"
TENSORBOARD, WANDB_ID = "tensorboard", "wandb-id.txt"
STATES = ("running", "stopped", "finished", "failed")

Event = dict[str, Any]


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


def evaluation_files(run: Path) -> list[Path]:
    """Every result of `irkd evaluate`, in order of names; that of an earlier release last."""
    return [f for f in [*sorted((run / EVALUATION).glob("*.json")), run / EARLIER_EVALUATION] if f.is_file()]


# ---- whole files


@contextmanager
def whole(path: Path, temporary: Path | None = None) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` whole (written, synced, renamed) or not at all.

    `temporary`: where it is written first, else a hidden name of this process's own beside it.
    """
    temporary = temporary or path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write(path: Path, content: str | bytes) -> None:
    """Write a whole file, see `whole`; what UTF-8 cannot hold (a name of other bytes) is written as `\\udcff`."""
    with whole(path) as file:
        file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)


def sync_folder(folder: Path) -> None:
    """Return when the names in a folder are on the disk itself."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_bytes(file: Path) -> bytes:
    """Content of a plain file.

    Raises:
        OSError: it cannot be read, or it is a folder, a pipe or a device: those may never end.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as handle:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "is no plain file", str(file))
        return handle.read()


def read_word(file: Path) -> str:
    """The text of a small file, such as `owner`; empty where there is none."""
    try:
        return read_bytes(file).decode("utf-8", "backslashreplace").strip()
    except OSError:
        return ""


def parse(data: bytes) -> Any:
    """The value of JSON text.

    Raises:
        ValueError: it is none, not UTF-8, or nested too deeply; the message says which.
    """
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"no JSON: {error}") from None


def printable(text: str) -> str:
    """A text from somebody's run folder, with what a terminal would obey or refuse written as escapes."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def span(seconds: float) -> str:
    """A length of time in its two largest units."""
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= size:
            rest = int(seconds % size // part)
            return f"{int(seconds // size)} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{seconds:.0f} s"


# ---- what values are


def is_count(value: object) -> bool:
    """A whole number from 0 on that other programs can hold too."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def is_real(value: object) -> bool:
    """A number; NaN and the infinities are some."""
    return isinstance(value, float) or (
        isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
    )


def is_number(value: object) -> bool:
    """A finite number."""
    return is_real(value) and math.isfinite(value)  # type: ignore[arg-type]


def is_text(value: object) -> bool:
    """A string."""
    return isinstance(value, str)


def is_mapping(value: object) -> bool:
    """A mapping."""
    return isinstance(value, dict)


def list_of(of: Callable[[object], bool]) -> Callable[[object], bool]:
    """Whether a value is a list of such values."""
    return lambda value: isinstance(value, list) and all(of(v) for v in value)


def optional(of: Callable[[object], bool]) -> Callable[[object], bool]:
    """Whether a value is null or such a value."""
    return lambda value: value is None or of(value)


def _is_time(value: object) -> bool:
    return is_number(value) and 0 <= value < 2e11  # type: ignore[operator]  # seconds since 1970, and before the year 8300


def wrong_type(values: dict[str, Any], types: dict[str, Callable[[object], bool]]) -> str | None:
    """The first key of another type than it should be, as `stage='x'`; keys that are not there are not missed."""
    for key, fits in types.items():
        if key in values and not fits(values[key]):
            return f"{key}={str(values[key])[:40]!r} is not what belongs there"
    return None


# ---- events

_BASE: dict[str, Callable[[object], bool]] = {"event": is_text, "step": is_count, "time": _is_time}
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
}
_TYPES: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(("stage", "resolution", "epoch", "stage_epoch", "epochs", "batch"), is_count),
    **dict.fromkeys(("steps_per_epoch", "world", "parameters"), is_count),
    **dict.fromkeys(("accuracy", "images_per_s", "data_wait", "seconds", "lr"), is_number),
    **dict.fromkeys(("alpha", "gamma", "flat_maps", "val_accuracy"), is_number),
    **dict.fromkeys(("test_accuracy", "test_accuracy_last"), is_number),
    **dict.fromkeys(("total", "ce", "kd", "saliency"), is_real),
    **dict.fromkeys(("split", "reason", "device", "precision", "torch", "config", "policy"), is_text),
    **dict.fromkeys(("command", "commit", "version"), is_text),
    **dict.fromkeys(("notes", "skipped"), list_of(is_text)),
    **dict.fromkeys(("state", "decision"), is_mapping),
    "train_accuracy": optional(is_number),  # an epoch may have had no step
    "teacher_parameters": optional(is_count),
    "resolutions": list_of(is_count),
}
_TEACHER = _TYPES | {"accuracy": list_of(is_number)}
_CHECKED = re.compile(rb', "crc": "([0-9a-f]{8})"\}$')


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
        return [
            f"{count} line{'s' * (count > 1)} of {EVENTS} cut short or altered, and left out: {shown}{more}"
        ]


def event_line(values: Event) -> bytes:
    """A line of events.jsonl: JSON, with a checksum of what stands before it as its last key."""
    text = json.dumps(values).encode()
    return text[:-1] + b', "crc": "%08x"}\n' % zlib.crc32(text)


def parse_event(line: bytes) -> Event:
    """The event that a line holds.

    Raises:
        ValueError: it holds none, or was altered since; the message says why.
    """
    found = _CHECKED.search(line)
    if found:
        line = line[: found.start()] + b"}"
        if int(found[1], 16) != zlib.crc32(line):
            raise ValueError("altered: its checksum differs")
    event = parse(line)
    if not isinstance(event, dict) or not _BASE.keys() <= event.keys():
        raise ValueError("no event")
    if "crc" in event:
        raise ValueError("altered: its checksum cannot be read")
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
        data = read_bytes(file)
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
        if _CHECKED.search(line):
            checked = True
        elif checked:
            unchecked.append(number)
    return Log(events, left_out, unchecked)


def settled(events: list[Event]) -> list[Event]:
    """Each step once: what a resumed run did again replaces what it did before."""
    kept: list[Event] = []
    for event in events:
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


def open_log(file: Path) -> Any:
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
    for file in sorted((run / SAMPLES).glob("rank-*.jsonl")):
        for line in read_bytes(file).split(b"\n"):
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
        record = parse(line)
    except ValueError:
        return None
    types = {"started": is_number, "from": is_count, "step": is_count, "ids": list_of(is_count)}
    if not isinstance(record, dict) or "started" not in record or wrong_type(record, types):
        return None
    return record if "from" in record or {"step", "ids"} <= record.keys() else None


# ---- how a run stands


def write_status(run: Path, state: str, step: int, world: int, reason: str = "") -> None:
    """Say in `status.json` how a run stands: running, stopped (wants to go on), finished, or failed (does not).

    A run that is `running` and has no process was killed. Whoever starts runs again decides by this, not by exit codes.
    """
    told = {"state": state, "step": step, "time": round(time.time(), 1), "reason": reason, "world": world}
    with contextlib.suppress(OSError):  # a full disk must not end the run
        write(run / STATUS, json.dumps(told) + "\n")


def read_status(run: Path) -> tuple[dict[str, Any], str]:
    """What a run said of itself, empty where it has not or where that is damaged; and then what is wrong with it."""
    types = {
        "state": lambda v: v in STATES, "step": is_count, "time": _is_time, "reason": is_text, "world": is_count
    }  # fmt: skip
    return _read_small(run / STATUS, types, needed="state")


def read_restarts(run: Path) -> tuple[dict[str, Any], str]:
    """The count of restarts as `irkd requeue` keeps it, as `read_status`."""
    types = {"restarts": is_count, "without_progress": is_count, "step": optional(is_count)}
    return _read_small(run / RESTARTS, types)


def _read_small(
    file: Path, types: dict[str, Callable[[object], bool]], needed: str | None = None
) -> tuple[dict[str, Any], str]:
    try:
        value = parse(read_bytes(file))
    except FileNotFoundError:
        return {}, ""
    except OSError as error:
        return {}, f"{file.name} cannot be read: {error.strerror or error}"
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
        content = read_bytes(file)
    except FileNotFoundError:
        raise UserError(f"{run} is no run folder: it has no {CONFIG}") from None
    except OSError as error:
        raise unreadable(file, error) from error
    values = plain.parse(content, f"{file} cannot be read")
    if not isinstance(values, dict):
        raise UserError(f"{file} cannot be read: it holds no mapping")
    return values
