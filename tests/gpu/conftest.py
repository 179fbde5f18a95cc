"""Where these tests run: on CUDA, or with IRKD_GPU_TESTS_ON=cpu on the CPU, as a rehearsal."""

from __future__ import annotations

import os

import pytest
import torch

from tests.training.conftest import student_yaml, teacher

__all__ = ["device", "student_yaml", "teacher"]


@pytest.fixture(scope="session", autouse=True)
def device() -> torch.device:
    """The device under test."""
    name = os.environ.get("IRKD_GPU_TESTS_ON", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA (IRKD_GPU_TESTS_ON=cpu rehearses)")
    return torch.device(name)
