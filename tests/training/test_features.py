"""Projections of features in runs: trained and saved under every engine, resumed bitwise, left out of a student."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from irkd_dist import checkpoint, networks
from irkd_dist.runfolder import PROJECTIONS
from tests.training.launch import irkd, losses

FEATURES = [
    "loss.features.beta=0.5",
    "loss.features.taps=[last,[0,1]]",
    "optim.clip=1",
    "curriculum.epochs=1",
]


def newest(run: Path) -> checkpoint.Content:
    return checkpoint.read(max((run / "checkpoints").glob("step-*")))


def test_engines_and_worlds_train_and_keep_the_projections(student_yaml: Path) -> None:
    found = {}
    for engine, world in (("ddp", 1), ("ddp", 2), ("zero1", 2), ("zero2", 2), ("fsdp2", 2)):
        name = f"{engine}-{world}"
        irkd(
            "train",
            str(student_yaml),
            f"name={name}",
            f"engine={engine}",
            "optim.eps=1e-3",
            *FEATURES,
            world=world,
        )
        found[name] = newest(student_yaml.parent / name), losses(student_yaml.parent / name)
    first, told = found["ddp-1"]
    ours = [k for k in first.student if k.startswith(PROJECTIONS)]
    assert len(ours) == 4, "weight and bias of two"
    assert {f"exp_avg.{k}" for k in ours} <= first.optimizer.keys()
    assert all(float(first.optimizer[f"exp_avg.{k}"].abs().max()) > 0 for k in ours), "they are trained"
    assert all(e["features"] > 0 for e in told)
    for name, (content, losses_) in found.items():
        assert content.student.keys() == first.student.keys(), name
        for key in first.student:
            torch.testing.assert_close(
                content.student[key], first.student[key], rtol=1e-3, atol=1e-5, msg=f"{name} {key}"
            )
        assert [e["features"] for e in losses_] == pytest.approx([e["features"] for e in told], rel=1e-4), (
            name
        )


def test_a_resumed_run_is_the_unbroken_one_and_a_student_goes_without(student_yaml: Path) -> None:
    run = ["train", str(student_yaml), *FEATURES, "checkpoint.every_steps=1", "optim.ema={decay: 0.5}"]
    irkd(*run, "name=whole")
    irkd(*run, "name=broken", env={"IRKD_FAULT": "sigkill@step:3"}, check=False)
    irkd(*run, "name=broken")
    whole, broken = (newest(student_yaml.parent / name) for name in ("whole", "broken"))
    for a, b in (
        (whole.student, broken.student),
        (whole.optimizer, broken.optimizer),
        (whole.average, broken.average),
    ):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)
    network = networks.load(student_yaml.parent / "whole")
    assert not [k for k in network.model.state_dict() if k.startswith(PROJECTIONS)]
    irkd("evaluate", str(student_yaml.parent / "whole"), "--resolutions", "12")
    irkd("train", str(student_yaml), "name=next", "curriculum.epochs=1", f"teacher.run={student_yaml.parent / 'whole'}",
         f"student.weights={student_yaml.parent / 'whole'}")  # fmt: skip
