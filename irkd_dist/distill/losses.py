"""Cross-entropy, distillation and their combination: pure functions of tensors, one value a sample.

Nothing here averages over the batch: the caller multiplies by per-sample weights that sum to one over the global
batch, which is the batch mean for any number of processes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def at_least_fp32(tensor: Tensor) -> Tensor:
    """fp32 of a lower precision; fp32 and fp64 as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of logits (B, K) with class numbers (B,) or probabilities (B, K); returns (B,) in fp32."""
    return F.cross_entropy(at_least_fp32(logits), target, reduction="none")


def soft_distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) at temperature T, summed over the classes (Hinton et al. 2015).

    student, teacher: logits (B, K). Returns (B,). Summed, never averaged, over the K classes.
    """
    log_student = F.log_softmax(at_least_fp32(student) / temperature, dim=1)
    log_teacher = F.log_softmax(at_least_fp32(teacher) / temperature, dim=1)
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1)
    return temperature**2 * divergence


def hard_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy with the teacher's decision (DeiT, Touvron et al. 2021, eq. 3). Logits (B, K); returns (B,)."""
    return F.cross_entropy(at_least_fp32(student), teacher.argmax(dim=1), reduction="none")


def term_weights(form: str, alpha: float, gamma: float) -> tuple[float, float, float]:
    """Weights of (ce, kd, saliency).

    `sum`: 1, alpha, gamma (the paper, eq. 1). `convex`: 1 - alpha, alpha, gamma (the authors' notebooks).
    """
    if form == "sum":
        return 1.0, alpha, gamma
    if form == "convex":
        return 1.0 - alpha, alpha, gamma
    raise ValueError(f"loss form {form!r} is neither sum nor convex")
