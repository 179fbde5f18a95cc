"""Faults on purpose, for tests and `make chaos`: what may happen to a cluster, at a chosen step of a chosen rank.

`IRKD_FAULT=kind@point:step[:rank]`, several joined by commas; each happens once.

Kinds: sigkill, sigterm, sigusr1, sigstop (of this process), nospace (files may no longer grow), bug (an error of the
program), input (an error of the user), nan and inf (of the loss, or of one element of the gradient), differ (of a
learning rate). Points: `step` before a step, `loss` and `gradient` after its forward, `write` in the middle of a
checkpoint's files, `cache` in the middle of a shard of the teacher's cache (a process's shards, from 0), `transition`
between a transition and its checkpoint, `reset` before the moments are forgotten, `decision` when a stage is entered.
"""

from __future__ import annotations

import os
import resource
import signal

from irkd_dist.errors import UserError

KINDS = {
    "sigkill": signal.SIGKILL,
    "sigterm": signal.SIGTERM,
    "sigusr1": signal.SIGUSR1,
    "sigstop": signal.SIGSTOP,
}
_done: set[str] = set()


def inject(point: str, step: int, rank: int | None = None) -> list[str]:
    """Let what the environment asks for happen here; returns the kinds that are the caller's to act on."""
    left = []
    for fault in filter(None, os.environ.get("IRKD_FAULT", "").split(",")):
        kind, _, where = fault.partition("@")
        at, at_step, at_rank = (*where.split(":"), "")[:3]
        own = os.environ.get("RANK", "0") if rank is None else str(rank)
        if fault in _done or at != point or int(at_step) != step or at_rank not in ("", own):
            continue
        _done.add(fault)
        if kind in KINDS:
            os.kill(os.getpid(), KINDS[kind])
        elif kind == "nospace":
            # Python ignores SIGXFSZ: the write fails instead of the process
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
        elif kind == "bug":
            raise RuntimeError(f"a bug on purpose at {where}")
        elif kind == "input":
            raise UserError(f"an image that cannot be read on purpose at {where}")
        else:
            left.append(kind)
    return left


def heal() -> None:
    """Undo `nospace`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if soft == 1024:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
