"""Models by name, and the places in them that saliency reads."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from irkd_dist.distill import models, saliency
from irkd_dist.distill.models import create_model
from irkd_dist.distill.taps import Method, Tap, forward_with_maps, resolve_tap, tap_pairs, tapped_forward
from irkd_dist.errors import UserError
from tests.distill import plain_vit as plain

GRADIENT_METHODS = ("gradient", "grad_cam", "hirescam")


def paths(pairs: list[tuple[Tap, Tap]]) -> list[tuple[str, str]]:
    return [(s.path, t.path) for s, t in pairs]


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


def test_fused_attention_has_no_second_derivative_and_explicit_products_have() -> None:
    """Why `without_fused_attention` exists; both compute the same."""
    model = plain.build("class_token", depth=2, seed=2)
    images, target = plain.inputs(2, 12, seed=2)
    explicit = model(images)

    def backward() -> None:
        _, (m,) = forward_with_maps(model, images, ["blocks.0.norm1"], "gradient", target, frozen=False)
        m.sum().backward()

    backward()
    for block in model.blocks:
        block.attn.fused_attn = True
    torch.testing.assert_close(model(images), explicit)
    with pytest.raises(RuntimeError, match="derivative"):
        backward()
    models.without_fused_attention(model)
    assert not any(block.attn.fused_attn for block in model.blocks)
    backward()


# -- void taps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", [plain.SIZE, 12])
@pytest.mark.parametrize("head", ["class_token", "distilled"])
def test_patch_gradients_after_the_last_attention_are_exactly_zero(head: str, resolution: int) -> None:
    model = plain.build(head, depth=3, seed=3)
    images, target = plain.inputs(2, resolution, seed=3)
    taps = ["blocks.2", "norm", "blocks.2.mlp", "blocks.2.norm2", "blocks.2.attn"]
    alive = ["blocks.2.norm1", "blocks.1", "blocks.2.attn.qkv"]
    output, features = tapped_forward(model, images, taps + alive)
    gradients = saliency.feature_gradients(
        saliency.class_score(models.inference_logits(output), target), features, create_graph=False
    )
    prefix = 2 if head == "distilled" else 1
    for path, gradient in zip(taps + alive, gradients, strict=True):
        assert gradient[:, 0].abs().max() > 0, "the class token's own gradient is there"
        assert (gradient[:, prefix:].abs().max() == 0) == (path in taps), path


@pytest.mark.parametrize("method", GRADIENT_METHODS)
@pytest.mark.parametrize("head", plain.HEADS)
def test_exactly_the_taps_without_a_map_are_called_void(head: str, method: str) -> None:
    """Measured on images: the map is constant, or nothing but what is left of a sum that cancels."""
    depth = 3
    model = plain.build(head, depth, seed=4)
    images, target = plain.inputs(4, plain.SIZE, seed=4)
    blocks = [f"blocks.{i}{inside}" for i in range(depth) for inside in ("", ".norm1")]
    taps = [*blocks, "norm"]
    if head in ("class_token", "distilled"):  # every module inside the last block, by its path
        taps += [
            name for name, _ in model.named_modules() if name.startswith("blocks.2.") and _gives_tokens(name)
        ]
        assert {"blocks.2.ls2", "blocks.2.attn.qkv", "blocks.2.attn.proj"} <= set(taps)
    output, features = tapped_forward(model, images, taps)
    gradients = saliency.feature_gradients(
        saliency.class_score(models.inference_logits(output), target), features, create_graph=False
    )
    prefix = int(model.num_prefix_tokens)
    for path, feature, gradient in zip(taps, features, gradients, strict=True):
        a, g = feature[:, prefix:], gradient[:, prefix:]
        m = saliency.GRADIENT_MAPS[method](a, g).detach()
        weights = g.mean(1, keepdim=True) if method == "grad_cam" else g
        size = m if method == "gradient" else (weights * a).abs().sum(2).detach()
        spread = float((m.amax(1) - m.amin(1)).max() / size.max()) if size.max() else 0.0
        assert resolve_tap(model, path, method, "student").void == (spread < 1e-3), (path, spread)  # type: ignore[arg-type]
    named = {p for p in [*blocks, "norm"] if resolve_tap(model, p, method, "student").void}  # type: ignore[arg-type]
    assert named == set(plain.void_taps(head, method, depth))


def _gives_tokens(name: str) -> bool:
    """Modules of a block whose output is (B, T, D); the attention's inner ones are per head."""
    inside = name.split(".", 2)[2] if name.count(".") > 1 else ""
    return inside not in ("attn.q_norm", "attn.k_norm", "attn.attn_drop")


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("method", GRADIENT_METHODS)
@pytest.mark.parametrize("head", plain.HEADS)
def test_last(head: str, method: str, strict: bool) -> None:
    """The last block's norm1 where its output is void; `strict_paper` keeps the block, and calls it void."""
    model = plain.build(head, depth=3)
    tap = resolve_tap(model, "last", method, "student", strict_paper=strict)  # type: ignore[arg-type]
    void = "blocks.2" in plain.void_taps(head, method, 3)
    assert tap == (Tap("blocks.2", void) if strict or not void else Tap("blocks.2.norm1"))


