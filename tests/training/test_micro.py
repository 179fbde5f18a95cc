"""`optim.accumulate: auto`: as many micro-batches as memory asks for, the same on all ranks and after a restart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from irkd_dist import checkpoint, config
from irkd_dist.data import memory
from irkd_dist.eventlog import read_events
from irkd_dist.training import bookends, build, engines, micro
from tests.training.launch import irkd, losses, spawn


@pytest.mark.parametrize(
    ("share", "sample", "room", "count"),
    [
        (32, 1.0, 32.0, 1),
        (32, 1.0, 31.0, 2),
        (32, 1.0, 10.0, 4),
        (32, 1.0, 0.0, 32),
        (32, 1.0, -5.0, 32),
        (3, 2.0, 4.0, 2),
    ],
)
def test_parts_that_fit(share: int, sample: float, room: float, count: int) -> None:
    assert micro.needed(share, sample, room) == count


def test_what_a_sample_takes_is_estimated_and_bounds_the_number(
    student_yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against autograd's own record of one forward; with little memory there are many parts, with much there is one."""
    asked = config.load(student_yaml, ["optim.accumulate=auto", "loss.saliency.gamma=0"])
    engine = engines.setup(asked)
    try:
        parts = build.build(asked, engine)
        assert micro.choose(parts, 0)[0] == 1
        few, more = (micro._bytes(parts, 16, count) for count in micro.SMALL)
        kept = dict[int, int]()

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            output = parts.student(torch.zeros(8, 3, 16, 16))
        size = (more - few) / (micro.SMALL[1] - micro.SMALL[0])
        sample, largest = size / micro.OVERHEAD, sum(kept.values()) / 8
        assert 0.7 * largest < sample < 1.5 * largest
        assert output[0].shape[0] == 8
        states = {k: v.clone() for k, v in parts.student.state_dict().items()}
        monkeypatch.setattr(memory, "left", lambda: int((few + 8 * size) / micro.USED) + 2**20)
        count, why = micro.choose(parts, 1)
        assert 1 < count < 32
        assert "MiB a sample (estimated)" in why
        monkeypatch.setattr(memory, "left", lambda: 0)
        assert micro.choose(parts, 1)[0] == 32
        assert all(torch.equal(v, states[k]) for k, v in parts.student.state_dict().items()), "nothing stays"
        assert all(p.grad is None for p in parts.student.parameters())
    finally:
        engine.finish()


def test_a_choice_that_led_to_no_step_is_made_anew(tmp_path: Path) -> None:
    stage = {"time": 1.0, "step": 4, "event": "stage", "stage": 1, "processes": 2, "accumulate": 3}
    log = tmp_path / "events.jsonl"
    log.write_text(
        "".join(json.dumps({"schema": 1, **e}) + "\n" for e in [stage, {**stage, "event": "resume"}])
    )
    assert bookends._begun_with(tmp_path, 1, 2) is None, "it may have been why"
    with log.open("a") as file:
        file.write(json.dumps({"schema": 1, "time": 2.0, "step": 5, "event": "skip"}) + "\n")
    assert bookends._begun_with(tmp_path, 1, 2) == 3
    assert bookends._begun_with(tmp_path, 1, 4) is None
    assert bookends._begun_with(tmp_path, 0, 2) is None


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_ranks_agree_and_a_resumed_run_keeps_the_number(student_yaml: Path, engine: str) -> None:
    """The ranks have other memory (tests.training.poor_worker): the poorer one's number holds for both."""
    run = [str(student_yaml), "optim.accumulate=auto", "curriculum.epochs=1", f"engine={engine}", "optim.eps=1e-3",
           "checkpoint.every_steps=1"]  # fmt: skip
    spawn(2, "tests.training.poor_worker", *run, "name=poor")
    out = student_yaml.parent
    told = [e for e in read_events(out / "poor") if e["event"] == "stage"]
    assert [e["accumulate"] for e in told] == [16, 16], "one has no memory left: a sample at a time"
    irkd("train", *run[:1], *run[2:], "name=fixed", "optim.accumulate=16", world=2)
    spawn(
        2,
        "tests.training.poor_worker",
        *run,
        "name=broken",
        env={"IRKD_FAULT": "sigterm@step:6"},
        check=False,
    )
    irkd("train", *run, "name=broken", world=2)  # it would choose another number now
    stages = [e for e in read_events(out / "broken") if e["event"] == "stage"]
    assert [e["accumulate"] for e in stages] == [16, 16, 16]
    last = {
        n: checkpoint.load_student(max((out / n / "checkpoints").glob("step-*")))
        for n in ("poor", "fixed", "broken")
    }
    for name in ("fixed", "broken"):
        assert all(torch.equal(v, last[name][k]) for k, v in last["poor"].items()), name
    if engine == "ddp":
        irkd("train", *run[:1], *run[2:], "name=one", world=2)
        for a, b in zip(losses(out / "poor"), losses(out / "one"), strict=True):
            assert a["total"] == pytest.approx(b["total"], rel=1e-4)
