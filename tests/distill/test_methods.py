"""A saliency method is one file: found by its name, without any other edit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from irkd_dist import config as configuration
from irkd_dist.distill import methods
from irkd_dist.distill.module import Distiller, Objective
from irkd_dist.distill.taps import tap_pairs
from irkd_dist.distill.teacher import Teacher, freeze
from irkd_dist.errors import UserError
from tests.distill import plain_vit as plain

INPUT_X_GRADIENT = '''
"""|G * A|, summed over channels."""

INNER_GRADIENT = True
VOID = ("unread",)


def saliency_map(features, gradient):
    return (gradient * features).abs().sum(dim=2)
'''

NORM = '''
"""Length of each patch's features: no gradient at all."""

INNER_GRADIENT = False
BLOCK_TAP = ""


def check(model, path, role):
    pass


def saliency_map(model, path, features):
    return features[:, model.num_prefix_tokens:].norm(dim=2)
'''

VALUES = {"fixed": {"resolution": 12, "epochs": 1}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose files are methods too."""
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    yield tmp_path
    for name in ("input_x_gradient", "norm"):
        methods.LOADED.pop(name, None)
        sys.modules.pop(f"{methods.__name__}.{name}", None)


def saliency(name: str) -> dict:
    return {**VALUES, "loss": {"saliency": {"method": name}}}


@pytest.mark.parametrize(("name", "text"), [("input_x_gradient", INPUT_X_GRADIENT), ("norm", NORM)])
def test_one_file_adds_a_method(folder: Path, name: str, text: str) -> None:
    with pytest.raises(
        UserError, match=rf"loss\.saliency\.method='{name}' is none of attention, grad_cam, gradient, h"
    ):
        configuration.from_dict(saliency(name), "here")
    (folder / f"{name}.py").write_text(text)
    config = configuration.from_dict(saliency(name), "here")
    method = config.loss.saliency.method
    assert methods.inner_gradient(method) == ("INNER_GRADIENT = True" in text)

    student, network = (
        plain.build("class_token", 3, seed=1).train(),
        plain.build("class_token", 4, dim=24, seed=2),
    )
    pairs = tap_pairs(student, network, ["first", "last"], method)
    assert not any(tap.void for pair in pairs for tap in pair)
    taps = tuple(s.path for s, _ in pairs)
    assert taps == (
        ("blocks.0", "blocks.2.norm1") if methods.inner_gradient(method) else ("blocks.0", "blocks.2")
    )
    teacher = Teacher(freeze(network, None, True), [t.path for _, t in pairs], method)
    module = Distiller(student, Objective(method=method, taps=taps))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    images, target = plain.inputs(4, 12, seed=3)
    weight = torch.full((4,), 0.25, dtype=torch.float64)
    said = []
    for _ in range(3):
        terms = module(images, target, weight, teacher(images, target, 4), 0.0, 100.0)
        optimizer.zero_grad()
        terms["total"].backward()
        optimizer.step()
        said.append(float(terms["saliency"]))
    assert said[2] < said[0]


def test_the_four_methods_are_files_of_forty_lines_or_fewer() -> None:
    assert methods.names() == ["attention", "grad_cam", "gradient", "hirescam"]
    for name in methods.names():
        module = methods.load(name)
        assert methods.inner_gradient(name) == module.INNER_GRADIENT
        assert len(Path(module.__file__).read_text().splitlines()) <= 40, name


def test_a_configuration_is_checked_without_torch() -> None:
    code = "import sys, irkd_dist.config as c; c.methods.inner_gradient('attention'); print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told == "False\n"
