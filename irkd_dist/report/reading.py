"""Run folder -> plain data: configuration, events, panels, evaluation, and the times between events."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from irkd_dist import checkpoint, eventlog, runfolder, typed
from irkd_dist import config as configuration
from irkd_dist.config import Config, Stage
from irkd_dist.data import shards
from irkd_dist.errors import UserError
from irkd_dist.eventlog import Event
from irkd_dist.report.evaluations import Evaluation, read_evaluation
from irkd_dist.training import panels


@dataclass(frozen=True)
class Run:
    """What a run folder tells."""

    folder: Path
    name: str
    config: Config
    events: list[Event]
    classes: tuple[str, ...]  # empty if not at hand
    version: str | None  # of the package, as of the newest checkpoint
    panels: list[tuple[int, int, dict[str, np.ndarray]]]
    evaluations: list[Evaluation]
    notices: list[str]  # what a reader must know about the record itself
    log: list[Event]  # every event as it was written, also what a resume did again

    @property
    def stages(self) -> list[Stage]:
        """The stages as configured, reached or not."""
        return configuration.stages(self.config)

    @property
    def epochs(self) -> list[list[Event]]:
        """The evaluations of each stage that has one, an epoch each."""
        return [own for i in range(len(self.stages)) if (own := self.of("evaluation", i))]

    def passed(self, stage: int | None = None) -> list[Event]:
        """The end of each epoch, judged or not (eval_every), of one stage if given, in order."""
        return [
            e for e in self.events if e["event"] in ("evaluation", "epoch") and stage in (None, e["stage"])
        ]

    @property
    def best(self) -> Event | None:
        """The evaluation whose weights the run is judged by: the last stage's best, the earliest of equal ones."""
        last = self.last("evaluation")
        return max(self.of("evaluation", last["stage"]), key=lambda e: e["accuracy"]) if last else None

    def of(self, kind: str, stage: int | None = None) -> list[Event]:
        """Events of one kind, of one stage if given, in order."""
        return [e for e in self.events if e["event"] == kind and stage in (None, e.get("stage"))]

    def last(self, kind: str) -> Event | None:
        """The newest event of one kind."""
        return next((e for e in reversed(self.events) if e["event"] == kind), None)


def read(folder: Path) -> Run:
    """Read a run folder; what is missing or broken besides its configuration and events becomes a notice.

    Raises:
        UserError: it has no configuration or no events.
    """
    config = configuration.from_dict(runfolder.read_config(folder), str(folder / runfolder.CONFIG))
    log = eventlog.read_log(folder)
    events = _each_epoch_once(eventlog.settled(log.events))
    notices = [f"{text}." for text in log.said()]
    state = _newest_state(folder)
    snapshots, problems = panels.load(folder)
    notices += problems
    evaluations = []
    for file in runfolder.evaluation_files(folder):
        try:
            found, problem = read_evaluation(file)
            evaluations.append(found)
            notices += [problem] if problem else []
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            notices.append(f"{file.name} is not what irkd evaluate writes and was left out: {error}")
    classes = tuple(state.get("classes", ())) or _classes_of_shards(config)
    name, version = folder.resolve().name, state.get("package_version")
    return Run(folder, name, config, events, classes, version, snapshots, evaluations, notices, log.events)


def images(run: Run, split: str) -> int | None:
    """How many images a split has, where the run has written it down."""
    counts = (run.last("start") or {}).get("images")
    count = counts.get(split) if isinstance(counts, dict) else None
    return count if typed.is_count(count) and count else None


