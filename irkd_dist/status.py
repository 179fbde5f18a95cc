"""Where a run stands, from its folder alone: no process is asked, no torch is imported, a mounted folder will do."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irkd_dist import eventlog, runfolder, typed
from irkd_dist.errors import UserError, printable

SILENT = 120.0  # seconds without a sign of life after which "running" is doubted; a slow run's own pace counts more
TROUBLE = ("skip", "rollback", "checkpoint_failed", "stop")


@dataclass(frozen=True)
class Status:
    """What `show` prints; None where the run has not come that far."""

    run: str
    state: str  # waiting, running, silent, stopped, finished, failed
    reason: str  # why it stopped or failed, else empty
    age: float  # seconds since its last sign of life
    stage: int  # 0-based
    stages: int
    resolution: int
    epoch: int  # epochs done in the stage
    epochs: int  # epochs of the stage at most
    step: int
    steps: int | None  # of the whole run at most
    images_per_s: float | None
    step_s: float | None
    data_wait: float | None
    accuracy: float | None
    best: float | None  # of this stage
    split: str
    checkpoint_step: int | None  # newest on disk
    checkpoint_age: float | None
    restarts: int
    world: int | None
    trouble: dict[str, int]  # how often: skip, rollback, ...
    left: float | None  # estimated seconds
    damage: list[str]  # what could not be read, and was left out


def read(run: Path, now: float | None = None) -> Status:
    """Read a run folder.

    Raises:
        UserError: not a run folder, or its files cannot be read.
    """
    now = time.time() if now is None else now
    log = eventlog.read_log(run)
    stages, by_tokens = _stages(run)
    everything = eventlog.settled(log.events)
    events = [e for e in everything if e.get("stage", 0) in range(len(stages))]
    others = len(everything) - len(events)
    beyond = [f"{others} event{'s' * (others > 1)} of stages that {runfolder.CONFIG} does not have, left out"]
    beyond = beyond if others else []
    told, damage = runfolder.read_status(run)
    kinds = {kind: [e for e in events if e["event"] == kind] for kind in ("train", "evaluation", "stage")}
    entered = kinds["stage"][-1] if kinds["stage"] else {"stage": 0, "resolution": stages[0][0], "step": 0}
    here = entered["stage"]
    resolution, epochs = stages[here]
    judged = [e for e in kinds["evaluation"] if e["stage"] == here]
    trained = [e for e in kinds["train"] if e["stage"] == here and "seconds" in e]
    finished = any(e["event"] == "summary" for e in events)
    step = max((e["step"] for e in events), default=0)
    per_epoch = entered.get("steps_per_epoch")
    last = max([e["time"] for e in events] + ([told["time"]] if "time" in told else []), default=now)
    age = max(now - last, 0.0)
    checkpoint = _newest_checkpoint(run)
    starts = _starts(log.events)
    state = _state(told, finished, age, trained, bool(kinds["stage"]))
    latest = trained[-1] if trained else None
    left = None

    def scale(side: int) -> float:
        return (side / resolution) ** 2 if by_tokens else 1.0

    if state in ("running", "silent", "stopped") and per_epoch:
        left = _left(events, entered, step, stages, per_epoch)
    return Status(
        str(run), state, told.get("reason", "") if state == told.get("state") else "", age, here,
        len(stages), resolution, judged[-1]["stage_epoch"] if judged else 0, epochs, step,
        round(sum(e * per_epoch * scale(r) for r, e in stages)) if per_epoch else None,
        latest["images_per_s"] if latest else None, _step_seconds(trained),
        latest["data_wait"] if latest else None, judged[-1]["accuracy"] if judged else None,
        max((e["accuracy"] for e in judged), default=None), judged[-1]["split"] if judged else "",
        checkpoint[0] if checkpoint else None, max(now - checkpoint[1], 0.0) if checkpoint else None,
        max(len(starts) - 1, 0), starts[-1].get("world") if starts else None,
        {k: n for k in TROUBLE if (n := sum(e["event"] == k for e in events))}, left,
        [*([damage] if damage else []), *log.said(), *beyond],
    )  # fmt: skip


def show(status: Status) -> str:
    """The lines a person reads."""
    s = status
    head = {
        "waiting": f"has not trained yet, last sign of life {runfolder.span(s.age)} ago",
        "running": f"running, last sign of life {runfolder.span(s.age)} ago",
        "silent": f"no sign of life for {runfolder.span(s.age)}: killed, or it hangs; the same command goes on with it",
        "stopped": f"stopped {runfolder.span(s.age)} ago; the same command goes on with it",
        "finished": f"finished {runfolder.span(s.age)} ago",
        "failed": f"failed {runfolder.span(s.age)} ago",
    }[s.state]
    rows = [
        ("stage", f"{s.stage + 1} of {s.stages}: {s.resolution} px, {s.epoch} of {s.epochs} epochs done"),
        ("step", f"{s.step:,}" + (f" of {s.steps:,} at most" if s.steps and s.state != "finished" else "")),
    ]
    if s.reason:
        rows.insert(0, ("why", printable(s.reason)))
    if s.images_per_s is not None and s.step_s is not None and s.data_wait is not None:
        who = f" on {s.world} process{'es' if s.world != 1 else ''}" if s.world else ""
        waiting = f"{s.data_wait:.1%} of it waiting for images"
        rows.append(("speed", f"{s.images_per_s:,.0f} images/s{who}, {s.step_s:.3g} s a step, {waiting}"))
    if s.accuracy is not None and s.best is not None:
        rows.append(("accuracy", f"{s.accuracy:.2%} ({s.split}), best of this stage {s.best:.2%}"))
    if s.checkpoint_step is None or s.checkpoint_age is None:
        rows.append(("checkpoint", "none yet"))
    else:
        rows.append(("checkpoint", f"step {s.checkpoint_step:,}, {runfolder.span(s.checkpoint_age)} old"))
    rows.append(("restarts", str(s.restarts)))
    if s.trouble:
        rows.append(("events", ", ".join(f"{n} {k.replace('_', ' ')}" for k, n in s.trouble.items())))
    if s.left is not None:
        how = "an estimate" + (": later stages by their pixels" if s.stage + 1 < s.stages else "")
        rows.append(("left", f"about {runfolder.span(s.left)} of training at most ({how})"))
    rows += [("damaged", printable(text)) for text in s.damage]
    return "\n".join([f"{printable(s.run)}: {head}", *(f"  {name:<11} {text}" for name, text in rows)])


def overview(path: Path, now: float | None = None) -> str:
    """`show` of a run folder; of a folder that holds some, a line for each, the newest sign of life first.

    Raises:
        UserError: it is no run folder and holds none.
    """
    if any((path / name).exists() for name in (runfolder.CONFIG, runfolder.EVENTS)) or not path.is_dir():
        return show(read(path, now))
    lines: list[tuple[float, str]] = []
    for run in sorted(f for f in path.iterdir() if f.is_dir() and (f / runfolder.CONFIG).exists()):
        try:
            found = read(run, now)
            lines.append((found.age, _line(found)))
        except UserError as error:
            lines.append((float("inf"), f"{printable(run.name)}  damaged: {error}"))
    if not lines:
        raise UserError(
            f"{path} is no run folder and holds none: none of its folders has a {runfolder.CONFIG}"
        )
    return "\n".join(line for _, line in sorted(lines))


def _line(s: Status) -> str:
    parts = [
        f"{s.state} {runfolder.span(s.age)} ago",
        f"stage {s.stage + 1} of {s.stages} ({s.resolution} px)",
    ]
    parts.append(f"step {s.step:,}" + (f" of {s.steps:,}" if s.steps and s.state != "finished" else ""))
    parts += [f"{s.split} {s.best:.2%}"] if s.best is not None else []
    parts += [f"about {runfolder.span(s.left)} left"] if s.left is not None else []
    parts += [s.reason] if s.reason else []
    parts += [f"damaged: {text}" for text in s.damage]
    return printable(f"{Path(s.run).name}  " + ", ".join(parts))


def _stages(run: Path) -> tuple[list[tuple[int, int]], bool]:
    """(resolution, epochs) of each stage, and whether its steps go with its pixels (curriculum.batch=tokens)."""
    tree = runfolder.read_config(run)
    try:
        if tree.get("fixed"):
            stages, by_tokens = [(tree["fixed"]["resolution"], tree["fixed"]["epochs"])], False
        else:
            plan = tree["curriculum"]
            stages = [(s["resolution"], s.get("epochs") or plan["epochs"]) for s in plan["stages"]]
            by_tokens = plan.get("batch") == "tokens"
    except (LookupError, TypeError, AttributeError):
        stages, by_tokens = [], False
    if not stages or not all(typed.is_count(v) and v > 0 for pair in stages for v in pair):
        raise UserError(f"{run / runfolder.CONFIG} names no stages with a resolution and epochs")
    return stages, by_tokens


def _state(
    told: dict[str, Any], finished: bool, age: float, trained: list[dict[str, Any]], entered: bool
) -> str:
    """What the run said of itself, doubted where it says that it runs and nothing has been heard for long."""
    if told.get("state") in ("stopped", "finished", "failed"):
        return told["state"]
    if finished:
        return "finished"
    pace = max((e["seconds"] for e in trained[-5:]), default=0.0)
    if age > max(SILENT, 10 * pace):
        return "silent"
    return "running" if entered else "waiting"


def _starts(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every start and resume up to the first end: settled events forget those that came to nothing."""
    ends = (i for i, e in enumerate(events) if e["event"] == "summary")
    return [e for e in events[: next(ends, None)] if e["event"] in ("start", "resume")]


