"""Student and losses in one forward: the module that DDP, DeepSpeed or FSDP2 wrap.

The saliency term differentiates inside this forward, the only place where its gradients are right once an engine
hooks or shards the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from irkd_dist.distill import features, losses, methods, models, saliency, taps


@dataclass(frozen=True)
class Objective:
    """What the student minimises; weights that change by stage or step are arguments of the forward."""

    form: Literal["sum", "convex"] = "sum"
    kd_kind: Literal["soft", "hard"] = "soft"
    temperature: float = 4.0
    method: str = "gradient"
    normalization: Literal["minmax", "l2"] = "minmax"
    taps: tuple[str, ...] = ()  # module paths in the student, void ones left out
    feature_kind: Literal["cosine", "mse"] = "cosine"
    feature_taps: tuple[str, ...] = ()  # module paths in the student, one for each of its projections


@dataclass
class Targets:
    """What the teacher says about a batch: detached, and of each sample alone, whatever batch it came in."""

    logits: Tensor | None = None  # (B, K) in fp32
    maps: list[Tensor] | None = None  # one (A, h', w') a tap in fp32, for the first A samples of the batch
    features: list[Tensor] | None = None  # one (B, h', w', D) a pair of feature taps


class Distiller(nn.Module):
    """A student with its losses.

    Args:
        student: the model to train.
        objective: the terms' definition.
        autocast: dtype of the forward and both backwards, None for fp32; parameters stay fp32.
        inner_grad_context: makes what an engine needs around the inner gradient.
    """

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        autocast: torch.dtype | None = None,
        inner_grad_context: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self.autocast = autocast
        self.inner_grad_context = inner_grad_context
        methods.load(objective.method)
        taps.put_taps(student, objective.taps)
        features.put_keepers(student, objective.feature_taps)

    # `compiling` may put a compiled one in its place
    def forward(
        self,
        images: Tensor,
        target: Tensor,
        weight: Tensor,
        targets: Targets,
        alpha: float = 0.0,
        gamma: float = 0.0,
        saliency_scale: float = 1.0,
        beta: float = 0.0,
    ) -> dict[str, Tensor]:
        """Compute the named loss terms of a batch share.

        images (B, 3, r, r); target (B,) class numbers or (B, K) probabilities; weight (B,), so that the mean over
        ranks of sum(weight * loss) is the mean over the global batch. `targets.maps` covers the first A samples, those
        whose saliency is aligned; `saliency_scale` is global batch / global A. A term of weight 0 is not computed.

        Returns:
            Scalars: `total` to differentiate, the detached terms `ce`, `kd`, `saliency`, `features` where they are
            computed, `correct` (samples right) and `flat` (maps without a shape).
        """
        terms, counts = self.terms(images, target, weight, targets, alpha, gamma, saliency_scale, beta)
        ce_weight, kd_weight, saliency_weight = losses.term_weights(self.objective.form, alpha, gamma)
        total = ce_weight * terms["ce"]
        if "kd" in terms:
            total = total + kd_weight * terms["kd"]
        if "saliency" in terms:
            total = total + saliency_weight * terms["saliency"]
        if "features" in terms:
            total = total + beta * terms["features"]
        return {name: term.detach() for name, term in terms.items()} | counts | {"total": total}

    def terms(
        self,
        images: Tensor,
        target: Tensor,
        weight: Tensor,
        targets: Targets,
        alpha: float,
        gamma: float,
        saliency_scale: float = 1.0,
        beta: float = 0.0,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The terms of `forward` before their weights, to differentiate; and the counts `correct` and `flat`."""
        aligned, maps = len(targets.maps[0]) if gamma and targets.maps else 0, []
        theirs_of_features = targets.features if beta and targets.features else []
        wanted, distances = self.objective.feature_taps if theirs_of_features else (), None
        with (
            torch.autocast(images.device.type, self.autocast, enabled=self.autocast is not None),
            features.keeping(self.student, wanted) as kept,
        ):
            if not aligned:
                output = self.student(images)
            else:
                context = self.inner_grad_context()
                if wanted and not torch.compiler.is_compiling():  # what is compiled is not checkpointed
                    context = features.closed(kept, context)
                output, maps = taps.forward_with_maps(
                    self.student,
                    images[:aligned],
                    list(self.objective.taps),
                    self.objective.method,
                    target[:aligned],
                    frozen=False,
                    context=context,
                )
                if aligned < len(images):
                    output = _joined(output, self.student(images[aligned:]))
            if wanted:
                ours = features.grids(self.student, wanted, kept, (images.shape[2], images.shape[3]))
                projections = self.student.get_submodule(features.PROJECTIONS)
                distances = features.loss(ours, theirs_of_features, projections, self.objective.feature_kind)
        logits = models.inference_logits(output)
        class_logits, distilled_logits = output if isinstance(output, tuple) else (output, output)
        distils = alpha > 0 and targets.logits is not None

        # without distillation both heads of a distilled student learn from the labels, as inference uses both
        ce = losses.cross_entropy(class_logits if distils else logits, target)
        terms, counts = {"ce": (weight * ce).sum()}, {}
        if distils:
            assert targets.logits is not None
            if self.objective.kd_kind == "hard":
                per_sample = losses.hard_distillation(distilled_logits, targets.logits)
            else:
                per_sample = losses.soft_distillation(
                    distilled_logits, targets.logits, self.objective.temperature
                )
            terms["kd"] = (weight * per_sample).sum()
        if maps:
            assert targets.maps is not None
            theirs = [
                saliency.resize_map(m, ours.shape[1:]) for m, ours in zip(targets.maps, maps, strict=True)
            ]
            per_sample, flat = saliency.saliency_loss(maps, theirs, self.objective.normalization)
            terms["saliency"] = saliency_scale * (weight[: len(per_sample)] * per_sample).sum()
            counts["flat"] = flat
        if distances is not None:
            terms["features"] = (weight * distances).sum()
        label = target if target.ndim == 1 else target.argmax(dim=1)
        counts["correct"] = ((logits.argmax(dim=1) == label) & (weight > 0)).sum()
        return terms, counts


def _joined(first: taps.Output, rest: taps.Output) -> taps.Output:
    """Outputs of two parts of a batch as one."""
    if isinstance(first, tuple):
        return torch.cat((first[0], rest[0])), torch.cat((first[1], rest[1]))
    assert isinstance(rest, Tensor)
    return torch.cat((first, rest))
