"""The probe before a stage: taps without a map to align are named, and refused where all are."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from irkd_dist.distill import models, probe
from irkd_dist.distill.measure import TappedModel
from irkd_dist.distill.teacher import Teacher, freeze
from irkd_dist.errors import UserError
from tests.distill import plain_vit as plain

METHODS = ("gradient", "grad_cam", "hirescam")


def resnet(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return plain.randomise(models.create_model("test_resnet", classes=plain.CLASSES).double(), seed).eval()


def run(
    student: nn.Module,
    ours: list[str],
    network: nn.Module,
    theirs: list[str],
    method: str = "gradient",
    size: int = 32,
) -> list[probe.Probed]:
    images, labels = plain.inputs(4, size, seed=1)
    teacher = Teacher(freeze(network, None, True), theirs, method)
    return probe.probe(TappedModel(student, ours, method), teacher, images, labels, images)


@pytest.mark.parametrize("method", METHODS)
def test_a_grid_of_one_by_one_is_flat_and_what_works_is_named(method: str) -> None:
    """ResNet's layer4 at 32 px."""
    ours, theirs = resnet(1), resnet(2)
    found = run(ours, ["layer4"], theirs, ["layer4"], method)
    assert [p.verdict for p in found] == ["flat"]
    assert found[0].why == "the student's layer4 has a grid of 1 x 1 at this resolution"
    line = probe.complaint(found, ours, theirs, 32)
    assert re.search(r"\[layer4, layer4\] is flat.* of the student use layer3 or a module before it", line)
    found = run(ours, ["layer2", "layer4"], theirs, ["layer2", "layer3"], method)
    assert [p.verdict for p in found] == ["fine", "flat"]
    line = probe.complaint(found, ours, theirs, 32)
    assert line.startswith(
        "saliency.taps at 32 px: [layer4, layer3] is flat: the student's layer4 has a grid of 1 x 1"
    )
    (larger,) = run(ours, ["layer4"], theirs, ["layer4"], method, size=64)
    assert larger.verdict == ("flat" if method == "gradient" else "fine"), "all it feeds is a mean"
    if method == "gradient":
        assert larger.why == "every map of the student's layer4 is flat"
        assert probe.complaint([larger], ours, theirs, 64).endswith(
            "of the student use layer3 or a module before it"
        )
    mixed = run(plain.build("class_token", 2), ["blocks.0"], theirs, ["layer4"], method)
    assert mixed[0].why == "the teacher's layer4 has a grid of 1 x 1 at this resolution"
    assert ours.training is False


def test_fine_taps_have_nothing_said_of_them() -> None:
    ours, theirs = plain.build("distilled", 3, seed=1).train(), plain.build("class_token", 3, seed=2)
    for method in plain.METHODS:
        inside = ".attn.qkv" if method == "attention" else ""
        taps = [f"blocks.0{inside}", f"blocks.1{inside or '.norm1'}"]
        found = run(ours, taps, theirs, taps, method, size=12)
        assert [p.verdict for p in found] == ["fine", "fine"]
        assert probe.complaint(found, ours, theirs, 12) == ""
    assert ours.training, "the mode is put back"
    assert all(p.requires_grad for p in ours.parameters())


def test_the_papers_last_tap_is_flat() -> None:
    ours, theirs = plain.build("class_token", 2, seed=1), plain.build("class_token", 2, seed=2)
    found = run(ours, ["blocks.0", "blocks.1"], theirs, ["blocks.0", "blocks.1"], size=12)
    assert [p.verdict for p in found] == ["fine", "flat"]
    line = probe.complaint(found[1:], ours, theirs, 12)
    assert "every map of the student's blocks.1 is flat; of the student use last or a lower" in line


def test_a_missing_gradient_is_void_and_does_not_hide_the_others() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit, self.aside = plain.build("class_token", 2), nn.Identity()
            self.num_prefix_tokens = 1

        def forward(self, images: Tensor) -> Tensor:
            self.aside(self.vit.patch_embed(images).flatten(1, 2))
            return self.vit(images)

    teacher = plain.build("class_token", 2, seed=2)
    found = run(Aside(), ["aside", "vit.blocks.0"], teacher, ["blocks.0", "blocks.0"], size=12)
    assert [p.verdict for p in found] == ["void", "fine"]
    assert "the student's class score does not depend on aside" in probe.complaint(
        found, Aside(), teacher, 12
    )


def test_nan_is_reported_as_such() -> None:
    ours, theirs = plain.build("class_token", 2, seed=1), plain.build("class_token", 2, seed=2)
    with torch.no_grad():
        theirs.blocks[1].mlp.fc1.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"the teacher's logits are not finite on real images"):
        run(ours, ["blocks.0"], theirs, ["blocks.0"], size=12)
    broken: Any = probe.Probed(
        "a", "b", "not finite", "teacher", "the map of the teacher's b has NaN or infinity"
    )
    fine = probe.Probed("c", "d", "fine")
    line = probe.complaint([fine, broken], ours, theirs, 12)
    assert "[a, b] is not finite: the map of the teacher's b has NaN" in line


def test_a_head_that_starts_at_zero_is_not_judged_yet() -> None:
    ours, theirs = plain.build("class_token", 2, seed=1), plain.build("class_token", 2, seed=2)
    with torch.no_grad():
        ours.head.weight.zero_()
    assert run(ours, ["blocks.0"], theirs, ["blocks.0"], size=12)[0].verdict == "fine"


def test_what_is_flat_by_its_weights_alone_gets_a_shape_when_they_are_shaken() -> None:
    """Residual branches that begin at zero, against a tap that only a mean follows."""
    torch.manual_seed(0)
    young = models.create_model("resnet10t", classes=plain.CLASSES, options={"channels": [8, 8, 8, 8]})
    images, labels = plain.inputs(4, 16, seed=1)
    teacher = Teacher(freeze(resnet(2).float(), None, True), ["layer1", "layer1"], "gradient")
    images = images.float()
    for model, verdicts in ((young, ["flat", "flat"]), (probe.shaken(young), ["fine", "flat"])):
        found = probe.probe(
            TappedModel(model, ["layer2", "layer4"], "gradient"), teacher, images, labels, images
        )
        assert [p.verdict for p in found] == verdicts
