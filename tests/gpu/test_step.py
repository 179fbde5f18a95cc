"""A step's terms and gradients on the device against the CPU's, and that it never waits for the device."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from irkd_dist.data.loader import Batch
from irkd_dist.distill import models, taps
from irkd_dist.distill.module import Distiller, Objective
from irkd_dist.distill.teacher import Teacher, freeze
from irkd_dist.training import step

CPU = torch.device("cpu")
METHODS = ["gradient", "grad_cam", "hirescam", "attention"]
ROWS = 8


@pytest.fixture
def refusing(device: torch.device) -> Iterator[None]:
    """Make every wait of the host for the device an error, once a test asks for it."""
    yield
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True)
def _full_fp32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def parts(method: str, on: torch.device, autocast: torch.dtype | None) -> tuple[Distiller, Teacher]:
    torch.manual_seed(0)
    options = {
        "classes": 10,
        "patch": 4,
        "image_size": 16,
        "options": {"embed_dim": 32, "depth": 3, "num_heads": 2},
    }
    student, teacher = (models.create_model("custom", **copy.deepcopy(options)) for _ in range(2))
    pairs = taps.tap_pairs(student, teacher, ["first", "second"], method)
    models.without_fused_attention(student)
    objective = Objective(method=method, normalization="l2", taps=tuple(s.path for s, _ in pairs))
    frozen = Teacher(freeze(teacher.to(on), autocast, True, on), [t.path for _, t in pairs], method, autocast)
    return Distiller(student.to(on), objective, autocast).train(), frozen


def batch(on: torch.device) -> Batch:
    noise = torch.Generator().manual_seed(1)
    return Batch(
        ids=np.arange(ROWS),
        images=torch.randn(ROWS, 3, 16, 16, generator=noise).to(on),
        labels=(torch.arange(ROWS) % 10).to(on),
        soft_labels=None,
        weight=torch.full((ROWS,), 1 / ROWS).to(on),
        positions=torch.arange(ROWS),
        size=ROWS,
        full=None,
        epoch=0,
        step=0,
        draw=0,
    )


def taken(method: str, on: torch.device, autocast: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The loss and all gradients as one vector, on the CPU."""
    module, teacher = parts(method, on, autocast)
    images, target, weight, *_ = (b := batch(on)).images, b.labels, b.weight
    total = module(images, target, weight, teacher(images, target, ROWS), 1.0, 0.8)["total"]
    total.backward()
    found = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
    return total.detach().cpu(), torch.cat(found).cpu()


@pytest.mark.parametrize("method", METHODS)
def test_fp32_is_the_cpus(method: str, device: torch.device) -> None:
    loss, gradient = taken(method, device)
    expected_loss, expected = taken(method, CPU)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    assert float((gradient - expected).norm()) <= 1e-4 * float(expected.norm())


@pytest.mark.parametrize("method", METHODS)
def test_bf16_is_near_fp32(method: str, device: torch.device) -> None:
    loss, gradient = taken(method, device, torch.bfloat16)
    expected_loss, expected = taken(method, device)
    torch.testing.assert_close(loss, expected_loss, rtol=3e-2, atol=0)
    assert float(torch.cosine_similarity(gradient, expected, dim=0)) > 0.97


@pytest.mark.parametrize("method", METHODS)
def test_a_micro_batch_does_not_wait_for_the_device(
    method: str, device: torch.device, refusing: None
) -> None:
    module, teacher = parts(method, device, None)
    whole = batch(device)
    spec = step.Saliency(fraction=0.5)
    for attempt in range(2):  # the first one may set up libraries
        if attempt and device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        for part in step.parts(whole, 2):
            told = step.arguments(teacher, spec, part, 1.0, 0.8, step=0)
            module(*told)["total"].backward()
