"""Floating point operations of a training, counted on two images and multiplied: no clock, the same on any machine."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from irkd_dist import config as configuration
from irkd_dist import configured, networks
from irkd_dist.config import Config
from irkd_dist.data import shards
from irkd_dist.distill import methods, models
from irkd_dist.distill.module import Distiller, Objective, Targets
from irkd_dist.distill.teacher import Teacher, freeze

IMAGES = 2  # BatchNorm needs more than one


class _Counter(TorchDispatchMode):
    """Adds up what torch's registry says of each operation.

    `FlopCounterMode` puts hooks on modules besides, with which an inner gradient cannot be taken.
    """

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.total += count(*args, **kwargs, out_val=out)
        return out


def of_run(config: Config, events: Sequence[dict[str, Any]]) -> float:
    """FLOPs of a run's training steps: of an image at each stage, times the images that the log says were trained on.

    Counted with the formulas of `torch.utils.flop_counter`: products and convolutions of forward, inner gradient and
    backwards, a multiplication and an addition as two. Elementwise work, the optimizer and validation are left out.
    The teacher is included, unless its answers come from a cache.

    Raises:
        UserError: the teacher or the shards are gone.
    """
    stages, total = configuration.stages(config), 0.0
    for event in events:
        if event["event"] in ("epoch", "evaluation") and event.get("images"):
            stage = stages[event["stage"]]
            sizes = [stage.resolution, *stage.multiscale]
            total += event["images"] * sum(of_image(config, size) for size in sizes) / len(sizes)
    return total


def of_image(config: Config, resolution: int) -> float:
    """FLOPs of training on an image at a resolution, the mean over steps with and without saliency."""
    spec = config.loss.saliency
    aligned = spec.fraction / spec.every if spec.gamma else 0.0
    key = json.dumps(configuration.to_dict(replace(config, seed=0, name="any", out="any")), sort_keys=True)
    without = _of_image(key, config.loss.kd.alpha, 0.0, resolution)
    return without + aligned * (_of_image(key, config.loss.kd.alpha, spec.gamma, resolution) - without)


@functools.lru_cache(maxsize=256)
def _of_image(key: str, alpha: float, gamma: float, resolution: int) -> float:
    config = configuration.from_dict(json.loads(key), "a run")
    distiller, teacher, manifest = _networks(key)
    full = manifest.largest if config.teacher is not None and config.teacher.view == "full" else resolution
    images, labels = torch.zeros(IMAGES, 3, resolution, resolution).normal_(), torch.arange(IMAGES)
    seen = images if full == resolution else torch.zeros(IMAGES, 3, full, full).normal_()
    cached = config.teacher is not None and config.teacher.cache.folder is not None
    aligned = IMAGES if gamma and distiller.objective.taps else 0

    def ask() -> Any:
        assert teacher is not None
        return teacher(seen, labels, aligned, logits=alpha > 0)

    counter = _Counter()
    with torch.random.fork_rng(devices=()):
        targets = [ask()] if teacher is not None and cached else []
        with counter:
            targets = targets or ([ask()] if teacher is not None else [])
            weight = torch.full((IMAGES,), 1 / IMAGES)
            distiller(images, labels, weight, *targets or [Targets()], alpha, gamma)["total"].backward()
    distiller.zero_grad()
    return counter.total / IMAGES


@functools.lru_cache(maxsize=1)
def _networks(key: str) -> tuple[Distiller, Teacher | None, shards.Manifest]:
    config = configuration.from_dict(json.loads(key), "a run")
    manifest = shards.load_manifest(Path(config.data.shards))
    loss, student = config.loss, replace(config.student, weights=None, pretrained=False)
    network, _, _ = configured.create_student(replace(config, student=student), len(manifest.classes))
    theirs: nn.Module | None = None
    pairs = []
    if config.teacher is not None:
        theirs = configured.load_teacher(config, manifest).model
        pairs = networks.tap_pairs(config, network, theirs)[0]
    second = loss.saliency.gamma > 0 and methods.inner_gradient(loss.saliency.method)
    models.without_fused_attention(network)
    objective = Objective(
        loss.form, loss.kd.kind, loss.kd.temperature, loss.saliency.method, loss.saliency.normalization,
        tuple(s.path for s, _ in pairs),
    )  # fmt: skip
    teacher = None
    if theirs is not None:
        models.without_fused_attention(theirs)
        teacher = Teacher(freeze(theirs, None, second), [t.path for _, t in pairs], loss.saliency.method)
    return Distiller(network.train(), objective), teacher, manifest
