"""What a run says while it trains: events.jsonl always, a progress bar, and W&B or TensorBoard when asked."""

from __future__ import annotations

import base64
import collections
import contextlib
import importlib.util
import json
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from irkd_dist import __version__, eventlog, files, runfolder, typed
from irkd_dist.errors import UserError
from irkd_dist.training import loggers

if TYPE_CHECKING:
    from irkd_dist.writer import Writer

NAMES = {"tensorboard": "TensorBoard", "mlflow": "MLflow", "trackio": "Trackio"}
QUIET_S = 30.0  # off a terminal, between two lines on how far a measurement is
T = TypeVar("T")


class Tracker:
    """Writes events and metrics on rank 0; elsewhere every call does nothing.

    Args:
        run: run folder.
        main: whether this process is rank 0.
        backend: `none`, `wandb`, `tensorboard`, `mlflow` or `trackio`.
        mode, project, name, config: for it; in a sweep its agent sets the run's id by environment.
        ask: called with a reason when the backend wants the run to end.
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
        ask: Callable[[str], None],
    ) -> None:
        self.main = main
        self.console = console(quiet=not main)
        self._progress: Progress | None = None
        self._backend: loggers.Logger | None = None
        if not main:
            return
        self._file = eventlog.open_log(run / runfolder.EVENTS)
        self._pending: collections.deque[bytes] = collections.deque()
        self._full = False
        if backend == "wandb":
            self._backend = _Wandb(run, mode, project, name, config, self.say, ask)
        elif backend == "tensorboard":
            self._backend = loggers.TensorBoard(run, config)
        elif backend == "mlflow":
            self._backend = loggers.MLflow(run, project, name, config)
        elif backend == "trackio":
            self._backend = loggers.Trackio(project, name, config)

    def event(self, kind: str, step: int, **values: Any) -> None:
        """Append one line to events.jsonl, flushed."""
        if self.main:
            line = {"event": kind, "step": step, "time": round(time.time(), 3), **values}
            self._pending.append(typed.checked(line))
            self._write()
            if kind == "stop" and self._backend is not None:
                self._backend.stop()

    def sync(self) -> None:
        """Return when all events are on the disk itself, as far as it takes them."""
        if self.main:
            with contextlib.suppress(OSError):
                os.fsync(self._file.fileno())

    def _write(self) -> None:
        """Write the pending lines; a full disk keeps them for the next time, and training goes on."""
        while self._pending:
            try:
                self._file.write(self._pending[0])  # unbuffered: a line is there, or it is pending
            except OSError as error:
                if not self._full:
                    self.say(f"warning: {runfolder.EVENTS} cannot be written: {error}; its lines wait")
                self._full = True
                return
            self._full = False
            self._pending.popleft()

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Send numbers to the backend; their names begin with train/, val/, test/ or system/."""
        if self._backend is not None:
            self._backend.log(values, step)

    def image(self, step: int, name: str, pixels: np.ndarray | None) -> None:
        """Send a picture (H, W, 3) uint8 to the backend, if there is one."""
        if pixels is not None and self._backend is not None:
            self._backend.image(name, pixels, step)

    def table(self, step: int, name: str, columns: list[str], rows: list[list[str]]) -> None:
        """Send a table to the backend, if there is one."""
        if self._backend is not None:
            self._backend.table(name, columns, rows, step)

    def model(self, checkpoint: Path) -> None:
        """Send the weights of a checkpoint and what describes them, if there is a backend that keeps files."""
        if self._backend is not None:
            names = (runfolder.STATE, runfolder.STUDENT, runfolder.AVERAGE)  # not the moments
            self._backend.model([checkpoint / n for n in names if (checkpoint / n).is_file()])

    def written(self, writer: Writer) -> None:
        """Record the checkpoints that were written, or not, since the last call."""
        for done in writer.results():
            told = {"name": done.name, "seconds": round(done.seconds, 4)}
            if done.error is None:
                self.event("checkpoint", done.step, **told)
            else:
                self.event("checkpoint_failed", done.step, **told, error=done.error)
                self.say(f"warning: {done.error}; training goes on, and the next checkpoint tries again")

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        self.console.print(text)

    @contextmanager
    def stage_bar(self, title: str, total: int, done: int) -> Iterator[Any]:
        """Progress of one stage: yields `update(done, text)`. Off a terminal each update is a line."""
        started, first = time.perf_counter(), done
        with self._bar() as progress:
            task = progress.add_task(title, total=total, completed=done, text="")

            def update(done: int, text: str) -> None:
                progress.update(task, completed=done, text=text)
                if not self.console.is_terminal:
                    rate = (time.perf_counter() - started) / max(done - first, 1)
                    left = f"  {runfolder.span(rate * (total - done))} left" if done < total else ""
                    self.say(f"{title}  step {done} of {total}  {text}{left}")

            yield update

    def counted(self, batches: Iterable[T], what: str, total: int) -> Iterator[T]:
        """The batches as they are, with a bar while they are taken; off a terminal a line every 30 s."""
        said = time.perf_counter()
        with self._bar() as progress:
            task = progress.add_task(what, total=total, text="")
            try:
                for done, batch in enumerate(batches):
                    progress.update(task, completed=done)
                    if not self.console.is_terminal and time.perf_counter() - said > QUIET_S:
                        said = time.perf_counter()
                        self.say(f"{what}: {done} of {total} batches")
                    yield batch
            finally:
                progress.remove_task(task)

    @contextmanager
    def _bar(self) -> Iterator[Progress]:
        """The bars of this moment: a terminal shows one group of them at a time."""
        if self._progress is not None:
            yield self._progress
            return
        columns = (
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            TimeRemainingColumn(),
        )
        hidden = not self.main or not self.console.is_terminal
        with Progress(*columns, console=self.console, disable=hidden, transient=True) as self._progress:
            try:
                yield self._progress
            finally:
                self._progress = None

    def close(self) -> None:
        """Flush and close everything."""
        if self.main:
            self._file.close()
        if self._backend is not None:
            self._backend.finish()


