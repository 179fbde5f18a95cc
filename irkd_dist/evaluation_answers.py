"""What networks say of every image of a split: student, teacher, earlier stages; and pictures of wrong answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from irkd_dist import networks, runfolder
from irkd_dist.config import Config
from irkd_dist.data import shards
from irkd_dist.data.loader import Loader
from irkd_dist.distill import measure, models
from irkd_dist.distill.measure import Answers, TappedModel
from irkd_dist.distill.teacher import Teacher
from irkd_dist.errors import UserError
from irkd_dist.networks import Network
from irkd_dist.training import bookends, build, distributed, panels
from irkd_dist.training.engines import Engine

GALLERY = 16  # images of wrong answers that are kept


@dataclass(frozen=True)
class Task:
    """What is measured, on what, by which of the processes."""

    network: Network
    config: Config  # of the run, with the shards that are measured on
    manifest: shards.Manifest
    place: Engine  # as far as it joins the processes
    teacher: Teacher | None
    taps: list[str]  # of the network, as the teacher's are paired with them


def of(task: Task, model: nn.Module, loader: Loader, who: str) -> Answers:
    """What a network says of all samples of a loader, on every process."""
    own = measure.answers(model, loader.batches(0), task.place.autocast)
    found = Answers.joined(distributed.gather(task.place, own))
    if (found.predicted < 0).all():
        raise UserError(
            f"the logits of {who} are not finite on any of {len(found.ids)} images at {loader.resolution} px: it has "
            "diverged, or its weights are damaged; lower optim.lr or set optim.clip=1"
        )
    return found


def has_answers(config: Config) -> bool:
    """Whether the one teacher that is at hand answers as the run's does: it has a head, and is not one of several."""
    return config.teacher is not None and config.teacher.logits and not config.teacher.ensemble


def by_teacher(task: Task, split: str, loader: Loader) -> Answers:
    """What the teacher says of them, of the view that it has."""
    assert task.teacher is not None
    view = bookends.TeacherView(task.teacher)
    if task.config.teacher is None or task.config.teacher.view != "full":
        return of(task, view, loader, "the teacher")
    with build.evaluation_loader(task.config, task.manifest, task.place, split, 0, full=True) as whole:
        return of(task, view, whole, "the teacher")


def earlier_stages(
    task: Task, run: Path, split: str, sizes: list[int], raw: bool, notes: list[str]
) -> dict[str, dict[str, float]]:
    """Accuracy by resolution of the best checkpoint of each stage but the one that is measured anyway."""
    found: dict[str, dict[str, float]] = {}
    own = runfolder.stage_of(task.network.folder)
    for folder in runfolder.bests(run):
        stage = runfolder.stage_of(folder)
        if stage in (None, own) or str(stage) in found:
            continue
        try:
            model = networks.load(folder, averaged=not raw).model.to(task.place.device)
        except UserError as error:
            notes.append(f"stage {stage} is left out: {error}")
            continue
        if task.place.device.type == "cpu":
            models.without_fused_attention(model)
        found[str(stage)] = {}
        for size in sizes:
            with build.evaluation_loader(task.config, task.manifest, task.place, split, size) as loader:
                said = of(task, model, loader, f"the best of stage {stage}")
                found[str(stage)][str(size)] = said.accuracy
    return dict(sorted(found.items(), key=lambda item: int(item[0])))


def gallery(task: Task, split: str, loader: Loader, told: dict[str, Answers]) -> dict[str, np.ndarray]:
    """Wrong answers of the student as pictures, with both maps of the label's score; every process must call it.

    Half of them those whose label got the lowest probability, then of the others those of the surest wrong answer.
    """
    own, count = told["student"], GALLERY // 2
    wrong = np.flatnonzero((own.predicted != own.labels) & (own.predicted >= 0))
    worst = wrong[np.argsort(own.truth[wrong], kind="stable")][:count]
    others = np.setdiff1d(wrong, worst)
    surest = others[np.argsort(-own.confidence[others], kind="stable")][:count]
    chosen = np.concatenate([worst, surest])
    if not len(chosen):
        return {}
    row_of = {int(i): row for row, i in enumerate(loader.ids)}
    rows = np.array([row_of[int(i)] for i in own.ids[chosen]])
    images, labels = loader.pick(rows)
    mean, std = (
        torch.tensor(v, device=images.device).view(3, 1, 1) for v in (task.manifest.mean, task.manifest.std)
    )
    pixels = ((images * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    found = {
        "images": pixels.cpu().numpy(), "ids": own.ids[chosen], "labels": own.labels[chosen],
        "resolution": np.array(loader.resolution), "worst": np.arange(len(chosen)) < len(worst),
    }  # fmt: skip
    for who, answers in told.items():
        for name in ("predicted", "confidence", "truth"):
            found[f"{who}_{name}"] = getattr(answers, name)[chosen]
    if task.taps:
        student = TappedModel(task.network.model, task.taps, task.network.method, task.place.autocast)
        found["student"] = panels.average(student.maps(images, labels))
    if task.taps and task.teacher is not None:
        view = images
        if task.config.teacher is not None and task.config.teacher.view == "full":
            with build.evaluation_loader(
                task.config, task.manifest, task.place, split, 0, full=True
            ) as whole:
                view, _ = whole.pick(rows)
        maps = task.teacher(view, labels, aligned=len(view), logits=False).maps
        found["teacher"] = panels.average(maps or [])
    return found
