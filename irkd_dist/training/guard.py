"""The guard: a gradient that is not finite changes nothing, on any process, and the host learns of it a step late.

The engine looks at the gradient's norm on the device and lets AdamW leave the update out there (`found_inf`). That
flag, and what the processes wish (to stop, to save), are combined in one small exchange after each step and read after
the next: nothing inside a step waits for the device or for another process.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from irkd_dist.training.distributed import Place


def poisoned(loss: Tensor) -> Tensor:
    """The loss, whose gradient is NaN everywhere if it is not finite itself: times one, or times NaN."""
    return loss * (loss.detach() * 0 + 1)


@dataclass(frozen=True)
class Flags:
    """What was asked for and what went wrong in a step, the same on every process."""

    step: int
    stop: bool  # some process was asked to stop
    save: bool  # rank 0's clock says that a checkpoint is due
    skipped: bool  # the gradient was not finite: no process has taken the step
    mine: bool  # this process's own loss or gradient was not


class Exchange:
    """Combines the flags of each step over the processes, and hands them out a step later."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._sent: _Sent | None = None

    def send(self, step: int, stop: bool, save: bool, skipped: Tensor, mine: Tensor) -> list[Flags]:
        """Send a step's flags; returns those of the step before, if there was one.

        skipped, mine: scalars on the device, 0 or 1; the first is the same on every process already.
        """
        earlier = self.settle()
        row = torch.stack([*(torch.full_like(skipped, float(flag)) for flag in (stop, save)), skipped])
        work = dist.all_reduce(row, op=dist.ReduceOp.MAX, async_op=True) if self._place.world > 1 else None
        copied = None
        if row.is_cuda:
            if work is not None:
                work.wait()  # only the stream does
            row, mine, work = row.to("cpu", non_blocking=True), mine.to("cpu", non_blocking=True), None
            copied = torch.cuda.Event()
            copied.record()
        self._sent = _Sent(step, row, mine, work, copied)
        return earlier

    def settle(self) -> list[Flags]:
        """The flags that were sent and not yet handed out; waits for them."""
        if (sent := self._sent) is None:
            return []
        self._sent = None
        if sent.work is not None:
            sent.work.wait()
        if sent.copied is not None:
            sent.copied.synchronize()
        stop, save, skipped = (flag > 0 for flag in sent.row.tolist())
        return [Flags(sent.step, stop, save, skipped, bool(sent.mine))]


@dataclass(frozen=True)
class _Sent:
    step: int
    row: Tensor
    mine: Tensor
    work: dist.Work | None
    copied: torch.cuda.Event | None
