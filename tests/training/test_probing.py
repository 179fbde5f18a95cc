"""What a run measures outside its steps, against autograd, formulas by hand and a naive sum."""

from pathlib import Path

import numpy as np
import pytest
import torch

from irkd_dist import config as configuration
from irkd_dist import eventlog
from irkd_dist.distill import losses
from irkd_dist.training import opening, probing
from irkd_dist.training.energy import Meter
from irkd_dist.training.train import train

SMALL = {"name": "custom", "patch": 4, "options": {"embed_dim": 16, "depth": 2, "num_heads": 2}}


@pytest.fixture(scope="module")
def teacher(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return train(_config(shapes, tmp_path_factory.mktemp("runs"), "teacher"))["run"]


def _config(shapes: Path, out: Path, name: str, **more: object) -> configuration.Config:
    tree = {
        "data": {"shards": str(shapes), "batch": 32},
        "student": SMALL,
        "optim": {"lr": 1e-3},
        "precision": "fp32",
    }
    tree |= {"fixed": {"resolution": 16, "epochs": 1}, "name": name, "out": str(out), **more}
    return configuration.from_dict(tree, "test")


def _student(shapes: Path, out: Path, teacher: str, **more: object) -> configuration.Config:
    loss = {"kd": {"alpha": 1.0}, "saliency": {"gamma": 0.8}}
    plan = {"stages": [{"resolution": 8}, {"resolution": 16}], "epochs": 1}
    own = {"teacher": {"run": teacher}, "loss": loss, "fixed": None, "curriculum": plan, **more}
    return _config(shapes, out, "student", **own)


def test_each_term_has_the_gradient_that_autograd_gives(shapes: Path, tmp_path: Path, teacher: str) -> None:
    with opening.opened(_student(shapes, tmp_path, teacher), owns_process=False, extend=False) as run:
        from irkd_dist.training import build

        _, held_out = build.loaders(run.parts, run.parts.plan.stages[1])
        with held_out:
            found = probing.measure_epoch(run.parts, held_out, 16)
            rows = np.arange(len(held_out))
            images, labels = held_out.pick(rows)
        student = run.parts.student.eval()
        student.training = True  # else the heads are averaged
        assert found["images"] == len(rows) == 13  # all of the validation split
        first, second = student(images)
        with torch.no_grad():
            theirs = run.parts.teacher.model(images) if run.parts.teacher else None
        ce = losses.cross_entropy(first, labels).mean()
        kd = losses.soft_distillation(second, theirs, 4.0).mean()
        for name, term in (("ce", ce), ("kd", kd)):
            student.zero_grad()
            term.backward(retain_graph=True)
            norm = sum(float((p.grad**2).sum()) for p in student.parameters() if p.grad is not None) ** 0.5
            assert found["gradients"][name] == pytest.approx(norm, rel=1e-4), name
        student.zero_grad(set_to_none=True)
        assert found["gradients"]["saliency"] > 0
        assert 0 <= found["pointing"] <= 1
        assert -1 <= found["correlation"] <= 1


def test_operations_are_those_of_the_products_of_matrices(shapes: Path, tmp_path: Path, teacher: str) -> None:
    train(_student(shapes, tmp_path, teacher))
    events = eventlog.read_events(tmp_path / "student")
    small, large = (e for e in events if e["event"] == "flops")
    # a ViT by hand: patches, per block qkv, attention, projection and MLP (twice the width), heads; 2 for each product
    for told, size in ((small, 8), (large, 16)):
        patches, dim, depth, classes = (size // 4) ** 2, 16, 2, 10
        tokens = patches + 2  # class and distillation token
        block = tokens * dim * dim * (3 + 1 + 4) + 2 * tokens * tokens * dim
        by_hand = 2 * (patches * 48 * dim + depth * block + 2 * dim * classes)
        assert told["inference"] == by_hand, size
        assert 3 * told["inference"] < told["training"] < 9 * told["inference"]  # two backwards of maps
        assert told["teacher"] > told["inference"]
    probes = [e for e in events if e["event"] == "probe"]
    assert [(e["stage"], e["resolution"], e["epoch"]) for e in probes] == [(0, 8, 1), (1, 16, 2)]


def test_a_run_has_the_same_weights_with_and_without(shapes: Path, tmp_path: Path, teacher: str) -> None:
    for name, count in (("with", 13), ("without", 0)):
        train(_student(shapes, tmp_path / name, teacher, track={"probe": count}))
    weights = [
        (next((tmp_path / n / "student" / "best").glob("stage-01-*")) / "student.safetensors").read_bytes()
        for n in ("with", "without")
    ]
    assert weights[0] == weights[1]
    assert not [e for e in eventlog.read_events(tmp_path / "without" / "student") if e["event"] == "probe"]


def test_energy_is_the_difference_of_counters_that_wrap(tmp_path: Path) -> None:
    def tell(zone: str, microjoules: int) -> None:
        (tmp_path / zone).mkdir(exist_ok=True)
        (tmp_path / zone / "energy_uj").write_text(f"{microjoules}\n")
        (tmp_path / zone / "max_energy_range_uj").write_text("100000000\n")

    tell("intel-rapl:0", 5_000_000)
    tell("intel-rapl:1", 99_000_000)
    tell("intel-rapl:0:0", 1)  # a part of the first
    meter = Meter(torch.device("cpu"), tmp_path)
    tell("intel-rapl:0", 8_000_000)
    tell("intel-rapl:1", 1_000_000)
    tell("intel-rapl:0:0", 50_000_000)
    assert meter.spent() == pytest.approx(3 + 2)
    assert meter.spent() == 0
    assert Meter(torch.device("cpu"), tmp_path / "none").spent() is None
