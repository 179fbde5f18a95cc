"""The training loop: one for teachers and students, with or without distillation, curriculum and saliency."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from irkd_dist import config as configuration
from irkd_dist import runs
from irkd_dist.config import Config, Stage
from irkd_dist.data.loader import Batch, Loader
from irkd_dist.distill.module import Targets
from irkd_dist.errors import UserError
from irkd_dist.training import bookends, checkpoint, curriculum, distributed, optim, panels, setup
from irkd_dist.training.setup import Job, Position
from irkd_dist.training.tracking import Tracker

TERMS = ("total", "ce", "kd", "saliency", "correct", "flat", "samples", "steps", "aligned", "wait_s")


def train(config: Config) -> dict[str, Any]:
    """Run an experiment to its end, or go on with it where its run folder stands.

    Returns:
        The summary: `run`, `steps`, `seconds`, `val_accuracy` (best of the last stage), `test_accuracy`.

    Raises:
        UserError: configuration, shards, teacher or run folder do not fit together; nothing was written then.
    """
    engine = distributed.setup(config.precision)
    try:
        job = setup.build(config, engine)
        position, skipped = setup.resume(job)
        tracker = _open_run(job)
        try:
            return _train(job, position, skipped, tracker)
        finally:
            tracker.close()
    finally:
        distributed.finish(engine)


def _train(job: Job, position: Position, skipped: list[str], tracker: Tracker) -> dict[str, Any]:
    plan = setup.plan(job.config, job.stages)
    bookends.announce(job, position, skipped, tracker)
    skill = bookends.probe_teacher(job, tracker, position)

    while not position.finished:  # one turn is one stage
        stage = job.stages[position.curriculum.stage]
        loader, validation = setup.loaders(job, stage)
        alpha, gamma = _stage_weights(job, skill, position.curriculum.stage)
        _enter(job, position, stage, loader, alpha, gamma, tracker)
        steps = plan.epochs[position.curriculum.stage] * loader.steps_per_epoch
        with (
            loader,
            validation,
            tracker.stage_bar(f"{stage.resolution} px", steps, position.stage_step) as bar,
        ):
            present = position.curriculum.stage
            while position.curriculum.stage == present and not position.finished:
                _train_epoch(job, position, loader, alpha, gamma, steps, tracker, bar)
                _end_epoch(job, position, plan, stage, validation, tracker)
    return bookends.summarize(job, position, tracker)


def _train_epoch(
    job: Job, position: Position, loader: Loader, alpha: float, gamma: float, stage_steps: int,
    tracker: Tracker, bar: Any,
) -> None:  # fmt: skip
    """The rest of the epoch that `position` stands in, step by step."""
    config, engine = job.config, job.engine
    job.module.train()
    sums = torch.tensor(position.sums or [0.0] * len(TERMS), device=engine.device)
    logged, started, saved = sums.clone(), time.perf_counter(), time.perf_counter()
    loader.wait_s = 0.0
    for batch in loader.batches(position.epoch, position.epoch_step):
        distributed.inject_fault(position.step)
        torch.manual_seed(_step_seed(config.seed, position.step, engine.rank))
        lr = _learning_rate(job, position, loader.steps_per_epoch, stage_steps)
        optim.set_lr(job.optimizer, lr)

        terms = forward(job, batch, alpha, gamma, position.step)
        distributed.backward(engine, terms["total"])
        distributed.clip(engine, job.module, config.optim.clip)
        job.optimizer.step()
        job.optimizer.zero_grad()

        sums += _row(terms, batch, loader, sums)
        position.epoch_step += 1
        position.stage_step += 1
        position.step += 1
        if position.step % config.track.log_every == 0 or position.epoch_step == loader.steps_per_epoch:
            means, images = _means(job, sums - logged)
            seconds, logged = time.perf_counter() - started, sums.clone()
            started = time.perf_counter()
            _check_finite(means, position.step, stage_lr=lr)
            rates = {"images_per_s": images / seconds, "data_wait": means.pop("wait_s") / seconds, "lr": lr}
            timing = {"seconds": round(seconds, 4), **rates}
            tracker.event("train", position.step, stage=position.curriculum.stage, **means, **timing)
            tracker.metrics(position.step, {f"train/{k}": v for k, v in (means | rates).items()})
            bar(
                position.stage_step,
                _bar_text(means, rates["images_per_s"], position.curriculum.best_accuracy),
            )
        if position.epoch_step < loader.steps_per_epoch and _checkpoint_due(job, position, saved):
            position.sums = distributed.total(engine, sums.clone()).tolist()
            _check_finite(_means_of(job, position.sums)[0], position.step, stage_lr=lr)
            _checkpoint(job, position, tracker)
            saved = time.perf_counter()
    position.sums = sums.tolist()


def _end_epoch(
    job: Job, position: Position, plan: curriculum.Plan, stage: Stage, validation: Loader, tracker: Tracker
) -> None:
    """Validate, let rank 0 decide, write it down, and move the position to the next epoch or stage."""
    started = time.perf_counter()
    accuracy = setup.accuracy(job, job.student, validation)
    means, images = _means(job, torch.tensor(position.sums, device=job.engine.device))
    best_name = f"{runs.BEST}/stage-{position.curriculum.stage:02d}-step-{position.step:08d}"
    decided = curriculum.observe(plan, position.curriculum, accuracy, best_name) if job.engine.main else None
    state, decision = distributed.broadcast(job.engine, decided)
    before = position.curriculum

    tracker.event(
        "evaluation", position.step, stage=before.stage, resolution=stage.resolution, epoch=position.epoch + 1,
        stage_epoch=before.epoch + 1, split=setup.held_out(job.manifest), accuracy=accuracy, best=decision.best,
        train_accuracy=means.pop("accuracy"), train=means, data_wait_s=means.pop("wait_s"), images=images,
        seconds=time.perf_counter() - started,
    )  # fmt: skip
    tracker.metrics(position.step, {"val/accuracy": accuracy, "val/resolution": stage.resolution})
    tracker.say(
        f"{stage.resolution:>4} px  epoch {before.epoch + 1:>3}/{plan.epochs[before.stage]}  "
        + "  ".join(f"{k} {means[k]:.4f}" for k in ("total", "ce", "kd", "saliency") if k in means)
        + f"  val {accuracy:.2%}{' *' if decision.best else ''}"
    )
    if job.engine.main and (before.epoch == 0 or decision.action != "continue"):
        panels.save(job, validation, before.stage, before.epoch + 1, stage.resolution)

    position.epoch += 1
    position.epoch_step, position.sums = 0, []
    if decision.best:
        # the best is a checkpoint of the moment after its epoch, so that a stage can start from it
        setup.save(job, job.folder / best_name, replace(position, curriculum=state))
    position.curriculum = state
    if decision.action == "advance":
        ended_best = best_name if decision.best else before.best_checkpoint
        position.stage_bests = [*position.stage_bests, *([ended_best] if ended_best else [])]
        position.stage_step = 0
        following = job.stages[state.stage]
        tracker.event(
            "transition", position.step, stage=before.stage, to=state.stage, resolution=following.resolution,
            reason=decision.reason, reload=decision.reload, policy=job.config.optim.policy,
        )  # fmt: skip
        tracker.say(f"stage {before.stage} ends: {decision.reason}; next {following.resolution} px")
        if decision.reload is not None:
            # the transition's checkpoint holds what the stage starts from, so a resume need not load twice
            setup.load_into(job, job.folder / decision.reload)
    elif decision.action == "finish":
        position.finished = True
    _checkpoint(job, position, tracker)


def _enter(
    job: Job, position: Position, stage: Stage, loader: Loader, alpha: float, gamma: float, tracker: Tracker
) -> None:
    """Start a stage, or go on in it: its teacher, and at its first step the optimizer policy, applied in place."""
    setup.load_stage_teacher(job, position.curriculum.stage)
    if position.stage_step == 0 and job.config.optim.policy == "reset":
        optim.reset(distributed.inner_optimizer(job.optimizer))
    tracker.event(
        "stage", position.step, stage=position.curriculum.stage, resolution=stage.resolution, epochs=stage.epochs,
        steps_per_epoch=loader.steps_per_epoch, alpha=alpha, gamma=gamma, policy=job.config.optim.policy,
    )  # fmt: skip


def _learning_rate(job: Job, position: Position, epoch_steps: int, stage_steps: int) -> float:
    spec, policy = job.config.optim.schedule, job.config.optim.policy
    over_stage = spec.span == "stage" or (spec.span == "auto" and policy == "reset")
    if over_stage:
        step, steps = position.stage_step, stage_steps
    else:
        step, steps = position.step, epoch_steps * sum(s.epochs or 0 for s in job.stages)
    factor = optim.lr_factor(spec.kind, step, steps, spec.warmup, spec.start, spec.final)
    if policy == "rewarm" and position.curriculum.stage > 0:
        factor *= optim.rewarm_factor(position.stage_step, job.config.optim.rewarm_steps)
    return job.config.optim.lr * factor


def forward(job: Job, batch: Batch, alpha: float, gamma: float, step: int) -> dict[str, Tensor]:
    """Teacher and student on one rank's share of a batch; returns the loss terms of `Distiller.forward`.

    Saliency is aligned on every `every`-th step, for the first `fraction` of the global batch's positions; a rank's
    share ascends in position, so that these are its first samples.
    """
    spec = job.config.loss.saliency
    chosen = math.ceil(spec.fraction * batch.size) if gamma and step % spec.every == 0 else 0
    aligned = int((batch.positions < chosen).sum()) if chosen else 0
    target = batch.labels if batch.targets is None else batch.targets
    targets = Targets()
    if job.teacher is not None:
        images = batch.images if batch.full is None else batch.full
        targets = job.teacher(images, target, aligned, logits=alpha > 0)
    scale = batch.size / chosen if chosen else 1.0
    return job.module(batch.images, target, batch.weight, targets, alpha, gamma if aligned else 0.0, scale)


def _stage_weights(job: Job, skill: list[float], stage: int) -> tuple[float, float]:
    """KD and saliency weights of a stage, following the teacher's competence when asked."""
    loss = job.config.loss
    alpha = loss.kd.alpha * (skill[stage] if loss.kd.follow_teacher else 1.0)
    gamma = loss.saliency.gamma * (skill[stage] if loss.saliency.follow_teacher else 1.0)
    return alpha, gamma


