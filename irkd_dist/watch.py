"""Runs as they go, in a terminal: bars, losses, speed, time left, what happened last. Read from their folders alone.

Torch is not imported, and no process is asked: it may be looked at from any machine that sees the folders.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from irkd_dist import eventlog, happened, runfolder, status
from irkd_dist.errors import UserError, printable
from irkd_dist.eventlog import Event
from irkd_dist.status import Status

TERMS = {"total": "total", "ce": "ce", "kd": "kd", "saliency": "saliency"}
LAST = 3  # events that are shown of a run
COLOURS = {"running": "green", "finished": "cyan", "failed": "red", "silent": "red", "stopped": "yellow"}


def watch(paths: list[Path], every: float = 2.0, once: bool = False) -> int:
    """Show runs until `q` or Ctrl-C is pressed, or until none of them goes on any more; `every`: seconds between looks.

    paths: run folders, or folders of them; those that appear later are found too. Off a terminal a line is printed for
    each change. once: one look and no more.

    Raises:
        UserError: a path is no run folder and holds none.
    """
    console = Console(highlight=False, markup=False, emoji=False)
    if not (runs := _runs(paths)):
        raise UserError(f"{', '.join(map(str, paths))}: no run folder, and none in it")
    stopped = False
    try:
        (_live if console.is_terminal and not once else _lines)(console, paths, every, once)
    except KeyboardInterrupt:
        stopped = True
    if not once:
        left = [run for run in _runs(paths) if not _over(run)]
        console.print(f"irkd watch: {f'{len(left)} of {len(runs)} runs go on' if left else 'no run goes on'}")
    return 130 if stopped else 0


def view(runs: list[Path], now: float | None = None) -> Group:
    """What the terminal shows of runs: a panel each."""
    return Group(*(_panel(run, now) for run in runs))


def line(run: Path, now: float | None = None) -> str:
    """A run in one line."""
    try:
        s = status.read(run, now)
        events = eventlog.read_events(run)
    except UserError as error:
        return f"{printable(run.name)}: {error}"
    parts = [s.state, f"stage {s.stage + 1} of {s.stages}, {s.resolution} px", _step(s)]
    parts += [_losses(events), f"{s.images_per_s:,.0f} images/s"] if s.images_per_s is not None else []
    parts += [f"{s.split} {s.accuracy:.2%}"] if s.accuracy is not None else []
    parts += [f"about {runfolder.span(s.left)} left"] if s.left is not None else []
    parts += [s.reason] if s.reason else []
    return printable(f"{run.name}: {', '.join(part for part in parts if part)}")


def _live(console: Console, paths: list[Path], every: float, _once: bool) -> None:
    with _keys() as pressed, Live(console=console, auto_refresh=False, screen=False) as live:
        while True:
            runs = _runs(paths)
            over = all(_over(run) for run in runs)  # before they are shown: what is last is seen too
            live.update(view(runs), refresh=True)
            if over or pressed(every) == "q":
                return


def _lines(console: Console, paths: list[Path], every: float, once: bool) -> None:
    said: dict[Path, str] = {}
    while True:
        runs = _runs(paths)
        over = all(_over(run) for run in runs)
        for run in runs:
            if (text := line(run)) != said.get(run):
                console.print(text, soft_wrap=True)
                said[run] = text
        if once or over:
            return
        time.sleep(every)


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Yields `pressed(seconds)`: the key that was pressed within them, or an empty string; Ctrl-C interrupts."""
    if os.name != "posix" or not sys.stdin.isatty():
        yield lambda seconds: time.sleep(seconds) or ""
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)

    def pressed(seconds: float) -> str:
        ready, _, _ = select.select([sys.stdin], [], [], seconds)
        return os.read(sys.stdin.fileno(), 1).decode("utf-8", "replace").lower() if ready else ""

    try:
        yield pressed
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _runs(paths: list[Path]) -> list[Path]:
    found = []
    for path in paths:
        if (path / runfolder.CONFIG).exists() or not path.is_dir():
            found.append(path)
        else:
            found += sorted(f for f in path.iterdir() if (f / runfolder.CONFIG).is_file())
    missing = [p for p in found if not (p / runfolder.CONFIG).exists()]
    if missing:
        raise UserError(f"{missing[0]} is no run folder: it has no {runfolder.CONFIG}")
    return list(dict.fromkeys(found))


def _over(run: Path) -> bool:
    try:
        return status.read(run).state in ("finished", "failed")
    except UserError:
        return False


def _panel(run: Path, now: float | None) -> Panel:
    try:
        s = status.read(run, now)
        log = eventlog.read_log(run).events
    except UserError as error:
        return Panel(Text(printable(str(error)), "red"), title=printable(run.name), title_align="left")
    events = eventlog.settled(log)
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim")
    rows.add_column()
    rows.add_row(
        "stage", f"{s.stage + 1} of {s.stages}: {s.resolution} px, epoch {s.epoch} of {s.epochs} done"
    )
    if s.images_per_s is not None and s.data_wait is not None:
        rows.add_row("loss", _losses(events))
        rows.add_row("speed", f"{s.images_per_s:,.0f} images/s, {s.data_wait:.1%} waiting for images")
    if s.accuracy is not None and s.best is not None:
        rows.add_row("accuracy", f"{s.accuracy:.2%} ({s.split}), best of this stage {s.best:.2%}")
    if s.restarts or s.trouble:
        faults = [f"{n} {k.replace('_', ' ')}" for k, n in s.trouble.items()]
        rows.add_row("faults", Text(", ".join([f"{s.restarts} restarts", *faults]), "yellow"))
    for text in [*s.damage, *([s.reason] if s.reason else [])]:
        rows.add_row("", Text(printable(text), "red"))
    for event, told in _happened(log):
        ago = runfolder.span(max((time.time() if now is None else now) - event["time"], 0.0))
        rows.add_row(f"{ago} ago", Text(printable(told), "dim"))
    state = Text(s.state, COLOURS.get(s.state, "white"))
    head = Table.grid(padding=(0, 1), expand=True)
    head.add_column(no_wrap=True)
    head.add_column(ratio=1)
    head.add_column(no_wrap=True)
    head.add_row(
        state, ProgressBar(total=max(s.steps or 1, 1), completed=min(s.step, s.steps or 1)), _ends(s)
    )
    return Panel(Group(head, rows), title=printable(run.name), title_align="left", padding=(0, 1))


def _ends(s: Status) -> str:
    return _step(s) + (f", about {runfolder.span(s.left)} left" if s.left is not None else "")


def _step(s: Status) -> str:
    return f"step {s.step:,}" + (f" of {s.steps:,}" if s.steps and s.state != "finished" else "")


def _losses(events: list[Event]) -> str:
    last = next((e for e in reversed(events) if e["event"] == "train"), {})
    return ", ".join(f"{name} {last[key]:.3f}" for key, name in TERMS.items() if key in last)


def _happened(log: list[Event]) -> list[tuple[Event, str]]:
    """The last events besides losses, as text."""
    policies = {e["stage"]: e for e in log if e["event"] == "stage"}
    told = []
    for event in reversed(log):
        words = happened.words(event, policies)
        if words is None and event["event"] == "evaluation":
            words = "evaluated", f"epoch {event['epoch']}: {event['accuracy']:.2%} ({event['split']})"
        if words is None and event["event"] == "checkpoint":
            words = "checkpoint", str(event.get("name", ""))
        if words is not None:
            told.append((event, f"{words[0]}: {words[1]}"))
        if len(told) == LAST:
            break
    return told[::-1]
