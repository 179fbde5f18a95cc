"""After a job ended, is it to run again? Decided by the run folder alone: launchers hide or change exit codes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from irkd_dist import files, runfolder, typed


@dataclass(frozen=True)
class Verdict:
    """What is to become of the job, and why; printed as `requeue: stopped at step 40`."""

    action: Literal["requeue", "finished", "failed"]
    why: str

    def __str__(self) -> str:
        return f"{self.action}: {self.why}"


def decide(run: Path, limit: int, count: bool = True, owner: str | None = None) -> Verdict:
    """Requeue what stopped on request or crashed, unless `limit` restarts in a row brought no new checkpoint.

    Called once after each attempt, it counts the restarts in `restarts.json` of the run folder; `count=False` looks
    and changes nothing. With `owner`, the attempt that asks, a run that another job has begun since is not requeued.
    """
    if owner is not None and (present := owned_by(run)) != owner:
        return Verdict("failed", f"{present or 'nobody'} has the run folder now, this is {owner}")
    status, damage = runfolder.read_status(run)
    state, step = status.get("state"), _newest_step(run)
    if state == "finished":
        return Verdict("finished", f"step {status.get('step')}")
    if state == "failed":
        return Verdict("failed", str(status.get("reason") or "see the log"))
    what = {"stopped": "stopped on request", "running": "crashed or was killed"}.get(
        str(state), "ended before training began"
    )
    what = damage or what  # then nothing is known of how it ended
    what += f", newest checkpoint {f'at step {step}' if step is not None else 'none'}"
    if not count:
        return Verdict("requeue", what)

    before, damage = runfolder.read_restarts(run)
    what += f"; {damage}, so the count begins anew" if damage else ""
    vain = before.get("without_progress", 0) + 1 if before.get("step") == step else 0
    if vain > limit:
        what += f"; gave up after {limit} restarts without a new checkpoint"
        _write(run / runfolder.STATUS, {**status, "state": "failed", "reason": what})
        _write(
            run / runfolder.RESTARTS, {**before, "without_progress": 0}
        )  # who submits it again means to try anew
        return Verdict("failed", what)
    after = {"restarts": before.get("restarts", 0) + 1, "without_progress": vain, "step": step}
    _write(run / runfolder.RESTARTS, after)
    return Verdict("requeue", f"{what}; restart {after['restarts']}, {vain} of {limit} without progress")


def own(run: Path, owner: str) -> None:
    """Say which attempt of which job has the run folder from now on, and forget how the one before ended."""
    files.write(run / runfolder.OWNER, owner + "\n")
    (run / runfolder.STATUS).unlink(missing_ok=True)


def owned_by(run: Path) -> str:
    """The attempt that began last, as `own` was told; empty where there is none."""
    return runfolder.read_word(run / runfolder.OWNER)


def state(run: Path) -> str:
    """What `status.json` says: running, stopped, finished, failed; empty where there is none."""
    return runfolder.read_status(run)[0].get("state", "")


def _newest_step(run: Path) -> int | None:
    """The step of the newest checkpoint."""
    found = runfolder.steps(run / runfolder.CHECKPOINTS)
    return runfolder.step_of(found[0]) if found else None


def _write(file: Path, value: dict[str, object]) -> None:
    files.write(file, typed.checked(value))
