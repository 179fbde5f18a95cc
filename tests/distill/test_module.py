"""The student with its losses: every term and their sum through the module's own forward."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from irkd_dist.distill.module import Distiller, Objective, Targets
from irkd_dist.distill.teacher import Teacher
from tests.distill import plain_vit as plain

BATCH = 4
WEIGHT = torch.tensor([0.25, 0.25, 0.25, 0.25], dtype=torch.float64)
TAPS = ("blocks.0", "blocks.1.norm1")


def student(head: str, seed: int = 1, **more: Any) -> Any:
    return plain.build(head, depth=2, seed=seed, **more).train()


def batch(soft: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Images, target, and the teacher's logits."""
    images, target = plain.inputs(BATCH, 12, seed=1, soft=soft)
    draws = torch.Generator().manual_seed(2)
    return images, target, 2 * torch.randn(BATCH, plain.CLASSES, generator=draws, dtype=torch.float64)


def probabilities(logits: Tensor, temperature: float = 1.0) -> list[float]:
    exponentials = [math.exp(v / temperature) for v in logits.tolist()]
    return [e / sum(exponentials) for e in exponentials]


def ce_by_hand(logits: Tensor, target: Tensor) -> float:
    q = probabilities(logits)
    if target.ndim == 0:
        return -math.log(q[int(target)])
    return -sum(y * math.log(p) for y, p in zip(target.tolist(), q, strict=True))


def kd_by_hand(logits: Tensor, teacher: Tensor, kind: str, temperature: float) -> float:
    if kind == "hard":
        return -math.log(probabilities(logits)[int(teacher.argmax())])
    q, p = probabilities(logits, temperature), probabilities(teacher, temperature)
    return temperature**2 * sum(b * math.log(b / a) for a, b in zip(q, p, strict=True))


def teacher_of(head: str, method: str = "gradient") -> Teacher:
    model = plain.build(head, depth=3, dim=24, heads=3, seed=50).requires_grad_(False)
    return Teacher(model, ["blocks.0", "blocks.1"], method)  # type: ignore[arg-type]


# -- CE and KD ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("form", ["sum", "convex"])
@pytest.mark.parametrize("head", ["class_token", "distilled", "mean"])
def test_total_with_distillation_equals_arithmetic(head: str, form: str, kind: str) -> None:
    """CE reads the class head, KD the distillation head; a student with one head takes both on it."""
    model = student(head)
    for soft in (False, True):
        images, target, teacher_logits = batch(soft)
        module = Distiller(model, Objective(form=form, kd_kind=kind, temperature=3.0))  # type: ignore[arg-type]
        terms = module(images, target, WEIGHT, Targets(teacher_logits), alpha=0.3)
        heads = [plain.forward(model, image)[0] for image in images]
        assert len(heads[0]) == (2 if head == "distilled" else 1)
        ce = sum(ce_by_hand(h[0], y) for h, y in zip(heads, target, strict=True)) / BATCH
        kd = sum(kd_by_hand(h[-1], t, kind, 3.0) for h, t in zip(heads, teacher_logits, strict=True)) / BATCH
        assert terms["ce"].item() == pytest.approx(ce, rel=1e-9)
        assert terms["kd"].item() == pytest.approx(kd, rel=1e-9)
        expected = ce + 0.3 * kd if form == "sum" else 0.7 * ce + 0.3 * kd
        assert terms["total"].item() == pytest.approx(expected, rel=1e-9)
        mean = torch.stack([sum(h) / len(h) for h in heads])
        labels = target if target.ndim == 1 else target.argmax(1)
        assert terms["correct"] == (mean.argmax(1) == labels).sum()


def test_without_distillation_the_labels_teach_the_mean_of_both_heads() -> None:
    model = student("distilled")
    images, target, teacher_logits = batch()
    expected = 0.0
    for image, label in zip(images, target, strict=True):
        first, second = plain.forward(model, image)[0]
        expected += ce_by_hand((first + second) / 2, label) / BATCH
    for alpha, targets in ((0.0, Targets()), (0.0, Targets(teacher_logits))):
        terms = Distiller(model, Objective())(images, target, WEIGHT, targets, alpha=alpha)
        assert terms["total"].item() == pytest.approx(expected, rel=1e-9)
    model.eval()
    terms = Distiller(model, Objective())(images, target, WEIGHT, Targets())
    assert terms["total"].item() == pytest.approx(expected, rel=1e-9), "inference is the same mean"


