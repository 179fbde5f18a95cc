"""What becomes of a job, by what its run folder says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from irkd_dist.training import requeue
from irkd_dist.training.requeue import decide
from tests.training.launch import irkd


def left_behind(run: Path, state: str | None, *steps: int) -> Path:
    """A run folder with this state and checkpoints at these steps."""
    for step in steps:
        (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True, exist_ok=True)
    run.mkdir(exist_ok=True)
    if state is not None:
        (run / "status.json").write_text(json.dumps({"state": state, "step": 9, "reason": "no such teacher"}))
    return run


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("finished", "finished: step 9"),
        ("failed", "failed: no such teacher"),
        (
            "stopped",
            "requeue: stopped on request, newest checkpoint at step 8; restart 1, 0 of 3 without progress",
        ),
        (
            "running",
            "requeue: crashed or was killed, newest checkpoint at step 8; restart 1, 0 of 3 without progress",
        ),
        (
            None,
            "requeue: ended before training began, newest checkpoint at step 8; restart 1, 0 of 3 without progress",
        ),
    ],
)
def test_the_run_folder_decides(tmp_path: Path, state: str | None, said: str) -> None:
    assert str(decide(left_behind(tmp_path, state, 4, 8), limit=3)) == said


def test_a_new_checkpoint_starts_the_count_anew(tmp_path: Path) -> None:
    for steps in [(4,), (4,), (8,), (8,), (8,)]:
        assert decide(left_behind(tmp_path, "running", *steps), limit=2).action == "requeue"
    verdict = decide(left_behind(tmp_path, "running"), limit=2)
    assert verdict.action == "failed"
    assert "gave up after 2 restarts without a new checkpoint" in verdict.why
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 9)


def test_submitting_again_after_giving_up_starts_the_count_anew(tmp_path: Path) -> None:
    left_behind(tmp_path, "running")
    assert [decide(left_behind(tmp_path, "running"), limit=1).action for _ in range(4)] == [
        "requeue", "failed", "requeue", "failed",
    ]  # fmt: skip


@pytest.mark.parametrize("broken", ["", "{", "[]", '{"state": 3}'])
def test_a_status_that_cannot_be_read_is_a_crash(tmp_path: Path, broken: str) -> None:
    (tmp_path / "status.json").write_text(broken)
    assert decide(tmp_path, limit=3).action == "requeue"


@pytest.mark.parametrize("broken", ['{"restarts": "x"}', '{"without_progress": null}', "[" * 100_000, "[]"])
def test_a_count_that_cannot_be_read_begins_anew_and_is_said(tmp_path: Path, broken: str) -> None:
    (left_behind(tmp_path, "running", 8) / "restarts.json").write_text(broken)
    verdict = decide(tmp_path, limit=3)
    assert verdict.action == "requeue"
    assert "restarts.json is damaged" in verdict.why
    assert "restart 1, 0 of 3 without progress" in verdict.why


def test_looking_changes_nothing(tmp_path: Path) -> None:
    left_behind(tmp_path, "running")
    for _ in range(5):
        assert decide(tmp_path, limit=1, count=False).action == "requeue"
    assert not (tmp_path / "restarts.json").exists()


def test_a_run_that_another_job_has_begun_is_left_to_it(tmp_path: Path) -> None:
    requeue.own(tmp_path, "job7.0")
    left_behind(tmp_path, "running")
    assert decide(tmp_path, limit=3, owner="job7.0").action == "requeue"
    requeue.own(tmp_path, "job8.0")
    left_behind(tmp_path, "running")
    assert (
        str(decide(tmp_path, limit=3, owner="job7.0"))
        == "failed: job8.0 has the run folder now, this is job7.0"
    )
    assert decide(tmp_path, limit=3, owner="job8.0").action == "requeue"


def test_a_mistake_found_before_training_is_kept_in_the_run_folder(student_yaml: Path) -> None:
    """A job would else be requeued for it: it looks as if it had ended before training began."""
    run = student_yaml.parent / "early"
    run.mkdir()
    done = irkd(
        "train", str(student_yaml), "name=early", env={"ACCELERATE_MIXED_PRECISION": "fp16"}, check=False
    )
    assert done.returncode == 2
    assert (
        "accelerate's mixed_precision=fp16 disagrees"
        in json.loads((run / "status.json").read_text())["reason"]
    )