def _row(terms: dict[str, Tensor], batch: Batch, loader: Loader, like: Tensor) -> Tensor:
    own = (batch.weight > 0).sum()
    one = like.new_ones(())
    values = {**terms, "samples": own, "steps": one, "wait_s": like.new_tensor(loader.wait_s)}
    if "saliency" in terms:
        values["aligned"] = one
    loader.wait_s = 0.0
    return torch.stack([values[k].detach().float() if k in values else like.new_zeros(()) for k in TERMS])


def _means(job: Job, sums: Tensor) -> tuple[dict[str, float], int]:
    """Means over steps and processes of each process's summed rows, and the number of images."""
    return _means_of(job, distributed.total(job.engine, sums).tolist())


def _means_of(job: Job, totals: list[float]) -> tuple[dict[str, float], int]:
    row = dict(zip(TERMS, totals, strict=True))
    steps = max(row["steps"], 1.0)  # summed over the processes, as are the terms
    means = {k: row[k] / steps for k in ("total", "ce")}
    if job.config.loss.kd.alpha:
        means["kd"] = row["kd"] / steps
    if job.config.loss.saliency.gamma:
        aligned = max(row["aligned"], 1.0)  # steps at which it was computed
        means |= {"saliency": row["saliency"] / aligned, "flat_maps": row["flat"] / aligned}
    means |= {
        "accuracy": row["correct"] / max(row["samples"], 1.0),
        "wait_s": row["wait_s"] / job.engine.world,
    }
    return means, int(row["samples"])


