"""What a run says while it trains: events.jsonl always, a progress bar, and W&B or TensorBoard when asked."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from irkd_dist.errors import UserError

EVENTS = "events.jsonl"


class Tracker:
    """Writes events and metrics on rank 0; elsewhere every call does nothing.

    Args:
        run: run folder.
        main: whether this process is rank 0.
        backend: `none`, `wandb` or `tensorboard`.
        mode, project, name, config: for W&B; in a sweep its agent sets the run's id by environment.
    """

    def __init__(
        self,
        run: Path,
        main: bool,
        backend: str,
        mode: Literal["online", "offline"],
        project: str,
        name: str,
        config: dict[str, Any],
    ) -> None:
        self.main = main
        self.console = Console(quiet=not main, highlight=False, soft_wrap=True)
        self._backend: Any = None
        self._kind = backend if main else "none"
        if not main:
            return
        self._file = _open_events(run / EVENTS)
        self._pending: collections.deque[str] = collections.deque()
        self._full = False
        if backend == "wandb":
            self._backend = _wandb(run, mode, project, name, config)
        elif backend == "tensorboard":
            self._backend = _tensorboard(run)

    def event(self, kind: str, step: int, **values: Any) -> None:
        """Append one line to events.jsonl, flushed."""
        if self.main:
            line = {"event": kind, "step": step, "time": round(time.time(), 3), **values}
            self._pending.append(json.dumps(line) + "\n")
            self._write()

    def sync(self) -> None:
        """Return when all events are on the disk itself, as far as it takes them."""
        if self.main:
            with contextlib.suppress(OSError):
                os.fsync(self._file.fileno())

    def _write(self) -> None:
        """Write the pending lines; a full disk keeps them for the next time, and training goes on."""
        while self._pending:
            data = self._pending[0].encode()
            try:
                self._file.write(data)  # unbuffered: a line is there, or it is pending
            except OSError as error:
                if not self._full:
                    self.say(f"warning: {EVENTS} cannot be written: {error}; its lines wait")
                self._full = True
                return
            self._full = False
            self._pending.popleft()

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Send numbers to the backend."""
        if self._kind == "wandb":
            self._backend.log(values, step=step)
        elif self._kind == "tensorboard":
            for key, value in values.items():
                self._backend.add_scalar(key, value, step)

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        self.console.print(text)

    @contextmanager
    def stage_bar(self, title: str, total: int, done: int) -> Iterator[Any]:
        """Progress of one stage: yields `update(done, text)`. Off a terminal it draws nothing."""
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
        )
        hidden = not self.main or not self.console.is_terminal
        with Progress(*columns, console=self.console, disable=hidden, transient=True) as progress:
            task = progress.add_task(title, total=total, completed=done, text="")
            yield lambda done, text: progress.update(task, completed=done, text=text)

    def close(self) -> None:
        """Flush and close everything."""
        if self.main:
            self._file.close()
        if self._kind == "wandb":
            self._backend.finish()
        elif self._kind == "tensorboard":
            self._backend.close()


@contextmanager
def count_bar(what: str) -> Iterator[tuple[Any, Any]]:
    """A bar for counted work: yields `progress(done, total)` and `say(text)`. Off a terminal, a line now and then."""
    console = Console(highlight=False, soft_wrap=True)
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if not console.is_terminal and (done == total or done % max(total // 10, 1) == 0):
                console.print(f"{done} of {total} {what}")

        yield progress, console.print


def read_events(run: Path) -> list[dict[str, Any]]:
    """Events of a run in order, each step once: what a resumed run did again replaces what it did before.

    A line cut short by a kill is left out.

    Raises:
        UserError: the run has no events.
    """
    file = run / EVENTS
    if not file.is_file():
        raise UserError(f"{run} is no run folder: it has no {EVENTS}")
    events: list[dict[str, Any]] = []
    for event in _lines(file):
        if event["event"] == "start":
            events = []
        if event["event"] in ("resume", "rollback"):
            events = [e for e in events if e["step"] <= event["step"]]
        events.append(event)
    return events


def read_decisions(run: Path, config: str) -> dict[int, dict[str, Any]]:
    """Decisions that were written down under the configuration of this digest, by step, whatever was resumed since."""
    decisions = {}
    for event in _lines(run / EVENTS) if (run / EVENTS).is_file() else ():
        if event["event"] == "decision" and event["config"] == config:
            decisions[event["step"]] = event
    return decisions


class SampleLog:
    """Writes the samples of each step of each rank to `rank-00000.jsonl`, if it is asked to."""

    def __init__(self, folder: Path, rank: int, world: int, step: int, asked: bool) -> None:
        self._file: Any = None
        self._start = {"start": step, "world": world, "time": round(time.time(), 3)}
        if asked:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / f"rank-{rank:05d}.jsonl").open("a")
            self._line(self._start)

    def __enter__(self) -> SampleLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, step: int, ids: list[int]) -> None:
        """Record the ids (index within the split) that this rank's share of a step's batch held."""
        if self._file is not None:
            self._line({"step": step, "ids": ids})

    def _line(self, values: dict[str, Any]) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()


def summary_table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """A table for the terminal: first column left, the others right."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """The events as they were written; a line cut short by a kill is left out."""
    for line in file.read_text().splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event and "step" in event:
            yield event


def _open_events(file: Path) -> Any:
    cut = file.exists() and file.stat().st_size > 0 and not file.read_bytes().endswith(b"\n")
    handle = file.open("ab", buffering=0)
    if cut:  # a kill in the middle of a line: the next event starts a new one
        handle.write(b"\n")
    return handle


def _wandb(
    run: Path, mode: Literal["online", "offline"], project: str, name: str, config: dict[str, Any]
) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError("track.backend=wandb needs wandb: pip install 'irkd_dist[all]'") from None
    id_file = run / "wandb-id.txt"
    identity = id_file.read_text().strip() if id_file.exists() else None
    # a preempted run goes on under its own id; a sweep's agent gives one by environment, which wandb reads itself
    try:
        handle = wandb.init(
            project=project,
            name=name,
            config=config,
            dir=run,
            mode=mode,
            id=identity,
            resume="allow",  # type: ignore[arg-type]
        )
    except wandb.Error as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"track.mode={mode}: W&B does not start: {reason} (offline needs no account)"
        ) from error
    id_file.write_text(handle.id)
    return handle


def _tensorboard(run: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("track.backend=tensorboard needs tensorboard: pip install 'irkd_dist[all]'") from None
    return SummaryWriter(str(run / "tensorboard"))
