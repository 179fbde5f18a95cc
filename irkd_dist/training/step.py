"""One optimisation step: the batch in parts, teacher and student on each, and whether it was taken."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from irkd_dist import faults
from irkd_dist.config import Optim, Saliency
from irkd_dist.data.loader import Batch
from irkd_dist.distill.cache import CachedTeacher
from irkd_dist.distill.module import Targets
from irkd_dist.distill.teacher import Teacher
from irkd_dist.training import curriculum, guard, optim, virtual
from irkd_dist.training.engines import Engine
from irkd_dist.training.parts import Parts
from irkd_dist.training.position import Position

MEANS = ("total", "ce", "kd", "saliency", "features")  # the terms that are weighted by sample


@dataclass(frozen=True)
class Taken:
    """How a step went; all of it is on the device."""

    terms: list[dict[str, Tensor]]  # loss terms of each micro-batch
    skipped: Tensor  # 1: the gradient was not finite, and no process has taken the step; else 0
    mine: Tensor  # 1: a loss of this process was not finite
    samples: Tensor | int  # of this process's share


def take(parts: Parts, batches: list[Batch], alpha: float, gamma: float, step: int, accumulate: int) -> Taken:
    """Take one step on all ranks, or on none: then weights and moments are as they were.

    batches: this process's share of the global batch; several, if it carries several virtual ranks. accumulate:
    micro-batches that the share is computed in.
    """
    config, engine, terms = parts.config, parts.engine, []
    mine = torch.zeros((), device=engine.device)
    pieces = slices(batches, config.data.virtual_ranks, engine, accumulate)
    several, buffers = len(batches) > 1, list(parts.student.buffers())
    before = after = _flat(buffers)  # BatchNorm's statistics, which a forward changes
    for i, (rank, part, piece) in enumerate(pieces):
        torch.manual_seed(virtual.seed(config.seed, step, rank, part))
        with engine.micro_batch(last=i == len(pieces) - 1):
            teacher = parts.answers or parts.teacher
            beta = config.loss.features.beta
            made = parts.module(*arguments(teacher, config.loss.saliency, piece, alpha, gamma, step, beta))
            # a batch's weights make the mean over slices; the engine takes the one over processes
            if several:
                made = {k: v / len(batches) if k in MEANS else v for k, v in made.items()}
            loss = _faulty(made["total"], parts.student, engine, step)
            mine = torch.maximum(mine, (~torch.isfinite(loss.detach())).float())
            engine.backward(guard.poisoned(loss))
        terms.append({**made, "total": loss})
        if i == (0 if several else len(pieces) - 1):  # of several slices the first one's count
            after = _flat(buffers)
    skipped = engine.step()
    _put(buffers, [torch.where(skipped > 0, old, new) for old, new in zip(before, after, strict=True)])
    if (ema := config.optim.ema) is not None:
        engine.move_average(optim.ema_decay(ema.decay, ema.warmup, step), skipped)
    return Taken(terms, skipped, mine, sum((b.weight > 0).sum() for b in batches))


def slices(
    batches: list[Batch], count: int | None, engine: Engine, accumulate: int
) -> list[tuple[int, int, Batch]]:
    """A process's share as (rank, part, micro-batch): its seed's rank and part, and what it computes at once.

    With `count` virtual ranks a slice each, where a process carries whole ones; otherwise the process's own rank, in
    `accumulate` parts. Every process has the same number of them, since sharded engines gather parameters in each: a
    sample of weight 0 where a slice has none.
    """
    if count is None or not virtual.exact(count, engine.world):
        return [(engine.rank, i, part) for i, part in enumerate(parts(batches[0], accumulate))]
    ranks = virtual.carried(count, engine.rank, engine.world)
    return [(rank, 0, batch) for rank, batch in zip(ranks, batches, strict=True)]


def parts(batch: Batch, count: int) -> list[Batch]:
    """A rank's share in `count` micro-batches, in order; one without a sample gets the first with weight 0."""
    if count == 1:
        return [batch]
    n = len(batch.ids)
    bounds = [round(i * n / count) for i in range(count + 1)]
    return [
        _rows(batch, torch.arange(a, b)) if b > a else _nothing(batch) for a, b in itertools.pairwise(bounds)
    ]


