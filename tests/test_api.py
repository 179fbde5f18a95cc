"""What `import irkd_dist` gives, as somebody with a loop or a notebook of their own uses it."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import irkd_dist
from irkd_dist import config as configuration
from irkd_dist.data import shards
from irkd_dist.data.decoded import Dataset
from irkd_dist.data.loader import Loader
from irkd_dist.data.views import View
from irkd_dist.distill.models import create_model
from irkd_dist.errors import UserError


@pytest.fixture(scope="module")
def run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student trained from a mapping."""
    out = tmp_path_factory.mktemp("api")
    values = {
        "data": {"shards": str(shapes), "batch": 64}, "fixed": {"resolution": 16, "epochs": 1}, "out": str(out),
        "student": {"options": {"embed_dim": 32, "depth": 3, "num_heads": 2}}, "track": {"panels": 0},
    }  # fmt: skip
    summary = irkd_dist.train(values, ["optim.lr=1e-3"])
    assert summary["run"] == str(out / "run-seed0")
    return out / "run-seed0"


def small_vit(seed: int = 0, depth: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return create_model(
        "custom", classes=5, image_size=16, options={"embed_dim": 32, "depth": depth, "num_heads": 2}, patch=4
    )


def test_the_import_takes_no_torch() -> None:
    code = "import sys, irkd_dist; dir(irkd_dist); print([m for m in ('torch', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        irkd_dist.nothing  # noqa: B018


def test_every_name_is_there_and_documented() -> None:
    for name in irkd_dist.__all__:
        assert getattr(irkd_dist, name).__doc__


def test_a_student_sees_a_picture_as_evaluation_does(run: Path, shapes: Path, tmp_path: Path) -> None:
    student = irkd_dist.load(run)
    assert student.size == 16
    assert student.resolutions == [16]
    assert len(student.classes) == 10
    manifest = shards.load_manifest(shapes)
    with Loader(Dataset(shapes, manifest, "test"), View(16), batch=8, seed=0) as loader:
        batch = next(iter(loader.batches(0)))
    stored = shards.open_split(shapes, manifest, "test", 16)
    for i, seen in enumerate(batch.images):
        (tmp_path / f"{i}.png").write_bytes(stored.image(i))
        torch.testing.assert_close(student.transform(tmp_path / f"{i}.png"), seen)
        pixels = np.asarray(Image.open(tmp_path / f"{i}.png"))
        torch.testing.assert_close(student.transform(pixels), seen)
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 50), np.uint8))
    assert student.transform(wide, 12).shape == (3, 12, 12)
    with torch.no_grad():
        logits = student(batch.images)
    assert torch.equal(logits, student.model(batch.images).detach())
    (maps, *_) = student.saliency_maps(batch.images)
    assert maps.shape == (8, 4, 4)


def test_maps_are_the_gradient_of_the_predicted_class(run: Path) -> None:
    """Against autograd by hand, and without a trace in the model."""
    model = small_vit().train()
    images = torch.randn(4, 3, 16, 16)
    maps = irkd_dist.saliency_maps(model, images, taps=[1])
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    model.eval()
    kept: list[torch.Tensor] = []
    handle = model.blocks[1].register_forward_hook(lambda _m, _a, out: kept.append(out))  # type: ignore[union-attr]
    logits = model(images)
    handle.remove()
    gradient = torch.autograd.grad(logits.amax(1).sum(), kept[-1])[0][:, 1:]
    torch.testing.assert_close(maps[0].flatten(1), gradient.abs().amax(2))
    with pytest.raises(UserError, match="has blocks 0 to 2"):
        irkd_dist.saliency_maps(model, images, taps=[7])


@pytest.mark.parametrize(
    ("name", "options", "grids"),
    [
        ("resnet10t", {}, [16, 8, 4, 2, 1]),
        ("small_resnet", {}, [16, 8, 4]),
        ("small_resnet", {"size": 16}, [8, 4, 2]),
        ("test_vit", {"img_size": 32, "patch_size": 8}, [4]),
        ("test_convnext", {}, [8, 4, 2, 1]),
    ],
)
def test_any_timm_model(name: str, options: dict[str, int], grids: list[int]) -> None:
    model = timm.create_model(name, num_classes=5, **options)
    maps = irkd_dist.saliency_maps(model, torch.randn(2, 3, 32, 32), method="grad_cam")
    assert [m.shape[-1] for m in maps][: len(grids)] == grids
    assert all(m.isfinite().all() for m in maps)


def test_the_losses_in_a_loop_of_ones_own() -> None:
    """They train; the distillation is torch's KL; the saliency's gradient against finite differences."""
    student, teacher = small_vit(1), small_vit(2, depth=4)
    align = irkd_dist.SaliencyLoss(student, teacher)
    assert not any(p is q for p in align.parameters() for q in teacher.parameters())
    images, labels = torch.randn(6, 3, 16, 16), torch.randint(0, 5, (6,))
    output, said, term = align(images, labels)
    kd = irkd_dist.distillation_loss(output, said, 2.0)
    expected = 4 * F.kl_div(
        F.log_softmax(output / 2, 1), F.log_softmax(said / 2, 1), reduction="batchmean", log_target=True
    )
    torch.testing.assert_close(kd, expected)
    (F.cross_entropy(output, labels) + kd + term).backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())

    double, images = copy.deepcopy(align).double(), images.double()
    object.__setattr__(double, "_teacher", (copy.deepcopy(teacher).double(),))
    weight = double.student.blocks[0].mlp.fc1.weight  # type: ignore[union-attr]
    double(images, labels)[2].backward()
    exact, step = float(weight.grad[3, 5]), 1e-6
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            weight[3, 5] += sign * step
            values.append(float(double(images, labels)[2].detach()))
            weight[3, 5] -= sign * step
    assert exact == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-9)


def test_evaluate_and_read_run(run: Path) -> None:
    result = irkd_dist.evaluate(run, resolutions=[16])
    (summary,) = irkd_dist.read_run(run, "summary")
    assert result["accuracy"]["16"] == pytest.approx(summary["test_accuracy"])
    assert irkd_dist.read_run(run)[0]["event"] == "start"


def test_a_mapping_is_checked_as_a_file_is(shapes: Path) -> None:
    with pytest.raises(UserError, match=r"unknown key optim\.lrr"):
        irkd_dist.train({"fixed": {"resolution": 16, "epochs": 1}, "optim": {"lrr": 1}})
    config = configuration.from_values({"fixed": {"resolution": 16, "epochs": 1}}, ["seed=3"])
    assert config.name == "run-seed3"
    with pytest.raises(TypeError, match="overrides go with a file or a mapping"):
        irkd_dist.train(config, ["seed=4"])