def test_terms_of_weight_zero_are_not_computed() -> None:
    images, target, logits = batch()
    teacher = teacher_of("class_token")
    maps = teacher(images, target, aligned=BATCH).maps
    module = Distiller(student("class_token"), Objective(taps=TAPS))
    everything = Targets(logits, maps)
    always = {"ce", "correct", "total"}
    assert set(module(images, target, WEIGHT, everything)) == always
    assert set(module(images, target, WEIGHT, everything, alpha=1.0)) == always | {"kd"}
    assert set(module(images, target, WEIGHT, everything, gamma=1.0)) == always | {"saliency", "flat"}
    assert set(module(images, target, WEIGHT, Targets(), alpha=1.0, gamma=1.0)) == always
    terms = module(images, target, WEIGHT, everything, alpha=1.0, gamma=1.0)
    assert set(terms) == always | {"kd", "saliency", "flat"}
    assert [name for name, value in terms.items() if value.requires_grad] == ["total"]


@pytest.mark.parametrize("head", ["class_token", "distilled"])
def test_samples_of_weight_zero_contribute_nothing(head: str) -> None:
    """A dummy sample changes neither loss nor gradient; the batch mean is in the weights alone."""
    model = student(head)
    images, target, logits = batch()
    teacher = teacher_of("class_token")
    module = Distiller(model, Objective(taps=TAPS))
    results = []
    for count in (BATCH, 2):
        weight = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64)[:count]
        targets = Targets(logits[:count], teacher(images[:count], target[:count], count).maps)
        terms = module(images[:count], target[:count], weight, targets, alpha=0.5, gamma=0.8)
        gradients = torch.autograd.grad(terms["total"], list(model.parameters()))
        results.append((terms, gradients))
    (padded, padded_gradients), (alone, alone_gradients) = results
    for name in ("total", "ce", "kd", "saliency", "correct"):
        torch.testing.assert_close(padded[name], alone[name], rtol=1e-10, atol=0)
    for a, b in zip(padded_gradients, alone_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


# -- saliency through the module ---------------------------------------------------------------------


def saliency_by_hand(
    model: Any, teacher: Teacher, images: Tensor, target: Tensor, objective: Objective
) -> Tensor:
    """Mean over the given samples, differentiable with respect to the student's weights."""
    total = images.new_zeros(())
    for image, label in zip(images, target, strict=True):
        ours = plain.maps(model, image, label, list(objective.taps), objective.method)
        teacher.model.requires_grad_(True)
        theirs = plain.maps(teacher.model, image, label, teacher.paths, teacher.method)
        teacher.model.requires_grad_(False)
        total = total + plain.loss(ours, theirs, objective.normalization)
    return total / len(images)


@pytest.mark.parametrize("form", ["sum", "convex"])
@pytest.mark.parametrize(("method", "normalization"), [("gradient", "minmax"), ("grad_cam", "l2")])
@pytest.mark.parametrize("head", ["class_token", "distilled", "mean"])
def test_whole_loss_and_its_gradient(head: str, method: str, normalization: str, form: str) -> None:
    model, teacher = student(head), teacher_of(head, method)
    images, target, _ = batch()
    objective = Objective(form=form, method=method, normalization=normalization, taps=TAPS)  # type: ignore[arg-type]
    targets = teacher(images, target, aligned=BATCH)
    assert targets.logits is not None
    terms = Distiller(model, objective)(images, target, WEIGHT, targets, alpha=0.5, gamma=0.8)

    expected = images.new_zeros(())
    ce_weight = 1.0 if form == "sum" else 0.5
    for image, label in zip(images, target, strict=True):
        heads = plain.forward(model, image)[0]
        said = torch.stack(plain.forward(teacher.model, image)[0]).mean(0)
        expected = expected - ce_weight * heads[0].log_softmax(0)[label] / BATCH
        log_q, p = (heads[-1] / 4).log_softmax(0), (said / 4).softmax(0)
        expected = expected + 0.5 * 16 * (p * (p.log() - log_q)).sum() / BATCH
    saliency = saliency_by_hand(model, teacher, images, target, objective)
    expected = expected + 0.8 * saliency

    torch.testing.assert_close(terms["saliency"], saliency.detach(), rtol=1e-8, atol=0)
    torch.testing.assert_close(terms["total"], expected, rtol=1e-8, atol=0)
    assert saliency > 1e-3
    names, parameters = zip(*model.named_parameters(), strict=True)
    got = torch.autograd.grad(terms["total"], parameters)
    for name, a, b in zip(names, got, torch.autograd.grad(expected, parameters), strict=True):
        rounding = 1e-6 * float(b.abs().max()) if name == "pos_embed" else 0.0  # timm interpolates in fp32
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9 + rounding, msg=name)


