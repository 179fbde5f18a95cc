"""The training loop: one for teachers and students, with or without distillation, curriculum and saliency."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from irkd_dist import checkpoint, faults, runfolder
from irkd_dist import config as configuration
from irkd_dist.config import Config
from irkd_dist.data import sampler
from irkd_dist.data.loader import Loader
from irkd_dist.errors import Passing, Stopped, Superseded, UserError
from irkd_dist.training import (
    bookends,
    curriculum,
    distributed,
    engines,
    metrics,
    optim,
    panels,
    saving,
    setup,
    step,
)  # fmt: skip
from irkd_dist.training.setup import Job, Position
from irkd_dist.training.tracking import SampleLog, Tracker


@dataclass
class Run:
    """What the loop has in hand."""

    job: Job
    position: Position
    tracker: Tracker
    samples: SampleLog
    requests: distributed.StopRequests
    watch: distributed.Watch
    decisions: dict[int, dict[str, Any]]  # by step: taken before a restart, to be taken again
    session: str  # this start of the run; the newest one owns the folder
    writer: checkpoint.Writer = field(default_factory=checkpoint.Writer)
    saved: float = field(default_factory=time.perf_counter)  # moment of the last checkpoint
    asked: bool = False  # to stop, some rank


def train(config: Config) -> dict[str, Any]:
    """Run an experiment to its end, or go on with it where its run folder stands.

    Returns:
        The summary: `run`, `steps`, `seconds`, `val_accuracy` (best of the last stage), `test_accuracy`.

    Raises:
        UserError: configuration, shards, teacher or run folder do not fit together (nothing was written then), or the
            run cannot go on.
        Stopped: a signal asked for it; a checkpoint is written, and the same call goes on from there.
    """
    folder, reached = configuration.folder_of(config), 0
    try:
        engine = engines.setup(config)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0" and folder.is_dir() and not isinstance(error, Passing):
            runfolder.write_status(folder, "failed", 0, int(os.environ.get("WORLD_SIZE", "1")), str(error))
        raise
    try:
        started = distributed.broadcast(engine, time.time())
        with (
            distributed.StopRequests() as requests,
            distributed.Watch(engine, config.rank_timeout_s, str(started)) as watch,
        ):
            job = setup.build(config, engine)
            position, skipped = setup.resume(job)
            reached = position.step
            with _opened(job, position, skipped, requests, watch, started) as run:
                summary = _train(run)
                if engine.main:
                    runfolder.write_status(folder, "finished", run.position.step, engine.world)
        distributed.barrier(engine)  # without torchrun rank 0 keeps the store: it leaves last
        return summary
    except Stopped:
        distributed.barrier(engine)
        raise
    except UserError as error:
        error.said = not distributed.first_to_say(engine, str(error))
        ends = not isinstance(
            error, (Superseded, Passing)
        )  # else the folder is another's, or the run goes on
        if ends and engine.main and folder.is_dir():
            runfolder.write_status(folder, "failed", reached, engine.world, str(error))
        raise
    finally:
        engine.finish()


def _train(run: Run) -> dict[str, Any]:
    job = run.job
    skill = bookends.probe_teacher(job, run.tracker, run.position)

    while not run.position.finished:  # one turn is one stage
        present = run.position.curriculum.stage
        stage = job.stages[present]
        loader, validation = setup.loaders(job, stage)
        alpha, gamma = _stage_weights(job, skill, present)
        steps = job.plan.stages[present].epochs * loader.steps_per_epoch
        _enter(run, loader, alpha, gamma, steps)
        title = f"{stage.resolution} px"
        with loader, validation, run.tracker.stage_bar(title, steps, run.position.stage_step) as bar:
            while run.position.curriculum.stage == present and not run.position.finished:
                if not _train_epoch(run, loader, alpha, gamma, steps, bar):
                    continue  # rolled back
                _end_epoch(run, loader, validation)
                if run.asked and not run.position.finished:
                    _stop(run)
    newest = job.folder / runfolder.CHECKPOINTS / checkpoint.name(run.position.step)
    saving.settle(job, run.writer, run.tracker, newest)
    return bookends.summarize(job, run.position, run.tracker)


def _train_epoch(run: Run, loader: Loader, alpha: float, gamma: float, stage_steps: int, bar: Any) -> bool:
    """The rest of the epoch that the position stands in, step by step; False if the run went back to a checkpoint."""
    job, position, engine = run.job, run.position, run.job.engine
    config, run_steps = job.config, _run_steps(job, loader)
    left_out = {*config.data.leave_out, *position.left_out}
    job.module.train()
    sums = torch.tensor(position.sums or [0.0] * len(metrics.TERMS), device=engine.device)
    logged, started = sums.clone(), time.perf_counter()
    epoch_started = time.perf_counter() - position.seconds
    loader.wait_s = 0.0
    for batch in loader.batches(position.epoch, position.epoch_step):
        faults.inject("step", position.step, engine.rank)
        lr = step.learning_rate(job, position, stage_steps, run_steps)
        optim.set_lr(job.optimizer, lr)

        timed = False
        if position.step not in left_out:
            wishes = [run.requests.received is not None, saving.overdue(job, run.saved)]
            try:
                rows, (asked, timed) = step.take(job, batch, alpha, gamma, position.step, wishes)
            except step.NotFinite as error:
                if _skip(run, error.ranks, lr, loader.steps_per_epoch):
                    return False
            else:
                position.skipped = []
                run.asked |= asked
                sums += metrics.row(rows, batch, loader, sums)
                if config.track.samples:  # not else: it waits for the device
                    run.samples.write(position.step, batch.ids[(batch.weight > 0).cpu().numpy()].tolist())

        position.epoch_step += 1
        position.stage_step += 1
        position.step += 1
        run.watch.step = position.step
        position.seconds = time.perf_counter() - epoch_started
        if position.step % config.track.log_every == 0 or position.epoch_step == loader.steps_per_epoch:
            means, images = metrics.means(job, sums - logged)
            seconds, logged = time.perf_counter() - started, sums.clone()
            started = time.perf_counter()
            rates = {"images_per_s": images / seconds, "data_wait": means.pop("wait_s") / seconds, "lr": lr}
            if images:
                timing = {"seconds": round(seconds, 4), **rates}
                run.tracker.event("train", position.step, stage=position.curriculum.stage, **means, **timing)
                run.tracker.metrics(position.step, {f"train/{k}": v for k, v in (means | rates).items()})
            text = metrics.bar_text(means, rates["images_per_s"], position.curriculum.best_accuracy)
            bar(position.stage_step, text)
            saving.note(run.writer, run.tracker)
        if position.epoch_step < loader.steps_per_epoch and (run.asked or saving.due(job, position, timed)):
            position.sums = distributed.total(engine, sums).tolist()
            _save(run)
            if run.asked:
                _stop(run)
    position.sums = sums.tolist()
    return True


def _end_epoch(run: Run, loader: Loader, validation: Loader) -> None:
    """Validate, let rank 0 decide, write it down, and move the position to the next epoch or stage."""
    job, position, tracker = run.job, run.position, run.tracker
    started, before = time.perf_counter(), position.curriculum
    distributed.share_buffers(job.engine, job.student)
    accuracy = setup.accuracy(job, job.student, validation)
    means, images = metrics.means(job, torch.tensor(position.sums, device=job.engine.device))
    seconds = time.perf_counter() - started
    tokens = len(loader) * setup.tokens_per_image(job, loader.resolution)
    best_name = runfolder.best_name(before.stage, position.step)
    state, decision = _decide(run, accuracy, best_name, position.seconds + seconds, tokens)

    tracker.event(
        "evaluation", position.step, stage=before.stage, resolution=loader.resolution, epoch=position.epoch + 1,
        stage_epoch=before.epoch + 1, split=setup.held_out(job.manifest), accuracy=accuracy, best=decision.best,
        train_accuracy=means.pop("accuracy"), train=means, data_wait_s=means.pop("wait_s"), images=images,
        seconds=seconds,
    )  # fmt: skip
    tracker.metrics(position.step, {"val/accuracy": accuracy, "val/resolution": loader.resolution})
    tracker.say(
        f"{loader.resolution:>4} px  epoch {before.epoch + 1:>3}/{job.plan.stages[before.stage].epochs}  "
        + "  ".join(f"{k} {means[k]:.4f}" for k in ("total", "ce", "kd", "saliency") if k in means)
        + f"  val {accuracy:.2%}{' *' if decision.best else ''}"
    )
    if before.epoch == 0 or decision.action != "continue":
        panels.save(job, validation, before.stage, before.epoch + 1, loader.resolution)

    position.epoch += 1
    position.epoch_step, position.sums, position.seconds = 0, [], 0.0
    position.curriculum = state
    position.finished = decision.action == "finish"
    if decision.action != "advance":
        _save(run, best=(best_name, state) if decision.best else None)
        return
    ended_best = best_name if decision.best else before.best_checkpoint
    position.stage_bests = [*position.stage_bests, *([ended_best] if ended_best else [])]
    position.stage_step = 0
    details = asdict(decision)
    tracker.event(
        "transition", position.step, **{**details, "stage": before.stage, "to": decision.stage}
    )  # fmt: skip
    tracker.say(f"stage {before.stage} ends: {decision.reason}; next {decision.resolution} px")
    faults.inject("transition", position.step, job.engine.rank)
    if decision.reload is not None:
        # the transition's checkpoint holds what the stage starts from, so a resume need not load twice
        saving.settle(job, run.writer, tracker, job.folder / decision.reload)
        setup.load_into(job, job.folder / decision.reload)
    _save(run, best=(best_name, state) if decision.best else None)


def _decide(
    run: Run, accuracy: float, best_name: str, seconds: float, tokens: float
) -> tuple[curriculum.State, curriculum.Decision]:
    """Rank 0's decision on every rank. One that was written down before a restart is taken again as it was."""
    job, position = run.job, run.position
    decided = None
    if job.engine.main:
        written = run.decisions.get(position.step)
        if written is not None:
            state, decision = curriculum.State(**written["state"]), curriculum.Decision(**written["decision"])
        else:
            state, decision = curriculum.observe(
                job.plan, position.curriculum, accuracy, best_name, seconds, tokens
            )
        decided = state, decision
        run.tracker.event(
            "decision", position.step, config=_config_digest(job), state=asdict(state), decision=asdict(decision),
            replayed=written is not None,
        )  # fmt: skip
        run.tracker.sync()  # it holds, whatever happens next
    return distributed.broadcast(job.engine, decided)


