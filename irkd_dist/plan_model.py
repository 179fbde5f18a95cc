"""What more processes are taken to cost: a stated model of time and memory on top of what one process measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

Spread = Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"]
SPREADS: tuple[Spread, ...] = ("ddp", "zero1", "zero2", "zero3", "fsdp2")


@dataclass(frozen=True)
class Model:
    """The batch is divided, and gradients are summed in a ring.

    A step of N processes takes compute / N / efficiency + 2 (N - 1) / N * gradient bytes / bandwidth + N * latency; the
    two overlap by `overlap`. bandwidth: bytes/s between neighbours, of the slowest link.
    """

    gpus: int = 1  # in all
    bandwidth: float = 10e9
    latency: float = 2e-5
    efficiency: float = 0.9  # of a process with a part of the batch, against one with all of it
    overlap: float = 0.5  # of the exchange that the backward hides

    def seconds(self, alone: float, gradient: float) -> float:
        """Of a step that takes `alone` on one process, with a gradient of so many bytes."""
        n = self.gpus
        if n == 1:
            return alone
        exchange = 2 * (n - 1) / n * gradient / self.bandwidth + n * self.latency
        return alone / n / self.efficiency + (1 - self.overlap) * exchange


def states(spread: Spread, weights: float, n: int, average: bool, gathered: float) -> float:
    """Bytes of weights, gradients, AdamW's moments and the moving average, of one of n processes.

    In fp32 each is as large as the weights, moments twice (Rajbhandari et al. 2020, section 3, with all in fp32). DDP
    sums gradients in buckets, a second copy; DeepSpeed's ZeRO steps a copy of its part of the weights. `gathered`:
    bytes of the weights that are whole at once where they are sharded.
    """
    own = weights / n
    kept = {
        "ddp": (4 if n == 1 else 5) * weights,
        "zero1": 2 * weights + 3 * own,
        "zero2": weights + 4 * own,
        "zero3": 5 * own + gathered,
        "fsdp2": 4 * own + gathered,
    }
    averaged = 0.0 if not average else own if spread in ("zero3", "fsdp2") else weights
    return kept[spread] + averaged


def gathered(student: nn.Module, weights: float, second_order: bool) -> float:
    """Bytes of the weights that a sharded student has whole at once: its largest block, or all of them.

    A saliency gradient keeps them gathered until the step (`fsdp2.kept_gathered`).
    """
    if second_order:
        return weights
    blocks = getattr(student, "blocks", None) or [student]
    return 4.0 * max(sum(p.numel() for p in block.parameters()) for block in blocks)
