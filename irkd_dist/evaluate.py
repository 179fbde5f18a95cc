"""Measure a run or checkpoint: accuracy at each resolution, agreement of its saliency with the teacher's, pointing."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from irkd_dist import checkpoint, runs
from irkd_dist import config as configuration
from irkd_dist.data import shards
from irkd_dist.data.loader import Loader
from irkd_dist.distill import measure, models
from irkd_dist.errors import UserError
from irkd_dist.training import build, engines, metrics, restore
from irkd_dist.training.build import Parts
from irkd_dist.training.tracking import summary_table

RESULT = "evaluation.json"
AGREEMENT_SAMPLES = 1024  # maps cost a backward pass each; the standard error is below 0.01 by then


def evaluate(
    path: Path,
    *,
    which: str = "best",
    split: str = "test",
    resolutions: list[int] | None = None,
    data: str | None = None,
) -> dict[str, Any]:
    """Evaluate a run folder (its `best` or `last` checkpoint) or a checkpoint folder.

    Accuracy in 0..1 by resolution over the whole split; for a run with a teacher the agreement of the maps (`mse`,
    Pearson's `correlation`), and for shards with object masks the pointing game's hit rate, both over the first
    1024 samples. Written to `evaluation.json` in the run folder.

    Raises:
        UserError: no such run, split or resolution, or the shards or the teacher are gone.
    """
    folder = runs.checkpoint_of(path, which)
    state = checkpoint.load_state(folder)
    config = configuration.from_dict(state["config"], f"{folder / checkpoint.STATE}")
    config = replace(config, engine="ddp")  # whatever trained it: nothing is stepped here
    if data is not None:
        config = replace(config, data=replace(config.data, shards=data))
    manifest = shards.load_manifest(Path(config.data.shards))
    if split not in manifest.splits:
        raise UserError(f"{config.data.shards} has no split {split!r}; it has {', '.join(manifest.splits)}")
    engine = engines.setup(config)
    try:
        job = build.build(config, engine)
        restore.load_into(engine, folder, moments=False)
        sizes = resolutions or _default_resolutions(job)
        for size in sizes:
            _check_resolution(job, size)
        result: dict[str, Any] = {
            "checkpoint": str(folder),
            "split": split,
            "accuracy": {},
            "agreement": {},
            "pointing": {},
        }
        for size in sizes:
            with build.evaluation_loader(job.config, job.manifest, engine, split, size) as loader:
                result["accuracy"][str(size)] = metrics.accuracy(engine, job.student, loader, "the student")
                _measure_maps(job, loader, split, size, result)
        if engine.main:
            _write(runs.run_of(path) if (runs.run_of(path) / runs.CONFIG).exists() else folder, result)
        return result
    finally:
        engine.finish()


def show(result: dict[str, Any]) -> None:
    """Print a result as a table."""
    columns = ["resolution", "accuracy"]
    columns += ["map mse", "map correlation"] if result["agreement"] else []
    columns += ["pointing"] if result["pointing"] else []
    rows = []
    for size, accuracy in result["accuracy"].items():
        row = [f"{size} px", f"{accuracy:.2%}"]
        if result["agreement"]:
            row += [
                f"{result['agreement'][size]['mse']:.4f}",
                f"{result['agreement'][size]['correlation']:.3f}",
            ]
        if result["pointing"]:
            row.append(f"{result['pointing'][size]:.2%}")
        rows.append(row)
    title = f"{result['checkpoint']}, {result['split']} split"
    Console().print(summary_table(title, columns, rows))


def _measure_maps(job: Parts, loader: Loader, split: str, size: int, result: dict[str, Any]) -> None:
    """Rank 0's share of the maps: agreement with the teacher, and the pointing game where there are masks."""
    if not job.taps:
        return
    batches = []
    for batch in loader.batches(0):
        batches.append(batch)
        if sum(len(b.ids) for b in batches) >= AGREEMENT_SAMPLES:
            break
    student = job.tapped
    if job.teacher is not None:
        restore.load_stage_teacher(job, len(job.plan.stages) - 1)
        normalization = job.config.loss.saliency.normalization
        seen = batches
        if build.full_view(job.config):
            with build.evaluation_loader(
                job.config, job.manifest, job.engine, split, size, full=True
            ) as whole:
                seen = [replace(b, full=w.images) for b, w in zip(batches, whole.batches(0), strict=False)]
        result["agreement"][str(size)] = measure.agreement(student, job.teacher, seen, normalization)
    if job.manifest.masks and not job.config.data.centre_crop:
        folder = Path(job.config.data.shards)
        stored = size if job.manifest.mode == "resize" else job.manifest.resolutions[-1]
        opened = shards.open_split(folder, job.manifest, split, stored, verify="size")
        with contextlib.closing(opened):
            hits = [
                measure.pointing_hits(student.maps(b.images, b.labels), _masks(opened, b.ids))
                for b in batches
            ]
        result["pointing"][str(size)] = float(torch.cat(hits).float().mean())


def _masks(opened: shards.Split, ids: Any) -> torch.Tensor:
    encoded = [opened.mask(int(i)) for i in ids]
    return torch.stack([shards.decode(m, "png")[0] > 127 for m in encoded if m is not None])


def _default_resolutions(job: Parts) -> list[int]:
    stages = {s.resolution for s in job.plan.stages}
    if job.manifest.mode == "crop":
        return sorted(stages)
    patches = _patches(job).values()
    return [r for r in job.manifest.resolutions if r in stages or not any(r % p for p in patches)]


def _patches(job: Parts) -> dict[str, int]:
    """Patch sizes that a resolution must be a multiple of, by role."""
    sizes = {"student": models.patch_size(job.student)}
    if job.teacher is not None and not build.full_view(job.config):
        sizes["teacher"] = models.patch_size(job.teacher.model)
    return {role: size for role, size in sizes.items() if size is not None}


def _check_resolution(job: Parts, size: int) -> None:
    if job.manifest.mode == "resize" and size not in job.manifest.resolutions:
        rendered = ", ".join(map(str, job.manifest.resolutions))
        raise UserError(f"--resolutions {size}: {job.config.data.shards} was rendered at {rendered} px")
    if size < 1:
        raise UserError(f"--resolutions {size} is no size in pixels")
    for role, patch in _patches(job).items():
        if size % patch:
            raise UserError(f"--resolutions {size} is not a multiple of patch size {patch} ({role})")


def _write(folder: Path, result: dict[str, Any]) -> None:
    temporary = folder / f".{RESULT}"
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.rename(folder / RESULT)
