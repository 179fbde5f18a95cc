"""Saliency panels: the maps of a few held-out images, kept as the run goes for the report (the paper's Figure 5)."""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from irkd_dist import files, runfolder
from irkd_dist.data.loader import Loader
from irkd_dist.distill import methods, saliency
from irkd_dist.training import build
from irkd_dist.training.parts import Parts


def save(
    parts: Parts, run: Path, loader: Loader, stage: int, epoch: int, resolution: int
) -> np.ndarray | None:
    """Write what `show` gives to `panels/stage-SS-epoch-EEE.npz`; every process must call it, rank 0 writes.

    Returns:
        `picture` of them on rank 0, None elsewhere and where there are none.
    """
    arrays = show(parts, loader, resolution)
    if arrays is None or not parts.engine.main:
        return None
    with files.whole(runfolder.panel_file(run, stage, epoch)) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    return picture(arrays)


def show(parts: Parts, loader: Loader, resolution: int) -> dict[str, np.ndarray] | None:
    """A few images of a loader, see `choose`, with their maps.

    images (P, r, r, 3) uint8, labels (P,), ids (P,), and maps averaged over the taps, each min-max normalised: student
    (P, h, w), and teacher (P, h', w') where there is one. Every process must call it, for sharded parameters, and
    computes the same. None where the engine cannot differentiate the student (zero3).
    """
    config, engine, manifest = parts.config, parts.engine, parts.manifest
    count, method = config.track.panels, config.loss.saliency.method
    if not count or not parts.taps or (engine.no_inner_gradient and methods.inner_gradient(method)):
        return None
    rows = choose(loader.labels, count)
    images, labels = loader.pick(rows)
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (manifest.mean, manifest.std))
    pixels = ((images * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    arrays = {
        "images": pixels.cpu().numpy(),
        "labels": labels.cpu().numpy(),
        "ids": loader.ids[rows],
        "resolution": np.array(resolution),
        "student": average(parts.tapped.maps(images, labels)),
    }
    if parts.teacher is not None:
        view = images
        if build.full_view(config):
            split = build.held_out(manifest)
            with build.evaluation_loader(config, manifest, engine, split, resolution, full=True) as whole:
                view, _ = whole.pick(rows)
        maps = parts.teacher(view, labels, aligned=len(view), logits=False).maps
        arrays["teacher"] = average(maps or [])
    return arrays


def choose(labels: np.ndarray, count: int) -> np.ndarray:
    """Rows of the images to show: the first of each class, then the second of each, until there are `count`."""
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    turn = np.arange(len(labels)) - np.searchsorted(ordered, ordered)  # within its class
    return order[np.lexsort((ordered, turn))][:count]


def picture(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Image, the teacher's map and the student's, a row for each sample: (P s, 2 s or 3 s, 3) uint8."""
    side, columns = arrays["images"].shape[1], [arrays["images"]]
    for name in ("teacher", "student"):
        if name in arrays:
            maps = torch.from_numpy(arrays[name])[:, None].float()
            large = torch.nn.functional.interpolate(maps, size=side, mode="nearest")
            columns.append((255 * large.clamp(0, 1)).byte().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())
    return np.concatenate(np.concatenate(columns, axis=2), axis=0)


def load(run: Path) -> tuple[list[tuple[int, int, dict[str, np.ndarray]]], list[str]]:
    """The panels of a run as (stage, epoch, arrays), in order, and what is wrong with those that were left out."""
    result, problems = [], []
    for stage, epoch, file in runfolder.panel_files(run):
        try:
            with np.load(io.BytesIO(files.read(file)), allow_pickle=False) as stored:
                arrays = dict(stored)
            _check(arrays)
            result.append((stage, epoch, arrays))
        # the zip module raises NotImplementedError for a version or a compression that it does not have
        except (
            OSError,
            ValueError,
            KeyError,
            EOFError,
            BadZipFile,
            NotImplementedError,
            zlib.error,
        ) as error:
            problems.append(f"The saliency panels cannot be read: {file.name}: {error}")
    return result, problems


def _check(arrays: dict[str, np.ndarray]) -> None:
    """Refuse arrays of other shapes and types than `save` writes."""
    images, resolution = arrays["images"], arrays["resolution"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.size:
        raise ValueError("its images are none")
    count = len(images)
    if resolution.shape or not all(arrays[k].shape == (count,) for k in ("labels", "ids")):
        raise ValueError("its labels are not those of its images")
    for name in ("labels", "ids", "resolution"):
        if not np.issubdtype(arrays[name].dtype, np.integer):
            raise ValueError(f"its {name} are no whole numbers")
    for maps in (arrays[k] for k in ("student", "teacher") if k in arrays):
        if maps.ndim != 3 or len(maps) != count or not maps.size or not np.isfinite(maps).all():
            raise ValueError("its maps are not those of its images")


def average(maps: list[Tensor]) -> np.ndarray:
    """Maps (P, h, w) of the taps as one: normalised, on the largest of their grids, averaged, in fp32."""
    return saliency.mean_map(maps).cpu().numpy()
