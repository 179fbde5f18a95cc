"""A killed run ends with bitwise the weights of an unbroken one; a changed configuration is refused."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from irkd_dist import checkpoint
from irkd_dist import config as configuration
from irkd_dist.errors import UserError
from irkd_dist.eventlog import read_events
from irkd_dist.training.train import train
from tests.training.launch import irkd, losses

# dropout, MixUp and carried moments are on: all of it must come back. 16 steps, the transition after the 8th.
SETTINGS = ["student.dropout=0.1", "augment.mixup=0.4", "optim.policy=carry", "checkpoint.every_steps=3"]


def final(run: Path) -> dict[str, torch.Tensor]:
    newest, _ = checkpoint.newest(run / "checkpoints")
    assert newest is not None
    return load_file(newest / checkpoint.STUDENT) | load_file(newest / checkpoint.OPTIMIZER)


@pytest.fixture(scope="module")
def unbroken(shapes: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.training.conftest import STUDENT_YAML

    out = tmp_path_factory.mktemp("resume")
    (out / "student.yaml").write_text(STUDENT_YAML.format(shards=shapes, teacher=teacher, out=out))
    irkd("train", str(out / "student.yaml"), "name=unbroken", *SETTINGS)
    return out


@pytest.mark.parametrize("step", [1, 5, 7, 8, 9, 14])  # 7: the last before the transition, 8: the first after
def test_killed_and_started_again_is_bitwise_the_same(unbroken: Path, step: int) -> None:
    arguments = ("train", str(unbroken / "student.yaml"), f"name=killed-{step}", *SETTINGS)
    killed = irkd(*arguments, env={"IRKD_FAULT": f"sigkill@step:{step}"}, check=False)
    assert killed.returncode == -9
    run = unbroken / f"killed-{step}"
    irkd(*arguments)
    one, other = final(unbroken / "unbroken"), final(run)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)
    seen = [e["step"] for e in read_events(run) if e["event"] == "train"]
    assert seen == list(range(1, 17))  # no step is lost or counted twice
    first, second = (
        [(e["step"], e["total"]) for e in read_events(r) if e["event"] == "train"]
        for r in (unbroken / "unbroken", run)
    )
    assert first == second


CONVOLUTIONAL = [
    "student.name=small_resnet", "student.patch=null", "student.options={widths: [8, 8, 16, 16]}", "teacher=null",
    "loss={}", "curriculum.stages=[{resolution: 12, multiscale: [8, 16], lr: 1e-3}, {resolution: 16}]",
    "optim.policy=carry", "checkpoint.every_steps=3", "optim.weight_decay=0.05",
]  # fmt: skip


@pytest.mark.parametrize("world", [1, 2])
def test_a_convolutional_student_at_several_resolutions_too(student_yaml: Path, world: int) -> None:
    """Its weights lie in memory in another order than its checkpoints: moments must follow."""
    both, out = [], student_yaml.parent
    for name, fault in (("unbroken", {}), ("killed", {"IRKD_FAULT": "sigkill@step:5"})):
        arguments = ("train", str(student_yaml), f"name={name}", *CONVOLUTIONAL)
        if fault:
            irkd(*arguments, env=fault, check=False, world=world)
        irkd(*arguments, world=world)
        both.append(final(out / name))
    assert all(torch.equal(both[0][k], both[1][k]) for k in both[0])
    rates = [(e["stage"], e["lr"]) for e in losses(out / "unbroken")]
    assert {lr for stage, lr in rates if stage == 0} == {1e-3}
    assert {lr for stage, lr in rates if stage == 1} == {3e-4}


def test_a_finished_run_is_not_trained_again(unbroken: Path) -> None:
    before = final(unbroken / "unbroken")
    done = irkd("train", str(unbroken / "student.yaml"), "name=unbroken", *SETTINGS)
    assert "test accuracy" in done.stdout
    assert all(torch.equal(v, final(unbroken / "unbroken")[k]) for k, v in before.items())


def test_another_seed_gives_other_weights(unbroken: Path) -> None:
    irkd("train", str(unbroken / "student.yaml"), "name=seed", "seed=1", *SETTINGS)
    one, other = final(unbroken / "unbroken"), final(unbroken / "seed")
    assert not all(torch.equal(one[k], other[k]) for k in one)


def test_a_changed_semantic_key_is_refused_with_both_values(unbroken: Path) -> None:
    done = irkd(
        "train", str(unbroken / "student.yaml"), "name=unbroken", *SETTINGS, "optim.lr=1e-4", check=False
    )
    assert done.returncode == 2
    assert "optim.lr: 0.0003 -> 0.0001" in done.stderr
    assert "Traceback" not in done.stderr


def test_operational_keys_may_change(unbroken: Path) -> None:
    irkd(
        "train",
        str(unbroken / "student.yaml"),
        "name=unbroken",
        *SETTINGS,
        "data.workers=1",
        "track.panels=1",
    )


def test_a_damaged_newest_checkpoint_is_skipped_and_said(unbroken: Path) -> None:
    run = unbroken / "damaged"
    shutil.copytree(unbroken / "unbroken", run)
    newest, _ = checkpoint.newest(run / "checkpoints")
    assert newest is not None
    data = (newest / checkpoint.STUDENT).read_bytes()
    (newest / checkpoint.STUDENT).write_bytes(data[:100])
    done = irkd("train", str(unbroken / "student.yaml"), "name=damaged", *SETTINGS)
    assert "skipped checkpoint" in done.stdout
    assert newest.name in done.stdout
    one, other = final(unbroken / "unbroken"), final(run)
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_nothing_of_the_teacher_is_in_the_students_checkpoint(unbroken: Path, teacher: Path) -> None:
    newest, _ = checkpoint.newest(unbroken / "unbroken" / "checkpoints")
    assert newest is not None
    ours = load_file(newest / checkpoint.STUDENT)
    theirs = load_file(sorted((teacher / "checkpoints").glob("step-*"))[-1] / checkpoint.STUDENT)
    assert not any(
        a.shape == b.shape and torch.equal(a, b) and a.numel() > 100
        for a in ours.values()
        for b in theirs.values()
    )
    names = {k.partition(".")[2] for k in load_file(newest / checkpoint.OPTIMIZER)}
    assert names == set(ours)


def test_the_teachers_run_is_untouched(unbroken: Path, teacher: Path) -> None:
    assert unbroken.exists()
    for folder in (teacher / "checkpoints").glob("step-*"):
        checkpoint.load(folder)  # compares the checksums


def test_two_processes_go_on_with_the_epochs_sums(student_yaml: Path) -> None:
    key = ("checkpoint.every_minutes=1e-9", "curriculum.epochs=1")  # clocks differ: rank 0's decides
    irkd("train", str(student_yaml), *key, "name=whole", world=2)
    done = irkd(
        "train",
        str(student_yaml),
        *key,
        "name=killed",
        world=2,
        env={"IRKD_FAULT": "sigkill@step:2"},
        check=False,
    )
    assert done.returncode != 0
    irkd("train", str(student_yaml), *key, "name=killed", world=2)
    told = [
        [e for e in read_events(student_yaml.parent / name) if e["event"] == "evaluation"]
        for name in ("whole", "killed")
    ]
    for whole, killed in zip(*told, strict=True):
        assert killed["images"] == whole["images"] == 110
        assert killed["train"]["total"] == pytest.approx(whole["train"]["total"], rel=1e-5)


EXTENDS = ["optim.schedule.kind=constant", "name=longer"]


def stages(*epochs: int) -> str:
    shown = (f"{{resolution: {r}, epochs: {n}}}" for r, n in zip((16, 12), epochs, strict=False))
    return f"curriculum.stages=[{', '.join(shown)}]"


def extended(file: Path, *overrides: str) -> Path:
    train(configuration.load(file, [*EXTENDS, *overrides]), extend=True)
    return file.parent / "longer"


def test_an_extended_run_ends_as_one_that_was_as_long_from_the_start(student_yaml: Path) -> None:
    train(configuration.load(student_yaml, [*EXTENDS, "name=whole", stages(2, 1)]))
    train(configuration.load(student_yaml, [*EXTENDS, stages(1)]))
    run = extended(student_yaml, stages(2))
    assert [e["step"] for e in read_events(run) if e["event"] == "extend"] == [4]
    # a key that changes nothing, as every stage has epochs of its own
    extended(student_yaml, stages(2), "curriculum.epochs=7")
    assert max(e["step"] for e in read_events(run)) == 8
    extended(student_yaml, stages(2, 1))  # a stage that follows, which has the same teacher
    one, other = final(student_yaml.parent / "whole"), final(run)
    assert all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "curriculum.stages=[{resolution: 12, epochs: 3, patience: 2}]",
            "nothing else of a stage may change",
        ),
        ("curriculum.stages=[{resolution: 12, epochs: 1}]", "only the last stage may have more epochs"),
        ("curriculum.stages=[{resolution: 12}, {resolution: 16}]", "made for the largest stage"),
        ("optim.lr=1e-4", "optim.lr: 0.0003 -> 0.0001"),
    ],
)
def test_what_an_extension_may_not_change(student_yaml: Path, override: str, said: str) -> None:
    alone = [
        "teacher=null",
        "loss.kd.alpha=0",
        "loss.saliency.gamma=0",
        "curriculum.stages=[{resolution: 12}]",
    ]
    train(configuration.load(student_yaml, [*EXTENDS, *alone]))
    with pytest.raises(UserError, match=re.escape(said)):
        extended(student_yaml, *alone, override)