def console(quiet: bool = False) -> Console:
    """A terminal that prints names as they are: no markup in brackets, no emoji in colons."""
    return Console(quiet=quiet, highlight=False, soft_wrap=True, markup=False, emoji=False)


@contextmanager
def count_bar(what: str, pause_s: float = 0.0) -> Iterator[tuple[Any, Any]]:
    """A bar for counted work: yields `progress(done, total)` and `say(text)`.

    Off a terminal, a line at each tenth, or `pause_s` after the one before.
    """
    terminal, said = console(), time.monotonic()
    columns = (
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=terminal, disable=not terminal.is_terminal) as bar:
        task = bar.add_task(what, total=None)

        def progress(done: int, total: int) -> None:
            nonlocal said
            bar.update(task, completed=done, total=total)
            tenth, now = done == total or done % max(total // 10, 1) == 0, time.monotonic()
            if not terminal.is_terminal and (now - said > pause_s if pause_s else tenth):
                terminal.print(f"{done} of {total} {what}")
                said = now

        yield progress, terminal.print


def provenance() -> dict[str, str]:
    """What was asked of which code: the command, and the version or, of a checkout, the commit."""
    return {"command": shlex.join(["irkd", *sys.argv[1:]]), "version": __version__, "commit": _commit()}


def _commit() -> str:
    """The commit of the package's checkout, with a + if files of it were changed since; empty if it is none."""
    package = Path(__file__).resolve().parents[1]
    git = ["git", "-C", str(package)]
    try:
        found = subprocess.run(
            [*git, "rev-parse", "--show-prefix", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
        lines = found.stdout.split()
        # installed into somebody's checkout, such as into its .venv, it is no part of it
        if found.returncode or lines[0] != f"{package.name}/":
            return ""
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no", "."],
            capture_output=True, text=True, timeout=5, check=False,
        )  # fmt: skip
        return lines[1][:12] + ("+" if changed.stdout.strip() else "")
    except (OSError, subprocess.TimeoutExpired):
        return ""


def reach(backend: str, mode: str) -> str:
    """Whether a backend could be used from here, without starting anything; for `irkd doctor`.

    Raises:
        UserError: it is not installed, has no key, or its server does not answer.
    """
    if backend == "none":
        return "events.jsonl only (track.backend=none)"
    if importlib.util.find_spec(backend) is None:
        extra = backend if backend in ("mlflow", "trackio") else "all"
        raise UserError(f"track.backend={backend} needs {backend}: pip install 'irkd_dist[{extra}]'")
    if backend != "wandb":
        return f"{NAMES[backend]} is installed"
    if mode == "offline":
        return "W&B offline, no account needed; `wandb sync` sends a run later (track.mode=online: at once)"
    import wandb

    server = urllib.parse.urlsplit(wandb.Settings().base_url)
    where = f"{server.scheme}://{server.netloc}"
    port = server.port or (443 if server.scheme == "https" else 80)
    try:
        socket.create_connection((server.hostname or "", port), timeout=5.0).close()
    except OSError as error:
        raise UserError(
            f"W&B's server {where} does not answer: {error}; track.mode=offline needs none"
        ) from error
    if not wandb.api.api_key:
        raise UserError(
            f"no key for {where}: run `wandb login`, set WANDB_API_KEY, or use track.mode=offline"
        )
    return f"W&B online: {where} answers, a key is there"


class SampleLog:
    """Writes the samples of each step of each rank to a file of its own, if it is asked to.

    Args:
        run: run folder.
        rank: of this process.
        started: seconds since 1970 when this start of the run began, the same on every rank.
        step: that it goes on from.
        asked: whether to write at all.
    """

    def __init__(self, run: Path, rank: int, started: float, step: int, asked: bool) -> None:
        self._file: Any = None
        self._started = started
        if asked:
            self._file = eventlog.open_log(runfolder.samples_file(run, rank))
            self.go_on_from(step)

    def __enter__(self) -> SampleLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def go_on_from(self, step: int) -> None:
        """What was written of this step and later ones is done again from here."""
        if self._file is not None:
            self._line({"from": step})

    def write(self, step: int, ids: list[int]) -> None:
        """Record the ids (index within the split) that this rank's share of a step's batch held."""
        if self._file is not None:
            self._line({"step": step, "ids": ids})

    def _line(self, values: dict[str, Any]) -> None:
        self._file.write(typed.checked({"started": self._started, **values}))


def summary_table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """A table for the terminal: first column left, the others right."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


class _Wandb:
    """A W&B run: sends numbers, says how it ended, and turns the server's stop into a request to this process."""

    EXIT_STOPPED = 75  # with "preempting" a sweep's server gives the trial out again
    FINISH_S = 120.0  # for the upload at the end; a server that is gone must not keep the job's nodes

    def __init__(
        self, run: Path, mode: Literal["online", "offline"], project: str, name: str, config: dict[str, Any],
        say: Callable[[str], None], ask: Callable[[str], None],
    ) -> None:  # fmt: skip
        try:
            import wandb
            from wandb.errors import CommError
        except ImportError:
            raise UserError("track.backend=wandb needs wandb: pip install 'irkd_dist[all]'") from None
        self.told_to_stop = False  # by the server: a sweep's early termination, or a person in the browser
        self.stopped = self.preempted = self.gone = False
        self._say = say
        id_file = run / runfolder.WANDB_ID
        identity = runfolder.read_word(id_file) or None
        known = wandb.Settings.model_fields

        def stop() -> None:  # a function: W&B copies its settings deeply, and a method's object with them
            self.told_to_stop = True
            ask("W&B's stop")  # the loop ends all ranks at the same step

        own = {"stop_fn": stop, "finish_timeout": self.FINISH_S}
        chosen = {k: v for k, v in own.items() if k in known and f"WANDB_{k.upper()}" not in os.environ}

        def start(mode: Literal["online", "offline"]) -> Any:
            # a preempted run goes on under its own id; a sweep's agent gives one by environment, read by wandb
            return wandb.init(
                project=project, name=name, config=config, dir=run, mode=mode, id=identity, resume="allow",
                settings=wandb.Settings(**chosen),
            )  # fmt: skip

        try:
            self.run = start(mode)
        except CommError as error:
            # the server is gone or does not let us in: that is no reason to leave a GPU idle
            self.run = start("offline")
            reason = " ".join(str(error).split())[:120]
            say(f"W&B does not answer ({reason}): this run is kept offline")
        except wandb.Error as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"track.mode={mode}: W&B does not start: {reason} (offline needs no account)"
            ) from error
        files.write(id_file, self.run.id)

    def log(self, values: dict[str, float], step: int) -> None:
        self._call(lambda: self.run.log(values, step=step))

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        import wandb

        self._call(lambda: self.run.log({name: wandb.Image(pixels)}, step=step))

    def table(self, name: str, columns: list[str], rows: list[list[str]], step: int) -> None:
        import wandb

        self._call(lambda: self.run.log({name: wandb.Table(columns=[*columns], data=rows)}, step=step))

    def model(self, files: list[Path]) -> None:
        import wandb

        artifact = wandb.Artifact(
            loggers.artifact_name(f"{self.run.name or self.run.id}-student"), type="model"
        )
        for file in files:
            artifact.add_file(str(file), policy="immutable")  # no copy: it stays where it is
        self._call(lambda: self.run.log_artifact(artifact))

    def stop(self) -> None:
        """The run stops before its end; unless the server wanted that, a sweep shall give it out again."""
        self.stopped = True
        self._call(self._give_back)

    def _give_back(self) -> None:
        if not self.run.offline and not self._server_wants_it():
            self.preempted = True
            self.run.mark_preempting()

    def _server_wants_it(self) -> bool:
        """Whether the stop is the server's: an agent's SIGTERM looks like any other and comes before the SDK's word."""
        if self.told_to_stop:
            return True
        import wandb

        query = """query RunStoppedStatus($projectName: String, $entityName: String, $runId: String!) {
            project(name: $projectName, entityName: $entityName) { run(name: $runId) { stopped } } }"""
        names = {"projectName": self.run.project, "entityName": self.run.entity, "runId": self.run.id}
        key = base64.b64encode(f"api:{wandb.api.api_key}".encode()).decode()
        request = urllib.request.Request(
            f"{self.run.settings.base_url}/graphql",
            json.dumps({"query": query, "variables": names}).encode(),
            {"Content-Type": "application/json", "Authorization": f"Basic {key}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=5.0) as answer:
                return bool(json.load(answer)["data"]["project"]["run"]["stopped"])
        except (OSError, ValueError, LookupError, TypeError):
            return False

    def finish(self) -> None:
        """End the run, and say what is to be done with what is only on this disk, if anything is."""
        folder, patience = Path(self.run.dir).parent, self.run.settings.finish_timeout
        # within a `finally`: an exception on its way out is a failure
        failed = sys.exc_info()[0] is not None and not self.stopped
        code = self.EXIT_STOPPED if self.preempted else int(failed)
        started = time.monotonic()
        self._call(lambda: self.run.finish(exit_code=code))
        rest = f"send the rest with: wandb sync --include-online {folder}"
        if self.run.offline:
            self._say(f"W&B offline; send it with: wandb sync {folder.parent}/offline-run-*")
        elif self.gone:
            self._say(f"W&B has not got everything; {rest}")
        elif 0 < patience <= time.monotonic() - started:
            self._say(f"W&B took not everything in {patience:.0f} s; {rest}")

    def _call(self, action: Callable[[], object]) -> None:
        """Training goes on without W&B when its own process is gone, as after a signal to all processes of a job."""
        if self.gone:
            return
        try:
            action()
        except (
            Exception
        ) as error:  # the SDK raises several kinds, among them OSError, which would end the run
            self.gone = True
            self._say(
                f"W&B's own process has ended ({type(error).__name__}: {error}); training goes on without it"
            )
