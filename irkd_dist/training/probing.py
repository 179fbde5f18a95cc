"""What a run measures of itself outside its steps: floating-point operations, how alike the maps are, gradients.

The same few held-out images at every epoch's end, in evaluation mode: no step waits, no random number is drawn.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from irkd_dist import config as configuration
from irkd_dist.config import Config
from irkd_dist.data import shards
from irkd_dist.data.loader import Loader
from irkd_dist.distill import measure, methods, models
from irkd_dist.distill.module import Distiller, Targets
from irkd_dist.distill.teacher import Teacher
from irkd_dist.errors import UserError
from irkd_dist.training import build, panels, restore
from irkd_dist.training.parts import Parts
from irkd_dist.training.position import Position
from irkd_dist.training.tracking import Tracker


def count_flops(parts: Parts, tracker: Tracker, position: Position) -> None:
    """Record the floating-point operations of an image at each stage to come, as torch's counter sees them.

    `inference`: the student's forward; `training`: forward, both backwards and losses; `teacher`: its logits and maps.
    Averaged over the stage's scales and over the steps that align maps and those that do not. Nothing is recorded
    where an engine shards the weights: their products are not seen whole there.
    """
    if not parts.engine.replicated or position.finished:
        return
    stages = parts.plan.stages
    for number in range(position.curriculum.stage, len(stages)):
        restore.load_stage_teacher(parts, number)
        sizes = [stages[number].resolution, *stages[number].multiscale]
        each = {size: _flops_of_image(parts, size) for size in {*sizes}}
        means = {k: sum(each[size][k] for size in sizes) / len(sizes) for k in each[sizes[0]]}
        tracker.event("flops", position.step, stage=number, resolution=stages[number].resolution, **means)


def measure_epoch(parts: Parts, loader: Loader, resolution: int) -> dict[str, Any]:
    """How alike student's and teacher's maps are on `track.probe` held-out images, and what each term pulls at weights.

    `correlation` and `mse` as `measure.agreement`; `pointing`, where there are masks; `gradients`: the norm of each
    term's gradient before its weight, over all parameters. What cannot be measured is not there. Every process must
    call it, for sharded parameters, and computes the same.
    """
    config, engine, method = parts.config, parts.engine, parts.config.loss.saliency.method
    count = min(config.track.probe, loader.batch)
    if not count:
        return {}
    rows = panels.choose(loader.labels, count)
    images, labels = loader.pick(rows)
    view = _full_view(parts, resolution, rows) if build.full_view(config) else None
    found: dict[str, Any] = {"images": len(rows)}
    if parts.taps and not (engine.no_inner_gradient and methods.inner_gradient(method)):
        headless = config.teacher is not None and not config.teacher.logits  # no score to take a gradient of
        if parts.teacher is not None and not (headless and methods.inner_gradient(method)):
            seen = _Seen(loader.ids[rows], images, labels, torch.ones(len(rows), device=images.device), view)
            found |= measure.agreement(
                parts.tapped, _as_it_is(parts.teacher), [seen], config.loss.saliency.normalization
            )
        split = build.held_out(parts.manifest)
        masks = object_masks(config, parts.manifest, split, resolution, loader.ids[rows])
        if masks is not None:
            hits = measure.pointing_hits(parts.tapped.maps(images, labels), masks.to(images.device))
            found["pointing"] = float(hits.float().mean())
    if engine.replicated:
        found["gradients"] = _gradient_norms(parts, images, labels, images if view is None else view)
    return {k: v for k, v in found.items() if not isinstance(v, float) or math.isfinite(v)}


def named(probed: dict[str, Any]) -> dict[str, float]:
    """The numbers of `measure_epoch` by the names of metrics."""
    names = {"correlation": "val/map_correlation", "mse": "val/map_error", "pointing": "val/pointing"}
    norms = {f"train/gradient_{term}": norm for term, norm in probed.get("gradients", {}).items()}
    return {name: probed[key] for key, name in names.items() if key in probed} | norms


def object_masks(
    config: Config, manifest: shards.Manifest, split: str, resolution: int, ids: np.ndarray
) -> Tensor | None:
    """Masks (N, H, W) of samples, true on the object; None where there are none, or where they show more than is seen.

    Raises:
        UserError: a mask cannot be read.
    """
    if not manifest.masks or config.data.centre_crop or manifest.crop_pct != 1:
        return None
    stored = resolution if manifest.mode == "resize" else manifest.resolutions[-1]
    opened = shards.open_split(configuration.shards_of(config), manifest, split, stored, verify="size")
    with contextlib.closing(opened):
        return torch.stack([_mask(opened, int(i), stored) for i in ids])


def _mask(opened: shards.Split, i: int, size: int) -> Tensor:
    try:
        mask = shards.decode(opened.mask(i) or b"", "png")
        if mask.shape[1:] != (size, size):
            raise ValueError(f"it has {tuple(mask.shape[1:])} pixels, not {(size, size)}")
    except ValueError as error:
        raise UserError(
            f"{opened.where(i)}: the mask of sample {opened.keys[i]} cannot be read: {error}; render again: the same "
            "`irkd render` command replaces what is damaged"
        ) from error
    return mask[0] > 127


class _Seen:
    """Images as `measure.agreement` reads them."""

    def __init__(
        self, ids: np.ndarray, images: Tensor, labels: Tensor, weight: Tensor, full: Tensor | None
    ) -> None:
        self.ids, self.images, self.labels, self.weight, self.full = ids, images, labels, weight, full


def _gradient_norms(parts: Parts, images: Tensor, labels: Tensor, view: Tensor) -> dict[str, float]:
    """Each term's own gradient, before its weight; of terms that are off, nothing."""
    loss, distiller = parts.config.loss, _distiller(parts)
    gamma = loss.saliency.gamma if parts.teacher is not None else 0.0
    targets = Targets()
    if parts.teacher is not None:
        targets = _answer(parts, parts.teacher, view, labels, gamma)
    weight = torch.full((len(images),), 1 / len(images), device=images.device)
    parameters = [p for p in parts.student.parameters() if p.requires_grad]
    training = parts.student.training
    parts.student.eval()
    parts.student.training = models.is_distilled(parts.student)  # itself alone: both heads, and no dropout
    terms, _ = distiller.terms(images, labels, weight, targets, loss.kd.alpha, gamma, beta=loss.features.beta)
    norms = {}
    for name, term in terms.items():
        own = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        norms[name] = float(
            torch.stack([g.float().square().sum() for g in own if g is not None]).sum().sqrt()
        )
    parts.student.train(training)
    return {name: norm for name, norm in norms.items() if math.isfinite(norm)}


