"""When checkpoints are written, and which of them stay."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from irkd_dist import checkpoint, runfolder
from irkd_dist.checkpoint import Writer
from irkd_dist.errors import UserError
from irkd_dist.training import curriculum, distributed, setup
from irkd_dist.training.setup import Job, Position
from irkd_dist.training.tracking import Tracker


def overdue(job: Job, saved: float) -> bool:
    """Whether rank 0's clock says that the interval of minutes is over; `saved`: `perf_counter` at the last checkpoint.

    Clocks differ between processes, and all must save at the same step: so the others have no wish.
    """
    minutes = job.config.checkpoint.every_minutes
    return job.engine.main and minutes is not None and time.perf_counter() - saved > 60 * minutes


def due(job: Job, position: Position, timed: bool) -> bool:
    """Whether to save after this step; `timed`: what rank 0's clock says."""
    if position.skipped:
        return False  # the last good one must be from before these steps
    every = job.config.checkpoint.every_steps
    return timed or (every is not None and position.step % every == 0)


def save(
    job: Job,
    position: Position,
    writer: Writer,
    tracker: Tracker,
    best: tuple[str, curriculum.State] | None = None,
) -> None:
    """Take a snapshot on all ranks, and let rank 0's thread write it.

    `best`: also as the stage's best, under this name (relative to the run folder) and with this state.
    """
    started, name = time.perf_counter(), checkpoint.name(position.step)
    content = setup.snapshot(job, position)
    if job.engine.main:
        folders = [(job.folder / runfolder.CHECKPOINTS / name, content)]
        if best is not None:
            # the best is a checkpoint of the moment after its epoch, so that a stage can start from it
            state = {**content.state, **replace(position, curriculum=best[1]).state_dict()}
            folders.insert(0, (job.folder / best[0], replace(content, state=state)))
        kept = replace(position, stage_bests=list(position.stage_bests))
        taken = time.perf_counter() - started
        writer.submit(name, position.step, folders, lambda: _retain(job, kept))
        blocked = time.perf_counter() - started - taken
        tracker.event(
            "snapshot", position.step, name=name, seconds=round(taken, 4), blocked_s=round(blocked, 4)
        )
        note(writer, tracker)


def note(writer: Writer, tracker: Tracker) -> None:
    """Record the writes that ended since the last call."""
    for written in writer.results():
        seconds = round(written.seconds, 4)
        if written.error is None:
            tracker.event("checkpoint", written.step, name=written.name, seconds=seconds)
        else:
            tracker.event(
                "checkpoint_failed", written.step, name=written.name, seconds=seconds, error=written.error
            )
            tracker.say(f"warning: {written.error}; training goes on, and the next checkpoint tries again")


def settle(job: Job, writer: Writer, tracker: Tracker, needed: Path) -> None:
    """Wait until `needed` is on disk, on all ranks.

    Raises:
        UserError: on all ranks: it could not be written.
    """
    problem = None
    if job.engine.main:
        writer.wait()
        note(writer, tracker)
        if not (needed / checkpoint.STATE).is_file():
            problem = (
                f"{needed} could not be written (see checkpoint_failed in {runfolder.EVENTS}): free space there, and "
                "give the same command again"
            )
    problem = distributed.broadcast(job.engine, problem)
    if problem:
        raise UserError(problem)


def _retain(job: Job, position: Position) -> None:
    """Delete what is no longer needed: the newest `keep`, milestones and the bests they refer to stay."""
    spec, folder = job.config.checkpoint, job.folder / runfolder.CHECKPOINTS
    name = checkpoint.name(position.step)
    always = _milestones(folder, position, spec.keep_epochs)
    if position.skipped:  # a roll-back would go to the last one from before these steps
        before = [f for f in runfolder.steps(folder) if runfolder.step_of(f) <= position.skipped[0]]
        always |= {f.name for f in before[:1]}
    checkpoint.prune(folder, name, spec.keep, always)
    bests = {Path(b).name for b in [*position.stage_bests, position.curriculum.best_checkpoint] if b}
    checkpoint.prune_all_but(job.folder / runfolder.BEST, bests | _bests_of(folder, spec.keep))


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
        runfolder.write(record, "\n".join(sorted(names)) + "\n")
    return names
