"""The curriculum as a pure state machine: after each epoch's validation, go on, advance, or finish."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class StagePlan:
    """What a stage trains with, and what ends it. It ends at the first epoch's end at which a condition holds."""

    resolution: int
    batch: int  # global
    lr: float  # peak
    epochs: int  # at most
    min_epochs: int = 1  # before patience or target may end it
    patience: int | None = None  # epochs without a better validation accuracy
    target: float | None = None  # validation accuracy, 0..1
    minutes: float | None = None  # of training and validation in this stage
    tokens: float | None = None  # patch tokens that the student sees in this stage
    teacher: str | None = None  # checkpoint folder
    multiscale: tuple[int, ...] = ()  # a step's resolution is drawn from these and `resolution`
    number: int = 0  # among the stages


@dataclass(frozen=True)
class Plan:
    """What the curriculum may do."""

    stages: tuple[StagePlan, ...]
    policy: Literal["reset", "carry", "rewarm"] = "reset"
    start_from: Literal["last", "best"] = "last"


@dataclass(frozen=True)
class State:
    """Where a run stands: stage, what was spent on it, and the best validation accuracy of the stage."""

    stage: int = 0
    epoch: int = 0  # epochs done in the stage
    seconds: float = 0.0
    tokens: float = 0.0
    best_accuracy: float = -1.0
    best_epoch: int = 0
    best_checkpoint: str | None = None  # folder of the stage's best, relative to the run

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for the checkpoint."""
        return asdict(self)


@dataclass(frozen=True)
class Decision:
    """What happens after an epoch. All but the first three fields are given where a stage begins."""

    action: Literal["continue", "advance", "finish"]
    reason: str
    best: bool  # this epoch is the stage's best so far
    stage: int | None = None
    resolution: int | None = None
    batch: int | None = None
    lr: float | None = None
    policy: str | None = None  # what happens to the optimizer
    reload: str | None = None  # checkpoint folder that the next stage starts from; None: the present weights
    teacher: str | None = None  # the next stage's teacher checkpoint


def to_be_judged(plan: Plan, state: State, every: int, seconds: float = 0.0, tokens: float = 0.0) -> bool:
    """Whether the epoch that ends now is validated: each `every`-th of a stage, and its last."""
    spent = replace(
        state, epoch=state.epoch + 1, seconds=state.seconds + seconds, tokens=state.tokens + tokens
    )
    return spent.epoch % every == 0 or _spent(plan.stages[state.stage], spent) is not None


def observe(
    plan: Plan,
    state: State,
    accuracy: float | None,
    checkpoint: str,
    seconds: float = 0.0,
    tokens: float = 0.0,
) -> tuple[State, Decision]:
    """Take one epoch's validation accuracy (0..1; None: not validated) and what the epoch cost, and decide.

    `checkpoint` names this epoch's checkpoint should it be the best: a strictly higher accuracy, so that of equal
    ones the earliest stays.
    """
    stage, epoch = plan.stages[state.stage], state.epoch + 1
    best = accuracy is not None and accuracy > state.best_accuracy
    state = replace(state, epoch=epoch, seconds=state.seconds + seconds, tokens=state.tokens + tokens)
    if accuracy is not None and best:
        state = replace(state, best_accuracy=accuracy, best_epoch=epoch, best_checkpoint=checkpoint)
    reason = _ended(stage, state, accuracy)
    if reason is None:
        return state, Decision("continue", "", best)
    if state.stage + 1 == len(plan.stages):
        return state, Decision("finish", reason, best)
    following = plan.stages[state.stage + 1]
    decision = Decision(
        "advance", reason, best, state.stage + 1, following.resolution, following.batch, following.lr, plan.policy,
        state.best_checkpoint if plan.start_from == "best" and not best else None, following.teacher,
    )  # fmt: skip
    return State(stage=state.stage + 1), decision


def _spent(stage: StagePlan, state: State) -> str | None:
    if state.epoch >= stage.epochs:
        return f"{state.epoch} epochs done"
    if stage.minutes is not None and state.seconds >= 60 * stage.minutes:
        return f"its {stage.minutes:g} minutes are spent"
    if stage.tokens is not None and state.tokens >= stage.tokens:
        return f"its {stage.tokens:g} tokens are spent"
    return None


def _ended(stage: StagePlan, state: State, accuracy: float | None) -> str | None:
    if accuracy is None:
        return None
    if (spent := _spent(stage, state)) is not None:
        return spent
    if state.epoch < stage.min_epochs:
        return None
    if stage.target is not None and accuracy >= stage.target:
        return f"validation accuracy {accuracy:.2%} has reached {stage.target:.2%}"
    if stage.patience is not None and state.epoch - state.best_epoch >= stage.patience:
        return f"no better validation accuracy for {stage.patience} epochs"
    return None
