"""What a run is made of: built by build.py, taken by whatever trains, measures and saves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from irkd_dist.config import Config
from irkd_dist.data import shards
from irkd_dist.distill.cache import CachedTeacher
from irkd_dist.distill.measure import TappedModel
from irkd_dist.distill.teacher import Teacher
from irkd_dist.training import curriculum
from irkd_dist.training.engines import Engine


@dataclass(frozen=True)
class Parts:
    """What a run is made of; all of it lives as long as the run."""

    config: Config
    engine: Engine
    manifest: shards.Manifest
    plan: curriculum.Plan
    student: nn.Module  # the network itself
    module: nn.Module  # Distiller in the engine's wrapper
    optimizer: torch.optim.Optimizer  # its groups hold the learning rate; the engine steps it
    teacher: Teacher | None
    answers: CachedTeacher | None  # the teacher in the loop, where it has a cache
    taps: list[str]  # module paths in the student; empty if it has none that the method reads
    identity: dict[str, Any]  # written into every checkpoint: model, classes, normalisation, digests
    notes: list[str]  # what a user should know before the first step
    chosen: dict[int, int] = field(
        default_factory=dict
    )  # micro-batches by stage, under optim.accumulate=auto

    def micro_batches(self, stage: int) -> int:
        """Micro-batches that a process computes its share of a stage's batch in."""
        asked = self.config.optim.accumulate
        return self.chosen.get(stage, 1) if asked == "auto" else asked

    @property
    def tapped(self) -> TappedModel:
        """The student as its maps are read for panels and agreement."""
        return TappedModel(self.student, self.taps, self.config.loss.saliency.method, self.engine.autocast)
