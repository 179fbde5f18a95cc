"""After a gradient that was not finite: count, say which process, and over a limit go back to the last good place."""

from __future__ import annotations

from dataclasses import replace

from irkd_dist.errors import UserError
from irkd_dist.training import distributed, restore
from irkd_dist.training.guard import Flags
from irkd_dist.training.opening import Run


def heed(run: Run, flags: list[Flags], lr: float, epoch_steps: int) -> bool:
    """Take note of what the processes said of earlier steps; False if the run went back to a checkpoint.

    Raises:
        UserError: too many steps in a row had no finite gradient, after the run had gone back once or with nothing to
            go back to.
    """
    for flag in flags:
        run.asked |= flag.stop
        ids = run.seen.pop(flag.step, [])
        if not flag.skipped:
            run.position = replace(run.position, skipped=())
            run.samples.write(flag.step, ids)
        elif not _skip(run, flag, lr, epoch_steps):
            return False
    return True


def _skip(run: Run, flag: Flags, lr: float, epoch_steps: int) -> bool:
    config, engine = run.parts.config, run.parts.engine
    told = distributed.gather(engine, distributed.name(engine) if flag.mine else None)
    ranks = [name for name in told if name]
    what = f"the loss of {', '.join(ranks)}" if ranks else "the gradient, not a loss,"
    skipped = (*run.position.skipped, flag.step)
    run.position = replace(run.position, skipped=skipped)
    run.tracker.event("skip", flag.step, ranks=ranks, lr=lr, in_a_row=len(skipped))
    run.tracker.say(f"step {flag.step}: {what} is not finite; no rank takes it")
    if len(skipped) <= min(config.optim.max_skips, max(epoch_steps - 1, 1)):  # never a whole epoch
        return True
    advice = f"lower optim.lr (it was {lr:.3g}), set optim.clip=1, or look at these batches"
    several = f"no finite gradient on {len(skipped)} steps in a row (from step {skipped[0]} to {flag.step})"
    if run.position.left_out:
        before = f"after the run had already gone back and left out {len(run.position.left_out)} batches"
        raise UserError(f"{several}, {before}: {advice}")
    _go_back(run, skipped, f"{several}, and no checkpoint from before them is left to go back to: {advice}")
    return False


def _go_back(run: Run, skipped: tuple[int, ...], otherwise: str) -> None:
    engine = run.parts.engine
    run.exchange.settle()  # of a step that is done again
    run.seen.clear()
    if engine.main:
        run.writer.wait()
    name, content, passed = restore.newest(engine, run.folder, up_to=skipped[0])
    for reason in passed:
        run.tracker.say(f"skipped checkpoint: {reason}")
    if name is None:
        raise UserError(otherwise)
    restore.load(engine, content)
    position = restore.place(engine, content.state)
    if position.stage_step == 0 and run.parts.plan.policy == "reset":
        engine.reset_moments()  # as at each start of a stage: its checkpoint is from before
    run.position = replace(position, skipped=(), left_out=skipped)
    run.samples.go_on_from(position.step)
    run.tracker.event("rollback", position.step, checkpoint=name, left_out=list(skipped))
    run.tracker.say(
        f"went back from step {skipped[-1]} to {name}; the batches of steps {skipped[0]} to {skipped[-1]} are left out"
    )