def _enter(run: Run, loader: Loader, alpha: float, gamma: float, stage_steps: int) -> None:
    """Start a stage, or go on in it: its teacher, and at its first step the optimizer policy; then all ranks agree."""
    job, position, engine = run.job, run.position, run.job.engine
    started, stage = time.perf_counter(), job.plan.stages[position.curriculum.stage]
    setup.load_stage_teacher(job, position.curriculum.stage)
    if position.stage_step == 0 and job.plan.policy == "reset":
        faults.inject("reset", position.step, engine.rank)
        engine.reset_moments()
    lr = step.learning_rate(job, position, stage_steps, _run_steps(job, loader))
    if "differ" in faults.inject("decision", position.step, engine.rank):
        lr *= 2
    facts = {
        "step": position.step, "stage": position.curriculum.stage, "resolution": loader.resolution,
        "batch": loader.batch, "lr": lr, "policy": job.plan.policy, "moments": bool(engine.optimizer.state),
        "teacher": stage.teacher, "data": job.identity["data_digest"], "config": _config_digest(job),
        "weights": _weights_digest(job) if engine.replicated else None, "precision": str(engine.autocast),
        "torch": torch.__version__,
    }  # fmt: skip
    agreeing = time.perf_counter()
    distributed.agree(engine, facts)
    if loader.too_large:
        run.tracker.say(
            f"{loader.resolution} px: decoded images would not fit in memory, so none are kept (data.cache)"
        )
    now = time.perf_counter()
    run.tracker.event(
        "stage", position.step, stage=position.curriculum.stage, resolution=stage.resolution, epochs=stage.epochs,
        steps_per_epoch=loader.steps_per_epoch, batch=loader.batch, alpha=alpha, gamma=gamma, lr=lr,
        policy=job.plan.policy, seconds=round(now - started, 4), agreement_s=round(now - agreeing, 4),
    )  # fmt: skip
    if engine.world > 1:
        run.tracker.say(
            f"stage {position.curriculum.stage}: {engine.world} processes agree after {now - started:.3f} s, of which "
            f"{now - agreeing:.3f} s for the exchange"
        )


