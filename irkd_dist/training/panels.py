"""Saliency panels: the maps of a few held-out images, kept as the run goes for the report (the paper's Figure 5)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from irkd_dist.data.loader import Loader
from irkd_dist.distill import methods, saliency
from irkd_dist.training import setup
from irkd_dist.training.setup import Job

FOLDER = "panels"


def save(job: Job, loader: Loader, stage: int, epoch: int, resolution: int) -> None:
    """Write `panels/stage-SS-epoch-EEE.npz` for the first images of a loader.

    It holds images (P, r, r, 3) uint8, labels (P,), keys (P,), and maps averaged over the taps, each min-max
    normalised: student (P, h, w), and teacher (P, h', w') where there is one. Every process must call it, for sharded
    parameters; rank 0 writes. Left out where the engine cannot differentiate the student (zero3).
    """
    count = job.config.track.panels
    method = job.config.loss.saliency.method
    if not count or not job.student_taps or (job.engine.no_inner_gradient and methods.inner_gradient(method)):
        return
    batch = next(iter(loader.batches(0)))
    images, labels = batch.images[:count], batch.labels[:count]
    mean, std = (
        torch.tensor(v, device=images.device).view(3, 1, 1) for v in (job.manifest.mean, job.manifest.std)
    )
    pixels = ((images * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    arrays = {
        "images": pixels.cpu().numpy(),
        "labels": labels.cpu().numpy(),
        "ids": batch.ids[:count],
        "resolution": np.array(resolution),
        "student": average(setup.tapped_student(job).maps(images, labels)),
    }
    if job.teacher is not None:
        view = images
        if setup.full_view(job):
            with setup.evaluation_loader(job, setup.held_out(job.manifest), resolution, full=True) as whole:
                view = next(iter(whole.batches(0))).images[:count]
        maps = job.teacher(view, labels, aligned=len(view), logits=False).maps
        arrays["teacher"] = average(maps or [])
    if not job.engine.main:
        return
    folder = job.folder / FOLDER
    folder.mkdir(exist_ok=True)
    file = folder / f"stage-{stage:02d}-epoch-{epoch:03d}.npz"
    temporary = folder / f".{file.name}"
    np.savez_compressed(temporary, allow_pickle=False, **arrays)
    temporary.rename(file)


def load(run: Path) -> list[tuple[int, int, dict[str, np.ndarray]]]:
    """The panels of a run as (stage, epoch, arrays), in order."""
    result = []
    for file in sorted((run / FOLDER).glob("stage-*-epoch-*.npz")):
        _, stage, _, epoch = file.stem.split("-")
        with np.load(file) as arrays:
            result.append((int(stage), int(epoch), dict(arrays)))
    return result


def average(maps: list[Tensor]) -> np.ndarray:
    """Maps (P, h, w) of the taps as one: normalised, on the largest of their grids, averaged, in fp32."""
    return saliency.mean_map(maps).cpu().numpy()
