"""Taps: the places in a model that saliency reads, and the forward that gives maps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from irkd_dist.distill import methods, models, places, saliency, taps
from irkd_dist.distill.models import create_model
from irkd_dist.distill.taps import Tap, forward_with_maps, resolve_tap, tap_pairs, tapped_forward
from irkd_dist.errors import UserError
from tests.distill import plain_vit as plain

GRADIENT_METHODS = ("gradient", "grad_cam", "hirescam")


def paths(pairs: list[tuple[Tap, Tap]]) -> list[tuple[str, str]]:
    return [(s.path, t.path) for s, t in pairs]


# -- void taps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", [plain.SIZE, 12])
@pytest.mark.parametrize("head", ["class_token", "distilled"])
def test_patch_gradients_after_the_last_attention_are_exactly_zero(head: str, resolution: int) -> None:
    model = plain.build(head, depth=3, seed=3)
    images, target = plain.inputs(2, resolution, seed=3)
    tapped = ["blocks.2", "norm", "blocks.2.mlp", "blocks.2.norm2", "blocks.2.attn"]
    alive = ["blocks.2.norm1", "blocks.1", "blocks.2.attn.qkv"]
    output, features = tapped_forward(model, images, tapped + alive)
    gradients = taps.feature_gradients(
        saliency.class_score(models.inference_logits(output), target),
        features,
        tapped + alive,
        create_graph=False,
    )
    prefix = 2 if head == "distilled" else 1
    for path, gradient in zip(tapped + alive, gradients, strict=True):
        assert gradient[:, 0].abs().max() > 0, "the class token's own gradient is there"
        assert (gradient[:, prefix:].abs().max() == 0) == (path in tapped), path


@pytest.mark.parametrize("method", GRADIENT_METHODS)
@pytest.mark.parametrize("head", plain.HEADS)
def test_exactly_the_taps_without_a_map_are_called_void(head: str, method: str) -> None:
    """Measured on images: the map is constant, or nothing but what is left of a sum that cancels."""
    depth = 3
    model = plain.build(head, depth, seed=4)
    images, target = plain.inputs(4, plain.SIZE, seed=4)
    blocks = [f"blocks.{i}{inside}" for i in range(depth) for inside in ("", ".norm1")]
    tapped = [*blocks, "norm"]
    if head in ("class_token", "distilled"):  # every module inside the last block, by its path
        tapped += [
            name for name, _ in model.named_modules() if name.startswith("blocks.2.") and _gives_tokens(name)
        ]
        assert {"blocks.2.ls2", "blocks.2.attn.qkv", "blocks.2.attn.proj"} <= set(tapped)
    output, features = tapped_forward(model, images, tapped)
    gradients = taps.feature_gradients(
        saliency.class_score(models.inference_logits(output), target), features, tapped, create_graph=False
    )
    prefix = int(model.num_prefix_tokens)
    for path, feature, gradient in zip(tapped, features, gradients, strict=True):
        a, g = feature[:, prefix:], gradient[:, prefix:]
        m = methods.load(method).saliency_map(a, g).detach()
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
    assert paths(tap_pairs(student, teacher, "all", "grad_cam")) == [
        ("blocks.0", "layer1"),
        ("blocks.1", "layer3"),  # 3 / 2 = 1.5
        ("blocks.2.norm1", "layer4"),
    ]
    assert paths(tap_pairs(student, teacher, ["first", "last"], "gradient")) == [
        ("blocks.0", "layer1"),
        ("blocks.2.norm1", "layer3"),  # a mean alone follows layer4
    ]
    with pytest.raises(
        UserError,
        match="needs a teacher with blocks or stages, and Linear names none: pair taps by module path",
    ):
        tap_pairs(student, nn.Linear(1, 1), ["first"], "gradient")
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
        ([-1], "-1: the student has blocks 0 to 3"),
        ([10**400], "the student has blocks 0 to 3"),
        (["frist"], "the student has no module 'frist'; it has patch_embed,"),
        ([["first", "blocks.12"]], "the teacher has no module 'blocks.12'"),
        (["cls_token"], "the student has no module 'cls_token'"),  # a parameter, not a module
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
    with pytest.raises(UserError, match="has no attention layer with a joint qkv; use gradient, grad_cam or"):
        resolve_tap(model, "blocks.0.attn.qkv", "attention", "teacher")


# -- the tapped forward ------------------------------------------------------------------------------


def test_tapped_forward_keeps_the_order_and_nothing_afterwards() -> None:
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
    points = taps.put_taps(model, asked)
    assert len(points) == 3
    assert not any(point.open or point.kept is not None for point in points.values()), (
        "not after an error either"
    )


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_a_tap_asked_twice_is_given_twice(method: str) -> None:
    model = plain.build("class_token", depth=2)
    images, target = plain.inputs(2, 12, seed=6)
    once = forward_with_maps(model, images, ["blocks.0.norm1"], method, target, frozen=False)[1]
    twice = forward_with_maps(model, images, ["blocks.0.norm1"] * 2, method, target, frozen=False)[1]
    assert torch.equal(twice[0], once[0])
    assert torch.equal(twice[1], once[0])


@pytest.mark.parametrize(("head", "method"), plain.DEFINED)
def test_frozen_maps_equal_the_trained_ones(head: str, method: str) -> None:
    """The frozen path starts its graph at the first tap, whatever the order of the taps."""
    model = plain.build(head, depth=3)
    images, target = plain.inputs(2, 12, seed=7)
    tapped = plain.all_taps(head, method, 3)[::-1]
    output, maps = forward_with_maps(model, images, tapped, method, target, frozen=False)
    assert all(m.requires_grad for m in maps)
    model.requires_grad_(False)
    frozen_output, frozen = forward_with_maps(model, images, tapped, method, target, frozen=True)
    torch.testing.assert_close(
        models.inference_logits(frozen_output), models.inference_logits(output).detach()
    )
    for a, b in zip(frozen, maps, strict=True):
        assert not a.requires_grad
        torch.testing.assert_close(a, b.detach())


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


# -- tap points ------------------------------------------------------------------------------------------


def test_tap_points_change_neither_names_nor_copies() -> None:
    model = plain.build("class_token", depth=2)
    images, _ = plain.inputs(2, 12, seed=8)
    names, modules = list(model.state_dict()), [n for n, _ in model.named_modules()]
    first = taps.put_taps(model, ["blocks.0", "norm"])["blocks.0"]
    assert taps.put_taps(model, ["blocks.0"])["blocks.0"] is first, "once"
    assert list(model.state_dict()) == names
    assert [n for n, _ in model.named_modules()] == modules
    other = copy.deepcopy(model)
    assert taps.put_taps(other, [])["blocks.0"] is not first
    plain.randomise(other, seed=9)
    for m in (model, other):
        _, (feature,) = tapped_forward(m, images, ["blocks.0"])
        torch.testing.assert_close(feature[0], plain.forward(m, images[0])[1]["blocks.0"])
    assert len(model.get_submodule("blocks.0")._forward_hooks) == 1


class Aside(nn.Module):
    """A ViT's block list and a module beside it whose output no logit reads."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = plain.build("class_token", depth=2)
        self.aside, self.never, self.constant = nn.Identity(), nn.Identity(), nn.Identity()
        self.num_prefix_tokens = 1

    def forward(self, images: Tensor) -> Tensor:
        self.aside(self.vit.patch_embed(images).flatten(1, 2))
        self.constant(torch.ones(len(images), 9, 4))
        return self.vit(images)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_a_missing_gradient_is_an_error_that_names_the_tap(method: str, frozen: bool) -> None:
    model = Aside().requires_grad_(not frozen)
    images, target = plain.inputs(2, 12, seed=9)
    for tapped in (["vit.blocks.0", "aside"], ["aside"], ["aside", "vit.blocks.0"], ["constant"]):
        wrong = "constant" if "constant" in tapped else "aside"
        with pytest.raises(UserError, match=f"score does not depend on the output of '{wrong}'"):
            forward_with_maps(model, images, tapped, method, target, frozen=frozen)
    with pytest.raises(UserError, match="Aside does not call its module 'never'"):
        forward_with_maps(model, images, ["vit.blocks.0", "never"], method, target, frozen=frozen)
    with pytest.raises(UserError, match=r"'vit.head' gives \(2, 5\), no patch tokens and no grid"):
        forward_with_maps(model, images, ["vit.head"], method, target, frozen=frozen)


