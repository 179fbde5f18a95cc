"""The thread that writes checkpoints while training goes on."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from irkd_dist import checkpoint
from irkd_dist.errors import UserError


@dataclass
class Written:
    """How a write went: seconds it took beside the training, and why it failed, if it did."""

    name: str
    step: int
    seconds: float
    error: str | None = None


@dataclass
class _Order:
    name: str
    step: int
    folders: list[tuple[Path, checkpoint.Content]]
    afterwards: Callable[[], None]


@dataclass
class Writer:
    """Writes checkpoints in a thread, one after the other, in order.

    An order is several folders of one moment, such as a stage's best and the run's newest, which refers to it. What
    fails stays owed and is tried again with the next order, and no later checkpoint is written before it: the newest
    complete one never refers to one that is missing. At most one order waits: a second one blocks until there is room.
    """

    _orders: queue.Queue[_Order | None] = field(default_factory=lambda: queue.Queue(maxsize=1))
    _done: queue.SimpleQueue[Written] = field(default_factory=queue.SimpleQueue)
    _owed: list[tuple[Path, checkpoint.Content]] = field(default_factory=list)
    _thread: threading.Thread | None = None

    def submit(
        self,
        name: str,
        step: int,
        folders: list[tuple[Path, checkpoint.Content]],
        afterwards: Callable[[], None],
    ) -> None:
        """Write all of `folders`, the newest last; then call `afterwards`, in the thread, if all are whole."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="irkd-checkpoint", daemon=True)
            self._thread.start()
        self._orders.put(_Order(name, step, folders, afterwards))

    def results(self) -> list[Written]:
        """What was written, or failed, since the last call."""
        found = []
        while not self._done.empty():
            found.append(self._done.get())
        return found

    def wait(self) -> None:
        """Return when all orders are done."""
        self._orders.join()

    def close(self) -> None:
        """Finish all orders and end the thread."""
        if self._thread is not None:
            self._orders.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (order := self._orders.get()) is not None:
            started, error = time.perf_counter(), None
            # a newer checkpoint replaces an older one of its kind, `step-` or `best/stage-03-step-`
            newer = {_kind(folder) for folder, _ in order.folders}
            self._owed = [*(o for o in self._owed if _kind(o[0]) not in newer), *order.folders]
            try:
                while self._owed:
                    folder, content = self._owed[0]
                    checkpoint.save(
                        folder, content.student, content.optimizer, content.state, content.average
                    )
                    del self._owed[0]
                order.afterwards()
            except UserError as failure:
                error = str(failure)
            except Exception as failure:  # a thread that ends would let the training wait for ever
                error = f"cannot write checkpoint {order.name}: {failure!r}"
            self._done.put(Written(order.name, order.step, time.perf_counter() - started, error))
            self._orders.task_done()
        self._orders.task_done()


def _kind(folder: Path) -> tuple[Path, str]:
    return folder.parent, folder.name.rpartition("-")[0]
