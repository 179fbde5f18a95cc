"""Models by name, and the places in them that saliency reads."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from irkd_dist.distill import models
from irkd_dist.distill.models import create_model
from irkd_dist.errors import UserError
from tests.distill import plain_vit as plain

# -- models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"), [("custom", 546_186), ("vit_tiny", 5_362_762), ("vit_small", 21_342_346)]
)
def test_parameter_counts_of_the_papers_models(name: str, count: int) -> None:
    """At patch 4 and 32 px; the counts are also those of the formula."""
    model = create_model(name, classes=10, patch=4, image_size=32)
    dim, depth, hidden = {"custom": (128, 4, 256), "vit_tiny": (192, 12, 768), "vit_small": (384, 12, 1536)}[
        name
    ]
    block = 4 * dim + 3 * dim * (dim + 1) + dim * (dim + 1) + hidden * (dim + 1) + dim * (hidden + 1)
    outside = dim * (4 * 4 * 3 + 1) + dim + (64 + 1) * dim + 2 * dim + 10 * (dim + 1)
    assert models.parameter_count(model) == depth * block + outside == count
    assert [model.blocks[0].attn.num_heads, len(model.blocks)] == [{128: 4, 192: 3, 384: 6}[dim], depth]  # type: ignore[index,union-attr]
    distilled = create_model(name, classes=10, patch=4, image_size=32, distilled=True)
    extra = dim + dim + 10 * (dim + 1)  # token, its position, its head
    assert models.parameter_count(distilled) == count + extra


@pytest.mark.parametrize("patch", [2, 4])
@pytest.mark.parametrize("distilled", [False, True])
def test_a_student_takes_every_resolution(patch: int, distilled: bool) -> None:
    model = create_model("custom", classes=3, patch=patch, image_size=32, distilled=distilled)
    assert models.patch_size(model) == patch
    assert models.is_distilled(model) == distilled
    for resolution in (12, 20, 32, 40):
        images = torch.randn(2, 3, resolution, resolution)
        output = model.train()(images)
        assert isinstance(output, tuple) == distilled
        assert models.inference_logits(output).shape == (2, 3)
        assert isinstance(model.eval()(images), Tensor), "one answer at inference"


def test_inference_logits_are_those_of_evaluation() -> None:
    model = plain.build("distilled", depth=2)
    images, _ = plain.inputs(2, 12, seed=1)
    torch.testing.assert_close(models.inference_logits(model.train()(images)), model.eval()(images))


def test_any_timm_model_by_name() -> None:
    model = create_model("test_resnet", classes=7, dropout=0.3)
    assert models.patch_size(model) is None
    assert not models.is_distilled(model)
    assert model.drop_rate == 0.3
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("resolution", [12, 16, 20])
def test_the_small_resnet_sees_every_resolution_at_its_own_size(resolution: int) -> None:
    resizing = create_model("small_resnet", classes=3, options={"size": 16}).eval()
    plain_one = create_model("small_resnet", classes=3).eval()
    plain_one.load_state_dict(resizing.state_dict())
    images = torch.randn(2, 3, resolution, resolution)
    resized = tvf.resize(images, [16, 16], InterpolationMode.BICUBIC, antialias=True)
    torch.testing.assert_close(resizing(images), plain_one(resized))


def test_dropout_and_drop_path_reach_the_network() -> None:
    small: dict[str, Any] = {"classes": 3, "patch": 4, "image_size": 16}
    model: Any = create_model("custom", **small, dropout=0.1, drop_path=0.2, options={"attn_drop_rate": 0.05})
    block = model.blocks[-1]
    assert [model.pos_drop.p, block.attn.proj_drop.p, block.mlp.drop1.p] == [0.1, 0.1, 0.1]
    assert [block.attn.attn_drop.p, block.drop_path1.drop_prob] == pytest.approx([0.05, 0.2])
    plainly: Any = create_model("custom", **small)
    assert plainly.pos_drop.p == 0
    assert isinstance(plainly.blocks[-1].drop_path1, nn.Identity)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "vit_tinny_patch16_224"},
            "no model is named 'vit_tinny_patch16_224'; did you mean vit_tiny",
        ),
        ({"name": "custum"}, "did you mean custom"),
        ({"name": "zzzz9"}, r"no model is named 'zzzz9'; `timm.list_models\(\)` has the names"),
        ({"name": "test_resnet", "patch": 4}, r"'test_resnet' takes no patch size \(patch=4\)"),
        ({"name": "test_resnet", "distilled": True}, "has no distillation token, but distilled=True"),
        ({"name": "deit_tiny_distilled_patch16_224"}, "has distillation token, but distilled=False"),
        ({"name": "custom", "options": {"embed_dims": 12}}, "timm cannot create .*embed_dims"),
        ({"name": "custom", "options": {"num_heads": 5}}, "timm cannot create .*num_heads"),
    ],
)
def test_what_cannot_be_created_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_model(classes=3, **arguments)


def test_load_weights_names_what_differs() -> None:
    model, other = plain.build("class_token", depth=2), plain.build("class_token", depth=2, seed=5)
    models.load_weights(model, other.state_dict(), "here")
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())
    wider = plain.build("class_token", depth=2, dim=24).state_dict()
    with pytest.raises(
        UserError, match=r"run/best does not fit VisionTransformer.*cls_token \(model \(1, 1, 16\), file"
    ):
        models.load_weights(model, wider, "run/best")
    with pytest.raises(UserError, match=r"1 entries differ: head\.bias \(model \(5,\), file none\)"):
        models.load_weights(model, {k: v for k, v in wider_to(model).items() if k != "head.bias"}, "run/best")
    with pytest.raises(UserError, match=r"1 entries differ: more \(model none, file \(1,\)\)"):
        models.load_weights(model, wider_to(model) | {"more": torch.ones(1)}, "run/best")


def wider_to(model: nn.Module) -> dict[str, Tensor]:
    return dict(copy.deepcopy(model).state_dict())
