"""Fifty steps of a real run, in this process: the host waits for the device in none of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from irkd_dist import config as configuration
from irkd_dist import eventlog
from irkd_dist.training import metrics, step
from irkd_dist.training.train import train

WARM = 3  # steps in which libraries may set themselves up
SHORT = ["data.batch=4", "data.subset=100", "curriculum.stages=[{resolution: 12}]", "track.log_every=1000"]


@pytest.fixture
def waits(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, str]]]:
    """(step, where) of each operation inside a step that makes the host wait for the device."""
    found, at = list[tuple[int, str]](), -1

    def mode(name: str) -> None:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode(name)

    def watched(module: object, name: str) -> None:
        whole = getattr(module, name)

        def watching(*args: object, **kwargs: object) -> object:
            nonlocal at
            at += name == "take"
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                mode("warn")
                try:
                    return whole(*args, **kwargs)
                finally:
                    mode("default")
                    said = [w for w in told if "called a synchronizing" in str(w.message)]
                    found.extend((at, f"{w.filename}:{w.lineno}") for w in said)

        monkeypatch.setattr(module, name, watching)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        mode("warn")
        mode("default")
    watched(step, "take")
    watched(metrics, "row")
    yield found
    mode("default")


@pytest.mark.parametrize(
    "more",
    [["engine=ddp"], ["data.virtual_ranks=2"], ["engine=fsdp2"], ["optim.clip=1.0", "augment.mixup=0.4"]],
    ids=" ".join,
)
def test_fifty_steps_wait_for_nothing(
    student_yaml: Path, waits: list[tuple[int, str]], more: list[str], request: pytest.FixtureRequest
) -> None:
    name = f"waits-{request.node.callspec.indices['more']}"
    train(configuration.load(student_yaml, [f"name={name}", *SHORT, *more]))
    assert len(eventlog.read_events(student_yaml.parent / name)) > 3
    assert [w for w in waits if w[0] >= WARM] == []
