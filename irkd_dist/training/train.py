"""The training loop: one for teachers and students, with or without distillation, curriculum and saliency."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from irkd_dist import config as configuration
from irkd_dist import faults, runfolder
from irkd_dist.config import Config
from irkd_dist.data import sampler
from irkd_dist.data.loader import Loader
from irkd_dist.distill import models
from irkd_dist.training import (
    answers,
    bookends,
    build,
    curriculum,
    distributed,
    downloads,
    metrics,
    opening,
    optim,
    panels,
    probing,
    recovery,
    restore,
    saving,
    step,
)  # fmt: skip
from irkd_dist.training.opening import Run


def train(config: Config, *, owns_process: bool = False, extend: bool = False) -> dict[str, Any]:
    """Run an experiment to its end, or go on with it where its run folder stands.

    owns_process: SIGTERM, SIGUSR1 and Ctrl-C ask for a checkpoint and an end; without it signals, environment and
    process groups of the caller stay as they are. extend: more epochs or stages than the run was started with are
    trained, also if it is finished.

    Returns:
        The summary: `run`, `steps`, `seconds`, `val_accuracy` (best of the last stage), `test_accuracy`.

    Raises:
        UserError: configuration, shards, teacher or run folder do not fit together (nothing was written then), or the
            run cannot go on.
        Stopped: a signal asked for it; a checkpoint is written, and the same call goes on from there.
    """
    with opening.opened(config, owns_process, extend) as run:
        skill, shares = bookends.probe_teacher(run.parts, run.folder, run.tracker, run.position)
        bookends.probe_stages(run.parts, run.tracker, run.position)
        probing.count_flops(run.parts, run.tracker, run.position)
        while not run.position.finished:  # one turn is one stage
            number = run.position.curriculum.stage
            why = bookends.choose_micro_batches(run.parts, run.folder, number)
            train_set, held_out = build.loaders(run.parts, run.parts.plan.stages[number])
            if run.parts.teacher is not None:
                run.parts.teacher.shares = shares[number]
            stage = _enter(run, train_set, skill[number])
            if why:
                run.tracker.say(why)
            bar = run.tracker.stage_bar(f"{train_set.resolution} px", stage.steps, run.position.stage_step)
            with train_set, held_out, bar as update:
                while run.position.curriculum.stage == number and not run.position.finished:
                    if not _train_epoch(run, stage, train_set, update):
                        continue  # it went back to a checkpoint
                    _end_epoch(run, train_set, held_out)
                    if run.asked and not run.position.finished:
                        saving.stop(run)
        saving.settle(run, run.newest)
        return bookends.summarize(run.parts, run.folder, run.tracker, run.position)


@dataclass(frozen=True)
class _Stage:
    """What holds for all steps of a stage."""

    alpha: float  # weight of distillation
    gamma: float  # weight of saliency
    steps: int  # of the stage, if it does not end early
    run_steps: int  # of the run, likewise
    accumulate: int  # micro-batches


def _train_epoch(run: Run, stage: _Stage, loader: Loader, update: Any) -> bool:
    """The rest of the epoch that the position stands in, step by step; False if the run went back to a checkpoint."""
    parts, engine, track = run.parts, run.parts.engine, run.parts.config.track
    left_out = {*parts.config.data.leave_out, *run.position.left_out}
    parts.module.train()
    sums = metrics.start(run.position.sums, engine.device)
    logged, logged_at, waited = sums.clone(), time.perf_counter(), loader.wait_s
    seconds = run.position.seconds
    epoch_began = time.perf_counter() - seconds
    for batches in answers.steps(parts, loader, run.position, stage.alpha, stage.gamma):
        at = run.position.step
        faults.inject("step", at, engine.rank)
        lr = step.learning_rate(parts.config.optim, parts.plan, run.position, stage.steps, stage.run_steps)
        optim.set_lr(parts.optimizer, lr)
        flags = []
        if at not in left_out:
            taken = step.take(parts, batches, stage.alpha, stage.gamma, at, stage.accumulate)
            sums += metrics.row(taken, loader.wait_s - waited)
            waited = loader.wait_s
            run.remember(at, batches)
            flags = run.send(at, taken)

        run.position = run.position.advance()
        run.watch.step = run.position.step
        last = run.position.epoch_step == loader.steps_per_epoch
        due = (
            last or saving.due(parts.config.checkpoint, run.position) or any(f.stop or f.save for f in flags)
        )
        if due:
            flags += run.exchange.settle()  # of this step: what is saved must know how it went
        if not recovery.heed(run, flags, lr, loader.steps_per_epoch):
            return False
        seconds = time.perf_counter() - epoch_began
        if run.position.step % track.log_every == 0 or last:
            means, images = metrics.means(engine, sums - logged, parts.config.loss)
            elapsed = time.perf_counter() - logged_at
            run.log(means, images, elapsed, lr, answers.counted(parts, elapsed), update)
            logged, logged_at = sums.clone(), time.perf_counter()
        if due and not last and (run.asked or not run.position.skipped):
            if parts.answers is not None:
                parts.answers.write_soon()  # a resumed run does not ask for what lies before its checkpoint
            saving.save(run, sums=distributed.total(engine, sums), seconds=seconds)
            if run.asked:
                saving.stop(run)
    run.position = replace(run.position, sums=tuple(sums.tolist()), seconds=seconds)
    return True


def _end_epoch(run: Run, loader: Loader, validation: Loader) -> None:
    """Validate, let rank 0 decide, write it down, and move the position to the next epoch or stage."""
    parts, engine, tracker, before = run.parts, run.parts.engine, run.tracker, run.position.curriculum
    started, at, resolution = time.perf_counter(), run.position.step, loader.resolution
    answers.end_epoch(parts, tracker, at)
    downloads.tell(parts, tracker, at)
    tokens = len(loader) * build.tokens_per_image(parts.student, loader.scales)
    judged = distributed.broadcast(  # by rank 0's clock
        engine,
        curriculum.to_be_judged(parts.plan, before, parts.config.eval_every, run.position.seconds, tokens),
    )
    distributed.share_buffers(engine, parts.student)
    accuracy, raw = metrics.judge(engine, parts.student, validation, tracker) if judged else (None, None)
    sums = torch.tensor(run.position.sums, device=engine.device)
    means, images = metrics.means(engine, sums, parts.config.loss)
    seconds = time.perf_counter() - started
    best_name = runfolder.best_name(before.stage, at)
    state, decision = _decide(run, accuracy, best_name, run.position.seconds + seconds, tokens)

    shown = "  ".join(
        f"{k} {means[k]:.4f}" for k in ("total", "ce", "kd", "saliency", "features") if k in means
    )
    tracker.event(
        "evaluation" if judged else "epoch", at, stage=before.stage, resolution=resolution,
        epoch=run.position.epoch + 1, stage_epoch=before.epoch + 1, split=build.held_out(parts.manifest),
        accuracy=accuracy, best=decision.best, train_accuracy=means.pop("accuracy", None), train=means,
        data_wait_s=means.pop("wait_s"), images=images, seconds=seconds,
        **({} if raw is None else {"accuracy_raw": raw}), **run.energy(),
    )  # fmt: skip
    if accuracy is not None:
        tracker.metrics(at, {"val/accuracy": accuracy, "val/resolution": resolution})
        shown = f"{shown or 'no step taken'}  val {accuracy:.2%}{' *' if decision.best else ''}"
        if raw is not None:
            tracker.metrics(at, {"val/accuracy_raw": raw})
            shown += f" averaged, {raw:.2%} raw"
    epochs = parts.plan.stages[before.stage].epochs
    tracker.say(f"{resolution:>4} px  epoch {before.epoch + 1:>3}/{epochs}  {shown}")
    if before.epoch == 0 or decision.action != "continue":
        picture = panels.save(parts, run.folder, validation, before.stage, before.epoch + 1, resolution)
        tracker.image(at, "val/saliency", picture)
    if judged and (probed := probing.measure_epoch(parts, validation, resolution)):
        epoch = run.position.epoch + 1
        tracker.event("probe", at, stage=before.stage, resolution=resolution, epoch=epoch, **probed)
        tracker.metrics(at, probing.named(probed))

    run.position = run.position.next_epoch(state, decision.action == "finish")
    best = (best_name, state) if decision.best else None
    if decision.action == "advance":
        run.position = run.position.next_stage(best_name if decision.best else before.best_checkpoint)
        told = {**asdict(decision), "stage": before.stage, "to": decision.stage}
        tracker.event("transition", at, **told)
        tracker.say(f"stage {before.stage} ends: {decision.reason}; next {decision.resolution} px")
        faults.inject("transition", at, engine.rank)
        if decision.reload is not None:
            # the transition's checkpoint holds what the stage starts from, so a resume need not load twice
            saving.settle(run, run.folder / decision.reload)
            restore.load_into(engine, run.folder / decision.reload)
    saving.save(run, best)


def _decide(
    run: Run, accuracy: float | None, best_name: str, seconds: float, tokens: float
) -> tuple[curriculum.State, curriculum.Decision]:
    """Rank 0's decision on every rank. One that was written down before a restart is taken again as it was."""
    at, decided = run.position.step, None
    if run.parts.engine.main:
        written = run.decisions.get(at)
        if written is not None:
            state, decision = curriculum.State(**written["state"]), curriculum.Decision(**written["decision"])
        else:
            state, decision = curriculum.observe(
                run.parts.plan, run.position.curriculum, accuracy, best_name, seconds, tokens
            )
        decided = state, decision
        run.tracker.event(
            "decision", at, config=build.config_digest(run.parts.config), state=asdict(state),
            decision=asdict(decision), replayed=written is not None,
        )  # fmt: skip
        run.tracker.sync()  # it holds, whatever happens next
    return distributed.broadcast(run.parts.engine, decided)


