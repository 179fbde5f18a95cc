"""What each saliency method does with timm's families: docs/teachers.md says what is measured here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from irkd_dist.distill import models, saliency, taps
from irkd_dist.distill.module import Distiller, Objective
from irkd_dist.distill.teacher import Teacher, freeze
from irkd_dist.errors import UserError
from tests.distill import families

PAGE = Path(__file__).parents[2] / "docs" / "teachers.md"


def page_rows() -> dict[str, str]:
    text = PAGE.read_text()
    inside = text[text.index(families.BEGIN) : text.index(families.END)]
    lines = [line for line in inside.splitlines() if line.startswith("| ")][1:]
    return {line.split("|")[1].strip(): line for line in lines}


def test_the_page_has_every_family() -> None:
    assert [*page_rows()] == [f.title for f in families.FAMILIES]
    assert len(page_rows()) >= 25
    assert "WRONG" not in PAGE.read_text()


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda f: f.title)
def test_a_familys_row_is_what_is_measured(family: families.Family) -> None:
    assert families.row(family) == page_rows()[family.title]


def test_refusals_name_what_would_work() -> None:
    for title, method, message in (
        ("Swin", "attention", r"the student \(SwinTransformer\) has no class token; use gradient, grad_cam"),
        ("DINOv3", "attention", r"no attention layer with a joint qkv.*use gradient, grad_cam or hirescam"),
        ("TNT", "gradient", r"'blocks\.0' of TNT gives a tuple, no tensor; tap a module inside it"),
    ):
        family = next(f for f in families.FAMILIES if f.title == title)
        model = families.make(family)
        with pytest.raises(UserError, match=message):
            taps.tap_pairs(model, model, families.TAPS, method, sizes=(family.size, family.size))


def test_hieras_tokens_are_put_back_in_reading_order() -> None:
    """It keeps the tokens of a mask unit together: against timm's own intermediate features."""
    model = families.make(next(f for f in families.FAMILIES if f.title == "Hiera"))
    images = torch.randn(2, 3, 64, 64)
    _, (features,) = taps.tapped_forward(model, images, ["blocks.0"])
    ours, grid = taps.places.tokens(model, "blocks.0", features, (64, 64))
    (theirs,) = model.forward_intermediates(images, indices=[0], intermediates_only=True)  # type: ignore[operator]
    assert torch.equal(ours.transpose(1, 2).unflatten(2, grid), theirs)
    assert not torch.equal(features, ours), "they are in another order inside"


@pytest.mark.parametrize("patch", [4, 8, 16])
@pytest.mark.parametrize(("theirs", "side"), [(14, 112), (16, 64)])
def test_maps_of_other_grids_are_matched(theirs: int, patch: int, side: int) -> None:
    torch.manual_seed(0)
    small = {"embed_dim": 24, "depth": 2, "num_heads": 2}
    student = models.create_model("vit_tiny", classes=5, patch=patch, image_size=side, options=small)
    name = "vit_small_patch14_reg4_dinov2" if theirs == 14 else "deit3_small_patch16_224"
    network = models.create_model(name, classes=5, image_size=side, options=small)
    teacher = Teacher(freeze(network, None, True), ["blocks.0"], "gradient")
    models.without_fused_attention(student)
    images, labels = torch.randn(2, 3, side, side), torch.tensor([1, 2])
    said = teacher(images, labels, aligned=2)
    assert said.maps is not None
    assert said.maps[0].shape == (2, side // theirs, side // theirs)
    distiller = Distiller(student, Objective(taps=("blocks.0",)))
    weight = torch.full((2,), 0.5)
    got = distiller(images, labels, weight, said, 0.0, 1.0)["saliency"]
    _, (own,) = taps.forward_with_maps(student, images, ["blocks.0"], "gradient", labels, frozen=True)
    assert own.shape == (2, side // patch, side // patch)
    resized = F.interpolate(said.maps[0][:, None], size=own.shape[1:], mode="bilinear")[:, 0]
    expected = torch.zeros(())
    for mine, other in zip(own, resized, strict=True):
        a, b = ((m - m.min()) / (m.max() - m.min() + saliency.EPSILON) for m in (mine, other))
        expected = expected + (a - b).square().mean() / 2
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
