"""Several teachers: their mean against a loop, shares by competence, and a run that is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from irkd_dist import checkpoint, config
from irkd_dist.distill.teacher import Member, Teacher, competent_shares, freeze
from irkd_dist.errors import UserError
from irkd_dist.eventlog import read_events
from tests.distill import plain_vit as plain
from tests.training.launch import irkd


@pytest.mark.parametrize("mix", [None, 1.0, 4.0])
def test_the_mean_is_that_of_a_loop(mix: float | None) -> None:
    models = [
        freeze(plain.build(head, 2, seed=i), None, True)
        for i, head in enumerate(("class_token", "mean", "mean"))
    ]
    images, labels = plain.inputs(4, 12, seed=1)
    scale, shift = torch.full((3, 1, 1), 2.0).double(), torch.full((3, 1, 1), 0.5).double()
    members = (Member(models[1]), Member(models[2], (scale, shift)))
    teacher = Teacher(models[0], ["blocks.0"], "gradient", members=members, shares=(1.0, 2.0, 1.0), mix=mix)
    said = teacher(images, labels, aligned=2)
    alone = Teacher(models[0], ["blocks.0"], "gradient")(images, labels, aligned=2)
    assert said.logits is not None
    assert said.maps is not None
    assert alone.maps is not None
    assert torch.equal(said.maps[0], alone.maps[0]), "maps are the first one's"
    each = [models[0](images), models[1](images), models[2](images * 2 + 0.5)]
    for i in range(4):
        if mix is None:
            expected = 0.25 * each[0][i] + 0.5 * each[1][i] + 0.25 * each[2][i]
            torch.testing.assert_close(said.logits[i], expected)
        else:
            p = [(z[i] / mix).softmax(0) for z in each]
            expected = 0.25 * p[0] + 0.5 * p[1] + 0.25 * p[2]
            torch.testing.assert_close((said.logits[i] / mix).softmax(0), expected)
            torch.testing.assert_close((said.logits[i] / mix).exp(), expected, msg="normalised already")
    for i in range(3):
        only = teacher.only(i)(images, labels).logits
        assert only is not None
        torch.testing.assert_close(only.softmax(1), each[i].softmax(1))
    assert teacher(images, labels, aligned=2, logits=False).logits is None


def test_shares_by_competence() -> None:
    assert competent_shares([0.3, 0.5, 0.05], 10) == pytest.approx((1 / 3, 2 / 3, 0.0))
    assert competent_shares([0.1, 0.02], 10) == (0.5, 0.5)


def test_a_run_with_several_teachers_is_resumed_as_it_was(student_yaml: Path, teacher: Path) -> None:
    early = min((teacher / "checkpoints").glob("step-*"))
    run = ["train", str(student_yaml), f"teacher.ensemble=[{{run: {early}}}]", "teacher.shares=competence",
           "curriculum.epochs=1", "checkpoint.every_steps=1"]  # fmt: skip
    irkd(*run, "name=whole", world=2)
    irkd(*run, "name=broken", env={"IRKD_FAULT": "sigkill@step:6"}, check=False)
    irkd(*run, "name=broken")
    irkd(*run, "name=one")
    out = student_yaml.parent
    (told,) = [e for e in read_events(out / "one") if e["event"] == "teacher"]
    assert len(told["shares"]) == 2
    assert all(sum(s) == pytest.approx(1) for s in told["shares"])
    first, second = (
        checkpoint.load_student(max((out / n / "checkpoints").glob("step-*"))) for n in ("one", "broken")
    )
    assert all(torch.equal(first[k], second[k]) for k in first)
    judged = irkd("evaluate", str(out / "one")).stdout
    assert "the teachers' accuracy is left out: here the first one alone is at hand" in judged
    assert "resolution  accuracy  teacher" not in " ".join(judged.split())
    other = irkd(*run, "name=one", "teacher.ensemble=[{run: nowhere}]", check=False)
    assert other.returncode == 2
    changed = irkd(*run, "name=one", f"teacher.ensemble=[{{run: {teacher}}}]", check=False)
    assert "was started with another configuration: teacher.ensemble: [" in changed.stderr


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"run": "a", "ensemble": [{}]}, r"teacher\.ensemble\[0\] needs either run or model"),
        ({"run": "a", "ensemble": [{"run": "b"}], "shares": [1]}, r"give a share for each of 2 teachers"),
        ({"run": "a", "ensemble": [{"run": "b"}], "shares": [0, 0]}, "not all of them 0"),
        ({"run": "a", "shares": "competence"}, r"shares=competence without teacher\.ensemble"),
        ({"run": "a", "ensemble": [{"run": "b"}], "schedule": "aligned"}, "with teacher.schedule=aligned"),
        ({"run": "a", "ensemble": [{"run": "b"}], "cache": {"folder": "c"}}, "with teacher.cache.folder=c"),
    ],
)
def test_what_cannot_be(teacher: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config.from_dict({"fixed": {"resolution": 16, "epochs": 1}, "teacher": teacher}, "here")