# -- grids -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(12, 20), (16, 8), (12, 12)])
def test_a_grid_has_the_images_shape(height: int, width: int) -> None:
    model = plain.build("class_token", depth=2)
    draws = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, height, width, generator=draws, dtype=torch.float64)
    for method, path in (("gradient", "blocks.0"), ("attention", "blocks.0.attn.qkv")):
        _, (m,) = forward_with_maps(model, images, [path], method, torch.tensor([0, 1]), frozen=False)
        assert m.shape == (2, height // 4, width // 4)


@pytest.mark.parametrize(
    ("tokens", "size", "grid"),
    [
        (12, (30, 40), (3, 4)),
        (9, (17, 17), (3, 3)),
        (1, (8, 8), (1, 1)),
        (12, (32, 32), None),
        (0, (8, 8), None),
    ],
)
def test_tokens_of_a_model_without_patches(
    tokens: int, size: tuple[int, int], grid: tuple[int, int] | None
) -> None:
    if grid is not None:
        assert places.token_grid(nn.Identity(), "stage", tokens, size) == grid
        return
    with pytest.raises(
        UserError, match=rf"'stage' gives {tokens} patch tokens, which form no grid on images of"
    ):
        places.token_grid(nn.Identity(), "stage", tokens, size)


def swin() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, embed_dim=8, depths=(1, 1), num_heads=(1, 1), num_classes=3
    ).double().eval()  # fmt: skip


