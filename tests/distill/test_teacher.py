"""The frozen teacher: what it says, and that nothing of it ever changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from irkd_dist.distill import models, saliency
from irkd_dist.distill.module import Distiller, Objective
from irkd_dist.distill.taps import put_taps
from irkd_dist.distill.teacher import Teacher, competence, freeze
from irkd_dist.errors import UserError
from tests.distill import plain_vit as plain

CONVOLUTIONAL = {"test_resnet": ["layer1", "layer2"], "test_convnext": ["stages.0", "stages.1"]}
NAMES = ["vit", *CONVOLUTIONAL]
SIZE = 32  # the convolutional models divide it by 32


def network(name: str) -> Any:
    """A tiny fp64 model with running statistics and biases that are not those of a new one."""
    if name == "vit":
        return plain.build("class_token", depth=2, seed=30)
    torch.manual_seed(31)
    model = models.create_model(name, classes=plain.CLASSES).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    head: nn.Module = model.fc if name == "test_resnet" else model.head.fc  # type: ignore[union-attr,assignment]
    plain.randomise(head, 32)
    return model


def paths_of(name: str) -> list[str]:
    return CONVOLUTIONAL.get(name, ["blocks.0", "blocks.1.norm1"])


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# -- it never changes --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_weights_mode_and_statistics_never_change(name: str) -> None:
    """Through many training steps of a student with every term, the teacher stays bitwise what it was."""
    model = network(name).train().requires_grad_(True)
    before = snapshot(model)
    teacher = Teacher(freeze(model, None, inner_gradient=True), paths_of(name), "gradient")
    student = plain.build("distilled", depth=2, seed=33).train()
    module = Distiller(student, Objective(taps=("blocks.0", "blocks.1.norm1"))).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    start = snapshot(student)
    for step in range(4):
        images, target = plain.inputs(3, SIZE, seed=40 + step, soft=step % 2 == 1)
        targets = teacher(images, target, aligned=2 + step % 2)
        terms = module(images, target, torch.full((3,), 1 / 3), targets, 0.5, 0.8)
        optimizer.zero_grad()
        terms["total"].backward()
        optimizer.step()
        assert targets.logits is not None
        assert targets.maps is not None
        for value in (targets.logits, *targets.maps):
            assert not value.requires_grad
            assert value.grad_fn is None
    assert any(not torch.equal(start[k], v) for k, v in student.state_dict().items())
    after = model.state_dict()
    assert before.keys() == after.keys()
    for key in before:
        assert torch.equal(before[key], after[key]), key
    assert not any(m.training for m in model.modules())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any(point.open or point.kept is not None for point in put_taps(model, []).values())
    assert not set(module.state_dict()) - {f"student.{k}" for k in student.state_dict()}
    held = {id(p) for p in model.parameters()}
    assert not held & {id(p) for p in module.parameters()}


@pytest.mark.parametrize("method", plain.METHODS)
def test_call_under_no_grad_is_the_same(method: str) -> None:
    paths = plain.all_taps("class_token", method, 2)[:1]
    teacher = Teacher(freeze(network("vit"), None, True), paths, method)  # type: ignore[arg-type]
    images, target = plain.inputs(2, plain.SIZE, seed=3)
    with torch.no_grad():
        inside = teacher(images, target, 2)
    outside = teacher(images, target, 2)
    assert inside.maps is not None
    assert outside.maps is not None
    assert torch.equal(inside.maps[0], outside.maps[0])
    assert inside.maps[0].abs().max() > 0


# -- what it says ------------------------------------------------------------------------------------


def test_what_is_asked_is_what_is_given() -> None:
    teacher = Teacher(freeze(network("vit"), None, True), paths_of("vit"), "gradient")
    images, target = plain.inputs(3, plain.SIZE, seed=1)
    nothing = teacher(images, target, aligned=0, logits=False)
    assert nothing.logits is None
    assert nothing.maps is None
    logits = teacher(images, target).logits
    assert logits is not None
    for i in range(3):
        torch.testing.assert_close(logits[i], plain.forward(teacher.model, images[i])[0][0])
    assert teacher(images, target).maps is None
    maps_only = teacher(images, target, aligned=2, logits=False)
    assert maps_only.logits is None
    assert maps_only.maps is not None
    assert [len(m) for m in maps_only.maps] == [2, 2]
    for aligned in (1, 2, 3):
        torch.testing.assert_close(teacher(images, target, aligned=aligned).logits, logits)


def test_a_distilled_teacher_says_the_mean_of_its_heads() -> None:
    model = plain.build("distilled", depth=2, seed=34)
    images, target = plain.inputs(2, 12, seed=2)
    for aligned in (0, 1, 2):
        logits = Teacher(freeze(model, None, True), ["blocks.0"], "gradient")(images, target, aligned).logits
        assert logits is not None
        for i in range(2):
            torch.testing.assert_close(logits[i], sum(plain.forward(model, images[i])[0]) / 2)


@pytest.mark.parametrize("method", ["gradient", "grad_cam", "hirescam"])
@pytest.mark.parametrize("name", list(CONVOLUTIONAL))
def test_convolutional_teacher_equals_plain_autograd(name: str, method: str) -> None:
    """One image at a time, stages by hand, (1, D, h, w) maps; then aligned with a ViT's patch grid."""
    model = freeze(network(name), None, True)
    images, target = plain.inputs(2, SIZE, seed=5)
    teacher = Teacher(model, CONVOLUTIONAL[name], method)  # type: ignore[arg-type]
    targets = teacher(images, target, 2)
    assert targets.maps is not None
    assert targets.logits is not None
    for i in range(2):
        logits, stages = stages_by_hand(name, model, images[i : i + 1].clone().requires_grad_())
        torch.testing.assert_close(targets.logits[i], logits[0].detach())
        for m, features in zip(targets.maps, stages, strict=True):
            (gradient,) = torch.autograd.grad(logits[0, target[i]], features, retain_graph=True)
            gradient, features = gradient[0], features[0].detach()
            if method == "gradient":
                expected = gradient.abs().amax(0)
            elif method == "grad_cam":
                expected = (gradient.mean((1, 2), keepdim=True) * features).sum(0).clamp(min=0)
            else:
                expected = (gradient * features).sum(0).clamp(min=0)
            torch.testing.assert_close(m[i], expected, rtol=1e-8, atol=1e-12)

    student = plain.build("class_token", depth=2, seed=35)
    module = Distiller(student, Objective(method=method, taps=("blocks.0.norm1", "blocks.1.norm1")))  # type: ignore[arg-type]
    terms = module(images, target, torch.full((2,), 0.5), targets, 0.0, 1.0)
    expected_loss = 0.0
    for i in range(2):
        ours = plain.maps(student, images[i], target[i], ["blocks.0.norm1", "blocks.1.norm1"], method)
        expected_loss += (
            float(plain.loss(ours, [m[i].flatten() for m in targets.maps], "minmax").detach()) / 2
        )
    assert terms["saliency"].item() == pytest.approx(expected_loss, rel=1e-8)
    assert expected_loss > 0


