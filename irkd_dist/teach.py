"""Fills a teacher's cache ahead: every sample as the training of the same configuration will show it, and no student.

Processes share nothing but the folder: each takes steps of its own, so that any number of them, on any machines, at
any time, do the work of one. What is there is not computed again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from irkd_dist import config as configuration
from irkd_dist.config import Config
from irkd_dist.data.loader import Batch, Loader
from irkd_dist.data.sampler import Share
from irkd_dist.distill import cache_shards
from irkd_dist.distill.cache import CachedTeacher, Wanted
from irkd_dist.errors import Stopped, UserError
from irkd_dist.training import answers, build, distributed, engines, restore
from irkd_dist.training.parts import Parts


@dataclass(frozen=True)
class Pass:
    """One sight of the whole split: an epoch of a stage, and the run's step at which it begins."""

    stage: int
    epoch: int
    draw: int
    step: int


def teach(
    config: Config,
    part: tuple[int, int] = (0, 1),
    epochs: int | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
    say: Callable[[str], object] = print,
) -> dict[str, float]:
    """Fill the cache with what the training of `config` asks its teacher.

    part: (i, n), from 0: of n jobs beside one another; the processes of a job share its part. epochs: of the run, from
    its first one; None: all. SIGTERM, SIGUSR1 and Ctrl-C end it when what is computed is written.

    Returns:
        Of all processes of the job: `computed` and `found` samples, `seconds`.

    Raises:
        UserError: as training does; or the cache has no folder, is full, or cannot be written.
        Stopped: a signal asked for it; the same command goes on.
    """
    config, started = _checked(config), time.perf_counter()
    engine = engines.setup(config)
    say = say if engine.main else lambda text: None
    try:
        with distributed.StopRequests(listen=True) as requests:
            parts = build.build(config, engine)
            assert parts.answers is not None
            share = (part[0] * engine.world + engine.rank, part[1] * engine.world)
            _announce(parts, epochs, share, say)
            report = progress if engine.main else lambda done, total: None
            try:
                computed, found = _fill(parts, passes(parts, epochs), share, report, say, requests)
            finally:
                parts.answers.close()
            _heed(parts, say)
        totals = distributed.total(engine, torch.tensor([computed, found], device=engine.device)).tolist()
    except Stopped as error:
        say(str(error))
        raise
    finally:
        engine.finish()
    return {"computed": totals[0], "found": totals[1], "seconds": time.perf_counter() - started}


def passes(parts: Parts, epochs: int | None) -> list[Pass]:
    """Each sight of the split that the training has, once: in its order, draws that come again left out."""
    found: dict[tuple[int, int], Pass] = {}
    epoch = step = 0
    for number, stage in enumerate(parts.plan.stages):
        with build.train_loader(parts, stage, Share()) as loader:
            steps = loader.steps_per_epoch
        for _ in range(stage.epochs):
            if epochs is None or epoch < epochs:
                draw = parts.config.augment.draw(epoch)
                found.setdefault((number, draw), Pass(number, epoch, draw, step))
            epoch, step = epoch + 1, step + steps
    return [*found.values()]


def _checked(config: Config) -> Config:
    spec, loss = config.teacher, config.loss
    if spec is None or spec.cache.folder is None:
        raise UserError(
            "irkd teach fills a cache: give teacher.cache.folder, in the configuration or as key=value"
        )
    if not (loss.kd.alpha or loss.saliency.gamma):
        raise UserError("loss.kd.alpha=0 and loss.saliency.gamma=0: this training asks its teacher nothing")
    # each process computes for itself, whatever training does, and what is there is read
    return replace(config, teacher=replace(spec, shard=False, cache=replace(spec.cache, mode="auto")))