@pytest.mark.parametrize("method", GRADIENT_METHODS)
@pytest.mark.parametrize(
    ("path", "channels", "grid"),
    [("layers.0", 8, 14), ("layers.1.blocks.0", 16, 7), ("norm", 16, 7), ("patch_embed.proj", 8, 14)],
)
def test_channels_last_are_recognised(path: str, channels: int, grid: int, method: str) -> None:
    """Swin's stages give (B, h, w, D), its first convolution (B, D, h, w)."""
    model = swin()
    # a mean alone follows the final norm, a norm alone the first convolution
    void = (path, method) in (("norm", "gradient"), ("patch_embed.proj", "hirescam"))
    assert resolve_tap(model, path, method, "student") == Tap(path, void)
    draws = torch.Generator().manual_seed(2)
    images, target = torch.randn(2, 3, 56, 56, generator=draws, dtype=torch.float64), torch.tensor([0, 2])
    output, (features,) = tapped_forward(model, images, [path])
    assert isinstance(output, Tensor)
    (gradient,) = torch.autograd.grad(output.gather(1, target[:, None]).sum(), features)
    if features.shape[1] == channels:
        features, gradient = features.permute(0, 2, 3, 1), gradient.permute(0, 2, 3, 1)
    assert features.shape == (2, grid, grid, channels)
    expected = {
        "gradient": gradient.abs().amax(3),
        "grad_cam": (gradient.mean((1, 2), keepdim=True) * features).sum(3).relu(),
        "hirescam": (gradient * features).sum(3).relu(),
    }[method]
    _, (m,) = forward_with_maps(model, images, [path], method, target, frozen=False)
    torch.testing.assert_close(m, expected)


def test_channels_last_inside_a_model_of_channels_first() -> None:
    """ConvNeXt's stages are (B, D, h, w), the MLP inside its blocks (B, h, w, D)."""
    model = create_model("test_convnext", classes=3).eval()
    images = torch.randn(2, 3, 96, 96)
    for path, last in (
        ("stages.0", False),
        ("stages.0.blocks.0.mlp", True),
        ("stages.0.blocks.0.conv_dw", False),
    ):
        _, (feature,) = tapped_forward(model, images, [path])
        point = taps.put_taps(model, [])[path]
        assert point.is_channels_last(feature.shape) == last
        _, (m,) = forward_with_maps(model, images, [path], "grad_cam", torch.tensor([0, 1]), frozen=False)
        assert m.shape == (2, 24, 24), path