def stages_by_hand(name: str, model: Any, image: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits and the outputs of the first two stages."""
    if name == "test_resnet":
        x = model.maxpool(model.act1(model.bn1(model.conv1(image))))
        first = model.layer1(x)
        second = model.layer2(first)
        return model.fc(model.layer4(model.layer3(second)).mean((2, 3))), [first, second]
    first = model.stages[0](model.stem(image))
    second = model.stages[1](first)
    x = second
    for stage in model.stages[2:]:
        x = stage(x)
    return model.head(model.norm_pre(x)), [first, second]


def test_renormalize_gives_the_teacher_its_own_input() -> None:
    """Pixels normalised as the student's reach the teacher as if normalised with its own numbers."""
    draws = torch.Generator().manual_seed(6)
    pixels = torch.rand(2, 3, plain.SIZE, plain.SIZE, generator=draws, dtype=torch.float64)
    ours_mean, ours_std, mean, std = (
        torch.tensor(v, dtype=torch.float64).view(3, 1, 1)
        for v in ([0.49, 0.48, 0.45], [0.25, 0.24, 0.26], [0.5, 0.4, 0.3], [0.1, 0.2, 0.3])
    )
    target = torch.tensor([0, 3])
    model = freeze(network("vit"), None, True)
    renormalize = (ours_std / std, (ours_mean - mean) / std)
    got = Teacher(model, ["blocks.0"], "gradient", renormalize=renormalize)(
        (pixels - ours_mean) / ours_std, target, 1
    )
    expected = Teacher(model, ["blocks.0"], "gradient")((pixels - mean) / std, target, 1)
    torch.testing.assert_close(got.logits, expected.logits)
    torch.testing.assert_close(got.maps, expected.maps)
    without = Teacher(model, ["blocks.0"], "gradient")((pixels - ours_mean) / ours_std, target, 1)
    assert not torch.allclose(without.logits, expected.logits)  # type: ignore[arg-type]


# -- bf16 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, "test_nfnet"])
def test_frozen_bf16_weights_give_the_logits_of_autocast(name: str) -> None:
    """Cast once is cast at each use, bit for bit; a weight that is standardised first (nfnet) is not cast."""
    if name == "test_nfnet":
        torch.manual_seed(36)
        model = models.create_model(name, classes=plain.CLASSES).eval()
    else:
        model = network(name).float()
    images, target = plain.inputs(3, SIZE, seed=7)
    images = images.float()
    frozen = freeze(copy.deepcopy(model), torch.bfloat16, inner_gradient=False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = models.inference_logits(model(images))
    assert expected.dtype == torch.bfloat16
    logits = Teacher(frozen, [], "gradient", torch.bfloat16)(images, target).logits
    assert logits is not None
    assert logits.dtype == torch.float32
    assert torch.equal(logits, expected.float())
    dtypes = {
        type(m): m.weight.dtype for m in frozen.modules() if isinstance(getattr(m, "weight", None), Tensor)
    }
    assert dtypes[nn.Linear] == torch.bfloat16
    for kind, dtype in dtypes.items():
        assert dtype == (torch.bfloat16 if kind in (nn.Linear, nn.Conv2d) else torch.float32), kind


@pytest.mark.parametrize("method", plain.METHODS)
def test_bf16_maps_are_near_fp32_maps(method: str) -> None:
    paths = plain.all_taps("class_token", method, 2)[-1:]
    images, target = plain.inputs(4, plain.SIZE, seed=8)
    images = images.float()
    maps = []
    for autocast in (None, torch.bfloat16):
        model = freeze(network("vit").float(), autocast, inner_gradient=True)
        targets = Teacher(model, paths, method, autocast)(images, target, 4)  # type: ignore[arg-type]
        assert targets.maps is not None
        assert targets.maps[0].dtype == torch.float32
        maps.append(saliency.normalize_map(targets.maps[0], "l2")[0])
    assert not torch.equal(*maps)
    assert (maps[0] * maps[1]).sum((1, 2)).min() > 0.99


def test_load_puts_a_checkpoint_into_the_frozen_network() -> None:
    model, other = network("vit").float(), plain.build("class_token", depth=2, seed=90).float()
    teacher = Teacher(freeze(model, torch.bfloat16, False), [], "gradient", torch.bfloat16)
    images, target = plain.inputs(2, plain.SIZE, seed=9)
    teacher.load(other.state_dict(), "stage 1")
    expected = Teacher(freeze(other, torch.bfloat16, False), [], "gradient", torch.bfloat16)
    got = teacher(images.float(), target).logits
    assert torch.equal(got, expected(images.float(), target).logits)  # type: ignore[arg-type]
    assert not any(p.requires_grad for p in teacher.model.parameters())
    deeper = plain.build("class_token", depth=3, seed=91).state_dict()
    with pytest.raises(
        UserError, match=r"stage 2 does not fit VisionTransformer: 12 entries differ: blocks\.2"
    ):
        teacher.load(deeper, "stage 2")


def test_fused_attention_is_off_only_where_the_inner_gradient_needs_it() -> None:
    for inner, expected in ((True, False), (False, True)):
        model = plain.build("class_token", depth=2)
        for block in model.blocks:
            block.attn.fused_attn = True
        freeze(model, None, inner_gradient=inner)
        assert {block.attn.fused_attn for block in model.blocks} == {expected}


# -- competence --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracy", "best", "classes", "expected"),
    [
        (0.9, 0.9, 10, 1.0),
        (0.5, 0.9, 10, 0.5),
        (0.1, 0.9, 10, 0.0),
        (0.05, 0.9, 10, 0.0),  # below chance
        (0.95, 0.9, 10, 1.0),
        (0.1, 0.1, 10, 0.0),  # a teacher that knows nothing
        (0.3, float("nan"), 10, 0.0),
        (0.75, 1.0, 2, 0.5),
    ],
)
def test_competence(accuracy: float, best: float, classes: int, expected: float) -> None:
    assert competence(accuracy, best, classes) == pytest.approx(expected, abs=1e-12)