def _enter(run: Run, loader: Loader, skill: float) -> _Stage:
    """Start a stage, or go on in it: its teacher, and at its first step the optimizer policy; then all ranks agree."""
    parts, engine, position, number = run.parts, run.parts.engine, run.position, run.position.curriculum.stage
    started, planned, loss = time.perf_counter(), parts.plan.stages[number], parts.config.loss
    stage = _Stage(
        alpha=loss.kd.alpha * (skill if loss.kd.follow_teacher else 1.0),
        gamma=loss.saliency.gamma * (skill if loss.saliency.follow_teacher else 1.0),
        steps=planned.epochs * loader.steps_per_epoch,
        run_steps=sum(
            s.epochs * sampler.steps_per_epoch(len(loader), s.batch, loader.least) for s in parts.plan.stages
        ),
        accumulate=parts.micro_batches(number),
    )
    restore.load_stage_teacher(parts, number)
    config, spec = parts.config, configuration.stages(parts.config)[number]
    models.set_drop_path(
        parts.student, configuration.drop_path(config, spec), configuration.drop_path(config)
    )
    notes = answers.enter(parts, number, loader)
    if position.stage_step == 0 and parts.plan.policy == "reset":
        faults.inject("reset", position.step, engine.rank)
        engine.reset_moments()
    lr = step.learning_rate(parts.config.optim, parts.plan, position, stage.steps, stage.run_steps)
    if "differ" in faults.inject("decision", position.step, engine.rank):
        lr *= 2
    agreeing = time.perf_counter()
    distributed.agree(
        engine,
        {
            "step": position.step, "stage": number, "scales": loader.scales, "batch": loader.batch, "lr": lr,
            "policy": parts.plan.policy, "moments": bool(engine.optimizer.state), "teacher": planned.teacher,
            "micro_batches": parts.micro_batches(number),
            "data": parts.identity["data_digest"], "config": build.config_digest(parts.config),
            "weights": restore.weights_digest(parts.student)[:16] if engine.replicated else None,
            "precision": str(engine.autocast), "threads": torch.get_num_threads(), "torch": torch.__version__,
        },
    )  # fmt: skip
    for note in (*loader.notes, *notes):
        run.tracker.say(note)
    now = time.perf_counter()
    run.tracker.event(
        "stage", position.step, stage=number, resolution=planned.resolution, epochs=planned.epochs,
        multiscale=planned.multiscale, steps_per_epoch=loader.steps_per_epoch, batch=loader.batch,
        alpha=stage.alpha, gamma=stage.gamma, lr=lr, accumulate=stage.accumulate, processes=engine.world,
        policy=parts.plan.policy, seconds=round(now - started, 4), agreement_s=round(now - agreeing, 4),
    )  # fmt: skip
    if engine.world > 1:
        run.tracker.say(
            f"stage {number}: {engine.world} processes agree after {now - started:.3f} s, of which "
            f"{now - agreeing:.3f} s for the exchange"
        )
    return stage