def test_a_mean_pooled_models_last_block_is_not_void() -> None:
    assert resolve_tap(plain.build("mean"), "last", "gradient", "student") == Tap("blocks.2")
    for head in ("mean", "mean_fc_norm"):
        assert resolve_tap(plain.build(head), "last", "grad_cam", "student") == Tap("blocks.2")


def test_names_of_taps() -> None:
    model = plain.build("class_token", depth=4)
    resolved = {
        name: resolve_tap(model, name, "gradient", "student")
        for name in (
            "first",
            "second",
            "last",
            2,
            "2",
            "1.norm1",
            "3.norm1",
            3,
            "norm",
            "blocks.3",
            "pos_drop",
        )
    }
    assert {name: tap.path for name, tap in resolved.items()} == {
        "first": "blocks.0",
        "second": "blocks.1",
        "last": "blocks.3.norm1",
        2: "blocks.2",
        "2": "blocks.2",
        "1.norm1": "blocks.1.norm1",
        "3.norm1": "blocks.3.norm1",
        3: "blocks.3",
        "norm": "norm",
        "blocks.3": "blocks.3",
        "pos_drop": "pos_drop",
    }
    assert [name for name, tap in resolved.items() if tap.void] == [3, "norm", "blocks.3"]
    for name, path in (("first", 0), ("last", 3), (1, 1), ("2.norm1", 2)):
        assert resolve_tap(model, name, "attention", "student") == Tap(f"blocks.{path}.attn.qkv")


# -- pairs -------------------------------------------------------------------------------------------


def test_all_pairs_in_proportion() -> None:
    student, teacher = plain.build("class_token", depth=4), plain.build("class_token", depth=12)
    assert paths(tap_pairs(student, teacher, "all", "gradient")) == [
        ("blocks.0", "blocks.0"),
        ("blocks.1", "blocks.4"),  # 11 / 3 = 3.67
        ("blocks.2", "blocks.7"),  # 22 / 3 = 7.33
        ("blocks.3.norm1", "blocks.11.norm1"),
    ]
    strict = tap_pairs(student, teacher, "all", "gradient", strict_paper=True)
    assert strict[-1] == (Tap("blocks.3", True), Tap("blocks.11", True))
    assert paths(tap_pairs(teacher, student, "all", "attention"))[::4] == [
        ("blocks.0.attn.qkv", "blocks.0.attn.qkv"),
        ("blocks.4.attn.qkv", "blocks.1.attn.qkv"),
        ("blocks.8.attn.qkv", "blocks.2.attn.qkv"),
    ]
    equal = paths(tap_pairs(student, student, "all", "gradient"))
    assert all(s == t for s, t in equal)


def test_pairs_by_name_by_number_and_as_written() -> None:
    student, teacher = plain.build("class_token", depth=4), plain.build("mean", depth=12)
    assert paths(tap_pairs(student, teacher, ["first", "second", "last"], "gradient")) == [
        ("blocks.0", "blocks.0"),
        ("blocks.1", "blocks.1"),
        ("blocks.3.norm1", "blocks.11"),
    ]
    assert paths(tap_pairs(student, teacher, [0, 2], "gradient")) == [
        ("blocks.0", "blocks.0"),
        ("blocks.2", "blocks.7"),
    ]
    three = tap_pairs(student, teacher, [3], "gradient")  # the notebooks' 0, 2, 3 names the block itself
    assert three == [(Tap("blocks.3", void=True), Tap("blocks.11"))]
    assert paths(
        tap_pairs(student, teacher, [["first", 5], [2, "last"], ["1.norm1", "norm"]], "gradient")
    ) == [
        ("blocks.0", "blocks.5"),
        ("blocks.2", "blocks.11"),
        ("blocks.1.norm1", "norm"),
    ]


def test_a_single_block_student_pairs_with_the_first_block() -> None:
    student, teacher = plain.build("mean", depth=1), plain.build("mean", depth=3)
    assert paths(tap_pairs(student, teacher, [0], "gradient")) == [("blocks.0", "blocks.0")]


