"""Cross-entropy, distillation and their weights, against arithmetic written out with math.exp and math.log."""

from __future__ import annotations

import math

import pytest
import torch

from irkd_dist.distill import losses

STUDENT = [[2.0, -1.0, 0.5], [0.0, 3.0, 1.0]]
TEACHER = [[1.0, 0.0, -2.0], [-1.0, 0.5, 4.0]]


def softmax(row: list[float], temperature: float = 1.0) -> list[float]:
    exponentials = [math.exp(v / temperature) for v in row]
    return [e / sum(exponentials) for e in exponentials]


def hinton(student: list[float], teacher: list[float], temperature: float) -> float:
    q, p = softmax(student, temperature), softmax(teacher, temperature)
    return temperature**2 * sum(pc * math.log(pc / qc) for pc, qc in zip(p, q, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_soft_distillation_is_hintons(temperature: float) -> None:
    got = losses.soft_distillation(torch.tensor(STUDENT), torch.tensor(TEACHER), temperature)
    expected = [hinton(s, t, temperature) for s, t in zip(STUDENT, TEACHER, strict=True)]
    assert got.tolist() == pytest.approx(expected, rel=1e-5)


def test_soft_distillation_of_two_classes_in_numbers() -> None:
    """p = (0.75, 0.25) against q = (0.5, 0.5) at T = 2: 4 (0.75 ln 1.5 + 0.25 ln 0.5) = 0.5232."""
    teacher = torch.tensor([[2 * math.log(3), 0.0]])
    got = losses.soft_distillation(torch.zeros(1, 2), teacher, 2.0)
    assert got.tolist() == pytest.approx([4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))], rel=1e-6)
    assert got.item() == pytest.approx(0.523248, abs=1e-6)


def test_soft_distillation_gradient() -> None:
    """d/dz of T^2 KL is T (q - p): at T^2 the gradients do not shrink as the temperature grows."""
    student = torch.tensor(STUDENT, dtype=torch.float64, requires_grad=True)
    losses.soft_distillation(student, torch.tensor(TEACHER, dtype=torch.float64), 4.0).sum().backward()
    assert student.grad is not None
    for got, s, t in zip(student.grad, STUDENT, TEACHER, strict=True):
        expected = [4.0 * (q - p) for q, p in zip(softmax(s, 4.0), softmax(t, 4.0), strict=True)]
        assert got.tolist() == pytest.approx(expected, rel=1e-10)


def test_equal_logits_have_nothing_to_distil() -> None:
    shifted = torch.tensor(STUDENT) + 7  # a softmax ignores a constant
    got = losses.soft_distillation(torch.tensor(STUDENT), shifted, 4.0)
    assert got.tolist() == pytest.approx([0, 0], abs=1e-5)


def test_a_class_that_the_teacher_excludes_is_no_nan() -> None:
    teacher = torch.tensor([[0.0, 0.0, -1e4]])
    got = losses.soft_distillation(torch.zeros(1, 3), teacher, 1.0)
    assert got.tolist() == pytest.approx([math.log(3 / 2)], rel=1e-5)


def test_hard_distillation_is_the_cross_entropy_of_the_teachers_decision() -> None:
    got = losses.hard_distillation(torch.tensor(STUDENT), torch.tensor(TEACHER))
    expected = [-math.log(softmax(STUDENT[0])[0]), -math.log(softmax(STUDENT[1])[2])]
    assert got.tolist() == pytest.approx(expected, rel=1e-6)


def test_cross_entropy_of_classes_and_of_probabilities() -> None:
    logits = torch.tensor(STUDENT)
    classes = losses.cross_entropy(logits, torch.tensor([2, 1]))
    expected = [-math.log(softmax(STUDENT[0])[2]), -math.log(softmax(STUDENT[1])[1])]
    assert classes.tolist() == pytest.approx(expected, rel=1e-6)
    soft = [[0.1, 0.2, 0.7], [1.0, 0.0, 0.0]]
    got = losses.cross_entropy(logits, torch.tensor(soft))
    expected = [
        -sum(y * math.log(q) for y, q in zip(row, softmax(z), strict=True))
        for row, z in zip(soft, STUDENT, strict=True)
    ]
    assert got.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["ce", "soft", "hard"])
def test_losses_are_computed_in_fp32_of_bf16_logits_and_in_fp64_of_fp64(kind: str) -> None:
    def loss(dtype: torch.dtype) -> torch.Tensor:
        student, teacher = torch.tensor(STUDENT, dtype=dtype), torch.tensor(TEACHER, dtype=dtype)
        if kind == "ce":
            return losses.cross_entropy(student, torch.tensor([0, 1]))
        if kind == "soft":
            return losses.soft_distillation(student, teacher, 4.0)
        return losses.hard_distillation(student, teacher)

    assert torch.equal(loss(torch.bfloat16), loss(torch.float32))  # these logits are exact in bf16
    assert loss(torch.bfloat16).dtype == torch.float32
    assert loss(torch.float64).dtype == torch.float64


def test_term_weights() -> None:
    assert losses.term_weights("sum", 0.5, 0.8) == (1.0, 0.5, 0.8)
    assert losses.term_weights("convex", 0.5, 0.8) == (0.5, 0.5, 0.8)
    assert losses.term_weights("convex", 0.25, 0.0) == (0.75, 0.25, 0.0)
    with pytest.raises(ValueError, match="'mean' is neither sum nor convex"):
        losses.term_weights("mean", 0.5, 0.8)