def _newest_checkpoint(run: Path) -> tuple[int, float] | None:
    """Step and time of the newest checkpoint."""
    for folder in runfolder.steps(run / runfolder.CHECKPOINTS):
        try:
            return runfolder.step_of(folder), (folder / runfolder.STATE).stat().st_mtime
        except OSError:
            continue  # pruned under our eyes
    return None


def _step_seconds(trained: list[dict[str, Any]]) -> float | None:
    """Seconds a step over the newest lines; a line covers the steps since the one before."""
    recent = trained[-11:]
    steps = recent[-1]["step"] - recent[0]["step"] if recent else 0
    return sum(e["seconds"] for e in recent[1:]) / steps if steps > 0 else None


def _left(
    events: list[dict[str, Any]], entered: dict[str, Any], step: int, stages: list[tuple[int, int]], per_epoch: int
) -> float | None:  # fmt: skip
    """Seconds left if no stage ends early: the pace since this stage was entered, validation and checkpoints included;
    an epoch of a stage to come takes as much longer as its images have more pixels."""
    done = step - entered["step"]
    if done <= 0:
        return None
    since = [e["time"] for e in events if e["time"] >= entered["time"]]
    epoch_s = (max(since) - entered["time"]) / done * per_epoch
    here = entered["stage"]
    first = min((e["step"] for e in events if e["event"] == "stage" and e["stage"] == here), default=step)
    side, epochs = stages[here]
    rest = max(epochs - (step - first) / per_epoch, 0)
    return epoch_s * (rest + sum(count * (later / side) ** 2 for later, count in stages[here + 1 :]))
