"""The guard of the gradient, and that nothing inside a step waits for the device."""

import shutil
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from irkd_dist import checkpoint, eventlog, faults
from irkd_dist import config as configuration
from irkd_dist.training import guard, metrics, restore, step
from irkd_dist.training.train import train

WAITS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select"}  # the host needs a value


class Waits(TorchDispatchMode):
    """Names the operations at which a host would wait for its device, while `inside`."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.found = False, list[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if self.inside and name in WAITS and "torch/_compile.py" not in (caller := _caller()):
            self.found.append(f"{name} in {caller}")
        return func(*args, **(kwargs or {}))


def _caller() -> str:
    """The innermost frame of ours, or of what we call."""
    frames = [f for f in traceback.extract_stack() if "torch/utils" not in f.filename][:-3]
    return f"{frames[-1].filename}:{frames[-1].lineno} {frames[-1].line}"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    with Waits() as mode:
        for module, name in ((step, "take"), (metrics, "row")):
            whole = getattr(module, name)

            def watched(*args, whole=whole, **kwargs):
                mode.inside = True
                try:
                    return whole(*args, **kwargs)
                finally:
                    mode.inside = False

            monkeypatch.setattr(module, name, watched)
        yield mode


@pytest.mark.parametrize(
    "more",
    [["engine=ddp"], ["data.virtual_ranks=2"], ["engine=fsdp2"], ["optim.clip=1.0", "augment.mixup=0.4"]],
)
def test_fifty_steps_wait_for_nothing(student_yaml: Path, waits: Waits, more: list[str]) -> None:
    """But for AdamW's step, below torch/_compile.py: on a CPU it reads `found_inf`, on a GPU its kernel does."""
    short = [
        "data.batch=4",
        "data.subset=100",
        "curriculum.stages=[{resolution: 12}]",
        "track.log_every=1000",
    ]
    train(configuration.load(student_yaml, ["name=waits", *short, *more]))
    assert len(eventlog.read_events(student_yaml.parent / "waits")) > 3
    assert waits.found == []


def test_flags_come_a_step_late_and_only_once() -> None:
    class Alone:
        rank, world, main, device = 0, 1, True, torch.device("cpu")

    exchange = guard.Exchange(Alone())
    no, yes = torch.zeros(()), torch.ones(())
    assert exchange.send(0, False, False, no, no) == []
    assert exchange.send(1, True, False, yes, yes) == [guard.Flags(0, False, False, False, False)]
    assert exchange.settle() == [guard.Flags(1, True, False, True, True)]
    assert exchange.settle() == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_spoils_every_gradient(value: float) -> None:
    weight, other = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    guard.poisoned((weight + other * 0).sum() + value).backward()
    assert weight.grad is not None
    assert other.grad is not None
    assert weight.grad.isnan().all()
    assert other.grad.isnan().all()  # zero times NaN


def test_a_finite_loss_keeps_its_bits() -> None:
    weight = torch.randn(5, requires_grad=True)
    plain = torch.autograd.grad((weight**3).sum(), weight)[0]
    assert torch.equal(torch.autograd.grad(guard.poisoned((weight**3).sum()), weight)[0], plain)


CONVOLUTIONAL = [
    "student.name=test_resnet", "student.patch=null", "student.options={}", "loss.saliency.taps=[[layer1,blocks.1]]",
    "curriculum.stages=[{resolution: 16}]", "curriculum.epochs=1",
]  # fmt: skip


def final(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_student(max((run / "checkpoints").glob("step-*")))


@pytest.mark.parametrize("slices", ["null", "4"])
def test_a_step_that_is_not_taken_leaves_batchnorms_statistics(
    student_yaml: Path, monkeypatch: pytest.MonkeyPatch, slices: str
) -> None:
    """Activations that are NaN reach them in the forward, long before anybody looks at a gradient."""
    more, whole = [*CONVOLUTIONAL, f"data.virtual_ranks={slices}"], step.take

    def spoiled(parts, batches, alpha, gamma, at, count):
        if at == 1:
            batches = [replace(b, images=b.images * float("nan")) for b in batches]
        return whole(parts, batches, alpha, gamma, at, count)

    train(configuration.load(student_yaml, ["name=told", "data.leave_out=[1]", *more]))
    monkeypatch.setattr(step, "take", spoiled)
    train(configuration.load(student_yaml, ["name=met", *more]))
    told, met = final(student_yaml.parent / "told"), final(student_yaml.parent / "met")
    assert any("running_var" in key for key in met)
    assert all(torch.equal(met[key], told[key]) for key in told)


def test_going_back_to_the_start_of_a_stage_resets_its_moments_too(
    student_yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of a transition holds those of the stage before."""
    train(configuration.load(student_yaml, ["name=told", "data.leave_out=[8,9,10]"]))
    monkeypatch.setenv("IRKD_FAULT", "nan@loss:8,nan@loss:9,nan@loss:10")
    monkeypatch.setattr(faults, "_done", set())
    train(configuration.load(student_yaml, ["name=back", "optim.max_skips=2"]))
    events = eventlog.read_events(student_yaml.parent / "back")
    assert [e["checkpoint"] for e in events if e["event"] == "rollback"] == ["step-00000008"]
    told, back = final(student_yaml.parent / "told"), final(student_yaml.parent / "back")
    assert all(torch.equal(back[key], told[key]) for key in told)


def test_going_back_to_a_checkpoint_whose_best_is_gone_takes_the_next_best(
    student_yaml: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, look = student_yaml.parent / "lost", restore.newest

    def without_best(*args, **kwargs):
        shutil.rmtree(run / "best", ignore_errors=True)
        return look(*args, **kwargs)

    monkeypatch.setattr(restore, "newest", without_best)
    monkeypatch.setenv("IRKD_FAULT", "nan@loss:5,nan@loss:6,nan@loss:7")
    monkeypatch.setattr(faults, "_done", set())
    only = ["curriculum.stages=[{resolution: 12}]", "optim.max_skips=2"]
    train(configuration.load(student_yaml, ["name=lost", *only]))
    assert "the run goes on without it: best/stage-00-step-00000004" in capsys.readouterr().out
    judged = [e for e in eventlog.read_events(run) if e["event"] == "evaluation"]
    assert [(e["step"], e["best"]) for e in judged] == [(4, True), (8, True)]
