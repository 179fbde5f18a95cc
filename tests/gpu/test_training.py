"""Whole runs on the device, against the CPU's and one another: engines, faults, checkpoints, caches, compile."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest
import torch

from irkd_dist.eventlog import read_events
from tests.gpu.launch import NO_GPU, Command, beside, irkd, succeeded
from tests.training.launch import losses

ENGINES = ("ddp", "zero1", "zero2", "fsdp2")
SHORT = ("curriculum.stages=[{resolution: 12}]", "curriculum.epochs=1", "track.panels=0", "compile=off")
CONVOLUTIONAL = (
    "student.name=test_resnet", "student.patch=null", "student.options={}", "loss.saliency.taps=[[layer1,blocks.1]]",
    "curriculum.stages=[{resolution: 16}]", "curriculum.epochs=1",
)  # fmt: skip
OFTEN = "checkpoint.every_steps=1"
STOPPED, KILLED = {"IRKD_FAULT": "sigterm@step:0"}, {"IRKD_FAULT": "sigkill@step:2"}

Done = dict[str, subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def folder(student_yaml: Path) -> Path:
    """Where the runs lie, by name."""
    return student_yaml.parent


@pytest.fixture(scope="module")
def first(device: torch.device, student_yaml: Path, folder: Path) -> Done:
    """All runs that wait for none, beside one another."""

    def train(name: str, *more: str, **environment: str) -> Command:
        return irkd("train", str(student_yaml), *SHORT, f"name={name}", *more, **environment)

    cache = f"teacher.cache.folder={folder / 'answers'}"
    commands = {name: train(name, f"engine={name}") for name in ENGINES if name != "ddp"}
    commands |= {
        "ddp": train("ddp", "track.panels=2"),
        "cpu": train("cpu", **NO_GPU),
        "device": train("device", "data.cache=device"),
        "undecoded": train("undecoded", "data.cache=none"),
        "virtual": train("virtual", "data.virtual_ranks=2"),
        "guard": train("guard", **{"IRKD_FAULT": "nan@gradient:1"}),
        "guard-cpu": train("guard-cpu", **NO_GPU, **{"IRKD_FAULT": "nan@gradient:1"}),
        "conv": train("conv", *CONVOLUTIONAL),
        "conv-cpu": train("conv-cpu", *CONVOLUTIONAL, **NO_GPU),
        "cached": train("cached", cache),
        "killed": train("killed", OFTEN, **KILLED),
        "to-cpu": train("to-cpu", **STOPPED),
        "from-cpu": train("from-cpu", **NO_GPU, **STOPPED),
    }
    if device.type == "cuda":
        commands = {"compiled": train("compiled", "compile=on"), **commands}
    for name in ENGINES:
        commands[f"gradients-{name}"] = gradients(name, student_yaml, folder / f"{name}.pt")
    commands["gradients-cpu"] = gradients("ddp", student_yaml, folder / "cpu.pt", **NO_GPU)
    return beside(commands)


@pytest.fixture(scope="module")
def second(first: Done, student_yaml: Path, folder: Path) -> Done:
    """Those that go on from one of the first."""

    def again(name: str, *more: str, **environment: str) -> Command:
        return irkd("train", str(student_yaml), *SHORT, f"name={name}", *more, **environment)

    (folder / "study.yaml").write_text(
        f"title: Two seeds\nexperiments: {{KD: {student_yaml}}}\nseeds: [0, 1]\noverrides: {json.dumps(SHORT)}\n"
    )
    table = ("--jobs", "2", "--out", str(folder / "table.md"))
    return beside(
        {
            "study": irkd("study", str(folder / "study.yaml"), *table),
            "killed": again("killed", OFTEN),
            "to-cpu": again("to-cpu", **NO_GPU),
            "from-cpu": again("from-cpu"),
            "cached": again("cached-again", f"teacher.cache.folder={folder / 'answers'}"),
            "evaluate": irkd("evaluate", str(folder / "ddp")),
            "report": irkd("report", str(folder / "ddp")),
        }
    )


def gradients(engine: str, file: Path, out: Path, **environment: str) -> Command:
    return Command(("tests.gpu.gradients_worker", engine, str(file), str(out)), environment)


def alike(run: Path, other: Path, bound: float) -> None:
    """Losses of all steps, and of the same steps."""
    ours, theirs = losses(run), losses(other)
    assert [e["step"] for e in ours] == [e["step"] for e in theirs]
    assert len(ours) > 1
    for one, two in zip(ours, theirs, strict=True):
        assert one["total"] == pytest.approx(two["total"], rel=bound), one["step"]


def needs_deepspeed(engine: str) -> None:
    if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip(f"{engine}: deepspeed is not installed")


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_begins_as_the_cpu_does(engine: str, first: Done, folder: Path) -> None:
    needs_deepspeed(engine)
    succeeded(first[engine])
    succeeded(first["cpu"])
    alike(folder / engine, folder / "cpu", 2e-3)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engines_gradient_is_the_cpus(engine: str, first: Done, folder: Path) -> None:
    needs_deepspeed(engine)
    succeeded(first[f"gradients-{engine}"])
    succeeded(first["gradients-cpu"])
    ours, theirs = (torch.load(folder / f"{name}.pt") for name in (engine, "cpu"))
    assert ours.keys() == theirs.keys()
    got, expected = (torch.cat([v.flatten().float() for v in g.values()]) for g in (ours, theirs))
    assert float((got - expected).norm()) <= 1e-3 * float(expected.norm())


def test_the_compiled_step_is_the_other(device: torch.device, first: Done, folder: Path) -> None:
    if device.type == "cpu":
        pytest.skip("compiling for a CPU takes minutes: tests/distill/test_compiling.py has it")
    done = succeeded(first["compiled"])
    assert "runs as it is" not in done.stderr, done.stderr
    alike(folder / "compiled", folder / "ddp", 2e-3)


def test_the_device_cache_changes_nothing(first: Done, folder: Path) -> None:
    for name in ("device", "undecoded"):
        succeeded(first[name])
    alike(folder / "device", folder / "undecoded", 1e-5)


def test_virtual_ranks(first: Done, folder: Path) -> None:
    succeeded(first["virtual"])
    alike(folder / "virtual", folder / "ddp", 2e-3)


def test_a_gradient_that_is_not_finite_is_left_out(first: Done, folder: Path) -> None:
    for name in ("guard", "guard-cpu"):
        succeeded(first[name])
        skipped = [e["step"] for e in read_events(folder / name) if e["event"] == "skip"]
        assert skipped == [1]
    alike(folder / "guard", folder / "guard-cpu", 2e-3)


def test_a_convolutional_student_in_channels_last(first: Done, folder: Path) -> None:
    for name in ("conv", "conv-cpu"):
        succeeded(first[name])
    alike(folder / "conv", folder / "conv-cpu", 5e-3)


def test_killed_and_gone_on(first: Done, second: Done, folder: Path) -> None:
    assert first["killed"].returncode == -9
    succeeded(second["killed"])
    assert any(e["event"] == "resume" for e in read_events(folder / "killed"))
    alike(folder / "killed", folder / "ddp", 1e-4)


@pytest.mark.parametrize("name", ["to-cpu", "from-cpu"])
def test_a_checkpoint_goes_to_the_cpu_and_back(name: str, first: Done, second: Done, folder: Path) -> None:
    assert first[name].returncode == 75, first[name].stderr
    succeeded(second[name])
    alike(folder / name, folder / "cpu", 2e-3)


def test_the_teachers_cache(first: Done, second: Done, folder: Path) -> None:
    succeeded(first["cached"])
    succeeded(second["cached"])
    asked = [e for e in read_events(folder / "cached-again") if e["event"] == "train"]
    assert sum(e["cache_misses"] for e in asked) == 0
    assert sum(e["cache_hits"] for e in asked) > 0
    alike(folder / "cached-again", folder / "cached", 1e-5)


def test_measured_reported_and_drawn(second: Done, folder: Path) -> None:
    succeeded(second["evaluate"])
    succeeded(second["report"])
    assert any((folder / "ddp" / "evaluation").iterdir())
    assert "data:image" in (folder / "ddp" / "report.html").read_text()
    assert list((folder / "ddp" / "panels").glob("*.npz"))


def test_two_runs_of_a_study_share_a_gpu(second: Done, folder: Path) -> None:
    succeeded(second["study"])
    assert "| KD | 2 |" in (folder / "table.md").read_text()


@pytest.mark.parametrize("engine", ["ddp", "zero2", "fsdp2"])
def test_two_gpus(engine: str, device: torch.device, first: Done, student_yaml: Path, folder: Path) -> None:
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("one GPU: two processes on it are refused by nccl")
    if device.type == "cpu":
        pytest.skip("tests/training/test_engines.py has it for a CPU")
    needs_deepspeed(engine)
    name = f"two-{engine}"
    train = ("train", str(student_yaml), *SHORT, f"name={name}", f"engine={engine}")
    launch = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "irkd_dist")
    succeeded(beside({name: Command((*launch, *train))})[name])
    alike(folder / name, folder / "ddp", 2e-3)