def test_pairs_with_a_convolutional_teacher() -> None:
    student, teacher = plain.build("class_token", depth=3), create_model("test_resnet", classes=5)
    pairs = tap_pairs(student, teacher, [["first", "layer1"], ["last", "layer2"]], "gradient")
    assert pairs == [(Tap("blocks.0"), Tap("layer1")), (Tap("blocks.2.norm1"), Tap("layer2"))]
    for spec in ("all", ["first"], [1]):
        with pytest.raises(
            UserError, match="needs a teacher with blocks, and ResNet has none: pair taps by module path"
        ):
            tap_pairs(student, teacher, spec, "gradient")
    with pytest.raises(
        UserError, match=r"reads the class token's attention row, and the teacher \(ResNet\) has no"
    ):
        tap_pairs(student, teacher, [["first", "layer1"]], "attention")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("last", r"saliency\.taps='last': give a list such as \[first, second, last\], or all"),
        ([["first"]], r"\['first'\] is not a pair \[student tap, teacher tap\]"),
        ([[0, 1, 2]], "is not a pair"),
        ([4], "4: the student has blocks 0 to 3"),
        ([[0, 12]], "12: the teacher has blocks 0 to 11"),
        (["12.norm1"], "'12.norm1': the student has blocks 0 to 3"),
        ([-1], "the student has no module '-1'; it has patch_embed,"),
        (["frist"], "the student has no module 'frist'; it has patch_embed,"),
        ([["first", "blocks.12"]], "the teacher has no module 'blocks.12'"),
        (["cls_token"], "the student has no module 'cls_token'"),  # a parameter, not a module
        (["patch_embed"], "student VisionTransformer.PatchEmbed: features in NHWC layout are not supported"),
    ],
)
def test_bad_taps_are_named(spec: str | list[Any], message: str) -> None:
    student, teacher = plain.build("class_token", depth=4), plain.build("class_token", depth=12)
    with pytest.raises(UserError, match=message):
        tap_pairs(student, teacher, spec, "gradient")


# -- where a method is not defined -------------------------------------------------------------------


def test_attention_needs_a_class_token() -> None:
    with pytest.raises(
        UserError, match=r"the student \(VisionTransformer\) has no class token; use gradient"
    ):
        resolve_tap(plain.build("mean"), "first", "attention", "student")
    kept = plain.build("mean_fc_norm")  # pools the patches, but has the token
    assert resolve_tap(kept, "first", "attention", "student") == Tap("blocks.0.attn.qkv")
    with pytest.raises(UserError, match=r"'norm' of the student is no attention layer"):
        resolve_tap(kept, "norm", "attention", "student")


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_attention_with_positions_inside_is_refused(name: str) -> None:
    """Their rows are not the softmax of q k alone."""
    model = timm.create_model(name, img_size=28, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    with pytest.raises(UserError, match="of the teacher is no attention layer with a joint qkv"):
        resolve_tap(model, "blocks.0.attn.qkv", "attention", "teacher")


def test_features_in_nhwc_are_refused_by_name() -> None:
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, embed_dim=8, depths=(1, 1), num_heads=(1, 1), num_classes=3
    )  # fmt: skip
    for path in ("layers.0", "layers.1.blocks.0"):
        with pytest.raises(UserError, match=r"teacher SwinTransformer\.\w+: features in NHWC layout"):
            resolve_tap(swin, path, "gradient", "teacher")


# -- the tapped forward ------------------------------------------------------------------------------


def test_tapped_forward_keeps_the_order_and_leaves_no_hook() -> None:
    model = plain.build("class_token", depth=3)
    images, _ = plain.inputs(2, 12, seed=5)
    asked = ["norm", "blocks.0", "blocks.2.norm1", "blocks.0"]
    output, features = tapped_forward(model, images, asked)
    assert torch.equal(output, model(images))  # type: ignore[arg-type]
    assert features[1] is features[3]
    for i in range(2):
        seen = plain.forward(model, images[i])[1]
        for path, feature in zip(asked, features, strict=True):
            torch.testing.assert_close(feature[i], seen[path])
    with pytest.raises(RuntimeError):
        tapped_forward(model, images[:, :1], asked)
    assert not any(module._forward_hooks for module in model.modules()), "not after an error either"


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_a_tap_asked_twice_is_given_twice(method: Method) -> None:
    model = plain.build("class_token", depth=2)
    images, target = plain.inputs(2, 12, seed=6)
    once = forward_with_maps(model, images, ["blocks.0.norm1"], method, target, frozen=False)[1]
    twice = forward_with_maps(model, images, ["blocks.0.norm1"] * 2, method, target, frozen=False)[1]
    assert torch.equal(twice[0], once[0])
    assert torch.equal(twice[1], once[0])


@pytest.mark.parametrize(("head", "method"), plain.DEFINED)
def test_frozen_maps_equal_the_trained_ones(head: str, method: Method) -> None:
    """The frozen path starts its graph at the first tap, whatever the order of the taps."""
    model = plain.build(head, depth=3)
    images, target = plain.inputs(2, 12, seed=7)
    taps = plain.all_taps(head, method, 3)[::-1]
    output, maps = forward_with_maps(model, images, taps, method, target, frozen=False)
    assert all(m.requires_grad for m in maps)
    model.requires_grad_(False)
    frozen_output, frozen = forward_with_maps(model, images, taps, method, target, frozen=True)
    torch.testing.assert_close(
        models.inference_logits(frozen_output), models.inference_logits(output).detach()
    )
    for a, b in zip(frozen, maps, strict=True):
        assert not a.requires_grad
        torch.testing.assert_close(a, b.detach())
