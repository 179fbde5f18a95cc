"""Maps, their normalisation and their loss, against autograd one sample at a time and finite differences."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from irkd_dist.distill import methods, saliency
from irkd_dist.distill.taps import forward_with_maps, tapped_forward
from tests.distill import plain_vit as plain

STEP = 1e-6  # of the central differences
DEPTH, TEACHER_DEPTH = 3, 4


def teacher_for(head: str, method: str) -> tuple[nn.Module, list[str]]:
    """A deeper, wider teacher with patches half as large: 8 x 8 of them where the student has 4 x 4."""
    kind = "class_token" if method == "attention" else head
    model = plain.build(kind, depth=TEACHER_DEPTH, dim=24, heads=3, patch=2, seed=77)
    taps = plain.all_taps(kind, method, TEACHER_DEPTH)
    return model.requires_grad_(False), taps


def paired(head: str, method: str) -> tuple[list[str], nn.Module, list[str]]:
    """All the student's taps, the teacher, and as many of its taps, spread over its depth."""
    teacher, theirs = teacher_for(head, method)
    ours = plain.all_taps(head, method, DEPTH)
    return ours, teacher, [theirs[i * len(theirs) // len(ours)] for i in range(len(ours))]


def product_loss(
    student: nn.Module,
    ours: list[str],
    teacher_maps: list[Tensor],
    images: Tensor,
    target: Tensor,
    how: tuple,
) -> Tensor:
    method, kind = how
    _, maps = forward_with_maps(student, images, ours, method, target, frozen=False)
    theirs = [saliency.resize_map(t, m.shape[1:]) for t, m in zip(teacher_maps, maps, strict=True)]
    per_sample, flat = saliency.saliency_loss(maps, theirs, kind)
    assert flat <= 0.6 * len(maps) * len(images), (
        "a ReLU may leave a map empty, but there must be something to test"
    )
    return per_sample.mean()


def plain_loss(
    student: nn.Module,
    ours: list[str],
    teacher_maps: list[Tensor],
    images: Tensor,
    target: Tensor,
    how: tuple,
    **more: torch.dtype,
) -> Tensor:
    method, kind = how
    total = images.new_zeros(())
    for i, (image, label) in enumerate(zip(images, target, strict=True)):
        maps = plain.maps(student, image, label, ours, method, **more)
        total = total + plain.loss(maps, [t[i] for t in teacher_maps], kind)
    return total / len(images)


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {
        n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)
    }


# -- (a) the plain reference -----------------------------------------------------------------------


@pytest.mark.parametrize("resolution", [plain.SIZE, 12])
@pytest.mark.parametrize(("head", "method"), plain.DEFINED)
def test_maps_and_weight_gradients_equal_plain_autograd(head: str, method: str, resolution: int) -> None:
    student = plain.build(head, DEPTH, seed=1)
    ours, teacher, theirs = paired(head, method)
    for soft in (False, True):
        images, target = plain.inputs(3, resolution, seed=2, soft=soft)
        _, maps = forward_with_maps(student, images, ours, method, target, frozen=False)  # type: ignore[arg-type]
        _, teacher_maps = forward_with_maps(
            teacher, images, theirs, method, target, frozen=True  # type: ignore[arg-type]
        )  # fmt: skip
        assert maps[0].shape == (3, resolution // 4, resolution // 4)
        assert teacher_maps[0].shape == (3, resolution // 2, resolution // 2)
        for model, paths, got in ((student, ours, maps), (teacher, theirs, teacher_maps)):
            for i in range(3):
                weights_ask = model is student
                with torch.enable_grad():
                    model.requires_grad_(True)  # the reference differentiates the whole network
                    expected = plain.maps(model, images[i], target[i], paths, method)
                    model.requires_grad_(weights_ask)
                for path, m, e in zip(paths, got, expected, strict=True):
                    torch.testing.assert_close(
                        m[i].flatten(), e, rtol=1e-8, atol=1e-10, msg=f"{path} of sample {i}"
                    )
        for kind in ("minmax", "l2"):
            how = (method, kind)
            loss = product_loss(student, ours, teacher_maps, images, target, how)
            expected_loss = plain_loss(student, ours, teacher_maps, images, target, how)
            torch.testing.assert_close(loss, expected_loss, rtol=1e-8, atol=0)
            expected_gradients = gradients(expected_loss, student)
            for name, gradient in gradients(loss, student).items():
                expected = expected_gradients[name]
                # timm interpolates position embeddings in fp32, backward too
                rounding = 1e-6 * float(expected.abs().max()) if name == "pos_embed" else 0.0
                torch.testing.assert_close(
                    gradient, expected, rtol=1e-6, atol=1e-9 + rounding, msg=f"{name}, {kind}, soft={soft}"
                )


def test_attention_follows_query_and_key_norms() -> None:
    student = plain.build("class_token", DEPTH, seed=3, qk_norm=True)
    images, target = plain.inputs(2, 12, seed=3)
    paths = plain.all_taps("class_token", "attention", DEPTH)
    _, maps = forward_with_maps(student, images, paths, "attention", target, frozen=False)
    for i in range(2):
        for m, e in zip(maps, plain.maps(student, images[i], target[i], paths, "attention"), strict=True):
            torch.testing.assert_close(m[i].flatten(), e, rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", ["gradient", "grad_cam", "hirescam"])
def test_map_is_the_difference_quotient_of_the_score(method: str) -> None:
    """No autograd at all: the score's slope in each feature of the last norm, by central differences."""
    model = plain.build("mean_fc_norm", depth=2, seed=4).requires_grad_(False)
    images, target = plain.inputs(1, plain.SIZE, seed=4)
    path = "blocks.1"
    _, maps = forward_with_maps(model, images, [path], method, target, frozen=True)  # type: ignore[arg-type]
    _, (features,) = tapped_forward(model, images, [path])

    def score(changed: Tensor) -> Tensor:
        return model.head(model.fc_norm(changed[:, 1:].mean(1)))[0, target[0]]  # type: ignore[operator]

    slope = torch.zeros_like(features)
    for n in range(features.shape[1]):
        for d in range(features.shape[2]):
            bump = torch.zeros_like(features)
            bump[0, n, d] = STEP
            slope[0, n, d] = (score(features + bump) - score(features - bump)) / (2 * STEP)
    slope, features = slope[0, 1:], features[0, 1:]
    expected = {
        "gradient": slope.abs().amax(1),
        "grad_cam": (slope.mean(0) * features).sum(1).relu(),
        "hirescam": (slope * features).sum(1).relu(),
    }[method]
    torch.testing.assert_close(maps[0][0].flatten(), expected, rtol=1e-6, atol=1e-8)


# -- (b) finite differences ------------------------------------------------------------------------


def away_from_kinks(
    head: str, method: str, resolution: int, paths: list[str], soft: bool
) -> tuple[nn.Module, Tensor, Tensor]:
    """The first seed whose point is further than 100 steps from every kink."""
    for seed in range(200):
        student = plain.build(head, DEPTH, seed=seed)
        images, target = plain.inputs(2, resolution, seed, soft)
        if plain.smallest_gap(student, images, target, paths, method) > 100 * STEP:
            return student, images, target
    raise AssertionError("no point away from the kinks in 200 seeds")


@pytest.mark.parametrize(
    ("head", "method", "kind", "resolution", "soft"),
    [
        ("class_token", "gradient", "minmax", 16, False),
        ("class_token", "gradient", "l2", 12, True),
        ("class_token", "grad_cam", "l2", 16, False),
        ("class_token", "hirescam", "minmax", 12, False),
        ("class_token", "attention", "minmax", 16, False),
        ("distilled", "gradient", "minmax", 12, False),
        ("distilled", "grad_cam", "minmax", 16, True),
        ("distilled", "hirescam", "l2", 16, False),
        ("distilled", "attention", "l2", 12, False),
        ("mean", "gradient", "l2", 16, False),
        ("mean", "grad_cam", "minmax", 12, False),
        ("mean", "hirescam", "minmax", 16, True),
        ("mean_fc_norm", "gradient", "minmax", 16, False),
        ("mean_fc_norm", "hirescam", "l2", 12, False),
        ("mean_fc_norm", "attention", "minmax", 12, False),
    ],
)
def test_weight_gradients_equal_finite_differences(
    head: str, method: str, kind: str, resolution: int, soft: bool
) -> None:
    ours, teacher, theirs = paired(head, method)
    student, images, target = away_from_kinks(head, method, resolution, ours, soft)
    _, teacher_maps = forward_with_maps(teacher, images, theirs, method, target, frozen=True)  # type: ignore[arg-type]
    side = resolution // plain.PATCH
    teacher_maps = [
        torch.stack([plain.resized(m.flatten(), side**2) for m in t]).view(-1, side, side)
        for t in teacher_maps
    ]  # once, it is slow
    how = (method, kind)
    exact = gradients(product_loss(student, ours, teacher_maps, images, target, how), student)
    largest = max(float(g.abs().max()) for g in exact.values())
    parameters = dict(student.named_parameters())
    draws = torch.Generator().manual_seed(5)
    for tensor_kind, name in plain.kinds(student).items():
        values, slope = parameters[name].detach().view(-1), exact[name].flatten()
        # one of the larger half, so that a wrong gradient has room to show
        ranked = slope.abs().argsort(descending=True)[: len(slope) // 2 + 1]
        for i in [int(ranked[torch.randint(len(ranked), (1,), generator=draws)])]:
            start, sides = float(values[i]), []
            for sign in (1, -1):
                values[i] = start + sign * STEP
                # fp64 all the way: timm's fp32 position embeddings hide a step of 1e-6
                at = plain_loss(student, ours, teacher_maps, images, target, how, pos_dtype=torch.float64)
                sides.append(float(at.detach()))
            values[i] = start
            quotient = (sides[0] - sides[1]) / (2 * STEP)
            assert quotient == pytest.approx(float(slope[i]), rel=1e-4, abs=1e-6 * largest), tensor_kind


# -- kinks and flat maps ---------------------------------------------------------------------------


def twice_differentiated(maps: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, flat maps, first derivative and a second one, against a fixed teacher's map."""
    leaf = maps.clone().requires_grad_()
    other = torch.linspace(0, 1, maps.shape[1], dtype=maps.dtype).square().expand_as(maps)
    loss, flat = saliency.saliency_loss([leaf], [other], kind)
    (first,) = torch.autograd.grad(loss.sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), leaf, allow_unused=True)
    return loss.detach(), flat, first.detach(), torch.zeros_like(maps) if second is None else second


@pytest.mark.parametrize("kind", ["minmax", "l2"])
def test_flat_maps_give_zero_and_are_counted(kind: str) -> None:
    shaped = torch.tensor([[0.1, 0.7, 0.3, 0.2]], dtype=torch.float64)
    rows = [torch.zeros(1, 4), torch.full((1, 4), 3.0), torch.full((1, 4), -2.0), torch.full((1, 4), 5.0)]
    rows[3][0, 1] += 5.0 * 0.9e-6  # just under the limit, representable in fp64
    maps = torch.cat([shaped, *(r.double() for r in rows), shaped * 1e-30])
    maps[4] = torch.tensor([5.0, 5.0 + 4.5e-6, 5.0, 5.0], dtype=torch.float64)
    loss, flat, first, second = twice_differentiated(maps, kind)
    assert flat == 4
    for result in (loss, first, second):
        assert result.isfinite().all()
        assert (result[1:5] == 0).all()
    assert first[0].abs().max() > 0
    assert loss[5] > 0, "small is not flat: the limit is relative"
    alone = twice_differentiated(shaped, kind)
    assert loss[0] == alone[0][0], "flat neighbours change nothing"
    torch.testing.assert_close(first[0], alone[2][0], rtol=0, atol=0)
    torch.testing.assert_close(second[0], alone[3][0], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["minmax", "l2"])
def test_divisor_stays_the_number_of_taps(kind: str) -> None:
    a, b = torch.tensor([[0.1, 0.7, 0.3, 0.2]]), torch.tensor([[0.4, 0.1, 0.9, 0.3]])
    flat = torch.ones(1, 4)
    (one, _), (with_flat_student, n), (with_flat_teacher, m) = (
        saliency.saliency_loss(ours, theirs, kind)
        for ours, theirs in (([a], [b]), ([a, flat], [b, b]), ([a, a], [b, flat]))
    )
    assert n == m == 1
    torch.testing.assert_close(with_flat_student, one / 2)
    torch.testing.assert_close(with_flat_teacher, one / 2)


def test_just_over_the_flat_limit_is_shaped() -> None:
    over = torch.tensor([[5.0, 5.0 + 5.5e-6, 5.0, 5.0]], dtype=torch.float64)
    _, shaped = saliency.normalize_map(over, "minmax")
    assert shaped.all()


@pytest.mark.parametrize("kind", ["minmax", "l2"])
def test_ties_of_the_extremes_are_finite(kind: str) -> None:
    tied = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.2, 0.9, 0.9, 0.2]], dtype=torch.float64)
    loss, flat, first, second = twice_differentiated(tied, kind)
    assert flat == 0
    assert (loss > 0).all()
    assert first.isfinite().all()
    assert second.isfinite().all()


@pytest.mark.parametrize("method", ["gradient", "grad_cam", "hirescam"])
def test_map_kinks_are_finite(method: str) -> None:
    """Ties in the max over D, gradients of exactly 0, a ReLU at exactly 0."""
    features = torch.tensor([[[1.0, -1.0], [2.0, 2.0], [0.0, 0.0]]], dtype=torch.float64).requires_grad_()
    gradient = torch.tensor([[[0.5, 0.5], [-1.0, 1.0], [0.0, 0.0]]], dtype=torch.float64).requires_grad_()
    m = methods.load(method).saliency_map(features, gradient)
    assert m.isfinite().all()
    slopes = torch.autograd.grad(m.sum(), (features, gradient), allow_unused=True)
    assert all(s.isfinite().all() for s in slopes if s is not None)
    assert (m >= 0).all()


@pytest.mark.parametrize("method", ["gradient", "grad_cam", "hirescam"])
def test_identical_channels_and_void_taps_train_without_nan(method: str) -> None:
    """A student whose patch features are all alike: every max is a tie, every map flat or tied."""
    student = plain.build("class_token", 2, seed=6)
    with torch.no_grad():
        student.head.weight.zero_()  # the score depends on nothing: G = 0 everywhere
    images, target = plain.inputs(2, 12, seed=6)
    _, maps = forward_with_maps(student, images, ["blocks.0", "blocks.1"], method, target, frozen=False)  # type: ignore[arg-type]
    loss, flat = saliency.saliency_loss(maps, [torch.rand_like(m) for m in maps], "minmax")
    assert flat == 4
    assert (loss == 0).all()
    for name, gradient in gradients(loss.sum(), student).items():
        assert (gradient == 0).all(), name


# -- closed form -----------------------------------------------------------------------------------


@contextmanager
def counting(calls: list[int]) -> Iterator[None]:
    calls.append(1)
    yield


@pytest.mark.parametrize("soft", [False, True])
def test_linear_head_gradient_equals_autograd(soft: bool) -> None:
    model = plain.build("mean", DEPTH, seed=7)
    images, target = plain.inputs(3, 12, seed=7, soft=soft)
    output, (features,) = tapped_forward(model, images, ["norm"])
    assert isinstance(output, Tensor)
    (gradient,) = torch.autograd.grad(saliency.class_score(output, target), features)
    closed = saliency.linear_head_gradient(model.head.weight, target, features.shape[1])
    assert closed.shape == (3, 1, 16)
    torch.testing.assert_close(closed.expand_as(gradient), gradient, rtol=1e-12, atol=1e-14)


def test_closed_form_is_used_where_it_holds_and_only_there() -> None:
    images, target = plain.inputs(2, 12, seed=8)

    def inner_gradients(model: nn.Module, paths: list[str]) -> int:
        calls: list[int] = []
        forward_with_maps(model, images, paths, "hirescam", target, frozen=False, context=counting(calls))
        return len(calls)

    closed = plain.build("mean", 2, seed=8)
    assert inner_gradients(closed, ["norm"]) == 0
    assert inner_gradients(closed, ["norm", "blocks.0"]) == 1
    assert inner_gradients(plain.build("mean_fc_norm", 2, seed=8), ["norm"]) == 1
    dropping = plain.build("mean", 2, seed=8, drop_rate=0.5)
    assert inner_gradients(dropping, ["norm"]) == 0, "dropout is off in evaluation"
    assert inner_gradients(dropping.train(), ["norm"]) == 1
    including = plain.build("mean_fc_norm", 2, seed=8, fc_norm=False, pool_include_prefix=True)
    assert inner_gradients(including, ["norm"]) == 1, "the pool divides by one token more"


def test_head_dropout_in_training_is_part_of_the_map() -> None:
    model = plain.build("mean", 2, seed=9, drop_rate=0.5).train()
    images, target = plain.inputs(2, plain.SIZE, seed=9)
    torch.manual_seed(10)
    _, (m,) = forward_with_maps(model, images, ["norm"], "hirescam", target, frozen=False)
    torch.manual_seed(10)  # the head's dropout is the only draw
    kept = torch.nn.functional.dropout(torch.ones(2, 16, dtype=torch.float64), 0.5)
    for i in range(2):
        features = plain.forward(model, images[i])[1]["norm"]
        expected = (features * kept[i] * model.head.weight[target[i]] / 16).sum(1).relu()
        torch.testing.assert_close(m[i].flatten(), expected, rtol=1e-10, atol=1e-12)


def test_closed_form_with_a_class_token_left_out_of_the_pool() -> None:
    model = plain.build("mean_fc_norm", 2, seed=11, fc_norm=False)
    images, target = plain.inputs(2, 12, seed=11)
    _, maps = forward_with_maps(model, images, ["norm", "blocks.1"], "hirescam", target, frozen=False)
    for i in range(2):
        expected = plain.maps(model, images[i], target[i], ["norm", "blocks.1"], "hirescam")
        for m, e in zip(maps, expected, strict=True):
            torch.testing.assert_close(m[i].flatten(), e, rtol=1e-9, atol=1e-12)


def test_gradient_map_at_a_linear_head_is_constant_so_flat() -> None:
    model = plain.build("mean", 2, seed=12)
    images, target = plain.inputs(2, 12, seed=12)
    _, (m,) = forward_with_maps(model, images, ["norm"], "gradient", target, frozen=False)
    expected = model.head.weight[target].abs().amax(1) / 9
    torch.testing.assert_close(m, expected[:, None, None].expand(2, 3, 3))
    loss, flat = saliency.saliency_loss([m], [torch.rand_like(m)], "minmax")
    assert flat == 2
    assert all((g == 0).all() for g in gradients(loss.sum(), model).values())


# -- the pure parts --------------------------------------------------------------------------------


def test_normalisation_by_hand() -> None:
    m = torch.tensor([[1.0, 2.0, 4.0, 3.0]], dtype=torch.float64)
    minmax, shaped = saliency.normalize_map(m, "minmax")
    assert shaped.tolist() == [True]
    assert minmax[0].tolist() == pytest.approx([0, 1 / 3, 1, 2 / 3], rel=1e-7)
    l2, _ = saliency.normalize_map(m, "l2")
    assert l2[0].tolist() == pytest.approx([v / math.sqrt(30) for v in (1, 2, 4, 3)], rel=1e-7)
    tiny = saliency.normalize_map(m * 1e-8, "minmax")[0][0]  # range 3e-8: the epsilon counts
    assert tiny.tolist() == pytest.approx([0, 1 / 4, 3 / 4, 2 / 4], rel=1e-6)
    with pytest.raises(ValueError, match="minmax nor l2"):
        saliency.normalize_map(m, "max")


def test_loss_by_hand() -> None:
    """minmax: mean over the patches; l2: their sum; averaged over the taps; one value a sample."""
    a, b = torch.tensor([[0.0, 1.0, 2.0, 4.0]]), torch.tensor([[3.0, 0.0, 0.0, 3.0]])
    loss, flat = saliency.saliency_loss([a, a], [b, a], "minmax")
    assert flat == 0
    assert loss.tolist() == pytest.approx([(1 + 0.25**2 + 0.5**2 + 0) / 4 / 2], rel=1e-6)
    cosine = 12 / (math.sqrt(21) * math.sqrt(18))
    assert saliency.saliency_loss([a], [b], "l2")[0].tolist() == pytest.approx([2 - 2 * cosine], rel=1e-6)


def test_l2_does_not_shrink_with_the_grid_and_teacher_gets_no_gradient() -> None:
    a, b = torch.rand(1, 4), torch.rand(1, 4).requires_grad_()
    tiled = [m.repeat(1, 9) for m in (a, b)]
    for kind in ("minmax", "l2"):
        small = saliency.saliency_loss([a], [b], kind)[0]
        assert not small.requires_grad
        torch.testing.assert_close(saliency.saliency_loss([tiled[0]], [tiled[1]], kind)[0], small)


@pytest.mark.parametrize(("old", "new"), [(8, 4), (6, 3), (4, 3), (3, 8), (2, 5), (1, 3)])
def test_resize_is_bilinear(old: int, new: int) -> None:
    maps = torch.rand(3, old, old, dtype=torch.float64)
    got = saliency.resize_map(maps, (new, new))
    for m, g in zip(maps, got, strict=True):
        torch.testing.assert_close(g.flatten(), plain.resized(m.flatten(), new * new))


def test_resize_of_a_grid_that_is_no_square() -> None:
    """Constant along one side, and linear between the centres of its pixels along the other."""
    column = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    got = saliency.resize_map(column[None, :, None].expand(2, 3, 4), (6, 2))
    expected = torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.0], dtype=torch.float64)
    torch.testing.assert_close(got, expected[None, :, None].expand(2, 6, 2))
    same = torch.rand(1, 3, 4)
    assert saliency.resize_map(same, (3, 4)) is same


