"""Saliency panels: the maps of a few held-out images, kept as the run goes for the report (the paper's Figure 5)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from irkd_dist.data.loader import Loader
from irkd_dist.distill import saliency
from irkd_dist.training import build
from irkd_dist.training.build import Parts

FOLDER = "panels"


def save(parts: Parts, run: Path, loader: Loader, stage: int, epoch: int, resolution: int) -> None:
    """Write `panels/stage-SS-epoch-EEE.npz` for the first images of a loader.

    It holds images (P, r, r, 3) uint8, labels (P,), keys (P,), and maps averaged over the taps, each min-max
    normalised: student (P, h, w), and teacher (P, h', w') where there is one. Every process must call it, for sharded
    parameters; rank 0 writes. Left out where the engine cannot differentiate the student (zero3).
    """
    config, engine, manifest = parts.config, parts.engine, parts.manifest
    count = config.track.panels
    method = config.loss.saliency.method
    if not count or not parts.taps or (engine.no_inner_gradient and method != "attention"):
        return
    batch = next(iter(loader.batches(0)))
    images, labels = batch.images[:count], batch.labels[:count]
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (manifest.mean, manifest.std))
    pixels = ((images * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    arrays = {
        "images": pixels.cpu().numpy(),
        "labels": labels.cpu().numpy(),
        "ids": batch.ids[:count],
        "resolution": np.array(resolution),
        "student": average(parts.tapped.maps(images, labels)),
    }
    if parts.teacher is not None:
        view = images
        if build.full_view(config):
            split = build.held_out(manifest)
            with build.evaluation_loader(config, manifest, engine, split, resolution, full=True) as whole:
                view = next(iter(whole.batches(0))).images[:count]
        maps = parts.teacher(view, labels, aligned=len(view), logits=False).maps
        arrays["teacher"] = average(maps or [])
    if not engine.main:
        return
    folder = run / FOLDER
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
    """Average normalised maps (P, N) over the taps, as square grids (P, h, w) of fp32."""
    mean = torch.stack([saliency.normalize_map(m, "minmax")[0] for m in maps]).mean(0)
    side = saliency.grid_side(mean.shape[1])
    return mean.reshape(-1, side, side).cpu().numpy()
