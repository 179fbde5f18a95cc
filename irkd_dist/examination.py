"""What asks every process, and prints: a check is a function that each of them calls.

It talks to the other processes before it may raise, so that none waits for another in vain.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from irkd_dist.errors import UserError, one_line
from irkd_dist.training import distributed, tracking
from irkd_dist.training.engines import Engine

# of one check (DeepSpeed compiles at its first use), then a process does not answer: it ends
PATIENCE_S = 300.0
REACH_S = 20.0  # for the launcher's port to answer
COLOURS = {"ok": "green", "warn": "yellow", "FAIL": "red"}


class Warn(Exception):
    """A finding to look at that does not keep a run from starting."""


@dataclass(frozen=True)
class Finding:
    """What one process found in one check."""

    level: str  # ok, warn, FAIL
    text: str
    who: str  # rank and host


class Examination:
    """Calls checks on every process alike, prints a line for each on rank 0, and remembers how they went."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.rank = int(os.environ.get("RANK", "0"))
        self.who = f"rank {self.rank} on {socket.gethostname()}"
        self.levels: list[str] = []
        self.started = time.monotonic()
        self.console = tracking.console()

    def __call__(self, name: str, check: Callable[[], str], alike: bool = False) -> bool:
        """Run a check on every process; True unless it fails. `alike`: processes that differ are a failure."""
        assert self.engine is not None
        with self.watched(name):
            try:
                found = Finding("ok", check(), self.who)
            except Warn as warning:
                found = Finding("warn", str(warning), self.who)
            except (UserError, OSError, RuntimeError) as error:
                found = Finding("FAIL", one_line(error), self.who)
            findings = distributed.gather(self.engine, found)
        worst = max(findings, key=lambda f: list(COLOURS).index(f.level))
        level, text = worst.level, worst.text
        if level != "ok" and any(f.text != text for f in findings):
            text = f"{worst.who}: {text}"
        elif alike and (other := next((f for f in findings if f.text != text), None)):
            level = "FAIL"
            text = f"{worst.who} has {text}; {other.who} has {other.text}: install the same everywhere"
        self._print(name, level, text)
        return level != "FAIL"

    def alone(self, name: str, text: str) -> None:
        """A failure of this process before it could join the others."""
        if self.rank == 0 or name == "rendezvous":
            self._line(name, "FAIL", text if self.rank == 0 else f"{self.who}: {text}")
        self.levels.append("FAIL")

    def rendezvous(self) -> bool:
        """Whether the launcher's address can be reached; without a launcher there is none."""
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if address is None or world == 1:
            self._print("rendezvous", "ok", "one process, none needed")
            return True
        deadline, reason = time.monotonic() + REACH_S, ""
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        while agent or self.rank > 0:  # otherwise rank 0 opens the port itself, when it joins
            try:
                socket.create_connection((address, int(port)), timeout=5.0).close()
                break
            except (OSError, ValueError) as error:
                reason = str(error)
            if time.monotonic() > deadline:
                self.alone(
                    "rendezvous", f"{address}:{port} cannot be reached: {reason}; check name, port, firewall"
                )
                return False
            time.sleep(0.2)
        self._print("rendezvous", "ok", f"{address}:{port} answers, {world} processes announced")
        return True

    def verdict(self) -> int:
        """Print how it went; returns the exit code."""
        failed, warned = self.levels.count("FAIL"), self.levels.count("warn")
        seconds = f"{time.monotonic() - self.started:.0f} s"
        if self.rank == 0:
            warnings = f", with {warned} warning{'s' * (warned > 1)}" if warned else ""
            failures = f"not ready: {failed} check{'s' * (failed > 1)} failed"
            print(f"{failures if failed else f'ready{warnings}'} ({seconds})")
        return 1 if failed else 0

    @contextlib.contextmanager
    def watched(self, name: str) -> Iterator[None]:
        """End this process if it stays in the block for longer than `PATIENCE_S`: another one never came."""

        def give_up() -> None:
            self._line(
                name, "FAIL", f"{self.who}: no answer for {PATIENCE_S:.0f} s: another process ended or hangs"
            )
            sys.stdout.flush()
            os._exit(1)

        timer = threading.Timer(PATIENCE_S, give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _print(self, name: str, level: str, text: str) -> None:
        self.levels.append(level)
        if self.rank == 0:
            self._line(name, level, text)

    def _line(self, name: str, level: str, text: str) -> None:
        self.console.print(f"{level:<4}", style=COLOURS[level], end="  ")
        self.console.print(f"{name:<14} {text}")
