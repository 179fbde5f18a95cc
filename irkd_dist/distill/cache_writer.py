"""The thread that writes what a teacher has said."""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from irkd_dist.distill import cache_shards
from irkd_dist.distill.cache_files import Store
from irkd_dist.distill.cache_shards import Layout

SHARD_BYTES = 2**25  # written at once, at most; an epoch's end writes what there is


@dataclass
class _Buffer:
    layout: Layout
    ids: list[np.ndarray] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)
    size: int = 0


class Writer:
    """A thread that turns answers into shards; what it cannot write ends the writing and nothing else.

    stopped: why it no longer writes; empty as long as it does.
    """

    def __init__(self, folder: Path, limit: int | None) -> None:
        self.stopped = ""
        self._folder, self._limit, self._number = folder, limit, 0
        self._news: list[str] = []
        self._buffers: dict[tuple[str, int], tuple[Store, _Buffer]] = {}
        self._queue: queue.Queue[Any] = queue.Queue(
            maxsize=64
        )  # a slow disk holds training up, rather than fill memory
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="irkd-cache-writer", daemon=True)
        self._thread.start()

    def put(self, store: Store, form: str, draw: int, ids: np.ndarray, parts: list[Tensor]) -> None:
        """Keep answers; they are copied from the device by the thread."""
        if store.layout is None:
            store.layout = Layout(tuple(p.shape[1] for p in parts), form)
        self._queue.put((store, draw, ids, parts))

    def write_soon(self) -> None:
        """Write what was put, without waiting for it."""
        if self._thread.is_alive():
            self._queue.put(threading.Event())

    def flush(self) -> None:
        """Return when all that was put is on the disk, or given up. Raises what the thread has raised."""
        if self._thread.is_alive():
            done = threading.Event()
            self._queue.put(done)
            done.wait()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Write the rest and end the thread."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def news(self) -> list[str]:
        """What is to be said since the last call."""
        news, self._news = self._news, []
        return news

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                if isinstance(item, threading.Event):
                    self._write_all()
                elif not self.stopped and self._error is None:
                    self._add(*item)
            except Exception as error:  # a bug of ours: the loop raises it at its next flush
                self._error = error
            finally:
                if isinstance(item, threading.Event):
                    item.set()
        if self._error is None:
            self._write_all()

    def _add(self, store: Store, draw: int, ids: np.ndarray, parts: list[Tensor]) -> None:
        assert store.layout is not None
        _, buffer = self._buffers.setdefault((store.key, draw), (store, _Buffer(store.layout)))
        rows = store.layout.encode([as_array(p) for p in parts])
        buffer.ids.append(ids)
        buffer.rows.append(rows)
        buffer.size += rows.nbytes
        if buffer.size >= SHARD_BYTES:
            self._write(store, draw)

    def _write_all(self) -> None:
        for store, draw in [(s, d) for (_, d), (s, _) in self._buffers.items()]:
            self._write(store, draw)

    def _write(self, store: Store, draw: int) -> None:
        """A shard of what is buffered and nobody else has written meanwhile."""
        _, buffer = self._buffers.pop((store.key, draw), (store, None))
        if self.stopped or buffer is None:
            return
        store.look(draw)
        ids, rows = np.concatenate(buffer.ids), np.concatenate(buffer.rows)
        new = ~store.has(draw, ids)
        if not new.any():
            return
        ids, rows = ids[new], rows[new]
        room = len(ids)
        if self._limit is not None:
            left = self._limit - cache_shards.size_of(self._folder) - cache_shards.TABLE
            room = min(room, max(left // (rows.itemsize * rows.shape[1] + 16), 0))
        full = f"teacher.cache.limit_gib is reached: nothing more is kept in {self._folder}"
        try:
            if room:
                arguments = (self._folder, store.key, draw, buffer.layout, ids[:room], rows[:room])
                cache_shards.write_shard(*arguments, self._number, self._limit)
        except cache_shards.Full:
            return self._stop(full)
        except OSError as error:
            return self._stop(
                f"{self._folder} cannot be written: {error.strerror or error}; nothing more is kept in it"
            )
        if room < len(ids):
            self._stop(full)
        self._number += 1
        store.look(draw)

    def _stop(self, why: str) -> None:
        self.stopped = why
        self._buffers.clear()
        self._news.append(f"{why}; training goes on, and computes what is missing")


def as_array(values: Tensor) -> np.ndarray:
    """On the CPU, as float32."""
    return values.detach().cpu().numpy().astype(np.float32, copy=False)