def _announce(parts: Parts, epochs: int | None, share: tuple[int, int], say: Callable[[str], object]) -> None:
    assert parts.answers is not None
    ends = [s for s in configuration.stages(parts.config) if s.patience or s.target or s.minutes or s.tokens]
    if ends and epochs is None and parts.config.augment.draws is None:
        say("stages may end early (patience, target, minutes, tokens): what they see if none does is filled")
    say(
        f"{parts.answers.folder}: part {share[0] + 1} of {share[1]} of what {parts.config.name} asks its teacher"
    )


def _fill(
    parts: Parts, todo: list[Pass], share: tuple[int, int], progress: Callable[[int, int], object],
    say: Callable[[str], object], requests: distributed.StopRequests,
) -> tuple[int, int]:  # fmt: skip
    """The share's samples, pass by pass; returns how many were computed, and how many were there."""
    assert parts.answers is not None
    total, done, computed, found = 0, 0, 0, 0
    for number, stage in enumerate(parts.plan.stages):
        own = [p for p in todo if p.stage == number]
        if not own:
            continue
        restore.load_stage_teacher(parts, number)
        with build.train_loader(parts, stage, Share()) as loader:
            for note in answers.enter(parts, number, loader):
                say(note)
            steps = range(share[0], loader.steps_per_epoch, share[1])
            total = total or len(steps) * len(todo)
            for each in own:
                missing = _missing(parts, loader, each, steps)
                done += len(steps) - len(missing)
                asked = [_wanted(parts, loader, each, s) for s in missing]
                batches = loader.steps(each.epoch, chosen=missing)
                ahead = parts.answers.ahead(batches, asked, parts.config.data.workers)
                for wanted, (batch,) in zip(asked, ahead, strict=True):
                    _ask(parts.answers, batch, wanted)
                    done += 1
                    progress(done, max(total, done))
                    if requests.received:
                        parts.answers.flush()
                        raise Stopped(
                            f"stopped by {requests.received} after {done} of {total} batches; what is computed is "
                            "written, and the same command goes on"
                        )
                parts.answers.flush()
                misses = parts.answers.counts.take()[1]
                computed, found = (
                    computed + misses,
                    found + sum(len(loader.samples(each.epoch, s)[0]) for s in steps) - misses,
                )
                if parts.answers.writer is not None and parts.answers.writer.stopped:
                    return computed, found
    return computed, found


def _missing(parts: Parts, loader: Loader, each: Pass, steps: range) -> list[int]:
    """The steps of which something is not there."""
    assert parts.answers is not None
    parts.answers.look(each.draw)
    return [s for s in steps if not parts.answers.complete(_wanted(parts, loader, each, s))]


def _wanted(parts: Parts, loader: Loader, each: Pass, step: int) -> Wanted:
    """What a step needs; all of its maps where its draw comes again, since then others are chosen."""
    loss, count = parts.config.loss, parts.config.optim.accumulate
    asked = answers.wanted(
        parts.config, loader, each.epoch, step, each.step + step, loss.kd.alpha, loss.saliency.gamma,
        2 if count == "auto" else count,  # more maps are wanted of several micro-batches than of one
    )  # fmt: skip
    if parts.config.augment.draws is not None and loss.saliency.gamma:
        asked = replace(asked, aligned=len(asked.ids))
    return asked


def _ask(cached: CachedTeacher, batch: Batch, wanted: Wanted) -> None:
    images = batch.images if batch.full is None else batch.full
    target = batch.labels if batch.soft_labels is None else batch.soft_labels
    cached(images, target, batch.ids, batch.draw, wanted.aligned, wanted.logits)


def _heed(parts: Parts, say: Callable[[str], object]) -> None:
    assert parts.answers is not None
    writer = parts.answers.writer
    if writer is not None and writer.stopped:
        raise UserError(f"{writer.stopped}: make room (irkd cache --prune), and give the same command again")
    for text in parts.answers.news():
        say(f"warning: {text}")
    say(f"{parts.answers.folder}: {cache_shards.size_of(parts.answers.folder) / 2**20:.1f} MiB")
