"""A run while it goes: its processes, its folder, and what must be closed again whatever happens."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from irkd_dist import checkpoint, eventlog, files, runfolder
from irkd_dist import config as configuration
from irkd_dist.config import Config
from irkd_dist.data.loader import Batch
from irkd_dist.errors import Passing, Stopped, Superseded, UserError
from irkd_dist.training import bookends, build, distributed, engines, guard, metrics, restore
from irkd_dist.training.energy import Meter
from irkd_dist.training.parts import Parts
from irkd_dist.training.position import Position
from irkd_dist.training.step import Taken
from irkd_dist.training.tracking import SampleLog, Tracker
from irkd_dist.writer import Writer


@dataclass
class Run:
    """What the loop has in hand."""

    parts: Parts
    folder: Path
    position: Position
    tracker: Tracker
    samples: SampleLog
    requests: distributed.StopRequests
    watch: distributed.Watch
    exchange: guard.Exchange
    decisions: dict[int, dict[str, Any]]  # by step: taken before a restart, to be taken again
    session: str  # this start of the run; the newest one owns the folder
    meter: Meter
    writer: Writer = field(default_factory=Writer)
    saved: float = field(default_factory=time.perf_counter)  # moment of the last checkpoint
    asked: bool = False  # to stop, some process
    seen: dict[int, list[int]] = field(default_factory=dict)  # samples of steps whose flags are not back yet

    @property
    def newest(self) -> Path:
        """The checkpoint of this position."""
        return self.folder / runfolder.CHECKPOINTS / checkpoint.name(self.position.step)

    def send(self, step: int, taken: Taken) -> list[guard.Flags]:
        """Tell the other processes how a step went and what is wished here; returns what they said of the step before.

        Clocks differ between processes and all must save at the same step, so only rank 0's counts.
        """
        minutes = self.parts.config.checkpoint.every_minutes
        overdue = minutes is not None and time.perf_counter() - self.saved > 60 * minutes
        stop, save = self.requests.received is not None, overdue and self.parts.engine.main
        return self.exchange.send(step, stop, save, taken.skipped, taken.mine)

    def remember(self, step: int, batches: list[Batch]) -> None:
        """Keep the samples of a step, if they are asked for, until it is known whether it was taken."""
        if self.parts.config.track.samples:  # not else: it waits for the device
            self.seen[step] = [i for b in batches for i in b.ids[(b.weight > 0).cpu().numpy()].tolist()]

    def energy(self) -> dict[str, float]:
        """Joules of all processes since the last call, for an event; nothing where no machine tells."""
        told = distributed.gather(self.parts.engine, self.meter.spent())
        known = [joules for joules in told if joules is not None]
        return {"energy_j": round(sum(known), 3)} if known else {}

    def log(
        self,
        means: dict[str, float],
        images: int,
        seconds: float,
        lr: float,
        cache: dict[str, float],
        update: Any,
    ) -> None:
        """Write down the steps since the last line."""
        step, state = self.position.step, self.position.curriculum
        self.tracker.written(self.writer)
        rates = {
            "images_per_s": images / seconds,
            "data_wait": means.pop("wait_s") / seconds,
            "lr": lr,
            **cache,
        }
        if images:
            timing = {"seconds": round(seconds, 4), **rates}
            self.tracker.event("train", step, stage=state.stage, **means, **timing)
            system = {f"system/{k}": rates[k] for k in ("images_per_s", "data_wait")}
            self.tracker.metrics(
                step, {f"train/{k}": v for k, v in means.items()} | system | {"train/lr": lr}
            )
        update(self.position.stage_step, metrics.bar_text(means, rates["images_per_s"], state.best_accuracy))


@contextmanager
def opened(config: Config, owns_process: bool, extend: bool) -> Iterator[Run]:
    """Join the processes, build or resume the run, and leave status and folder as they must be at its end."""
    folder, reached = configuration.folder_of(config), 0
    try:
        engine = engines.setup(config)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0" and folder.is_dir() and not isinstance(error, Passing):
            runfolder.write_status(folder, "failed", 0, int(os.environ.get("WORLD_SIZE", "1")), str(error))
        raise
    try:
        started = distributed.broadcast(engine, time.time())
        with (
            distributed.StopRequests(owns_process) as requests,
            distributed.Watch(engine, config.rank_timeout_s, str(started)) as watch,
        ):
            _, content, skipped = restore.newest(engine, folder)
            engine.autocast = restore.precision(engine, config, content.state)
            parts = build.build(config, engine)
            resumed = restore.resume(parts, content, skipped, extend)
            del content  # it would stay in memory as long as the run
            reached = resumed.position.step
            with _folder_opened(parts, folder, resumed, requests, watch, started) as run:
                yield run
                if engine.main:
                    runfolder.write_status(folder, "finished", run.position.step, engine.world)
        distributed.barrier(engine)  # without torchrun rank 0 keeps the store: it leaves last
    except Stopped:
        distributed.barrier(engine)
        raise
    except UserError as error:
        error.said = not distributed.first_to_say(engine, str(error))
        # else the folder is another's, or the run goes on
        if not isinstance(error, (Superseded, Passing)) and engine.main and folder.is_dir():
            runfolder.write_status(folder, "failed", reached, engine.world, str(error))
        raise
    finally:
        engine.finish()


@contextmanager
def _folder_opened(
    parts: Parts, folder: Path, resumed: restore.Resumed, requests: distributed.StopRequests,
    watch: distributed.Watch, started: float,
) -> Iterator[Run]:  # fmt: skip
    config, engine, position = parts.config, parts.engine, resumed.position
    if engine.main:
        files.write(folder / runfolder.CONFIG, configuration.to_yaml(config))
        files.write(folder / runfolder.SESSION, str(started))
        runfolder.write_status(folder, "running", position.step, engine.world)
    distributed.barrier(engine)
    assert config.name is not None
    track, tree = config.track, configuration.to_dict(config)
    tracker = Tracker(
        folder, engine.main, track.backend, track.mode, track.project, config.name, tree, requests.ask
    )
    decisions = eventlog.read_decisions(folder, build.config_digest(config)) if engine.main else {}
    # one that counts on a best which is gone is taken anew
    gone = {text.partition(": ")[0] for text in resumed.lost}
    decisions = {
        at: d
        for at, d in decisions.items()
        if not gone & {d["state"].get("best_checkpoint"), d["decision"].get("reload")}
    }
    with SampleLog(folder, engine.rank, started, position.step, track.samples) as samples:
        exchange = guard.Exchange(engine)
        run = Run(
            parts, folder, position, tracker, samples, requests, watch, exchange, decisions, str(started),
            Meter(engine.device),
        )  # fmt: skip
        try:
            bookends.announce(parts, folder, resumed, tracker)
            yield run
            if engine.main:
                tracker.written(run.writer)
        finally:
            if parts.answers is not None:
                parts.answers.close()
            run.writer.close()
            tracker.written(run.writer)
            tracker.close()
