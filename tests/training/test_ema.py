"""The moving average of the weights: timm's numbers, under each engine, through faults, kills and transitions."""

from pathlib import Path

import pytest
import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from irkd_dist import checkpoint, networks
from irkd_dist.eventlog import read_events
from irkd_dist.training import optim
from tests.training.launch import irkd

EMA = ["optim.ema={decay: 0.8}", "optim.lr=3e-3", "loss.saliency.gamma=0", "curriculum.epochs=1"]
EVERY = ["checkpoint.every_steps=1", "checkpoint.keep=99"]


def test_it_is_timms() -> None:
    """Weights, running statistics and counters after five steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    theirs = ModelEmaV3(model, decay=0.7, use_warmup=True)
    average = [v.clone() for v in model.state_dict().values()]
    for step in range(5):
        model(torch.randn(2, 3, 5, 5))
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter)
        theirs.update(model, step=step + 1)
        weight = torch.tensor(1 - optim.ema_decay(0.7, True, step))
        optim.move_average(average, [*model.state_dict().values()], weight)
    for ours, other in zip(average, theirs.module.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-6, atol=1e-7)


def naive(run: Path, decay: float = 0.8, skipped: tuple[int, ...] = ()) -> tuple[dict[str, Tensor], Path]:
    """The average by its definition, from each step's checkpoint; and the last checkpoint."""
    average: dict[str, Tensor] = {}
    folders = sorted((run / "checkpoints").glob("step-*"))
    assert [int(f.name[5:]) for f in folders] == list(range(1, len(folders) + 1))
    for step, folder in enumerate(folders):
        weights = checkpoint.load_student(folder, averaged=False)
        keep = 0.0 if step == 0 else min(decay, 1 - (1 + step) ** (-2 / 3))
        if step not in skipped:
            average = {
                k: keep * average.get(k, v) + (1 - keep) * v if v.is_floating_point() else v
                for k, v in weights.items()
            }
    return average, folders[-1]


def check(run: Path, skipped: tuple[int, ...] = ()) -> dict[str, Tensor]:
    expected, last = naive(run, skipped=skipped)
    kept = checkpoint.load_student(last)
    assert kept.keys() == expected.keys()
    for key, value in kept.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)
    raw = checkpoint.load_student(last, averaged=False)
    assert not all(torch.equal(kept[k], raw[k]) for k in kept)
    return kept


@pytest.mark.parametrize(
    ("engine", "world"), [("ddp", 1), ("ddp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2), ("fsdp2", 2)]
)
def test_each_engine_keeps_the_average_by_its_definition(student_yaml: Path, engine: str, world: int) -> None:
    """Across a transition that starts from the best, and a reset of the optimizer."""
    irkd("train", str(student_yaml), "name=run", f"engine={engine}", *EMA, *EVERY, world=world)
    check(student_yaml.parent / "run")


@pytest.mark.parametrize(("engine", "world"), [("ddp", 1), ("zero2", 2), ("zero3", 2), ("fsdp2", 2)])
def test_resumed_it_is_bitwise_the_same(student_yaml: Path, engine: str, world: int) -> None:
    both = []
    for name, fault in (("unbroken", {}), ("killed", {"IRKD_FAULT": "sigkill@step:6"})):
        arguments = ("train", str(student_yaml), f"name={name}", f"engine={engine}", *EMA)
        arguments += ("checkpoint.every_steps=3", "track.samples=true")
        if fault:
            irkd(*arguments, env=fault, check=False, world=world)
        irkd(*arguments, world=world)
        run = student_yaml.parent / name
        newest, _ = checkpoint.newest(run / "checkpoints")
        assert newest is not None
        evaluations = [e for e in read_events(run) if e["event"] == "evaluation"]
        both.append(
            (checkpoint.load_student(newest), [(e["accuracy"], e["accuracy_raw"]) for e in evaluations])
        )
    (one, told), (other, told_again) = both
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert told == told_again


def test_worlds_agree_bitwise_under_virtual_ranks(student_yaml: Path) -> None:
    """Of a student with BatchNorm, whose running statistics are averaged too."""
    convolutional = [
        "student.name=small_resnet",
        "student.patch=null",
        "student.options={widths: [8, 8, 16, 16]}",
    ]
    kept = []
    for world in (1, 2):
        more = [f"name=w{world}", "data.virtual_ranks=2", *convolutional]
        irkd("train", str(student_yaml), *EMA, *EVERY, *more, world=world)
        kept.append(check(student_yaml.parent / f"w{world}"))
    assert any("running_mean" in k for k in kept[0])
    assert all(torch.equal(v, kept[1][k]) for k, v in kept[0].items())


@pytest.mark.parametrize(("engine", "world"), [("ddp", 1), ("zero2", 2), ("fsdp2", 2)])
def test_a_step_that_is_not_taken_does_not_move_it(student_yaml: Path, engine: str, world: int) -> None:
    fault = {"IRKD_FAULT": "nan@loss:5"}
    more = ["name=run", f"engine={engine}", *EMA, *EVERY]
    assert "no rank takes it" in irkd("train", str(student_yaml), *more, env=fault, world=world).stdout
    run = student_yaml.parent / "run"
    if (run / "checkpoints" / checkpoint.name(6)).is_dir():
        check(run, skipped=(5,))
    else:  # none is written of it; the weights after it are those before
        source, target = (run / "checkpoints" / checkpoint.name(n) for n in (5, 6))
        target.symlink_to(source)
        check(run, skipped=(5,))


def test_it_is_what_is_judged_measured_and_taught_with(student_yaml: Path) -> None:
    out = irkd("train", str(student_yaml), "name=run", *EMA, "curriculum.start_from=best").stdout
    run = student_yaml.parent / "run"
    assert "averaged" in out
    assert "raw" in out
    evaluations = [e for e in read_events(run) if e["event"] == "evaluation"]
    assert all({"accuracy", "accuracy_raw"} <= e.keys() for e in evaluations)
    network, raw = networks.load(run), networks.load(run, averaged=False)
    kept = checkpoint.read(network.folder)
    for model, weights in ((network.model, kept.average), (raw.model, kept.student)):
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    for more in ([], ["--raw"]):
        irkd("evaluate", str(run), "--resolutions", "16", *more)
    assert len([*(run / "evaluation").glob("test-16-best*.json")]) == 2
    irkd("verify", str(run))
    damaged = network.folder / checkpoint.AVERAGE
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert "average.safetensors" in irkd("verify", str(run), check=False).stdout