def _skip(run: Run, ranks: list[str], lr: float, epoch_steps: int) -> bool:
    """Count a step that no rank took; over the limit go back to the last good checkpoint, once: then True."""
    job, position = run.job, run.position
    position.skipped = [*position.skipped, position.step]
    limit = min(job.config.optim.max_skips, max(epoch_steps - 1, 1))  # never a whole epoch
    run.tracker.event("skip", position.step, ranks=ranks, lr=lr, in_a_row=len(position.skipped))
    run.tracker.say(f"step {position.step}: the loss of {', '.join(ranks)} is not finite; no rank takes it")
    if len(position.skipped) <= limit:
        return False
    advice = f"lower optim.lr (it was {lr:.3g}), set optim.clip=1, or look at these batches"
    if position.left_out:
        raise UserError(
            f"the loss is not finite on {len(position.skipped)} steps in a row (to step {position.step}), after the "
            f"run had already gone back and left out {len(position.left_out)} batches: {advice}"
        )
    first, folder = position.skipped[0], None
    if job.engine.main:
        run.writer.wait()
        folder, _ = checkpoint.newest(job.folder / runfolder.CHECKPOINTS, up_to=first)
    folder = distributed.broadcast(job.engine, folder)
    if folder is None:
        raise UserError(
            f"the loss is not finite on {len(position.skipped)} steps in a row (from step {first}), and no checkpoint "
            f"from before them is left to go back to: {advice}"
        )
    state = setup.load_into(job, folder)
    run.position = Position.from_state(state)
    run.position.sums = run.position.sums if job.engine.main else []
    run.position.skipped, run.position.left_out = [], position.skipped
    run.samples.go_on_from(run.position.step)
    run.tracker.event("rollback", run.position.step, checkpoint=folder.name, left_out=position.skipped)
    run.tracker.say(
        f"went back from step {position.step} to {folder.name}; the batches of steps {first} to {position.step} are "
        "left out"
    )
    return True


