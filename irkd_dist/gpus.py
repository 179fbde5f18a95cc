"""The GPUs that runs beside one another share: which one the next takes, and whether it has room there.

Asked of nvidia-smi, since a question to CUDA would take memory of each GPU itself.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

MIB = 2**20
ASK_S = 1.0  # between two questions
SPARE = 1.2  # of the memory that the largest run has taken must be free before another starts


@dataclass
class Gpu:
    """One GPU, by its name in CUDA_VISIBLE_DEVICES."""

    name: str
    before: int | None = None  # bytes free when no run of ours was on it; None: nvidia-smi does not say
    free: int | None = None
    largest: int = (
        0  # bytes that a run has taken, in the mean over those on it; what strangers take counts too
    )

    def heed(self, free: int | None, runs: int) -> None:
        """Take note of what is free while so many runs are on it."""
        self.free = free
        if runs == 0 or self.before is None:
            self.before = free
        elif free is not None:
            self.largest = max(self.largest, (self.before - free) // runs)

    def lacks(self, runs: int) -> str | None:
        """Why it has no room for another run, in words; None if it has."""
        if runs == 0 or self.free is None or self.free > SPARE * self.largest:
            return None
        free, taken = (f"{size / 2**30:.1f} GiB" for size in (self.free, self.largest))
        return f"GPU {self.name} has {free} left, and a run has taken {taken}"


@dataclass
class Gpus:
    """All GPUs that this process may use; none where there is no driver."""

    found: list[Gpu] = field(default_factory=lambda: [Gpu(name) for name in visible()])
    asked_at: float = -ASK_S

    def look(self, used: Sequence[str | None]) -> None:
        """Ask how much is free; used: the GPU of each run that goes on."""
        if not self.found or time.monotonic() - self.asked_at < ASK_S:
            return
        free = free_memory()
        for gpu in self.found:
            gpu.heed(free.get(gpu.name), used.count(gpu.name))
        self.asked_at = time.monotonic()

    def place(self, used: Sequence[str | None]) -> tuple[str | None, str | None]:
        """The GPU with the fewest runs that has room (None: there are no GPUs), and why there is none, if so."""
        reasons = []
        for gpu in sorted(self.found, key=lambda g: (used.count(g.name), -(g.free or 0))):
            reason = gpu.lacks(used.count(gpu.name))
            if reason is None:
                return gpu.name, None
            reasons.append(reason)
        return None, "; ".join(reasons) or None


def visible() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; none where there is no driver."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    return [row[0] for row in _ask("index")]


def free_memory() -> dict[str, int]:
    """Bytes free by number and by UUID; of what nvidia-smi does not know or say, nothing."""
    found: dict[str, int] = {}
    for index, uuid, free in _ask("index,uuid,memory.free"):
        if free.isdigit():
            found[index] = found[uuid] = int(free) * MIB
    return found


def _ask(fields: str) -> list[list[str]]:
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in said.stdout.splitlines()]
    return [row for row in rows if len(row) == fields.count(",") + 1 and row[0].isdigit()]