def _check_finite(means: dict[str, float], step: int, stage_lr: float) -> None:
    if not math.isfinite(means["total"]):
        shown = ", ".join(f"{k}={means[k]:.4g}" for k in ("ce", "kd", "saliency") if k in means)
        raise UserError(
            f"the loss is {means['total']} by step {step} ({shown}) at lr {stage_lr:.3g}: "
            "lower optim.lr, or set optim.clip=1"
        )


def _bar_text(means: dict[str, float], rate: float, best: float) -> str:
    terms = "  ".join(f"{k} {means[k]:.3f}" for k in ("ce", "kd", "saliency") if k in means)
    return f"{terms}  {rate:.0f} img/s" + (f"  val {best:.2%}" if best >= 0 else "")


def _checkpoint_due(job: Job, position: Position, saved: float) -> bool:
    spec = job.config.checkpoint
    if spec.every_steps is not None and position.step % spec.every_steps == 0:
        return True
    if spec.every_minutes is None:
        return False
    # clocks differ between processes, and all must save at the same step: rank 0's counts
    return distributed.broadcast(job.engine, time.perf_counter() - saved > 60 * spec.every_minutes)


def _checkpoint(job: Job, position: Position, tracker: Tracker) -> None:
    started = time.perf_counter()
    name = checkpoint.name(position.step)
    setup.save(job, job.folder / runs.CHECKPOINTS / name, position)
    if job.engine.main:
        spec = job.config.checkpoint
        kept = _milestones(job.folder / runs.CHECKPOINTS, position, spec.keep_epochs)
        checkpoint.prune(job.folder / runs.CHECKPOINTS, name, spec.keep, kept)
        bests = {Path(b).name for b in [*position.stage_bests, position.curriculum.best_checkpoint] if b}
        bests |= _bests_of(job.folder / runs.CHECKPOINTS, spec.keep)
        checkpoint.prune_all_but(job.folder / runs.BEST, bests)
    tracker.event("checkpoint", position.step, name=name, seconds=round(time.perf_counter() - started, 4))