def _save(run: Run, best: tuple[str, curriculum.State] | None = None) -> None:
    owner = runfolder.read_word(run.job.folder / runfolder.SESSION) if run.job.engine.main else ""
    owner = owner or run.session
    if distributed.broadcast(run.job.engine, owner) != run.session:
        raise Superseded(
            f"{run.job.folder} was taken over by another start of the same run ({owner} s since 1970; this one began "
            f"at {run.session}): nothing more is written from here"
        )
    saving.save(run.job, run.position, run.writer, run.tracker, best)
    run.saved = time.perf_counter()
    if run.job.engine.main:
        runfolder.write_status(run.job.folder, "running", run.position.step, run.job.engine.world)


def _stop(run: Run) -> None:
    """Wait until the checkpoint of this step is on disk, and end on every rank."""
    job, position, engine = run.job, run.position, run.job.engine
    saving.settle(
        job, run.writer, run.tracker, job.folder / runfolder.CHECKPOINTS / checkpoint.name(position.step)
    )
    received = run.requests.received
    told = distributed.gather(engine, f"{distributed.name(engine)}: {received}" if received else None)
    reason = ", ".join(t for t in told if t)
    run.tracker.event("stop", position.step, reason=reason)
    if engine.main:
        runfolder.write_status(job.folder, "stopped", position.step, engine.world, reason)
    run.tracker.say(f"stopped at step {position.step} ({reason}); the same command goes on from here")
    raise Stopped(reason)


def _run_steps(job: Job, loader: Loader) -> int:
    """Steps of the whole run, if no stage ends early."""
    return sum(s.epochs * sampler.steps_per_epoch(len(loader), s.batch) for s in job.plan.stages)


def _stage_weights(job: Job, skill: list[float], stage: int) -> tuple[float, float]:
    """KD and saliency weights of a stage, following the teacher's competence when asked."""
    loss = job.config.loss
    alpha = loss.kd.alpha * (skill[stage] if loss.kd.follow_teacher else 1.0)
    gamma = loss.saliency.gamma * (skill[stage] if loss.saliency.follow_teacher else 1.0)
    return alpha, gamma


def _config_digest(job: Job) -> str:
    """Of the semantic keys: what decisions depend on."""
    tree = configuration.semantic_keys(job.identity["config"])
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def _weights_digest(job: Job) -> str:
    digest = hashlib.sha256()
    for value in job.student.state_dict().values():
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


@contextmanager
def _opened(
    job: Job, position: Position, skipped: list[str], requests: distributed.StopRequests, watch: distributed.Watch,
    started: float,
) -> Iterator[Run]:  # fmt: skip
    """The run folder and everything that must be closed again, whatever happens."""
    config, engine = job.config, job.engine
    if engine.main:
        try:
            runfolder.write(job.folder / runfolder.CONFIG, configuration.to_yaml(config))
            runfolder.write(job.folder / runfolder.SESSION, str(started))
            runfolder.write_status(job.folder, "running", position.step, engine.world)
        except OSError as error:
            raise UserError(f"cannot write run folder {job.folder}: {error}") from error
    distributed.barrier(engine)
    assert config.name is not None
    track, tree = config.track, configuration.to_dict(config)
    tracker = Tracker(job.folder, engine.main, track.backend, track.mode, track.project, config.name, tree)
    decisions = runfolder.read_decisions(job.folder, _config_digest(job)) if engine.main else {}
    samples = SampleLog(job.folder, engine.rank, started, position.step, track.samples)
    with samples:
        run = Run(job, position, tracker, samples, requests, watch, decisions, str(started))
        try:
            bookends.announce(job, position, skipped, tracker)
            yield run
            if engine.main:
                saving.note(run.writer, tracker)
        finally:
            run.writer.close()
            saving.note(run.writer, tracker)
            tracker.close()
