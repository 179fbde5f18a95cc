"""Saliency panels: the maps of a few held-out images, kept as the run goes for the report (the paper's Figure 5)."""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from irkd_dist import runfolder
from irkd_dist.data.loader import Loader
from irkd_dist.distill import saliency
from irkd_dist.training import setup
from irkd_dist.training.setup import Job


def save(job: Job, loader: Loader, stage: int, epoch: int, resolution: int) -> None:
    """Write `panels/stage-SS-epoch-EEE.npz` for the first images of a loader.

    It holds images (P, r, r, 3) uint8, labels (P,), keys (P,), and maps averaged over the taps, each min-max
    normalised: student (P, h, w), and teacher (P, h', w') where there is one. Every process must call it, for sharded
    parameters; rank 0 writes. Left out where the engine cannot differentiate the student (zero3).
    """
    count = job.config.track.panels
    method = job.config.loss.saliency.method
    if not count or not job.student_taps or (job.engine.no_inner_gradient and method != "attention"):
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
    with runfolder.whole(runfolder.panel_file(job.folder, stage, epoch)) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def load(run: Path) -> tuple[list[tuple[int, int, dict[str, np.ndarray]]], list[str]]:
    """The panels of a run as (stage, epoch, arrays), in order, and what is wrong with those that were left out."""
    result, problems = [], []
    for stage, epoch, file in runfolder.panel_files(run):
        try:
            with np.load(io.BytesIO(runfolder.read_bytes(file)), allow_pickle=False) as stored:
                arrays = dict(stored)
            _check(arrays)
            result.append((stage, epoch, arrays))
        except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error) as error:
            problems.append(f"The saliency panels cannot be read: {file.name}: {error}")
    return result, problems


def _check(arrays: dict[str, np.ndarray]) -> None:
    """Refuse arrays of other shapes and types than `save` writes."""
    images, resolution = arrays["images"], arrays["resolution"]
    count = len(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.size:
        raise ValueError("its images are none")
    if resolution.shape or not all(arrays[k].shape == (count,) for k in ("labels", "ids")):
        raise ValueError("its labels are not those of its images")
    for name in ("labels", "ids", "resolution"):
        if not np.issubdtype(arrays[name].dtype, np.integer):
            raise ValueError(f"its {name} are no whole numbers")
    for maps in (arrays[k] for k in ("student", "teacher") if k in arrays):
        if maps.ndim != 3 or len(maps) != count or not maps.size or not np.isfinite(maps).all():
            raise ValueError("its maps are not those of its images")


def average(maps: list[Tensor]) -> np.ndarray:
    """Average normalised maps (P, N) over the taps, as square grids (P, h, w) of fp32."""
    mean = torch.stack([saliency.normalize_map(m, "minmax")[0] for m in maps]).mean(0)
    side = saliency.grid_side(mean.shape[1])
    return mean.reshape(-1, side, side).cpu().numpy()
