"""Checkpoints that belong to no engine: weights and moments by name in safetensors, the rest in JSON.

A checkpoint is written to a temporary folder, synced, and renamed; state.json holds the checksums of the other two
files. So a folder that has the final name and whose checksums agree is whole, and nothing else is. `Writer` does this
in a thread while training goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from irkd_dist import faults
from irkd_dist.errors import Passing, UserError, unreadable

FORMAT_VERSION = 1
STUDENT, OPTIMIZER, STATE = "student.safetensors", "optimizer.safetensors", "state.json"


def save(
    folder: Path, student: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any]
) -> None:
    """Write a checkpoint; it appears under its name only when it is whole.

    student: full fp32 weights by parameter name; optimizer: moments by `kind.parameter`; state: JSON values.

    Raises:
        UserError: the disk is full or not writable; the folder's earlier content is untouched.
    """
    temporary = folder.with_name(f".writing-{folder.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in student.items()}, temporary / STUDENT)
        faults.inject("write", state.get("step", -1))
        save_file(optimizer, temporary / OPTIMIZER)
        digests = {name: _sync_and_digest(temporary / name) for name in (STUDENT, OPTIMIZER)}
        text = json.dumps({"version": FORMAT_VERSION, "sha256": digests, **state}, indent=1)
        (temporary / STATE).write_text(text)
        _sync_and_digest(temporary / STATE)
        _sync_folder(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
        _sync_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        faults.heal()
        shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(folder.parent if folder.parent.exists() else Path()).free / 2**20
        raise UserError(
            f"cannot write checkpoint {folder}: {error} ({free:.0f} MiB free); earlier checkpoints are untouched"
        ) from error


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds: see `save`."""

    student: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def unsound(content: Content) -> str | None:
    """What is not finite in a checkpoint's weights or moments; None where all is."""
    for kind, tensors in (("weight", content.student), ("moment", content.optimizer)):
        for name, value in tensors.items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                return f"{kind} {name} is not finite"
    return None


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
    folders: list[tuple[Path, Content]]
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
    _owed: list[tuple[Path, Content]] = field(default_factory=list)
    _thread: threading.Thread | None = None

    def submit(
        self, name: str, step: int, folders: list[tuple[Path, Content]], afterwards: Callable[[], None]
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
                    save(folder, content.student, content.optimizer, content.state)
                    del self._owed[0]
                order.afterwards()
            except UserError as failure:
                error = str(failure)
            except (
                Exception
            ) as failure:  # whatever it is: a thread that ends would let the training wait for ever
                error = f"cannot write checkpoint {order.name}: {failure!r}"
            self._done.put(Written(order.name, order.step, time.perf_counter() - started, error))
            self._orders.task_done()
        self._orders.task_done()


def _kind(folder: Path) -> tuple[Path, str]:
    return folder.parent, folder.name.rpartition("-")[0]


def load_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint folder.

    Raises:
        UserError: it is missing, not JSON, or of another version.
    """
    try:
        state = json.loads((folder / STATE).read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} is no checkpoint: it has no {STATE}") from None
    except OSError as error:
        raise unreadable(folder / STATE, error) from error
    except ValueError as error:
        raise UserError(f"{folder / STATE} cannot be read: {error}") from error
    if not isinstance(state, dict):
        raise UserError(f"{folder / STATE} is altered: it holds no mapping")
    if state.get("version") != FORMAT_VERSION:
        raise UserError(
            f"{folder} is of checkpoint version {state.get('version')}; this release reads {FORMAT_VERSION}"
        )
    return state


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Read (student weights, moments, state) after comparing the checksums.

    Raises:
        UserError: a file is missing, truncated or altered; the message names it.
    """
    state = load_state(folder)
    return _read(folder / STUDENT, state), _read(folder / OPTIMIZER, state), state


def load_student(folder: Path) -> dict[str, Tensor]:
    """Read the student's weights alone."""
    return _read(folder / STUDENT, load_state(folder))


def name(step: int) -> str:
    """Folder name of the checkpoint at a global step."""
    return f"step-{step:08d}"


def newest(folder: Path, up_to: int | None = None) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint in a folder of them (`up_to` a step), and why each newer one was skipped.

    Raises:
        Passing: the file system does not answer.
    """
    skipped = []
    candidates = sorted(folder.glob("step-*"), reverse=True)
    for candidate in candidates if up_to is None else [c for c in candidates if c.name <= name(up_to)]:
        try:
            state = load_state(candidate)
            for file in (STUDENT, OPTIMIZER):
                _check(candidate / file, state)
            return candidate, skipped
        except Passing:
            raise  # it may be whole: going on from an older one would throw work away
        except UserError as error:
            skipped.append(str(error))
    return None, skipped


def prune(folder: Path, present: str, keep: int, always: set[str]) -> None:
    """Delete all but the newest `keep` checkpoints up to `present` and those named in `always`.

    A later one than the present is damaged, else the run would have gone on from it: it takes no whole one's place.
    """
    ours = sorted((f for f in folder.glob("step-*") if f.name <= present), reverse=True)
    for old in ours[keep:]:
        if old.name not in always:
            shutil.rmtree(old, ignore_errors=True)
    for unfinished in folder.glob(".writing-*"):
        shutil.rmtree(unfinished, ignore_errors=True)


def prune_all_but(folder: Path, names: set[str]) -> None:
    """Delete every checkpoint in a folder but those named."""
    for old in folder.glob("*step-*"):
        if old.name not in names:
            shutil.rmtree(old, ignore_errors=True)


def _read(file: Path, state: dict[str, Any]) -> dict[str, Tensor]:
    _check(file, state)
    try:
        return load_file(file)
    except OSError as error:
        raise unreadable(file, error) from error
    except SafetensorError as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def _check(file: Path, state: dict[str, Any]) -> None:
    try:
        with file.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
    except FileNotFoundError:
        raise UserError(f"{file} is missing") from None
    except OSError as error:
        raise unreadable(file, error) from error
    if digest != state.get("sha256", {}).get(file.name):
        raise UserError(f"{file} is altered or truncated: its checksum differs from the one in {STATE}")


def _sync_and_digest(file: Path) -> str:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
