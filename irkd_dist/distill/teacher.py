"""The frozen teacher: logits and saliency maps of a batch, at the student's resolution or at full resolution."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from irkd_dist.distill import features, losses, methods, models, taps
from irkd_dist.distill.module import Targets


@dataclass
class Member:
    """One more teacher, whose logits count too."""

    model: nn.Module
    renormalize: tuple[Tensor, Tensor] | None = None


@dataclass
class Teacher:
    """A teacher that never changes: no gradient, evaluation mode whatever its surroundings do.

    Args:
        model: the network, on its device; frozen by `freeze`.
        paths: tapped modules, in the order of the student's taps.
        method: saliency method.
        autocast: dtype of its forward and inner gradient, None for fp32.
        renormalize: (scale, shift), each (3, 1, 1), from the student's input normalisation to the teacher's own.
        feature_paths: modules whose features are aligned, in the order of the student's.
        members: more teachers; maps and features are the first one's alone.
        shares: of each teacher in the mean of their logits, the first one's first; empty for one alone.
        mix: the temperature at which their probabilities are averaged; None: the logits are.
    """

    model: nn.Module
    paths: list[str]
    method: str
    autocast: torch.dtype | None = None
    renormalize: tuple[Tensor, Tensor] | None = None
    feature_paths: tuple[str, ...] = ()
    members: tuple[Member, ...] = ()
    shares: tuple[float, ...] = ()
    mix: float | None = None

    def __post_init__(self) -> None:
        methods.load(self.method)
        taps.put_taps(self.model, self.paths)
        features.put_keepers(self.model, self.feature_paths)
        self.compute: Callable[..., Targets] = self.answer  # or that, compiled (`compiling`)

    def __call__(
        self, images: Tensor, target: Tensor, aligned: int = 0, logits: bool = True, featured: bool = False
    ) -> Targets:
        """Compute targets for images (B, 3, r, r): logits of all, maps of the first `aligned` samples, features of all.

        Each sample's are detached, and the same whatever other samples are in the batch but for rounding.
        """
        featured = featured and bool(self.feature_paths)
        if not logits and not aligned and not featured:
            return Targets()
        seen = images
        if self.renormalize is not None:
            scale, shift = (
                t.to(images.device) for t in self.renormalize
            )  # a sharded one is not on its device yet
            images = images * scale + shift
        said = self.compute(images, target, aligned, logits, featured)
        if self.members and said.logits is not None:
            said.logits = self._mixed(said.logits, seen)
        return said

    def only(self, number: int) -> Teacher:
        """One of several teachers for itself, to be measured."""
        shares = tuple(float(i == number) for i in range(1 + len(self.members)))
        return replace(self, shares=shares)

    @torch.no_grad()
    def _mixed(self, first: Tensor, images: Tensor) -> Tensor:
        """The mean of all teachers' logits, or the logits of the mean of their probabilities at temperature `mix`."""
        total = sum(self.shares)
        parts = []
        for share, member in zip(self.shares, (None, *self.members), strict=True):
            logits = first
            if member is not None and share:
                view = (
                    images
                    if member.renormalize is None
                    else images * member.renormalize[0] + member.renormalize[1]
                )
                with torch.autocast(images.device.type, self.autocast, enabled=self.autocast is not None):
                    logits = models.inference_logits(member.model(view))
            if share:
                parts.append((share / total, losses.at_least_fp32(logits)))
        if self.mix is None:
            return torch.stack([share * logits for share, logits in parts]).sum(0)
        shifted = [(logits / self.mix).log_softmax(1) + math.log(share) for share, logits in parts]
        return self.mix * torch.stack(shifted).logsumexp(0)

    def answer(
        self, images: Tensor, target: Tensor, aligned: int, logits: bool, featured: bool = False
    ) -> Targets:
        """Targets of images as the teacher sees them."""
        outputs, maps, found = [], None, None
        paths = self.feature_paths if featured else ()
        with (
            torch.autocast(images.device.type, self.autocast, enabled=self.autocast is not None),
            features.keeping(self.model, paths) as kept,
        ):
            if aligned:
                output, maps = taps.forward_with_maps(
                    self.model, images[:aligned], self.paths, self.method, target[:aligned], frozen=True
                )
                outputs.append(models.inference_logits(output))
            if (logits or featured) and aligned < len(images):
                with torch.no_grad():
                    outputs.append(models.inference_logits(self.model(images[aligned:])))
            if featured:
                size = (images.shape[2], images.shape[3])
                found = [f.detach() for f in features.grids(self.model, paths, kept, size)]
        return Targets(losses.at_least_fp32(torch.cat(outputs)) if logits else None, maps, found)

    def load(self, weights: dict[str, Tensor], where: str) -> None:
        """Put another checkpoint's weights into the same network (a stage's teacher)."""
        models.load_weights(self.model, weights, where)


def freeze(
    model: nn.Module,
    autocast: torch.dtype | None,
    inner_gradient: bool,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Make a model a teacher: evaluation mode, no gradients, weights stored as its products use them.

    Under autocast every linear and convolutional weight is cast at each use; a frozen one is cast once, here, to
    the same numbers. `device` is where the model will compute (it is not moved): on a CPU the fused attention's
    backward is slower than explicit products (measured 1.5 times for a ViT-Small at 32 px), so a teacher whose maps
    need the inner gradient goes without.
    """
    model.eval().requires_grad_(False)
    if autocast is not None:
        for module in model.modules():
            # not their subclasses: weight standardisation computes with fp32 weights first
            if type(module) in (nn.Linear, nn.Conv2d):
                module.to(autocast)
    if inner_gradient and torch.device(device).type == "cpu":
        models.without_fused_attention(model)
    return model


def competent_shares(accuracies: Sequence[float], classes: int) -> tuple[float, ...]:
    """Shares of several teachers by how far each is above chance; equal where none is."""
    above = [max(a - 1.0 / classes, 0.0) for a in accuracies]
    return tuple(a / sum(above) for a in above) if sum(above) else (1.0 / len(above),) * len(above)


def competence(accuracy: float, best: float, classes: int) -> float:
    """How much of the teacher's skill is left at a resolution: 0 at chance, 1 at its best stage.

    accuracy and best in 0..1. The KD weight is multiplied by this when it follows the teacher.
    """
    chance = 1.0 / classes
    if not math.isfinite(best) or best <= chance:
        return 0.0
    return min(max((accuracy - chance) / (best - chance), 0.0), 1.0)
