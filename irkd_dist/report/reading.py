"""Run folder -> plain data: events, configuration, panels, evaluation, and the times between events."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from irkd_dist import config as configuration
from irkd_dist import runs
from irkd_dist.config import Config, Stage
from irkd_dist.data import shards
from irkd_dist.errors import UserError
from irkd_dist.evaluate import RESULT
from irkd_dist.training import checkpoint, panels
from irkd_dist.training.tracking import read_events

Event = dict[str, Any]
Snapshot = tuple[int, int, dict[str, np.ndarray]]  # stage, epoch in it, arrays as training/panels.py writes them


@dataclass(frozen=True)
class Run:
    """What a run folder tells."""

    folder: Path
    name: str
    config: Config
    events: list[Event]
    classes: tuple[str, ...]  # empty if not at hand
    version: str  # of the package, as of the newest checkpoint
    panels: list[Snapshot]
    measured: dict[str, Any]  # what `irkd evaluate` wrote; empty if it has not run
    notices: list[str]  # what a reader must know about the record itself

    @property
    def stages(self) -> list[Stage]:
        """The stages as configured, reached or not."""
        return configuration.stages(self.config)

    def of(self, kind: str, stage: int | None = None) -> list[Event]:
        """Events of one kind, of one stage if given, in order."""
        return [e for e in self.events if e["event"] == kind and stage in (None, e.get("stage"))]

    def last(self, kind: str) -> Event | None:
        """The newest event of one kind."""
        return next(reversed(self.of(kind)), None)

    @property
    def epochs(self) -> list[list[Event]]:
        """The evaluations of each stage that has one."""
        return [own for i in range(len(self.stages)) if (own := self.of("evaluation", i))]

    @property
    def best(self) -> Event | None:
        """The evaluation whose weights the run is judged by: the last stage's best, the earliest of equal ones."""
        return max(self.epochs[-1], key=lambda e: e["accuracy"]) if self.epochs else None

    @property
    def step(self) -> int:
        """How far the run got."""
        return max((e["step"] for e in self.events), default=0)


def read(folder: Path) -> Run:
    """Read a run folder; panels that cannot be read become a notice.

    Raises:
        UserError: no such folder, or one without configuration or events.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no run folder: there is no such folder")
    config, events, notices = runs.load_config(folder), _each_epoch_once(read_events(folder)), []
    state = _newest_state(folder)
    try:
        snapshots = panels.load(folder)
    except (OSError, ValueError, KeyError, BadZipFile) as error:  # a kill may cut one short
        snapshots = []
        notices.append(f"The saliency panels cannot be read: {error}")
    try:
        measured = json.loads((folder / RESULT).read_text()) if (folder / RESULT).is_file() else {}
    except ValueError as error:
        raise UserError(f"{folder / RESULT} is not what irkd evaluate writes: {error}") from error
    classes, version = state.get("classes") or _classes(config), state.get("package_version", "unknown")
    name = folder.resolve().name
    return Run(folder, name, config, events, tuple(classes), version, snapshots, measured, notices)


def elapsed(run: Run) -> list[float]:
    """Seconds of training up to each event; pauses before a resume and the final test are left out."""
    spent = [0.0]
    for before, event in itertools.pairwise(run.events):
        outside = event["event"] in ("start", "resume", "summary")
        spent.append(0.0 if outside else max(event["time"] - before["time"], 0.0))
    return list(itertools.accumulate(spent))


def stage_seconds(run: Run) -> dict[int, float]:
    """Seconds of training in each stage that was entered; before the first one under -1."""
    spent, stage, entered = {-1: 0.0}, -1, 0.0
    for event, now in zip(run.events, elapsed(run), strict=False):
        spent[stage] = spent.get(stage, 0.0) + now - entered
        stage, entered = event["stage"] if event["event"] == "stage" else stage, now
    return spent


def wait_share(steps: list[Event]) -> float | None:
    """Share of the time in training steps spent waiting for data, from train events at equal distances."""
    times = [1 / e["images_per_s"] for e in steps]
    waits = [t * e["data_wait"] for t, e in zip(times, steps, strict=True)]
    return sum(waits) / sum(times) if steps else None


def _each_epoch_once(events: list[Event]) -> list[Event]:
    """A run killed between an epoch's evaluation and its checkpoint evaluates again at the same step."""
    newest = {e["epoch"]: e for e in events if e["event"] == "evaluation"}
    return [e for e in events if e["event"] != "evaluation" or newest[e["epoch"]] is e]


def _newest_state(folder: Path) -> dict[str, Any]:
    for candidate in sorted((folder / runs.CHECKPOINTS).glob("step-*"), reverse=True):
        try:
            return checkpoint.load_state(candidate)
        except UserError:
            continue  # a damaged checkpoint is training's concern
    return {}


def _classes(config: Config) -> tuple[str, ...]:
    try:
        return shards.load_manifest(Path(config.data.shards)).classes
    except UserError:
        return ()
