"""Whole runs on the device: each engine, the device cache, and the same weights when run twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.launch import irkd, losses

SHORT = ["curriculum.stages=[{resolution: 12}]", "curriculum.epochs=1", "track.panels=0", "compile=off"]
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "fsdp2"])
def test_an_engine_begins_as_the_cpu_does(engine: str, student_yaml: Path, tmp_path: Path) -> None:
    irkd("train", str(student_yaml), *SHORT, f"engine={engine}", "name=here")
    irkd("train", str(student_yaml), *SHORT, "engine=ddp", "name=cpu", env=NO_GPU)
    here, cpu = (losses(next(tmp_path.glob(f"{name}*"))) for name in ("here", "cpu"))
    assert len(here) == len(cpu) > 1
    for ours, theirs in zip(here, cpu, strict=True):
        assert ours["total"] == pytest.approx(theirs["total"], rel=2e-3)


def test_the_device_cache_changes_nothing(student_yaml: Path, tmp_path: Path) -> None:
    for cache in ("none", "device"):
        irkd("train", str(student_yaml), *SHORT, f"data.cache={cache}", f"name={cache}")
    none, device = (losses(next(tmp_path.glob(f"{name}*"))) for name in ("none", "device"))
    assert [e["total"] for e in none] == pytest.approx([e["total"] for e in device], rel=1e-5)
