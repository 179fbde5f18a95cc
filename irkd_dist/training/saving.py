"""When checkpoints are written, and which of them stay."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from torch import Tensor

from irkd_dist import checkpoint, files, runfolder
from irkd_dist.config import Checkpoint
from irkd_dist.errors import Stopped, Superseded, UserError
from irkd_dist.training import curriculum, distributed, restore
from irkd_dist.training.opening import Run
from irkd_dist.training.position import Position


def due(spec: Checkpoint, position: Position) -> bool:
    """Whether to save after this step by its number."""
    return spec.every_steps is not None and position.step % spec.every_steps == 0


def save(
    run: Run,
    best: tuple[str, curriculum.State] | None = None,
    sums: Tensor | None = None,
    seconds: float = 0.0,
) -> None:
    """Take a snapshot on all ranks, and let rank 0's thread write it.

    `best`: also as the stage's best, under this name (relative to the run folder) and with this state. `sums` and
    `seconds`: of the epoch so far, summed over the processes; None at its end.

    Raises:
        Superseded: another start of the run has the folder now.
        UserError: a weight or a moment is not finite.
    """
    _still_ours(run)
    engine, started, name = run.parts.engine, time.perf_counter(), run.newest.name
    position = replace(run.position, sums=() if sums is None else tuple(sums.tolist()), seconds=seconds)
    content = restore.snapshot(run.parts, position)
    unsound = distributed.broadcast(engine, checkpoint.unsound(content) if engine.main else None)
    if unsound:
        raise UserError(
            f"{run.folder}: {unsound} at step {position.step}, so nothing is saved: lower optim.lr, set optim.clip=1; "
            "the same command goes on from the last checkpoint"
        )
    if engine.main:
        folders = [(run.newest, content)]
        if best is not None:
            # the best is a checkpoint of the moment after its epoch, so that a stage can start from it
            state = {**content.state, **replace(position, curriculum=best[1]).state_dict()}
            folders.insert(0, (run.folder / best[0], replace(content, state=state)))
        taken = time.perf_counter() - started
        run.writer.submit(
            name, position.step, folders, lambda: _retain(run.parts.config.checkpoint, run.folder, position)
        )
        blocked = time.perf_counter() - started - taken
        run.tracker.event(
            "snapshot", position.step, name=name, seconds=round(taken, 4), blocked_s=round(blocked, 4)
        )
        run.tracker.written(run.writer)
        runfolder.write_status(run.folder, "running", position.step, engine.world)
    run.saved = time.perf_counter()


def settle(run: Run, needed: Path) -> None:
    """Wait until `needed` is on disk, on all ranks.

    Raises:
        UserError: on all ranks: it could not be written.
    """
    problem = None
    if run.parts.engine.main:
        run.writer.wait()
        run.tracker.written(run.writer)
        if not (needed / checkpoint.STATE).is_file():
            problem = (
                f"{needed} could not be written (see checkpoint_failed in {runfolder.EVENTS}): free space there, and "
                "give the same command again"
            )
    problem = distributed.broadcast(run.parts.engine, problem)
    if problem:
        raise UserError(problem)


def stop(run: Run) -> NoReturn:
    """Wait until the checkpoint of this step is on disk, and end on every rank."""
    engine, step = run.parts.engine, run.position.step
    settle(run, run.newest)
    received = run.requests.received
    told = distributed.gather(engine, f"{distributed.name(engine)}: {received}" if received else None)
    reason = ", ".join(t for t in told if t)
    run.tracker.event("stop", step, reason=reason, **run.energy())  # since the last epoch's end
    if engine.main:
        runfolder.write_status(run.folder, "stopped", step, engine.world, reason)
    run.tracker.say(f"stopped at step {step} ({reason}); the same command goes on from here")
    raise Stopped(reason)


def _still_ours(run: Run) -> None:
    owner = runfolder.read_word(run.folder / runfolder.SESSION) if run.parts.engine.main else ""
    owner = owner or run.session
    if distributed.broadcast(run.parts.engine, owner) != run.session:
        raise Superseded(
            f"{run.folder} was taken over by another start of the same run ({owner} s since 1970; this one began at "
            f"{run.session}): nothing more is written from here"
        )


def _retain(spec: Checkpoint, run: Path, position: Position) -> None:
    """Delete what is no longer needed: the newest `keep`, milestones and the bests they refer to stay."""
    folder = run / runfolder.CHECKPOINTS
    name = checkpoint.name(position.step)
    always = _milestones(folder, position, spec.keep_epochs)
    if position.skipped:  # a roll-back would go to the last one from before these steps
        before = [f for f in runfolder.steps(folder) if runfolder.step_of(f) <= position.skipped[0]]
        always |= {f.name for f in before[:1]}
    checkpoint.prune(folder, name, spec.keep, always)
    bests = {Path(b).name for b in [*position.stage_bests, position.curriculum.best_checkpoint] if b}
    checkpoint.prune_all_but(run / runfolder.BEST, bests | _bests_of(folder, spec.keep))


def _bests_of(folder: Path, newest: int) -> set[str]:
    """Names of the best checkpoints that the newest ones count on: a resume may have to fall back to any of them."""
    names = set()
    for kept in runfolder.steps(folder)[:newest]:
        try:
            best = checkpoint.load_state(kept)["curriculum"]["best_checkpoint"]
        except (UserError, KeyError):
            continue  # damaged: nothing will go on from it
        names |= {Path(best).name} if best else set()
    return names


def _milestones(folder: Path, position: Position, every: int | None) -> set[str]:
    """Names of checkpoints kept for good: the ends of every n-th epoch."""
    record = folder / runfolder.MILESTONES
    names = set(runfolder.read_word(record).split())
    if every is not None and position.epoch_step == 0 and position.epoch % every == 0:
        names.add(checkpoint.name(position.step))
        files.write(record, "\n".join(sorted(names)) + "\n")
    return names