def test_the_mean_of_maps_is_on_the_largest_grid() -> None:
    small, large = torch.rand(2, 1, 2), torch.rand(2, 4, 3)
    got = saliency.mean_map([small, large])
    resized = saliency.resize_map(saliency.normalize_map(small, "minmax")[0], (4, 3))
    torch.testing.assert_close(got, (resized + saliency.normalize_map(large, "minmax")[0]) / 2)


@pytest.mark.parametrize("kind", ["minmax", "l2"])
def test_nan_is_not_flat(kind: str) -> None:
    good, bad = torch.rand(2, 2, 2), torch.rand(2, 2, 2)
    bad[1, 0, 1] = float("nan")
    for pair in (([good], [bad]), ([bad], [good])):
        loss, flat = saliency.saliency_loss(*pair, kind)
        assert flat == 0
        assert loss.isnan().tolist() == [False, True]


def test_class_score() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert saliency.class_score(logits, torch.tensor([2, 0])) == 7
    soft = torch.tensor([[0.0, 0.25, 0.75], [1.0, 0.0, 0.0]])
    assert saliency.class_score(logits, soft) == 0.5 + 2.25 + 4


def test_patch_tokens() -> None:
    tokens = torch.arange(2 * 6 * 3).reshape(2, 6, 3)
    assert torch.equal(saliency.patch_tokens(tokens, 2), tokens[:, 2:])
    grid = torch.arange(2 * 3 * 2 * 2).reshape(2, 3, 2, 2)
    flat = saliency.patch_tokens(grid, 0)
    assert flat.shape == (2, 4, 3)
    assert torch.equal(flat[1, 2], grid[1, :, 1, 0])


@pytest.mark.parametrize("method", plain.METHODS)
def test_maps_are_fp32_under_bf16_autocast(method: str) -> None:
    """The features are bf16; what is computed from them is not rounded to it again."""
    model = plain.build("class_token", 2, seed=13).float()
    images, target = plain.inputs(2, 12, seed=13)
    path = plain.all_taps("class_token", method, 2)[-1]
    with torch.autocast("cpu", torch.bfloat16):
        output, (m,) = forward_with_maps(
            model, images.float(), [path], method, target, frozen=False  # type: ignore[arg-type]
        )  # fmt: skip
        assert isinstance(output, Tensor)
        assert output.dtype == torch.bfloat16
        assert m.dtype == torch.float32
        if method == "attention":
            _, (qkv,) = tapped_forward(model, images.float(), [path])
            assert qkv.dtype == torch.bfloat16
    if method == "attention":
        query, key, _ = qkv.double().reshape(2, 10, 3, 2, 8).permute(2, 0, 3, 1, 4)
        expected = (query[:, :, :1] @ key.transpose(2, 3) / math.sqrt(8)).softmax(-1)[:, :, 0, 1:].mean(1)
        torch.testing.assert_close(m.flatten(1).double(), expected, rtol=1e-5, atol=1e-7)
