"""The curriculum as a pure state machine: after each epoch's validation, go on, advance, or finish."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Plan:
    """What the curriculum may do: epochs of each stage, and the patience that ends one early."""

    epochs: tuple[int, ...]
    patience: int | None = None
    start_from: Literal["last", "best"] = "last"


@dataclass(frozen=True)
class State:
    """Where a run stands: stage, epochs done in it, and the best validation accuracy of the stage."""

    stage: int = 0
    epoch: int = 0
    best_accuracy: float = -1.0
    best_epoch: int = 0
    best_checkpoint: str | None = None  # folder of the stage's best, relative to the run

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for the checkpoint."""
        return asdict(self)


@dataclass(frozen=True)
class Decision:
    """What happens after an epoch."""

    action: Literal["continue", "advance", "finish"]
    reason: str
    best: bool  # this epoch is the stage's best so far
    reload: str | None = None  # checkpoint folder that the next stage starts from; None: the present weights


def observe(plan: Plan, state: State, accuracy: float, checkpoint: str) -> tuple[State, Decision]:
    """Take one epoch's validation accuracy (0..1) and decide.

    `checkpoint` names this epoch's checkpoint should it be the best: a strictly higher accuracy, so that of equal
    ones the earliest stays.
    """
    epoch = state.epoch + 1
    best = accuracy > state.best_accuracy
    state = replace(state, epoch=epoch)
    if best:
        state = replace(state, best_accuracy=accuracy, best_epoch=epoch, best_checkpoint=checkpoint)
    if epoch >= plan.epochs[state.stage]:
        reason = f"{epoch} epochs done"
    elif plan.patience is not None and epoch - state.best_epoch >= plan.patience:
        reason = f"no better validation accuracy for {plan.patience} epochs"
    else:
        return state, Decision("continue", "", best)
    if state.stage + 1 == len(plan.epochs):
        return state, Decision("finish", reason, best)
    reload = state.best_checkpoint if plan.start_from == "best" and not best else None
    return State(stage=state.stage + 1), Decision("advance", reason, best, reload)