def _flops_of_image(parts: Parts, size: int) -> dict[str, float]:
    config, teacher, distiller = parts.config, parts.teacher, _distiller(parts)
    spec, alpha, gamma = config.loss.saliency, config.loss.kd.alpha, config.loss.saliency.gamma
    device, side = parts.engine.device, parts.manifest.largest if build.full_view(config) else size
    image, view = (torch.zeros(1, 3, s, s, device=device) for s in (size, side))
    label, weight = torch.zeros(1, dtype=torch.long, device=device), torch.ones(1, device=device)
    parameters = [p for p in parts.student.parameters() if p.requires_grad]
    training = parts.student.training
    parts.student.eval()

    def step(targets: Targets, gamma: float) -> int:
        with _Flops() as counter:
            terms, _ = distiller.terms(
                image, label, weight, targets, alpha, gamma, beta=config.loss.features.beta
            )
            total = torch.stack([*terms.values()]).sum()
            torch.autograd.grad(
                total, parameters, allow_unused=True
            )  # `backward` would call an engine's hooks
        return counter.total

    found: dict[str, float] = {}
    with (
        torch.no_grad(),
        torch.autocast(device.type, distiller.autocast, enabled=distiller.autocast is not None),
    ):
        with _Flops() as counter:
            models.inference_logits(parts.student(image))
        found["inference"] = counter.total
    share = spec.fraction / spec.every if gamma and teacher is not None else 0.0
    if teacher is not None:
        found["teacher"] = 0.0
        for part, own in ((share, gamma), (1 - share, 0.0)):
            if not part:
                continue
            with _Flops() as counter:
                targets = _answer(parts, teacher, view, label, own)
            found["teacher"] += part * counter.total
            found["training"] = found.get("training", 0.0) + part * step(targets, own)
    else:
        found["training"] = step(Targets(), 0.0)
    parts.student.train(training)
    return found


class _Flops(TorchDispatchMode):
    """Sums torch's own formulas; `FlopCounterMode` with its tracker of modules does not work under `autograd.grad`."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        self.total += formula(*args, **(kwargs or {}), out_val=result) if formula is not None else 0
        return result


def _answer(parts: Parts, teacher: Teacher, view: Tensor, labels: Tensor, gamma: float) -> Targets:
    """The teacher itself, not its cache: these images come in no step."""
    loss, aligned = parts.config.loss, len(view) if gamma else 0
    featured = loss.features.beta > 0
    return _as_it_is(teacher)(view, labels, aligned=aligned, logits=loss.kd.alpha > 0, featured=featured)


def _full_view(parts: Parts, resolution: int, rows: np.ndarray) -> Tensor:
    split = build.held_out(parts.manifest)
    with build.evaluation_loader(
        parts.config, parts.manifest, parts.engine, split, resolution, full=True
    ) as whole:
        return whole.pick(rows)[0]


def _distiller(parts: Parts) -> Distiller:
    """The student with its losses, out of its engine's wrapper: no hook of an engine runs."""
    return next(m for m in parts.module.modules() if isinstance(m, Distiller))


def _as_it_is(teacher: Teacher) -> Teacher:
    """The teacher without its compiled form, which would take batches of this size for those of the training."""
    return replace(teacher)