def _bests_of(folder: Path, newest: int) -> set[str]:
    """Names of the best checkpoints that the newest ones count on: a resume may have to fall back to any of them."""
    names = set()
    for kept in sorted(folder.glob("step-*"), reverse=True)[:newest]:
        try:
            best = checkpoint.load_state(kept)["curriculum"]["best_checkpoint"]
        except (UserError, KeyError):
            continue  # damaged: nothing will go on from it
        names |= {Path(best).name} if best else set()
    return names


def _milestones(folder: Path, position: Position, every: int | None) -> set[str]:
    """Names of checkpoints kept for good: the ends of every n-th epoch."""
    record = folder / "milestones.txt"
    names = set(record.read_text().split()) if record.exists() else set()
    if every is not None and position.epoch_step == 0 and position.epoch % every == 0:
        names.add(checkpoint.name(position.step))
        record.write_text("\n".join(sorted(names)) + "\n")
    return names


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of dropout and drop-path at a step: a resumed run draws what an unbroken one does."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()[:8], "little") >> 1


def _open_run(job: Job) -> Tracker:
    config = job.config
    if job.engine.main:
        try:
            job.folder.mkdir(parents=True, exist_ok=True)
            (job.folder / runs.CONFIG).write_text(configuration.to_yaml(config))
        except OSError as error:
            raise UserError(f"cannot write run folder {job.folder}: {error}") from error
    assert config.name is not None
    track = config.track
    return Tracker(
        job.folder,
        job.engine.main,
        track.backend,
        track.mode,
        track.project,
        config.name,
        configuration.to_dict(config),
    )
