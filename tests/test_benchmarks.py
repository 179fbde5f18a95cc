"""The benchmark of a GPU, rehearsed at its smallest on a CPU: it must not fail where a GPU is lent by the minute."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import carry

REPOSITORY = Path(__file__).resolve().parents[1]


def gpu(out: Path, *more: str) -> str:
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--quick", "--out", str(out), *more]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_gpus_benchmark_measures_each_cell_and_says_what_it_left_out(tmp_path: Path) -> None:
    told = gpu(tmp_path / "gpu.json", "--variants", "timm,irkd,irkd_cached_compiled")
    values = json.loads((tmp_path / "gpu.json").read_text())
    cells = values["cells"]["4:12"]
    assert [*cells] == ["timm", "irkd", "irkd_cached_compiled"], told
    assert values["left_out"] == {}
    for cell in cells.values():
        assert "error" not in cell, told
        assert "not_compiled" not in cell, told
        assert cell["images_per_s"] > 0
        assert len(cell["of_timm"]) == 3
        assert len(cell["kernels"]) == 10
    # the second derivative costs more than what it is taken of
    assert cells["irkd"]["flops"] > cells["timm"]["flops"] > 0
    assert told.count("4:12") == 3


def test_what_the_time_does_not_allow_is_said(tmp_path: Path) -> None:
    told = gpu(tmp_path / "gpu.json", "--variants", "kd,kd_compiled", "--budget-s", "0")
    assert json.loads((tmp_path / "gpu.json").read_text())["left_out"] == {
        "4:12 kd": "time is up",
        "4:12 kd_compiled": "time is up",
    }
    assert told.count("left out: time is up") == 2


def test_what_is_carried_is_all_that_the_other_machine_lacks() -> None:
    present = carry.closure([*carry.PRESENT], {})
    lacking = carry.closure(["omegaconf", "pydantic", "timm"], present)
    assert {"omegaconf", "pydantic", "pydantic-core", "annotated-types", "timm"} <= lacking.keys()
    assert not lacking.keys() & {
        "torch",
        "torchvision",
        "numpy",
        "pyyaml",
        "huggingface-hub",
    }  # there already
    assert lacking["pydantic"] == importlib.metadata.version("pydantic")
    with pytest.raises(SystemExit, match="no-such-package is not installed here"):
        carry.closure(["no-such-package"], {})
