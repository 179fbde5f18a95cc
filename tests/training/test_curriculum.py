"""The state machine against a table of what must happen."""

import pytest

from irkd_dist.training.curriculum import Plan, State, observe


def play(plan: Plan, accuracies: list[float]) -> list[tuple[int, str, bool, str | None]]:
    state, steps = State(), []
    for i, accuracy in enumerate(accuracies):
        stage = state.stage
        state, decision = observe(plan, state, accuracy, f"best/{i}")
        steps.append((stage, decision.action, decision.best, decision.reload))
    return steps


def test_stages_end_by_epochs() -> None:
    assert play(Plan((2, 1)), [0.1, 0.2, 0.15]) == [
        (0, "continue", True, None),
        (0, "advance", True, None),
        (1, "finish", True, None),  # a stage judges by its own best, not by an easier stage's
    ]


def test_patience_counts_epochs_since_the_best_and_equal_is_not_better() -> None:
    actions = [s[1] for s in play(Plan((10,), patience=3), [0.1, 0.3, 0.3, 0.2, 0.3])]
    assert actions == ["continue", "continue", "continue", "continue", "finish"]


def test_next_stage_starts_from_the_best_checkpoint_when_asked() -> None:
    plan = Plan((3, 1), start_from="best")
    assert play(plan, [0.1, 0.3, 0.2, 0.5])[2] == (0, "advance", False, "best/1")
    assert play(plan, [0.1, 0.2, 0.3, 0.5])[2] == (
        0,
        "advance",
        True,
        None,
    )  # the last is the best: nothing to load
    assert play(Plan((3, 1)), [0.1, 0.3, 0.2, 0.5])[2][3] is None


def test_a_finished_run_keeps_its_best() -> None:
    state = State()
    for i, accuracy in enumerate([0.4, 0.2]):
        state, decision = observe(Plan((2,)), state, accuracy, f"best/{i}")
    assert decision.action == "finish"
    assert (state.best_accuracy, state.best_epoch, state.best_checkpoint) == (0.4, 1, "best/0")


@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_the_first_epoch_is_always_the_best_so_far(accuracy: float) -> None:
    assert observe(Plan((5,)), State(), accuracy, "x")[1].best