def ends(run: Run) -> dict[int, str]:
    """Why each stage that ended did, in the words of the decision itself."""
    at = {e["step"]: e["stage"] for e in run.of("evaluation")}
    found = {e["stage"]: e["reason"] for e in run.of("transition")}
    for event in run.of("decision"):
        decision = event["decision"]
        if decision.get("action") in ("advance", "finish") and event["step"] in at:
            found[at[event["step"]]] = str(decision.get("reason", ""))
    return found


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share that was counted over so many trials (Wilson 1927, no continuity correction)."""
    z = 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = max(share * (1 - share) / count + z * z / (4 * count * count), 0.0)
    half = z / (1 + z * z / count) * math.sqrt(spread)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def stage_seconds(run: Run) -> dict[int, float]:
    """Seconds spent in each stage; -1 is before the first one."""
    spent: dict[int, float] = {}
    stage, entered = -1, 0.0
    for event, now in zip(run.events, _elapsed(run.events), strict=False):
        spent[stage] = spent.get(stage, 0.0) + now - entered
        stage, entered = event["stage"] if event["event"] == "stage" else stage, now
    return spent


def timed_evaluations(run: Run) -> list[tuple[Event, float]]:
    """The evaluations, each with the seconds of training up to it."""
    timed = zip(run.events, _elapsed(run.events), strict=False)
    return [(e, seconds) for e, seconds in timed if e["event"] == "evaluation"]


def spent_flops(run: Run) -> list[tuple[Event, float]]:
    """The evaluations, each with the floating-point operations of training up to it; none if they were not counted.

    Images of each epoch times what an image costs in its stage; the teacher only for answers that no cache had.
    """
    costs = {e["stage"]: e for e in run.of("flops")}
    found, spent, before = [], 0.0, 0
    for event in run.events:
        if event["event"] not in ("evaluation", "epoch"):
            continue
        cost = costs.get(event["stage"])
        if cost is None or "images" not in event:
            return []
        lines = [e for e in run.of("train", event["stage"]) if before < e["step"] <= event["step"]]
        hits, misses = (sum(e.get(k, 0) for e in lines) for k in ("cache_hits", "cache_misses"))
        asked = misses / (hits + misses) if hits + misses else 1.0
        spent += event["images"] * (cost["training"] + asked * cost.get("teacher", 0.0))
        before = event["step"]
        found += [(event, spent)] if event["event"] == "evaluation" else []
    return found


def joules(run: Run) -> float | None:
    """Energy of training as far as the machine told; None if it did not."""
    told = [e["energy_j"] for e in run.events if "energy_j" in e]
    return sum(told) if told else None


def probes(run: Run) -> list[Event]:
    """What each epoch's end has measured, each epoch once."""
    return [*{e["epoch"]: e for e in run.of("probe")}.values()]


def total_seconds(run: Run) -> float:
    """Seconds of training; of an unfinished run up to its last event."""
    summary = run.last("summary")
    return summary["seconds"] if summary else _elapsed(run.events)[-1]


def wait_share(steps: list[Event]) -> float | None:
    """Share of the time in training steps that was spent waiting for data."""
    if all("seconds" in e for e in steps) and (whole := sum(e["seconds"] for e in steps)):
        return float(sum(e["seconds"] * e["data_wait"] for e in steps) / whole)
    steps = [
        e for e in steps if e["images_per_s"] > 0
    ]  # an early release's, which had one batch for all stages
    counts = np.diff([0, *(e["step"] for e in steps)]) if steps else np.zeros(0)
    if steps and len(steps) > 1:
        counts[0] = counts[1]  # the first line's start is not in the record
    times = np.array([n / e["images_per_s"] for n, e in zip(counts, steps, strict=True)])
    if not times.sum():
        return None
    return float((times * [e["data_wait"] for e in steps]).sum() / times.sum())


def _elapsed(events: list[Event]) -> list[float]:
    """Seconds of training up to each event; pauses before a resume and the final test are left out."""
    steps = [0.0]
    for before, event in itertools.pairwise(events):
        outside = event["event"] in ("start", "resume", "summary")
        steps.append(0.0 if outside else max(event["time"] - before["time"], 0.0))
    return list(itertools.accumulate(steps))


def _newest_state(folder: Path) -> dict[str, Any]:
    kept = [*runfolder.bests(folder), *runfolder.steps(folder / runfolder.CHECKPOINTS)]
    for candidate in sorted(kept, key=runfolder.step_of, reverse=True):
        try:
            return checkpoint.load_state(candidate)
        except UserError:
            continue  # a damaged checkpoint is training's concern
    return {}


def _classes_of_shards(config: Config) -> tuple[str, ...]:
    try:
        return shards.load_manifest(configuration.shards_of(config)).classes
    except UserError:
        return ()


def _each_epoch_once(events: list[Event]) -> list[Event]:
    """A run killed between an epoch's evaluation and its checkpoint evaluates again at the same step."""
    newest = {e["epoch"]: e for e in events if e["event"] == "evaluation"}
    return [e for e in events if e["event"] != "evaluation" or newest[e["epoch"]] is e]
