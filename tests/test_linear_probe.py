"""`irkd probe`: the fit against plain gradient descent, and its folder as a teacher; backbones without a head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import irkd_dist
from irkd_dist import config, evaluation, linear_probe, networks
from irkd_dist.data import shards
from irkd_dist.errors import UserError
from irkd_dist.eventlog import read_events
from tests.training.launch import irkd, losses

SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2}
NAME = "vit_small_patch14_reg4_dinov2"


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    """DINOv2's weights, as timm has them: without a head."""
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=0, img_size=16, patch_size=4, **SMALL)
    save_file(model.state_dict(), tmp_path / "backbone.safetensors")
    return tmp_path / "backbone.safetensors"


def configuration(shapes: Path, out: Path, weights: Path | None, **more: Any) -> config.Config:
    student = {"name": NAME, "patch": 4, "options": SMALL, **({"weights": str(weights)} if weights else {})}
    tree = {
        "data": {"shards": str(shapes)}, "student": student, "fixed": {"resolution": 16, "epochs": 1},
        "out": str(out), "name": "dino", "precision": "fp32", **more,
    }  # fmt: skip
    return config.from_dict(tree, "here")


def test_the_fit_is_that_of_gradient_descent() -> None:
    torch.manual_seed(0)
    features, labels = 3 + 2 * torch.randn(60, 5), torch.randint(3, (60,))
    weight, bias = linear_probe.fit(features, labels, 3, penalty=0.05)
    standard = (features - features.mean(0)) / features.std(0, correction=0)
    slope, offset = torch.zeros(3, 5, requires_grad=True), torch.zeros(3, requires_grad=True)
    for _ in range(3000):
        loss = F.cross_entropy(standard @ slope.T + offset, labels) + 0.025 * slope.square().sum()
        for value, gradient in zip((slope, offset), torch.autograd.grad(loss, (slope, offset)), strict=True):
            value.data -= 0.5 * gradient
    expected = (standard @ slope.T + offset).detach()
    got = features @ weight.T + bias
    # a constant on all classes changes nothing
    torch.testing.assert_close(got.log_softmax(1), expected.log_softmax(1), rtol=1e-3, atol=1e-4)


def test_a_probe_is_a_teacher(shapes: Path, backbone: Path, tmp_path: Path) -> None:
    own, told = configuration(shapes, tmp_path, backbone), list[str]()
    first = linear_probe.probe(own, told.append)
    assert first.folder == tmp_path / "dino-probe"
    assert first.computed
    assert first.accuracy == max(first.tried.values())
    assert any("is replaced by a new one" in text for text in told)
    network = networks.load(first.folder)
    manifest = shards.load_manifest(shapes)
    assert network.mean == pytest.approx((0.485, 0.456, 0.406)), "what DINOv2 was trained with"
    # the head on the kept features says what the network says of the images
    kept = [linear_probe._kept(f) for f in first.folder.glob("features-*.safetensors")]
    assert sorted(len(k["labels"]) for k in kept if k) == [13, 110]
    held_out = min((k for k in kept if k), key=lambda k: len(k["labels"]))
    logits = network.model.get_classifier()(held_out["features"])  # type: ignore[operator]
    assert float((logits.argmax(1) == held_out["labels"]).float().mean()) == pytest.approx(first.accuracy)

    again = linear_probe.probe(own, told.append)
    assert not again.computed
    assert again.tried == first.tried
    (tmp_path / "student.yaml").write_text(f"""
data: {{batch: 32, shards: {shapes}}}
student: {{name: custom, patch: 4, options: {{embed_dim: 32, depth: 2, num_heads: 2}}}}
teacher: {{run: {first.folder}, renormalize: true}}
loss: {{kd: {{alpha: 1.0}}, saliency: {{gamma: 0.8}}}}
fixed: {{resolution: 16, epochs: 1}}
precision: fp32
out: {tmp_path}
""")
    done = irkd("train", str(tmp_path / "student.yaml"), "name=student")
    assert f"16 px {first.accuracy:.2%}" in done.stdout, "the run measures the same accuracy"
    refused = irkd(
        "train", str(tmp_path / "student.yaml"), "name=no", "teacher.renormalize=false", check=False
    )
    assert refused.returncode == 2
    assert "teacher.renormalize=true feeds it its own" in refused.stderr
    assert manifest.classes == network.classes


def test_a_backbone_without_a_head_teaches_features_and_attention(
    shapes: Path, backbone: Path, tmp_path: Path
) -> None:
    (tmp_path / "student.yaml").write_text(f"""
data: {{batch: 32, shards: {shapes}}}
student: {{name: custom, patch: 4, options: {{embed_dim: 32, depth: 2, num_heads: 2}}}}
teacher: {{logits: false, model: {{name: {NAME}, patch: 4, weights: {backbone}, options: {SMALL}}}}}
loss: {{features: {{beta: 1}}, saliency: {{gamma: 1, method: attention, taps: [last]}}}}
fixed: {{resolution: 16, epochs: 2}}
precision: fp32
track: {{log_every: 1}}
out: {tmp_path}
""")
    irkd("train", str(tmp_path / "student.yaml"), "name=student")
    told = losses(tmp_path / "student")
    assert all(e["features"] > 0 and e["saliency"] > 0 for e in told)
    assert "kd" not in told[0]
    assert told[-1]["features"] < told[0]["features"]
    result = evaluation.evaluate(tmp_path / "student", split="test")
    assert result["teacher"] == {}, "a feature is no answer"
    assert "teacher" not in result["confusion"]
    assert result["agreement"], "its attention is a map"
    irkd("train", str(tmp_path / "student.yaml"), "name=plain", "loss.saliency={gamma: 0, method: gradient}")
    probes = [e for e in read_events(tmp_path / "plain") if e["event"] == "probe"]
    assert all("gradients" in e and "correlation" not in e for e in probes), (
        "a feature has no saliency gradient"
    )
    result = evaluation.evaluate(tmp_path / "plain", split="test")
    assert result["agreement"] == {}
    assert any("the teacher has no logits" in note for note in result["notes"])
    for change, message in (
        ("loss.kd.alpha=1", "teacher.logits=false with loss.kd.alpha=1.0: a backbone without a head"),
        ("loss.saliency.method=gradient", "teacher.logits=false with loss.saliency.method=gradient"),
        (
            "teacher.logits=true",
            "its head head has no classes, the shards have 10; give it one of these by `irkd probe`",
        ),
    ):
        refused = irkd("train", str(tmp_path / "student.yaml"), "name=no", change, check=False)
        assert refused.returncode == 2
        assert message in refused.stderr


def test_a_probe_is_as_large_as_its_head_was_fitted(shapes: Path, backbone: Path, tmp_path: Path) -> None:
    stages = {"stages": [{"resolution": 8}, {"resolution": 16}], "epochs": 1}
    own = configuration(shapes, tmp_path, backbone, fixed=None, curriculum=stages)
    probed = linear_probe.probe(own)
    assert irkd_dist.load(probed.folder).size == 16


def test_what_cannot_be_probed(shapes: Path, backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"would start from random weights: give student\.weights, or pretrained"
    ):
        linear_probe.probe(configuration(shapes, tmp_path, None))
    cnn = {"name": "small_resnet", "weights": str(backbone)}
    with pytest.raises(UserError, match=r"student\.weights=.* does not fit SmallResNet"):
        linear_probe.probe(configuration(shapes, tmp_path, backbone, student=cnn))
