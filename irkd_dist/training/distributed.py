"""What processes tell each other: sums, decisions, agreement, requests to stop, and whether they are alive."""

from __future__ import annotations

import copy
import hashlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import TCPStore  # torch.distributed exports it without a type
from torch.distributed.distributed_c10d import PrefixStore, Store

from irkd_dist.errors import Lost, Passing, Stopped, UserError, say

T = TypeVar("T")

# words in errors that gloo and NCCL raise when another process is gone
COMMUNICATION = (
    "NCCL",
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
    "Broken pipe",
    "Socket closed",
)

# between hearing of another process's failure and ending: it is the one that its launcher is to see first
GRACE_S = 2.0
AGAIN = "the same command goes on from the last checkpoint"


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
    """Sum of each process's tensor; over several processes it comes back on their device."""
    if place.world == 1:
        return values
    values = values.to(place.device, copy=True)
    dist.all_reduce(values)
    return values


def broadcast(place: Place, value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if place.world == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def broadcast_tensors(place: Place, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rank 0's tensors by name, on every rank, on the CPU; they cross a device one by one."""
    if place.world == 1:
        return dict(tensors)
    shapes = broadcast(place, [(k, v.shape, v.dtype) for k, v in tensors.items()])
    result = {}
    for key, shape, dtype in shapes:
        value = (
            tensors[key].to(place.device)
            if place.main
            else torch.empty(shape, dtype=dtype, device=place.device)
        )
        dist.broadcast(value, 0)
        result[key] = tensors[key] if place.main else value.cpu()
    return result


def on_main(place: Place, make: Callable[[], T]) -> T:
    """What rank 0 makes, on every rank; so are its `UserError`s."""
    made: tuple[T | None, UserError | None] = (None, None)
    if place.main:
        try:
            made = make(), None
        except UserError as error:
            made = None, error
    value, problem = broadcast(place, made)
    if problem is not None:
        raise problem
    return value


def network(place: Place, make: Callable[[], tuple[nn.Module, T]]) -> tuple[nn.Module, T]:
    """A network that rank 0 makes, with what `make` says of it, on the CPU of every rank; no other opens its files."""
    made: list[nn.Module] = []

    def first() -> tuple[nn.Module | None, T]:
        model, said = make()
        made.append(model)
        return (_shell(model) if place.world > 1 else None), said

    shell, said = on_main(place, first)
    tensors = broadcast_tensors(place, _all_tensors(made[0]) if made else {})
    if made:
        return made[0], said
    assert shell is not None
    model = shell.to_empty(device="cpu")
    with torch.no_grad():
        for name, own in _all_tensors(model).items():
            own.copy_(tensors[name])
    return model, said


def _shell(model: nn.Module) -> nn.Module:
    """A copy of a network without the content of its tensors."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo | {id(b): b.to("meta") for b in model.buffers()})


def _all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those that no checkpoint keeps as well."""
    return {name: p.detach() for name, p in model.named_parameters()} | dict(model.named_buffers())


def share_buffers(place: Place, model: nn.Module) -> None:
    """Give every process rank 0's buffers: the running statistics of BatchNorm are each process's own."""
    for buffer in model.buffers() if place.world > 1 else ():
        dist.broadcast(buffer, 0)


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
        Passing: on every rank alike; it names each rank that differs, and in what.
    """
    stated = gather(place, (name(place), facts))
    wrong = []
    for who, theirs in stated[1:]:
        for key, value in stated[0][1].items():
            if theirs.get(key) != value:
                wrong.append(f"{who} has {key}={theirs.get(key)!r}, rank 0 has {value!r}")
    if wrong:
        raise Passing(
            f"the processes no longer agree: {'; '.join(wrong[:4])}. Nothing of this stage was saved; the same command "
            "goes on from the last checkpoint. Look for differing files, libraries or memory faults on that host"
        )


def first_to_say(place: Place, message: str) -> bool:
    """Whether no other process of this start has come with the same message: one line for 64 ranks, not 64."""
    if place.world == 1:
        return True
    start = f"{os.environ.get('TORCHELASTIC_RUN_ID')}-{os.environ.get('TORCHELASTIC_RESTART_COUNT')}"
    try:
        store = PrefixStore(f"irkd-said-{start}", _store(5.0))
        return store.add(hashlib.sha256(message.encode()).hexdigest(), 1) == 1
    except (RuntimeError, dist.DistError):
        return True  # the process that kept the store is gone


def _store(timeout_s: float) -> Store:
    """The launcher's store, over a connection of its own: the training's one may be waiting in a collective."""
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=timeout_s),
    )


# ---- requests: a signal asks, the loop answers at the next step boundary


class StopRequests:
    """Remembers SIGTERM, SIGUSR1 and Ctrl-C until the loop asks; a second Ctrl-C interrupts at once.

    One rank's request stops all ranks at the same step: the loop combines the flags. `listen`: to signals; without
    it they stay the caller's.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self, listen: bool) -> None:
        self.received: str | None = None
        self._listen = listen
        self._earlier: dict[signal.Signals, Any] = {}

    def ask(self, why: str) -> None:
        """Ask for an end, as a signal does."""
        self.received = self.received or why

    def __enter__(self) -> StopRequests:
        if self._listen and threading.current_thread() is threading.main_thread():
            self._earlier = {s: signal.signal(s, self._receive) for s in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: Any) -> None:
        if number == signal.SIGINT and self.received == "SIGINT":
            raise KeyboardInterrupt
        self.ask(signal.Signals(number).name)


# ---- who is alive


class Watch:
    """Ends the process when another one is silent, the launcher's store does not answer, or the launcher is gone.

    Each process writes its beat to the launcher's store and reads its right neighbour's: three small requests a beat,
    for any number of processes. A stopped or vanished process has no beat, one that waits in a collective has; so the
    message names the right one, `timeout_s` after its last sign of life.

    One thread talks to the store. A request over a cut cable never comes back, so another thread looks at the clock.

    A process that fails with an error of its own says so before it goes. The others print that, and not what they
    meet when it is gone: leaving with an error of the communication becomes `Lost`.

    Args:
        place: this process.
        timeout_s: seconds of silence after which the run ends.
        session: differs from start to start of the run, the same on every rank.
    """

    def __init__(self, place: Place, timeout_s: float, session: str) -> None:
        self.step = 0  # shown in messages; the loop sets it
        self._session = session
        self._farewell = {self._key(place.rank): "left"}  # written to the store at the end
        self._dead = ""  # what ended the run, as the process said that knew
        self._place, self._timeout = place, timeout_s
        self._interval = min(max(timeout_s / 20, 0.05), 2.0)
        self._ended = threading.Event()
        self._parent = os.getppid()
        self._launched = "TORCHELASTIC_RUN_ID" in os.environ or "MASTER_ADDR" in os.environ
        self._answered = time.monotonic()  # when the store did so last
        threads = [self._guard] if self._launched or place.world > 1 else []
        threads += [self._talk] if place.world > 1 else []
        self._threads = [threading.Thread(target=t, name="irkd-watch", daemon=True) for t in threads]

    def __enter__(self) -> Watch:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        told = (str(error or "").splitlines() or [""])[0]
        # an error of the communication is most likely the end of another process: that one is the news
        lost = isinstance(error, dist.DistError) or any(w in told for w in COMMUNICATION)
        lost = lost and "cuda error" not in told.lower()  # of its own device, met in a collective
        if isinstance(error, UserError):
            # of every process alike, most likely: each ends by itself, and those that do not are told after a while
            message = f"{name(self._place)} failed: {told}"
            self._farewell = {self._key(self._place.rank): f"failed/{self.step}/{message}", "failed": message}
        elif error is not None and not isinstance(error, Stopped):
            message = f"{name(self._place)} failed: {type(error).__name__}: {told}"
            self._farewell = {} if lost else {"dead": message}
        self._ended.set()
        for thread in self._threads:
            thread.join(timeout=self._timeout)
        if error is not None and lost and not isinstance(error, UserError):
            time.sleep(GRACE_S)
            raise Lost(
                f"{name(self._place)}: {self._dead or f'lost the other processes ({told})'}; ending here, {AGAIN}"
            ) from error

    def _guard(self) -> None:
        while not self._ended.wait(self._interval):
            if self._launched and os.getppid() != self._parent:
                self._end("its launcher is gone")
            silent = time.monotonic() - self._answered
            if self._place.world > 1 and silent > max(self._timeout, 5.0):
                self._end(f"{self._store_name()} has not answered for {silent:.0f} s")

    def _talk(self) -> None:
        store = PrefixStore(f"irkd-watch-{self._session}", _store(max(self._timeout, 5.0)))
        right = (self._place.rank + 1) % self._place.world
        beat, heard, said = 0, time.monotonic(), ""
        last = f"0/0/rank {right}"  # until it says more
        while not self._ended.is_set():
            beat += 1
            try:
                store.set(self._key(self._place.rank), f"{beat}/{self.step}/{name(self._place)}")
                said = self._read(store, self._key(right)) or last
                self._dead = self._read(store, "dead")
            except (RuntimeError, dist.DistError) as error:
                if self._ended.is_set():
                    return
                self._end(f"{self._store_name()} does not answer: {str(error).splitlines()[0]}")
            now = self._answered = time.monotonic()
            if said != last:
                heard, last = now, said
            if self._dead:
                time.sleep(GRACE_S)
                self._end(self._dead)
            if last != "left" and now - heard > self._timeout:
                beats, step, who = last.split("/", 2)
                silent = f"{who} has been silent for {now - heard:.0f} s (it was at step {step})"
                message = who if beats == "failed" else silent
                store.compare_set("dead", "", message)  # the first stays
                self._end(message)
            self._ended.wait(self._interval)
        with suppress(RuntimeError, dist.DistError):
            for key, text in self._farewell.items():
                store.compare_set(key, "", text) if key == "dead" else store.set(key, text)
            self._dead = self._read(store, "dead") or self._read(store, "failed")

    @staticmethod
    def _store_name() -> str:
        return f"the launcher's store on {os.environ.get('MASTER_ADDR')}"

    def _key(self, rank: int) -> str:
        return f"beat/{rank}"

    @staticmethod
    def _read(store: Store, key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    def _end(self, why: str) -> None:
        say(f"irkd: {name(self._place)}: {why}; ending here, {AGAIN}")
        os._exit(1)
