"""The state machine against a table of what must happen."""

import pytest

from irkd_dist.training.curriculum import Decision, Plan, StagePlan, State, observe


def plan(*epochs: int, start_from: str = "last", **ends: object) -> Plan:
    """Stages of 8, 12, ... px that end after so many epochs, or by `ends`."""
    stages = [
        StagePlan(8 + 4 * i, 128 // (i + 1), 1e-3 / (i + 1), e, teacher=f"t{i}", **ends)  # type: ignore[arg-type]
        for i, e in enumerate(epochs)
    ]
    return Plan(tuple(stages), "carry", start_from)  # type: ignore[arg-type]


def play(
    plan: Plan, accuracies: list[float], seconds: float = 0.0, tokens: float = 0.0
) -> list[tuple[int, str, bool, str | None]]:
    state, steps = State(), []
    for i, accuracy in enumerate(accuracies):
        stage = state.stage
        state, decision = observe(plan, state, accuracy, f"best/{i}", seconds, tokens)
        steps.append((stage, decision.action, decision.best, decision.reload))
    return steps


def test_stages_end_by_epochs() -> None:
    assert play(plan(2, 1), [0.1, 0.2, 0.15]) == [
        (0, "continue", True, None),
        (0, "advance", True, None),
        (1, "finish", True, None),  # a stage judges by its own best, not by an easier stage's
    ]


def test_a_decision_says_all_that_a_stage_begins_with() -> None:
    state, decision = observe(plan(1, 1), State(), 0.5, "x")
    assert decision == Decision("advance", "1 epochs done", True, 1, 12, 64, 5e-4, "carry", None, "t1")
    assert state == State(stage=1)


def test_patience_counts_epochs_since_the_best_and_equal_is_not_better() -> None:
    actions = [s[1] for s in play(plan(10, patience=3), [0.1, 0.3, 0.3, 0.2, 0.3])]
    assert actions == ["continue", "continue", "continue", "continue", "finish"]


def test_patience_and_target_wait_for_the_fewest_epochs() -> None:
    assert [s[1] for s in play(plan(10, patience=1, min_epochs=4), [0.3, 0.2, 0.2, 0.2])] == [
        "continue", "continue", "continue", "finish",
    ]  # fmt: skip
    assert [s[1] for s in play(plan(10, target=0.5, min_epochs=2), [0.6, 0.6])] == ["continue", "finish"]


def test_target_ends_at_the_accuracy_itself() -> None:
    assert [s[1] for s in play(plan(10, 1, target=0.5), [0.49, 0.5])] == ["continue", "advance"]


def test_budgets_of_time_and_tokens_end_a_stage_and_start_anew_in_the_next() -> None:
    timed = [s[:2] for s in play(plan(10, 10, minutes=1.0), [0.1] * 5, seconds=25)]
    assert timed == [(0, "continue"), (0, "continue"), (0, "advance"), (1, "continue"), (1, "continue")]
    counted = [s[:2] for s in play(plan(10, 10, tokens=1000), [0.1] * 4, tokens=500)]
    assert counted == [(0, "continue"), (0, "advance"), (1, "continue"), (1, "finish")]


def test_next_stage_starts_from_the_best_checkpoint_when_asked() -> None:
    best = plan(3, 1, start_from="best")
    assert play(best, [0.1, 0.3, 0.2, 0.5])[2] == (0, "advance", False, "best/1")
    # the last is the best: nothing to load
    assert play(best, [0.1, 0.2, 0.3, 0.5])[2] == (0, "advance", True, None)
    assert play(plan(3, 1), [0.1, 0.3, 0.2, 0.5])[2][3] is None


def test_a_finished_run_keeps_its_best() -> None:
    state = State()
    for i, accuracy in enumerate([0.4, 0.2]):
        state, decision = observe(plan(2), state, accuracy, f"best/{i}")
    assert decision.action == "finish"
    assert (state.best_accuracy, state.best_epoch, state.best_checkpoint) == (0.4, 1, "best/0")


@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_the_first_epoch_is_always_the_best_so_far(accuracy: float) -> None:
    assert observe(plan(5), State(), accuracy, "x")[1].best
