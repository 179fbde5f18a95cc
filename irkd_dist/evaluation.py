"""Measure a run or checkpoint: accuracy at each resolution, agreement of its saliency with the teacher's, pointing."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from irkd_dist import config as configuration
from irkd_dist import configured, files, networks, runfolder, typed
from irkd_dist import evaluation_answers as answers
from irkd_dist.config import Config
from irkd_dist.data import shards
from irkd_dist.data.loader import Batch, Loader
from irkd_dist.distill import measure, methods, models
from irkd_dist.distill.measure import TappedModel
from irkd_dist.distill.teacher import Teacher, freeze
from irkd_dist.errors import UserError
from irkd_dist.evaluation_answers import Task
from irkd_dist.networks import Network
from irkd_dist.training import build, distributed, engines, probing, tracking
from irkd_dist.training.engines import Engine

AGREEMENT_SAMPLES = 1024  # maps cost a backward pass each; the standard error is below 0.01 by then


def evaluate(
    path: Path,
    *,
    which: str = "best",
    split: str = "test",
    resolutions: list[int] | None = None,
    data: str | None = None,
    raw: bool = False,
    quick: bool = False,
) -> dict[str, Any]:
    """Evaluate a run folder (its `best` or `last` checkpoint) or a checkpoint folder.

    Of a student with a moving average of its weights (optim.ema) that is measured; `raw`: the trained weights instead.

    Accuracy in 0..1 by resolution over the whole split; for a run whose teacher is at hand the agreement of the maps
    (`mse`, Pearson's `correlation`), and for shards with object masks the pointing game's hit rate, both over the first
    1024 samples; images/s of the networks alone. Unless `quick` also the teacher's accuracy (`teacher`) and that of
    each earlier stage's best checkpoint (`stages`) by resolution, who is taken for whom at the largest resolution
    that was trained (`confusion`), and in a file beside it (`.npz`) images that are judged wrong, with both maps.
    Written to a file of the run folder's `evaluation/` named after split, resolutions and checkpoint, so that another
    measurement does not replace it.

    Raises:
        UserError: no such run, split or resolution, or the shards are gone or of other classes.
    """
    network = networks.load(path, which, averaged=not raw)
    config = configuration.from_dict(network.state["config"], str(network.folder / runfolder.STATE))
    config = replace(config, engine="ddp")  # whatever trained it: nothing is stepped here
    config = replace(config, data=replace(config.data, val_subset=None))  # the whole split
    if data is not None:
        config = replace(config, data=replace(config.data, shards=data))
    folder = configuration.shards_of(config)
    manifest = shards.load_manifest(folder)
    if split not in manifest.splits:
        raise UserError(f"{folder} has no split {split!r}; it has {', '.join(manifest.splits)}")
    networks.check_classes(network.classes, manifest, str(folder), str(network.folder))
    # its images are normalised as those that it was trained on, whatever the shards' own statistics are
    manifest = replace(manifest, mean=network.mean, std=network.std)
    place = engines.setup(config)
    try:
        notes = list(network.notes)
        network.model.to(place.device)
        if place.device.type == "cpu":
            models.without_fused_attention(network.model)  # as in training: the same numbers
        teacher, taps = _teacher(config, network, manifest, place, notes)
        task = Task(network, config, manifest, place, teacher, taps)
        sizes = sorted(set(resolutions or _default_resolutions(task)))
        for size in list(sizes):
            _check_resolution(task, size)
            if (why := _refusal(task, size)) is not None:
                if resolutions:
                    raise UserError(f"--resolutions {size}: {why}")
                sizes.remove(size)
                notes.append(f"{size} px is left out: {why}")
        result, found = _measure(task, split, sizes, quick)
        if not quick and path != network.folder:
            result["stages"] = answers.earlier_stages(task, path, split, sizes, raw, notes)
        result["notes"] = notes
        if place.main:
            other_data = network.state.get("data_digest") not in (None, shards.data_digest(manifest))
            other = shards.data_digest(manifest) if other_data else None
            _write(path, network, result, other, raw, found)
        return result
    finally:
        place.finish()


def show(result: dict[str, Any]) -> None:
    """Print a result as a table."""
    columns = ["resolution", "accuracy"]
    columns += ["teacher"] if result["teacher"] else []
    columns += [f"stage {int(stage) + 1}" for stage in result.get("stages", {})]
    columns += ["map mse", "map correlation"] if result["agreement"] else []
    columns += ["pointing"] if result["pointing"] else []
    rows = []
    for size, accuracy in result["accuracy"].items():
        row = [f"{size} px", f"{accuracy:.2%}"]
        row += [f"{result['teacher'][size]:.2%}"] if result["teacher"] else []
        row += [f"{own[size]:.2%}" for own in result.get("stages", {}).values()]
        if result["agreement"]:
            maps = result["agreement"][size]
            row += [f"{maps['mse']:.4f}", f"{maps['correlation']:.3f}"]
        if result["pointing"]:
            row.append(f"{result['pointing'][size]:.2%}")
        rows.append(row)
    console = tracking.console()
    for note in result["notes"]:
        console.print(note)
    title = f"{result['checkpoint']}, {result['split']} split, {result['samples']} images"
    console.print(tracking.summary_table(title, columns, rows))


def _measure(
    task: Task, split: str, sizes: list[int], quick: bool
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    model, autocast = task.network.model, task.place.autocast
    accuracy, agreement, pointing, rates, teacher, samples = {}, {}, {}, {}, {}, 0
    confusion: dict[str, Any] = {}
    gallery: dict[str, np.ndarray] = {}
    shown = max(
        {s.resolution for s in configuration.stages(task.config)} & {*sizes}, default=max(sizes, default=0)
    )
    for size in sizes:
        with build.evaluation_loader(task.config, task.manifest, task.place, split, size) as loader:
            samples, key = len(loader), str(size)
            told = {"student": answers.of(task, model, loader, "the student")}
            accuracy[key] = told["student"].accuracy
            first = next(iter(loader.batches(0)))
            rates[key] = {"student": _rate(model, first.images, autocast)}
            if task.teacher is not None:
                view = _full_view(task, split, size, [first])[0]
                seen = view.images if view.full is None else view.full
                rates[key]["teacher"] = _rate(task.teacher.model, seen, task.teacher.autocast)
            batches = _first_batches(loader) if task.taps else []
            if task.teacher is not None and answers.has_answers(task.config) and not quick:
                told["teacher"] = answers.by_teacher(task, split, loader)
                teacher[key] = told["teacher"].accuracy
            if size == shown and not quick:
                confusion = {"resolution": size, "classes": [*task.network.classes]}
                confusion |= {who: found.pairs() for who, found in told.items()}
                gallery = answers.gallery(task, split, loader, told)
        if batches and task.teacher is not None:
            student = TappedModel(model, task.taps, task.network.method, autocast)
            seen = _full_view(task, split, size, batches)
            normalization = task.config.loss.saliency.normalization
            agreement[key] = measure.agreement(
                student, task.teacher, seen, normalization, lambda own: distributed.total(task.place, own)
            )
        whole = not task.config.data.centre_crop and task.manifest.crop_pct == 1  # else masks would show more
        if batches and task.manifest.masks and whole:
            pointing[key] = _pointing(task, split, size, batches)
    return {
        "checkpoint": str(task.network.folder), "split": split, "samples": samples,
        "shards": str(configuration.shards_of(task.config)),
        "accuracy": accuracy, "agreement": agreement, "pointing": pointing, "images_per_s": rates,
        "parameters": models.parameter_count(model), "teacher": teacher, "confusion": confusion,
    }, gallery  # fmt: skip


def _teacher(
    config: Config, network: Network, manifest: shards.Manifest, place: Engine, notes: list[str]
) -> tuple[Teacher | None, list[str]]:
    """The run's teacher, if it is at hand, and the student's taps that are paired with its own."""
    if config.teacher is None or not network.taps:
        return None, list(network.taps)
    if not config.teacher.logits and methods.inner_gradient(config.loss.saliency.method):
        notes.append(
            f"the teacher has no logits (teacher.logits=false), so no maps by {config.loss.saliency.method} either"
        )
        return None, list(network.taps)
    if config.teacher.ensemble:
        notes.append(
            "the teachers' accuracy is left out: here the first one alone is at hand, the run has their mean"
        )
    try:
        own = configured.load_teacher(_last_teacher(config), manifest)
        pairs, _ = networks.tap_pairs(config, network.model, own.model)
    except UserError as error:
        notes.append(f"the agreement with the teacher's maps is left out: {error}")
        return None, list(network.taps)
    spec, renormalize = config.loss.saliency, None
    if config.teacher.renormalize:
        ours_mean, ours_std, mean, std = (
            torch.tensor(v, device=place.device).view(3, 1, 1)
            for v in (network.mean, network.std, own.mean, own.std)
        )
        renormalize = (ours_std / std, (ours_mean - mean) / std)
    frozen = freeze(
        own.model.to(place.device), place.autocast, methods.inner_gradient(spec.method), place.device
    )
    teacher = Teacher(frozen, [t.path for _, t in pairs], network.method, place.autocast, renormalize)
    return (teacher, [s.path for s, _ in pairs]) if pairs else (None, list(network.taps))


def _last_teacher(config: Config) -> Config:
    """The configuration with the teacher of its last stage, where stages have their own."""
    last, teacher = configuration.stages(config)[-1], config.teacher
    if teacher is None or teacher.run is None:
        return config
    if last.teacher is not None:
        return replace(config, teacher=replace(teacher, run=last.teacher))
    if teacher.schedule == "aligned":
        newest = runfolder.steps(Path(teacher.run) / runfolder.CHECKPOINTS)
        return replace(config, teacher=replace(teacher, run=str(newest[0]) if newest else teacher.run))
    return config


def _first_batches(loader: Loader) -> list[Batch]:
    """This process's share of the first samples of a split; those of its batches that come after them weigh nothing."""
    batches: list[Batch] = []
    for batch in itertools.islice(loader.batches(0), math.ceil(AGREEMENT_SAMPLES / loader.batch)):
        among = batch.step * loader.batch + batch.positions < AGREEMENT_SAMPLES
        batches.append(replace(batch, weight=batch.weight * among.to(batch.weight.device)))
    return batches


def _full_view(task: Task, split: str, size: int, batches: list[Batch]) -> list[Batch]:
    """The batches with what the teacher sees, where that is the full resolution."""
    if task.config.teacher is None or task.config.teacher.view != "full":
        return batches
    with build.evaluation_loader(task.config, task.manifest, task.place, split, 0, full=True) as whole:
        return [replace(b, full=w.images) for b, w in zip(batches, whole.batches(0), strict=False)]


def _pointing(task: Task, split: str, size: int, batches: list[Batch]) -> float:
    student = TappedModel(task.network.model, task.taps, task.network.method, task.place.autocast)
    counts = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        real = (batch.weight > 0).cpu()
        masks = probing.object_masks(task.config, task.manifest, split, size, batch.ids)
        assert masks is not None
        hits = measure.pointing_hits(student.maps(batch.images, batch.labels), masks.to(batch.images.device))
        counts += torch.tensor([int(hits.cpu()[real].sum()), int(real.sum())])
    hit, count = distributed.total(task.place, counts).tolist()
    return hit / count


@torch.no_grad()
def _rate(model: nn.Module, images: Tensor, autocast: torch.dtype | None, seconds: float = 0.2) -> float:
    """Images a second of a network's forward alone on this process, in evaluation mode."""

    def forward() -> None:
        with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
            model(images)
        if images.is_cuda:
            torch.cuda.synchronize()

    forward()  # the first one allocates
    started, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - started < seconds:
        forward()
        count += len(images)
    return round(count / (time.perf_counter() - started), 1)


def _default_resolutions(task: Task) -> list[int]:
    stages = {s.resolution for s in configuration.stages(task.config)}
    if task.manifest.mode == "crop" or task.manifest.crop_pct < 1:
        return sorted(stages)
    patches = _patches(task).values()
    return [r for r in task.manifest.resolutions if r in stages or not any(r % p for p in patches)]


def _patches(task: Task) -> dict[str, int]:
    """Patch sizes that a resolution must be a multiple of, by role."""
    sizes = {"student": models.patch_size(task.network.model)}
    if task.teacher is not None and task.config.teacher is not None and task.config.teacher.view != "full":
        sizes["teacher"] = models.patch_size(task.teacher.model)
    return {role: size for role, size in sizes.items() if size is not None}


def _check_resolution(task: Task, size: int) -> None:
    if size < 1:
        raise UserError(f"--resolutions {size} is no size in pixels")
    if task.manifest.mode == "resize" and task.manifest.stored(size) is None:
        rendered = ", ".join(map(str, task.manifest.resolutions))
        folder = configuration.shards_of(task.config)
        raise UserError(f"--resolutions {size}: {folder} was rendered at {rendered} px")
    for role, patch in _patches(task).items():
        if size % patch:
            raise UserError(f"--resolutions {size} is not a multiple of patch size {patch} ({role})")


def _refusal(task: Task, size: int) -> str | None:
    """Why a network does not take images of this size, as convolutional ones may not; None if both do."""
    full = task.config.teacher is not None and task.config.teacher.view == "full"
    pairs = [("the student", task.network.model, size)]
    if task.teacher is not None:
        pairs.append(("the teacher", task.teacher.model, task.manifest.largest if full else size))
    for role, model, side in pairs:
        autocast = task.place.autocast
        image = torch.zeros(1, 3, side, side, device=task.place.device)
        try:
            with torch.no_grad(), torch.autocast(image.device.type, autocast, enabled=autocast is not None):
                model(image)
        except (RuntimeError, AssertionError, ValueError) as error:
            return f"{role} cannot take it: {next(iter(str(error).splitlines()), type(error).__name__)}"
    return None


def _write(
    path: Path, network: Network, result: dict[str, Any], other_data: str | None, raw: bool,
    gallery: dict[str, np.ndarray],
) -> None:  # fmt: skip
    """Keep a result in the run folder, or beside a checkpoint that is in none; what it shows beside it."""
    run = runfolder.run_of(path)
    which = network.folder.name if path == network.folder else _which(run, network)
    parts = [result["split"], *result["accuracy"], which, *(["data", other_data] if other_data else [])]
    parts += ["raw"] if raw else []
    file = run / runfolder.EVALUATION / ("-".join(parts) + ".json")
    if gallery:
        with files.whole(file.with_suffix(".npz")) as out:
            np.savez_compressed(out, allow_pickle=False, **gallery)
    else:
        file.with_suffix(".npz").unlink(missing_ok=True)  # of an earlier measurement
    files.write(file, typed.checked(result))


def _which(run: Path, network: Network) -> str:
    return "best" if network.folder.parent == run / runfolder.BEST else "last"
