"""Where these tests run: on CUDA, or with IRKD_GPU_TESTS_ON=cpu on the CPU, as a rehearsal."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.gpu.launch import NO_GPU, irkd, run, succeeded
from tests.training.conftest import STUDENT_YAML, TEACHER_YAML


@pytest.fixture(scope="session", autouse=True)
def device() -> torch.device:
    """The device under test."""
    name = os.environ.get("IRKD_GPU_TESTS_ON", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA (IRKD_GPU_TESTS_ON=cpu rehearses)")
    return torch.device(name)


@pytest.fixture(scope="session")
def student_yaml(device: torch.device, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with KD and saliency, and its teacher, trained for an epoch on the CPU."""
    out = tmp_path_factory.mktemp("gpu")
    (out / "teacher.yaml").write_text(TEACHER_YAML.format(shards=shapes, out=out))
    succeeded(run(irkd("train", str(out / "teacher.yaml"), "fixed.epochs=1", **NO_GPU)))
    file = out / "student.yaml"
    file.write_text(STUDENT_YAML.format(shards=shapes, teacher=out / "teacher-seed0", out=out))
    return file