def arguments(
    teacher: Teacher | CachedTeacher | None,
    spec: Saliency,
    batch: Batch,
    alpha: float,
    gamma: float,
    step: int,
    beta: float = 0.0,
) -> tuple[Any, ...]:
    """What `Distiller.forward` takes of a batch: the images, and what the teacher says of them.

    Saliency is aligned on every `every`-th step, for the first `fraction` of the global batch's positions; a rank's
    share ascends in position, so that these are its first samples. Each rank runs the same forwards: one that has no
    sample to align, or none besides those, takes a sample of weight 0.
    """
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
    if teacher is not None:
        images = batch.images if batch.full is None else batch.full
        if isinstance(teacher, CachedTeacher):
            targets = teacher(images, target, batch.ids, batch.draw, aligned, logits=alpha > 0)
        else:
            targets = teacher(images, target, aligned, logits=alpha > 0, featured=beta > 0)
    scale = batch.size / chosen if chosen else 1.0
    return batch.images, target, batch.weight, targets, alpha, gamma if chosen else 0.0, scale, beta


def learning_rate(
    spec: Optim, plan: curriculum.Plan, position: Position, stage_steps: int, run_steps: int
) -> float:
    """The rate of the step that `position` stands before; pure, so that a resumed run has the same."""
    schedule, policy = spec.schedule, spec.policy
    over_stage = schedule.span == "stage" or (schedule.span == "auto" and policy == "reset")
    step, steps = (position.stage_step, stage_steps) if over_stage else (position.step, run_steps)
    factor = optim.lr_factor(schedule.kind, step, steps, schedule.warmup, schedule.start, schedule.final)
    if policy == "rewarm" and position.curriculum.stage > 0:
        factor *= optim.rewarm_factor(position.stage_step, spec.rewarm_steps)
    return plan.stages[position.curriculum.stage].lr * factor


def _flat(buffers: list[Tensor]) -> list[Tensor]:
    """Copies of all buffers as one tensor for each type: a model may have hundreds of small ones."""
    return [torch.cat([b.reshape(-1) for b in same]) for same in _by_type(buffers)]


def _put(buffers: list[Tensor], flat: list[Tensor]) -> None:
    """Put back what `_flat` gave."""
    for same, values in zip(_by_type(buffers), flat, strict=True):
        pieces = values.split([b.numel() for b in same])
        torch._foreach_copy_(same, [p.view_as(b) for p, b in zip(pieces, same, strict=True)])  # type: ignore[attr-defined]


def _by_type(buffers: list[Tensor]) -> list[list[Tensor]]:
    return [[b for b in buffers if b.dtype == dtype] for dtype in dict.fromkeys(b.dtype for b in buffers)]


def _faulty(loss: Tensor, student: nn.Module, engine: Engine, step: int) -> Tensor:
    """The loss, or what a fault on purpose makes of it or of one element of its gradient."""
    for kind in faults.inject("loss", step, engine.rank):
        loss = loss * float(kind)
    for kind in faults.inject("gradient", step, engine.rank):
        parameter = next(p for p in student.parameters() if p.requires_grad)

        handles: list[RemovableHandle] = []
        handles.append(parameter.register_hook(functools.partial(_spoil, float(kind), handles)))
    return loss


def _spoil(value: float, handles: list[RemovableHandle], gradient: Tensor) -> Tensor:
    handles.pop().remove()
    gradient = gradient.clone()
    gradient.view(-1)[0] = value
    return gradient


def _nothing(batch: Batch) -> Batch:
    """The first sample with weight 0."""
    return _rows(batch, torch.zeros(1, dtype=torch.long), weight=0.0)


def _rows(batch: Batch, index: Tensor, weight: float | None = None) -> Batch:
    device = batch.images.device
    # from pageable memory the copy would wait for the device
    on = index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index
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
