"""One optimisation step: the batch in parts, teacher and student on each, and whether the losses are finite."""

from __future__ import annotations

import hashlib
import itertools
import math
from dataclasses import replace

import torch
from torch import Tensor

from irkd_dist import faults
from irkd_dist.data.loader import Batch
from irkd_dist.distill.module import Targets
from irkd_dist.training import distributed, optim
from irkd_dist.training.setup import Job, Position


class NotFinite(Exception):
    """A rank's loss is not finite; no rank has taken the step. Holds the names of those ranks."""

    def __init__(self, ranks: list[str]) -> None:
        super().__init__(", ".join(ranks))
        self.ranks = ranks


def take(
    job: Job, batch: Batch, alpha: float, gamma: float, step: int, wishes: list[bool]
) -> tuple[list[dict[str, Tensor]], list[bool]]:
    """Take one step on all ranks, or on none.

    Returns:
        The loss terms of each micro-batch, and for each of this rank's `wishes` whether any rank has it: they travel
        with what is exchanged anyway.

    Raises:
        NotFinite: on all ranks alike; weights and moments are as they were.
    """
    engine, count = job.engine, job.config.optim.accumulate
    rows, granted = [], wishes
    for i, part in enumerate(parts(batch, count)):
        torch.manual_seed(seed(job.config.seed, step, engine.rank, i))
        with engine.micro_batch(last=i == count - 1):
            terms = forward(job, part, alpha, gamma, step)
            for kind in faults.inject("loss", step, engine.rank):
                terms["total"] = terms["total"] * float(kind)
            # before the backward: no gradient of any rank has yet met another's
            wrong = ~torch.isfinite(terms["total"].detach())
            bad, *granted = distributed.any_of(engine, wrong, *wishes)
            if bad:
                engine.discard()
                told = distributed.gather(engine, distributed.name(engine) if bool(wrong) else None)
                raise NotFinite([name for name in told if name])
            engine.backward(terms["total"])
        rows.append(terms)
    engine.step()
    return rows, granted


def parts(batch: Batch, count: int) -> list[Batch]:
    """A rank's share in `count` micro-batches, in order; one without a sample gets the first with weight 0.

    Every rank has the same number of them, since sharded engines gather parameters in each.
    """
    if count == 1:
        return [batch]
    n = len(batch.ids)
    bounds = [round(i * n / count) for i in range(count + 1)]
    return [
        _rows(batch, torch.arange(a, b))
        if b > a
        else _rows(batch, torch.zeros(1, dtype=torch.long), weight=0.0)
        for a, b in itertools.pairwise(bounds)
    ]


def forward(job: Job, batch: Batch, alpha: float, gamma: float, step: int) -> dict[str, Tensor]:
    """Teacher and student on one rank's share of a batch; returns the loss terms of `Distiller.forward`.

    Saliency is aligned on every `every`-th step, for the first `fraction` of the global batch's positions; a rank's
    share ascends in position, so that these are its first samples. Each rank runs the same forwards: one that has no
    sample to align, or none besides those, takes a sample of weight 0.
    """
    spec = job.config.loss.saliency
    chosen = math.ceil(spec.fraction * batch.size) if gamma and step % spec.every == 0 else 0
    own = int((batch.positions < chosen).sum()) if chosen else 0
    aligned, index, weights = own, torch.arange(len(batch.ids)), batch.weight
    if chosen and (own == 0 or (chosen < batch.size and own == len(batch.ids))):
        first, last = (
            ([0] if own == 0 else []),
            ([0] if own == len(batch.ids) and chosen < batch.size else []),
        )
        index = torch.tensor([*first, *index.tolist(), *last])
        nothing = weights.new_zeros(1)
        weights = torch.cat([*([nothing] if first else []), weights, *([nothing] if last else [])])
        aligned = max(own, 1)
        batch = replace(_rows(batch, index), weight=weights)
    target = batch.labels if batch.soft_labels is None else batch.soft_labels
    targets = Targets()
    if job.teacher is not None:
        images = batch.images if batch.full is None else batch.full
        targets = job.teacher(images, target, aligned, logits=alpha > 0)
    scale = batch.size / chosen if chosen else 1.0
    return job.module(batch.images, target, batch.weight, targets, alpha, gamma if chosen else 0.0, scale)


def learning_rate(job: Job, position: Position, stage_steps: int, run_steps: int) -> float:
    """The rate of the step that `position` stands before; pure, so that a resumed run has the same."""
    spec, policy = job.config.optim.schedule, job.config.optim.policy
    over_stage = spec.span == "stage" or (spec.span == "auto" and policy == "reset")
    step, steps = (position.stage_step, stage_steps) if over_stage else (position.step, run_steps)
    factor = optim.lr_factor(spec.kind, step, steps, spec.warmup, spec.start, spec.final)
    if policy == "rewarm" and position.curriculum.stage > 0:
        factor *= optim.rewarm_factor(position.stage_step, job.config.optim.rewarm_steps)
    return job.plan.stages[position.curriculum.stage].lr * factor


def seed(seed: int, step: int, rank: int, part: int = 0) -> int:
    """Seed of dropout and drop-path at a step: a resumed run draws what an unbroken one does."""
    key = f"{seed}/{step}/{rank}" + (f"/{part}" if part else "")
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1


def _rows(batch: Batch, index: Tensor, weight: float | None = None) -> Batch:
    on = index.to(batch.images.device)
    return replace(
        batch,
        ids=batch.ids[index.numpy()],
        images=batch.images[on],
        labels=batch.labels[on],
        soft_labels=None if batch.soft_labels is None else batch.soft_labels[on],
        weight=batch.weight[on] if weight is None else batch.weight.new_full((len(index),), weight),
        positions=batch.positions[index],
        full=None if batch.full is None else batch.full[on],
    )
