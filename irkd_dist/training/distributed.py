"""What processes tell each other: sums, decisions, agreement, requests to stop, and whether they are alive."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore  # torch.distributed exports it without a type
from torch.distributed.distributed_c10d import PrefixStore, Store

from irkd_dist.errors import UserError


class Place(Protocol):
    """A process's place in the run, as an engine knows it."""

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...
    @property
    def main(self) -> bool: ...
    @property
    def device(self) -> torch.device: ...


def total(place: Place, values: Tensor) -> Tensor:
    """Sum of each process's tensor."""
    if place.world == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values


def any_of(place: Place, *flags: bool | Tensor) -> list[bool]:
    """For each flag, whether any process has it set: one small all-reduce."""
    row = torch.stack([torch.as_tensor(f, device=place.device).to(torch.int32) for f in flags])
    if place.world > 1:
        dist.all_reduce(row, op=dist.ReduceOp.MAX)
    return [bool(v) for v in row.tolist()]


def broadcast(place: Place, value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if place.world == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def gather(place: Place, value: Any) -> list[Any]:
    """Every rank's value in the order of ranks, on every rank."""
    if place.world == 1:
        return [value]
    values: list[Any] = [None] * place.world
    dist.all_gather_object(values, value)
    return values


def barrier(place: Place) -> None:
    """Wait for every process."""
    if place.world > 1:
        dist.barrier()


def name(place: Place) -> str:
    """`rank 3 (host, process 4711)`, for messages."""
    return f"rank {place.rank} ({socket.gethostname()}, process {os.getpid()})"


def agree(place: Place, facts: dict[str, Any]) -> None:
    """Stop the run unless every rank states the same facts as rank 0.

    Raises:
        UserError: on every rank alike; it names each rank that differs, and in what.
    """
    stated = gather(place, (name(place), facts))
    wrong = []
    for who, theirs in stated[1:]:
        for key, value in stated[0][1].items():
            if theirs.get(key) != value:
                wrong.append(f"{who} has {key}={theirs.get(key)!r}, rank 0 has {value!r}")
    if wrong:
        raise UserError(
            f"the processes no longer agree: {'; '.join(wrong[:4])}. Nothing of this stage was saved; the same command "
            "goes on from the last checkpoint. Look for differing files, libraries or memory faults on that host"
        )


# ---- requests: a signal asks, the loop answers at the next step boundary


class StopRequests:
    """Remembers SIGTERM, SIGUSR1 and Ctrl-C until the loop asks; a second Ctrl-C interrupts at once.

    One rank's request stops all ranks at the same step: the loop combines the flags.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.received: str | None = None
        self._earlier: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            self._earlier = {s: signal.signal(s, self._receive) for s in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: Any) -> None:
        if number == signal.SIGINT and self.received == "SIGINT":
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number).name


# ---- who is alive


class Watch:
    """A thread in each process that ends the process when another one is silent, or its launcher is gone.

    Each process writes its beat to the launcher's store and reads its right neighbour's: three small requests a beat,
    for any number of processes. A stopped or vanished process has no beat, one that waits in a collective has; so the
    message names the right one, `timeout_s` after its last sign of life.

    Args:
        place: this process.
        timeout_s: seconds of silence after which the run ends.
    """

    def __init__(self, place: Place, timeout_s: float) -> None:
        self.step = 0  # shown in messages; the loop sets it
        self._place, self._timeout = place, timeout_s
        self._interval = min(max(timeout_s / 20, 0.05), 2.0)
        self._ended = threading.Event()
        self._parent = os.getppid()
        self._launched = "TORCHELASTIC_RUN_ID" in os.environ or "MASTER_ADDR" in os.environ
        self._thread = threading.Thread(target=self._run, name="irkd-watch", daemon=True)

    def __enter__(self) -> Watch:
        if self._launched or self._place.world > 1:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=self._timeout)

    def _run(self) -> None:
        store = self._store() if self._place.world > 1 else None
        beat, heard, last, said, dead = 0, time.monotonic(), "", "", ""
        while not self._ended.wait(self._interval):
            if self._launched and os.getppid() != self._parent:
                self._end("its launcher is gone")
            if store is None:
                continue
            beat += 1
            try:
                store.set(self._key(self._place.rank), f"{beat}/{self.step}/{name(self._place)}")
                said = self._read(store, self._key((self._place.rank + 1) % self._place.world))
                dead = self._read(store, "irkd/dead")
            except (RuntimeError, dist.DistError) as error:
                if self._ended.is_set():
                    return
                reason = str(error).splitlines()[0]
                self._end(
                    f"the launcher's store on {os.environ.get('MASTER_ADDR')} does not answer: {reason}"
                )
            now = time.monotonic()
            if said != last:
                heard, last = now, said
            if dead:
                self._end(dead)
            if last and last != "left" and now - heard > self._timeout:
                _, step, who = last.split("/", 2)
                message = f"{who} has been silent for {now - heard:.0f} s (it was at step {step})"
                store.set("irkd/dead", message)
                self._end(message)
        if store is not None:
            with suppress(RuntimeError, dist.DistError):
                store.set(self._key(self._place.rank), "left")

    def _store(self) -> Store:
        # a connection of its own: the training's one may be waiting in a collective
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=max(self._timeout, 5.0)),
        )
        return PrefixStore(f"irkd-watch-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def _key(self, rank: int) -> str:
        return f"irkd/beat/{rank}"

    @staticmethod
    def _read(store: Store, key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    def _end(self, why: str) -> None:
        print(
            f"irkd: {name(self._place)}: {why}; ending here, the same command goes on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
