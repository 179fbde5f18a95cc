"""How much memory is left, and who was promised it: one ledger for everything that a process keeps."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import psutil

if TYPE_CHECKING:
    import torch

RAM = 0.8  # of what is left may be promised; models, batches and other programs live on the rest
DEVICE = 0.5  # activations come on top

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# limit, use, and in memory.stat what the kernel gives back when asked: pages of files (tmpfs is not among them)
_V2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


class Promised(Protocol):
    """Somebody with a promise; pages are taken from the system as they are filled, not when they are asked for."""

    @property
    def unfilled(self) -> int:
        """Bytes promised and not yet in use."""
        ...

    @property
    def shared(self) -> bool:
        """Whether they are one and the same for all processes of the node."""
        ...


_promised: weakref.WeakSet[Promised] = weakref.WeakSet()


def promise(owner: Promised, size: int) -> bool:
    """Promise `size` bytes of RAM to an owner, if there is room; it holds until the owner is gone or filled."""
    if size > RAM * left():
        return False
    note(owner)
    return True


def note(owner: Promised) -> None:
    """Count what an owner was promised elsewhere."""
    _promised.add(owner)


def left(shared: bool = False) -> int:
    """Bytes of RAM that this process may still count on: its part of the node's, less what it has promised.

    The processes of a node (LOCAL_WORLD_SIZE) are taken to want the same. `shared`: bytes that the processes of the
    node may still count on for what they have in common.
    """
    node = min([psutil.virtual_memory().available, *in_cgroups()])
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    common = sum(owner.unfilled for owner in _promised if owner.shared)
    own = sum(owner.unfilled for owner in _promised if not owner.shared)
    return max(node - common - processes * own if shared else (node - common) // processes - own, 0)


def left_on(device: torch.device) -> int:
    """Bytes that a CUDA device has left, with those that torch holds and does not use."""
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def in_cgroups(own: Path = OWN_CGROUPS, mounted: Path = CGROUPS) -> list[int]:
    """Bytes left in each control group with a limit that the process is in (SLURM's, a container's), v1 and v2."""
    found = []
    for root, path, names in _hierarchies(own, mounted):
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            with contextlib.suppress(OSError, ValueError):  # no such file; or "max": without a limit
                found.append(_left_in(folder, *names))
    return found


def _hierarchies(own: Path, mounted: Path) -> Iterator[tuple[Path, str, tuple[str, str, tuple[str, ...]]]]:
    """(where it is mounted, path in it, names of its files) for each hierarchy that can limit memory."""
    with contextlib.suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                yield mounted, path, _V2
                yield mounted / "unified", path, _V2
            elif "memory" in controllers.split(","):
                yield mounted / "memory", path, _V1


def _left_in(folder: Path, limit: str, use: str, reclaimable: tuple[str, ...]) -> int:
    allowed, used = int((folder / limit).read_text()), int((folder / use).read_text())
    lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return max(allowed - used + sum(int(size) for name, size in lines if name in reclaimable), 0)
