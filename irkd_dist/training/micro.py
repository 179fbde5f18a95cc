"""How many micro-batches a stage needs (`optim.accumulate: auto`): what two small ones take, what memory is left."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from irkd_dist.data import memory
from irkd_dist.training import preflight
from irkd_dist.training.parts import Parts

SMALL = (4, 8)  # samples of the two that are measured, half of them aligned: BatchNorm takes no single one
USED = 0.8  # of what is left may be taken
OVERHEAD = 2.0  # of what autograd keeps on a CPU: gradients and temporary results beside it; an estimate


def choose(parts: Parts, number: int) -> tuple[int, str]:
    """Micro-batches that each process computes its share of a stage's batch in, the same for all, and why in words.

    On CUDA the peak of two small steps gives what a sample takes; on a CPU it is estimated as twice what autograd keeps
    of it. Every process must call it.
    """
    stage, engine = parts.plan.stages[number], parts.engine
    side = max((stage.resolution, *stage.multiscale))
    share = math.ceil(stage.batch / engine.world)
    few, more = (_bytes(parts, side, count) for count in SMALL)
    # where the second takes no more, all that it takes may be its samples'
    sample = (more - few) / (SMALL[1] - SMALL[0]) if more > few else max(more / SMALL[1], 1.0)
    fixed = max(few - SMALL[0] * sample, 0.0) + _moments(parts)
    count = needed(share, sample, USED * _left(parts) - fixed)
    if engine.world > 1:
        values = torch.tensor([count], device=engine.device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        count = int(values)
    how = "measured" if engine.device.type == "cuda" else "estimated"
    why = f"{sample / 2**20:.1f} MiB a sample ({how}), {_left(parts) / 2**20:.0f} MiB left, {share} samples a process"
    return count, why


def ensure(parts: Parts, number: int) -> None:
    """Choose a stage's micro-batches if they are to be chosen and are not."""
    if parts.config.optim.accumulate == "auto" and number not in parts.chosen:
        parts.chosen[number], _ = choose(parts, number)


def needed(share: int, sample: float, room: float) -> int:
    """Parts of `share` samples, of `sample` bytes each, so that one fits into `room` bytes; of one sample at least."""
    at_once = max(int(room // sample), 1)
    return min(math.ceil(share / at_once), share)


def _moments(parts: Parts) -> float:
    """Bytes of the moments that the first step will make."""
    held = sum(p.numel() for group in parts.optimizer.param_groups for p in group["params"])
    return (
        0.0 if parts.optimizer.state else 8.0 * held / (1 if parts.engine.replicated else parts.engine.world)
    )


def _left(parts: Parts) -> float:
    device = parts.engine.device
    if device.type != "cuda":
        return float(memory.left())
    images = (
        memory.DEVICE if parts.config.data.cache == "device" else 0.0
    )  # comes after, and takes so much at most
    return (1 - images) * memory.left_on(device)


def _bytes(parts: Parts, side: int, count: int) -> float:
    if parts.engine.device.type == "cuda":
        preflight.blank_step(
            parts, side, count
        )  # the first one makes what stays: workspaces, gathered buffers
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        preflight.blank_step(parts, side, count)
        return float(torch.cuda.max_memory_allocated() - before)
    kept, pack = _counter()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        preflight.blank_step(parts, side, count)
    return OVERHEAD * sum(kept.values())


def _counter() -> tuple[dict[int, int], Callable[[Any], Any]]:
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    return kept, pack