@pytest.mark.parametrize("head", ["class_token", "distilled"])
@pytest.mark.parametrize("aligned", [1, 3])
def test_part_of_the_batch_is_aligned(head: str, aligned: int) -> None:
    """`fraction`: saliency of the first samples only, scaled to their mean; CE and KD of all."""
    model, teacher = student(head), teacher_of("class_token")
    images, target, _ = batch()
    objective = Objective(taps=TAPS)
    module = Distiller(model, objective)
    part, whole = teacher(images, target, aligned), teacher(images, target, BATCH)
    assert part.maps is not None
    assert [len(m) for m in part.maps] == [aligned, aligned]
    torch.testing.assert_close(part.logits, whole.logits)
    terms = module(images, target, WEIGHT, part, 0.5, 0.8, saliency_scale=BATCH / aligned)
    full = module(images, target, WEIGHT, whole, 0.5, 0.8)
    for name in ("ce", "kd", "correct"):
        torch.testing.assert_close(terms[name], full[name], rtol=1e-10, atol=0)
    expected = saliency_by_hand(model, teacher, images[:aligned], target[:aligned], objective).detach()
    torch.testing.assert_close(terms["saliency"], expected, rtol=1e-8, atol=0)
    torch.testing.assert_close(terms["total"].detach(), terms["ce"] + 0.5 * terms["kd"] + 0.8 * expected)


def test_flat_taps_are_counted_and_leave_the_rest_alone() -> None:
    """The paper's void last tap (strict_paper): zero loss, half the average, no NaN."""
    model, teacher = student("class_token"), teacher_of("class_token")
    images, target, _ = batch()
    losses = {}
    for taps in (("blocks.0",), ("blocks.0", "blocks.1")):
        teacher.paths = ["blocks.0", "blocks.1"][: len(taps)]
        targets = teacher(images, target, BATCH, logits=False)
        terms = Distiller(model, Objective(taps=taps))(images, target, WEIGHT, targets, gamma=1.0)
        losses[taps] = terms["saliency"]
        assert terms["flat"] == (len(taps) - 1) * BATCH
        gradients = torch.autograd.grad(terms["total"], list(model.parameters()))
        assert all(g.isfinite().all() for g in gradients)
    alone, with_void = losses.values()
    torch.testing.assert_close(with_void, alone / 2)


# -- what engines need -------------------------------------------------------------------------------


@pytest.mark.parametrize("aligned", [0, 2, BATCH])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("form", ["sum", "convex"])
def test_every_parameter_of_a_distilled_student_gets_a_gradient(
    form: str, alpha: float, aligned: int
) -> None:
    """DDP waits for each: with and without distillation, and on a rank whose share is not aligned."""
    model = student("distilled")
    images, target, logits = batch()
    maps = teacher_of("class_token")(images, target, aligned).maps
    module = Distiller(model, Objective(form=form, taps=TAPS))  # type: ignore[arg-type]
    module(images, target, WEIGHT, Targets(logits if alpha else None, maps), alpha, 0.8 if aligned else 0.0)[
        "total"
    ].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_inner_gradient_runs_inside_the_engines_context() -> None:
    events = []

    @contextmanager
    def engine() -> Any:
        events.append("enter")
        yield
        events.append("leave")

    images, target, logits = batch()
    maps = teacher_of("class_token")(images, target, BATCH).maps
    module = Distiller(student("class_token"), Objective(taps=TAPS), inner_grad_context=engine)
    module(images, target, WEIGHT, Targets(logits, maps), 0.5, 0.8)
    assert events == ["enter", "leave"]
    module(images, target, WEIGHT, Targets(logits, maps), 0.5, 0.8)
    assert events == ["enter", "leave"] * 2
    module(images, target, WEIGHT, Targets(logits, None), 0.5, 0.0)
    assert len(events) == 4, "nothing to enter without saliency"


@pytest.mark.parametrize("method", ["gradient", "attention"])
def test_autocast_keeps_terms_and_gradients_in_fp32(method: str) -> None:
    model = student("distilled").float()
    images, target, _ = batch()
    images, weight = images.float(), WEIGHT.float()
    teacher = teacher_of("distilled", method)
    teacher.model.float()
    taps = TAPS
    if method == "attention":
        taps = teacher.paths = ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    targets = teacher(images, target, BATCH)
    objective = Objective(method=method, taps=tuple(taps))  # type: ignore[arg-type]
    exact = Distiller(model, objective)(images, target, weight, targets, 0.5, 0.8)
    rounded = Distiller(model, objective, torch.bfloat16)(images, target, weight, targets, 0.5, 0.8)
    for name in ("total", "ce", "kd", "saliency"):
        assert rounded[name].dtype == torch.float32
        assert rounded[name] != exact[name], "bf16 rounds somewhere"
        assert rounded[name].item() == pytest.approx(exact[name].item(), rel=0.1)
    rounded["total"].backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_state_dict_is_the_students_alone() -> None:
    model = student("class_token")
    module = Distiller(model, Objective(taps=TAPS))
    images, target, _ = batch()
    targets = teacher_of("class_token")(images, target, BATCH)
    module(images, target, WEIGHT, targets, 0.5, 0.8)["total"].backward()
    assert set(module.state_dict()) == {f"student.{k}" for k in model.state_dict()}
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in model.parameters())
