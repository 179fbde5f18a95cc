"""What is measured on a held-out split: accuracy, agreement of saliency maps, and the pointing game."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from irkd_dist.distill import models, saliency, taps
from irkd_dist.distill.teacher import Teacher


class Labelled(Protocol):
    """The part of a batch that is read here: images (B, 3, r, r), labels (B,), weight (B,) with 0 for padding.

    full (B, 3, R, R): what the teacher sees, if not the images. ids (B,): numbers within the split.
    """

    ids: np.ndarray
    images: Tensor
    labels: Tensor
    weight: Tensor
    full: Tensor | None


@dataclass(frozen=True)
class TappedModel:
    """A model with the places and the method of its saliency maps."""

    model: nn.Module
    paths: list[str]
    method: str
    autocast: torch.dtype | None = None

    def with_paths(self, paths: list[str]) -> TappedModel:
        """The same model, read elsewhere."""
        return replace(self, paths=paths)

    def maps(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        """Detached maps (B, h, w), one a tap, in evaluation mode."""
        return self.answer(images, labels)[1]

    def answer(self, images: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Detached logits (B, K) and maps, in evaluation mode."""
        training = self.model.training
        self.model.eval()
        # the graph then starts at the first tap
        asked = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in asked:
            parameter.requires_grad_(False)
        try:
            with torch.autocast(images.device.type, self.autocast, enabled=self.autocast is not None):
                output, maps = taps.forward_with_maps(
                    self.model, images, self.paths, self.method, labels, frozen=True
                )
            return models.inference_logits(output), maps
        finally:
            for parameter in asked:
                parameter.requires_grad_(True)
            self.model.train(training)


@torch.no_grad()
def correct_and_count(model: nn.Module, batches: Iterable[Labelled], autocast: torch.dtype | None) -> Tensor:
    """Right answers, samples, and samples whose logits are not finite, of this process's share: integers (3,).

    The model's mode is put back. Padding has weight 0 and is not counted, so the sum over the processes counts each
    sample once.
    """
    training = model.training
    model.eval()
    counts: Tensor | None = None
    for batch in batches:
        with torch.autocast(batch.images.device.type, autocast, enabled=autocast is not None):
            logits = models.inference_logits(model(batch.images))
        real = batch.weight > 0
        finite = logits.isfinite().all(dim=1)
        right = (logits.argmax(dim=1) == batch.labels) & finite & real
        step = torch.stack((right.sum(), real.sum(), (~finite & real).sum()))
        counts = step if counts is None else counts + step
    model.train(training)
    assert counts is not None, "an evaluation loader gives at least one batch"
    return counts


@dataclass(frozen=True)
class Answers:
    """What a model says of samples, one row each: arrays (N,), on the host."""

    ids: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray  # class; -1 where the logits are not finite
    confidence: np.ndarray  # probability of that class
    truth: np.ndarray  # probability of the label

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float((self.predicted == self.labels).sum() / len(self.labels))

    @staticmethod
    def joined(parts: list[Answers]) -> Answers:
        """The answers of several processes, in the order of ids."""
        order = np.argsort(np.concatenate([p.ids for p in parts]), kind="stable")
        names = ("ids", "labels", "predicted", "confidence", "truth")
        return Answers(*(np.concatenate([getattr(p, name) for p in parts])[order] for name in names))

    def pairs(self) -> list[list[int]]:
        """Confusion as (label, predicted, how often), of those that occur; -1 is no finite answer."""
        found, counts = np.unique(np.stack((self.labels, self.predicted)), axis=1, return_counts=True)
        return [[int(a), int(b), int(n)] for (a, b), n in zip(found.T, counts, strict=True)]


@torch.no_grad()
def answers(model: nn.Module, batches: Iterable[Labelled], autocast: torch.dtype | None) -> Answers:
    """What a model says of this process's share of samples, in evaluation mode; padding is left out."""
    training, rows = model.training, []
    model.eval()
    for batch in batches:
        with torch.autocast(batch.images.device.type, autocast, enabled=autocast is not None):
            logits = models.inference_logits(model(batch.images)).float()
        finite, real = logits.isfinite().all(dim=1), (batch.weight > 0).cpu().numpy()
        shares = logits.softmax(dim=1)
        confidence, predicted = shares.max(dim=1)
        truth = shares.gather(1, batch.labels[:, None])[:, 0]
        predicted = torch.where(finite, logits.argmax(dim=1), -1)
        told = [batch.labels, predicted, *(torch.where(finite, v, 0.0) for v in (confidence, truth))]
        rows.append([np.asarray(batch.ids)[real], *(t.cpu().numpy()[real] for t in told)])
    model.train(training)
    return Answers(*(np.concatenate(column) for column in zip(*rows, strict=True)))


def agreement(
    student: TappedModel,
    teacher: Teacher,
    batches: Iterable[Labelled],
    normalization: str,
    total: Callable[[Tensor], Tensor] = lambda own: own,
) -> dict[str, float]:
    """How alike student's and teacher's maps are, averaged over samples and taps.

    total: adds a tensor up over the processes that have a share of the samples each.

    Returns:
        `mse`: the saliency loss (see `saliency.saliency_loss`); `correlation`: Pearson's over the patch grid.
    """
    sums = [0.0] * 4  # loss and its samples, correlation and its pairs of maps
    for batch in batches:
        real = batch.weight > 0
        images, labels = batch.images[real], batch.labels[real]
        if not len(images):
            continue
        ours = student.maps(images, labels)
        view = images if batch.full is None else batch.full[real]
        theirs = teacher(view, labels, aligned=len(view), logits=False).maps or []
        theirs = [saliency.resize_map(t, o.shape[1:]) for t, o in zip(theirs, ours, strict=True)]
        sums[0] += float(saliency.saliency_loss(ours, theirs, normalization)[0].sum())
        sums[1] += len(images)
        for a, b in ((o.flatten(1), t.flatten(1)) for o, t in zip(ours, theirs, strict=True)):
            alike = F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True))
            sums[2] += float(alike.sum())
            sums[3] += len(a)
    loss, count, correlation, pairs = total(torch.tensor(sums, dtype=torch.float64)).tolist()
    return {"mse": loss / max(count, 1), "correlation": correlation / max(pairs, 1)}


def pointing_hits(maps: list[Tensor], masks: Tensor) -> Tensor:
    """Pointing game (Zhang et al. 2018): does the saliency's peak lie on the object?

    Each sample's maps (B, h, w) are min-max normalised, averaged over the taps (`saliency.mean_map`), and enlarged to
    the image; masks (B, H, W) are true on the object. Returns (B,) booleans.
    """
    enlarged = saliency.resize_map(saliency.mean_map(maps), masks.shape[1:])
    peak = enlarged.flatten(1).argmax(dim=1, keepdim=True)
    return masks.flatten(1).gather(1, peak).squeeze(1)
