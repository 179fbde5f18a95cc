"""Virtual ranks: the slices of a batch, whoever computes them, and one order in which their gradients are added.

With V virtual ranks each batch has V slices: position p of it is in slice p mod V. Dropout's seeds and the order of the
sum belong to the slices, processes only carry them: rank r of W those with v mod W = r, which are its share anyway.
Floating-point addition is commutative, not associative. So if every sum is one node of the same binary tree, 1, 2, 4,
... V processes get the same bits: slices that differ in their highest bit are added first, in the lowest bit last.
"""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist
from torch import Tensor


def seed(seed: int, step: int, rank: int, part: int = 0) -> int:
    """Seed of dropout and drop-path at a step of a (virtual) rank: a resumed run draws what an unbroken one does."""
    key = f"{seed}/{step}/{rank}" + (f"/{part}" if part else "")
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1


def carried(count: int, rank: int, world: int) -> list[int]:
    """The virtual ranks, of `count`, that a process carries, in the order in which it adds them up."""
    bits = count.bit_length() - 1
    reversed_bits = (int(f"{i:0{bits}b}"[::-1], 2) if bits else 0 for i in range(count))
    return [v for v in reversed_bits if v % world == rank]


def exact(count: int, world: int) -> bool:
    """Whether so many processes add up as one does: each has a whole branch of the tree."""
    return count % world == 0


class TreeSum:
    """Adds sets of tensors as the leaves of a balanced binary tree, in order, whatever their number.

    Like a binary counter: it holds one sum for each power of two, so log2 of the leaves at most.
    """

    def __init__(self) -> None:
        self._sums: list[tuple[int, list[Tensor]]] = []  # (leaves, their sum)

    def add(self, tensors: list[Tensor]) -> None:
        """Add a leaf; its tensors are taken over and may be changed."""
        leaves, total = 1, tensors
        while self._sums and self._sums[-1][0] == leaves:
            torch._foreach_add_(earlier := self._sums.pop()[1], total)  # type: ignore[attr-defined]
            leaves, total = 2 * leaves, earlier
        self._sums.append((leaves, total))

    def total(self) -> list[Tensor]:
        """The sum of all leaves, a power of two of them; ready for the next sum."""
        ((_, total),) = self._sums
        self._sums = []
        return total


def sum_over_processes(tensors: list[Tensor], rank: int, world: int) -> None:
    """Add up each process's tensors in place, as the tree's upper part: those that differ in the highest bit first.

    A world that is no power of two is added up by the backend, in an order of its own.
    """
    if world == 1:
        return
    flat = torch.cat([t.reshape(-1) for t in tensors])
    if world & (world - 1):
        dist.all_reduce(flat)
    else:
        theirs = torch.empty_like(flat)
        for level in reversed(range(world.bit_length() - 1)):
            partner = rank ^ (1 << level)
            pair = [dist.P2POp(dist.isend, flat, partner), dist.P2POp(dist.irecv, theirs, partner)]
            for request in dist.batch_isend_irecv(pair):
                request.wait()
            flat += theirs
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
