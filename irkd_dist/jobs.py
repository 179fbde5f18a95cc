"""Trainings beside one another: processes of `irkd train`, as many at once as asked and as memory allows.

Each is a run of its own that checkpoints and resumes by itself; here is only who starts when and where, what becomes of
a request to stop, and one table of how all stand.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from irkd_dist import gpus, runfolder, status
from irkd_dist.data import memory
from irkd_dist.errors import EXIT_STOPPED, UserError

POLL_S = 0.2
SPARE = 1.2  # of the memory that the largest run has taken must be free before another starts
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@dataclass(frozen=True)
class Job:
    """A training: its name in the table, the arguments of `irkd`, and its run folder."""

    name: str
    arguments: tuple[str, ...]
    folder: Path

    @property
    def log(self) -> Path:
        """Where its output goes when others run beside it."""
        return self.folder.with_name(f"{self.folder.name}.log")


@dataclass(frozen=True)
class Whole:
    """What the runs here are a part of: how many runs there are in all, and how many of them were before these."""

    runs: int
    before: int


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    gpu: str | None  # as CUDA_VISIBLE_DEVICES names it
    log_began: int  # bytes that its event log had when it was started
    said_before: int = 0  # bytes of what it had printed until then
    largest: int = 0  # bytes of memory that it has taken so far


@dataclass
class _Requests:
    """Signals that arrive are handed on to every run once each; the runs write their checkpoints and end."""

    asked: list[int] = field(default_factory=list)
    before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> _Requests:
        for number in SIGNALS:
            self.before[number] = signal.signal(number, lambda received, _: self.asked.append(received))
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def run(
    todo: Sequence[Job], beside: int, console: Console, whole: Whole | None = None
) -> tuple[dict[Path, str], bool]:
    """Train all, `beside` at once; a job whose run is finished only says so.

    With several at once each gets its part of the cores (OMP_NUM_THREADS, unless that is set) and the GPU with the
    fewest runs, and its output goes to `Job.log`. A run that fails does not stop the others. A further one starts when
    the last has begun to train and as much memory is left as the largest takes, of the machine and of a GPU; a line
    says which run is held back for memory.

    Returns:
        Why each job that failed did, by run folder; and whether a signal ended it all: then the same call goes on.
    """
    whole, began = whole or Whole(len(todo), 0), time.monotonic()
    waiting, running, failed = collections.deque(todo), list[_Running](), dict[Path, str]()
    done, stopped, largest, handed = set[Path](), False, 0, 0
    devices, held = gpus.Gpus(), None
    with _Requests() as requests, _shown(console, todo, done, failed, beside, whole, began) as show:
        while running or (waiting and not requests.asked):
            for each in list(running):
                each.largest = max(each.largest, _taken(each.process.pid))
                largest = max(largest, each.largest)
                if (code := each.process.poll()) is None:
                    continue
                running.remove(each)
                if code == 0:
                    done.add(each.job.folder)
                elif code == EXIT_STOPPED:
                    stopped = True
                else:
                    failed[each.job.folder] = _why(each, code, beside)
            for number in requests.asked[handed:]:
                for each in running:
                    each.process.send_signal(number)
            handed = len(requests.asked)
            if waiting and len(running) < beside and not requests.asked and _begun(running):
                used = [each.gpu for each in running]
                devices.look(used)
                gpu, lacking = devices.place(used)
                lacking = _lacking(running, largest) or lacking
                if lacking is None:
                    if beside == 1:
                        here = len(todo) - len(waiting)
                        at, left = whole.before + here + 1, _left(whole, here, began)
                        line = f"run {at} of {whole.runs}: {waiting[0].name}; {left}"
                        console.print(line, style="bold", markup=False, highlight=False)
                    running.append(_start(waiting.popleft(), gpu, beside))
                elif held is not waiting[0]:
                    held = waiting[0]
                    console.print(f"held back: {held.name}: {lacking}", markup=False, highlight=False)
            show()
            time.sleep(POLL_S)
    return failed, stopped or bool(requests.asked)


def _start(job: Job, gpu: str | None, beside: int) -> _Running:
    environment = dict(os.environ)
    if beside > 1:
        cores = len(os.sched_getaffinity(0))
        environment.setdefault("OMP_NUM_THREADS", str(max(cores // beside, 1)))
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
    command, began = [sys.executable, "-m", "irkd_dist", *job.arguments], _log_size(job)
    if beside == 1:
        return _Running(job, subprocess.Popen(command, env=environment, preexec_fn=_with_parent), gpu, began)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        said_before = log.tell()
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=_with_parent,
        )
    return _Running(job, process, gpu, began, said_before)


def _with_parent() -> None:
    """In the child: a session of its own, since Ctrl-C is handed on; and a request to stop if the parent is killed."""
    os.setsid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _begun(running: list[_Running]) -> bool:
    """Whether all have shown what they take."""
    return all(_trains(each) for each in running)


def _lacking(running: list[_Running], largest: int) -> str | None:
    """Why the machine has no memory for another run, in words; None if it has."""
    left = memory.left()
    if not running or left > SPARE * largest:
        return None
    return f"{left / 2**30:.1f} GiB of memory are left, and a run has taken {largest / 2**30:.1f} GiB"


def _log_size(job: Job) -> int:
    with contextlib.suppress(OSError):
        return (job.folder / runfolder.EVENTS).stat().st_size
    return 0


def _trains(run: _Running) -> bool:
    """Whether a run has come to its steps since it was started here: what an earlier start wrote does not count."""
    try:
        with (run.job.folder / runfolder.EVENTS).open("rb") as log:
            log.seek(run.log_began)
            return b'"event": "train"' in log.read()
    except OSError:
        return False


def _taken(process: int) -> int:
    """Bytes of memory of a process and those that it started; 0 where it is gone."""
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(process)
        return sum(p.memory_info().rss for p in [root, *root.children(recursive=True)])
    return 0


def _why(run: _Running, code: int, beside: int) -> str:
    """The last line of a failed run that says why, of this start; how it ended where it has none."""
    ended = f"ended with {code}" if code >= 0 else f"was killed by {_signal_name(-code)}"
    if beside == 1:
        return f"{ended}; see above"
    job = run.job
    with contextlib.suppress(OSError), job.log.open("rb") as log:
        log.seek(run.said_before)
        lines = log.read().decode(errors="backslashreplace").splitlines()
        told = next((line for line in reversed(lines) if line.startswith("irkd:")), None)
        if told is not None:
            return f"{told.removeprefix('irkd: ')} (log: {job.log})"
    return f"{ended} (log: {job.log})"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@contextlib.contextmanager
def _shown(
    console: Console,
    todo: Sequence[Job],
    done: set[Path],
    failed: dict[Path, str],
    beside: int,
    whole: Whole,
    began: float,
) -> Iterator[Any]:
    """A function that brings what is shown up to date: a table in a terminal, else a line for each end."""
    if beside == 1:
        yield lambda: None
        return
    if not console.is_terminal:
        told, names = set[Path](), {job.folder: job.name for job in todo}

        def lines() -> None:
            for folder in [*done, *failed]:
                if folder not in told:
                    told.add(folder)
                    name, said = names[folder], f"failed: {failed[folder]}" if folder in failed else "done"
                    at, left = whole.before + len(told), _left(whole, len(told), began)
                    console.print(
                        f"{at} of {whole.runs}: {name}: {said}; {left}", markup=False, highlight=False
                    )

        yield lines
        lines()
        return
    shown_at = 0.0
    with Live(console=console, auto_refresh=False) as live:

        def table() -> None:
            nonlocal shown_at
            if time.monotonic() - shown_at > 1:
                live.update(_table(todo, done, failed, whole, began), refresh=True)
                shown_at = time.monotonic()

        yield table
        live.update(_table(todo, done, failed, whole, began), refresh=True)


def _left(whole: Whole, ended: int, began: float) -> str:
    """Of all runs, by the time that those which have ended here took in the mean."""
    seconds, left = time.monotonic() - began, whole.runs - whole.before - ended
    if not ended or not left:
        return f"{left} of {whole.runs} runs are left"
    return f"{left} of {whole.runs} runs are left, about {runfolder.span(seconds / ended * left)}"


def _table(
    todo: Sequence[Job], done: set[Path], failed: dict[Path, str], whole: Whole, began: float
) -> Table:
    ended = len(done) + len(failed)
    caption = f"{whole.before + ended} of {whole.runs} runs have ended; {_left(whole, ended, began)}"
    table = Table(
        "run", "state", "at", "best val", "images/s", "left", caption=caption, caption_justify="left"
    )
    for job in todo:
        state, cells = _row(job, done, failed)
        table.add_row(escape(job.name), state, *cells)
    return table


def _row(job: Job, done: set[Path], failed: dict[Path, str]) -> tuple[str, list[str]]:
    if job.folder in failed:
        return "failed", [escape(failed[job.folder][:60]), "", "", ""]
    try:
        now = status.read(job.folder)
    except UserError:  # it has not begun
        return "waiting", ["", "", "", ""]
    state = "done" if job.folder in done else now.state
    return state, [
        f"{now.resolution} px, epoch {now.epoch}/{now.epochs}",
        "" if now.best is None else f"{now.best:.2%}",
        "" if now.images_per_s is None or state == "done" else f"{now.images_per_s:,.0f}",
        "" if now.left is None or state == "done" else runfolder.span(now.left),
    ]
