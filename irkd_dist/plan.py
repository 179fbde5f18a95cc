"""`irkd plan`: time, memory and disk of each stage before anything runs, from some real steps on this machine.

The calibration takes student, teacher and loss through a few steps of each stage at its own resolution and batch, in
memory: no run folder is written. More processes are a stated model on top of it (`plan_model`). A teacher that is not
trained yet is stood in for by a network of its configuration.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from rich.table import Table
from safetensors.torch import save_file

from irkd_dist import config as configuration
from irkd_dist import configured, plan_model, runfolder
from irkd_dist.config import Config
from irkd_dist.config import Model as Network
from irkd_dist.data import shards
from irkd_dist.data.loader import Batch
from irkd_dist.distill import measure, methods, models
from irkd_dist.errors import UserError
from irkd_dist.plan_model import Model, Spread
from irkd_dist.training import build, engines, metrics, micro, restore, step
from irkd_dist.training.engines import Engine
from irkd_dist.training.parts import Parts

MIB, GIB = 2**20, 2**30
WARM, MEASURED = 2, 5  # steps of each stage


@dataclass(frozen=True)
class StageForecast:
    """What a stage will take; seconds of all its epochs."""

    resolution: int
    epochs: int
    steps: int
    batch: int
    step_s: float
    kept_s: float  # of a step whose answers the teacher's cache has from an earlier epoch; 0 if there is none
    validation_s: float  # of one pass
    start_s: float
    seconds: float
    peak_mib: float
    images_per_s: float
    teacher_s: float  # of the teacher's forward and maps over a batch; 0 without one


@dataclass(frozen=True)
class Forecast:
    """What a run will take, at most: stages may end early."""

    stages: list[StageForecast]
    seconds: float
    peak_mib: float
    device: str
    gpus: int
    states_mib: dict[str, float]  # weights, gradients, moments of a process, by engine
    checkpoint_mib: float  # one
    checkpoint_s: float  # to write one there, beside the training
    checkpoints_mib: float  # all that are kept at once
    shards_mib: float
    cache_mib: float  # of the teacher's answers; 0 without a cache
    cache_s: float  # to fill it ahead (irkd teach)
    free_mib: float  # where the run folder goes
    notes: list[str]


ALONE = Model()


def plan(config: Config, model: Model = ALONE, file: Path | None = None) -> Forecast:
    """Forecast a run on this machine, or with `model` on several devices like this one's.

    file: the configuration's; among those beside it is that of a teacher which is not trained yet.

    Raises:
        UserError: shards, teacher and configuration do not fit together, or no configuration tells what a teacher is
            that is not there yet.
    """
    with tempfile.TemporaryDirectory() as folder:
        config, notes = _with_teacher(config, file, Path(folder))
        return _plan(config, model, notes)


def _plan(config: Config, model: Model, notes: list[str]) -> Forecast:
    began, folder = time.perf_counter(), configuration.folder_of(config)
    light = replace(config, track=replace(config.track, backend="none", panels=0), compile=False)
    if light.teacher is not None:
        cache = replace(light.teacher.cache, folder=None, mode="auto", limit_gib=None, storage="exact")
        light = replace(light, teacher=replace(light.teacher, cache=replace(cache, chunk=64)))
    engine = engines.setup(light)
    try:
        parts = build.build(light, engine)
        opened, held = time.perf_counter() - began, _held(engine)
        weights = 4.0 * sum(shape.numel() for shape in engine.shapes.values())
        spread = _states(config, parts, weights, model.gpus)
        draws = _kept_draws(config)
        told = []
        for i in range(len(parts.plan.stages)):
            one = _stage(parts, i, model, weights, draws)
            # of what one process takes: the weights it began with, gradients and moments are spread, the batch divided
            batch = max(one.peak_mib * MIB - held - 3 * weights, 0.0)
            peak = held - weights + spread[_spread(engine.name)] + batch / model.gpus
            told.append(one if model.gpus == 1 else replace(one, peak_mib=peak / MIB))
        checkpoint = 3 * weights + (weights if config.optim.ema else 0)
        kept = config.checkpoint.keep + len(told) + _milestones(config, told)
        # after the last stage the student is tested twice
        tested = 2 * told[-1].validation_s * parts.manifest.splits.get("test", 0) / max(_judged(parts), 1)
        cache, fill = _cache(config, parts, told)
        return Forecast(
            told, opened + sum(s.seconds for s in told) + tested, max(s.peak_mib for s in told), _device(engine),
            model.gpus, {name: size / MIB for name, size in spread.items()}, checkpoint / MIB,
            checkpoint / _disk(_there(folder)), kept * checkpoint / MIB, _shards_bytes(config, parts.manifest) / MIB,
            cache / MIB, fill / model.gpus, shutil.disk_usage(_there(folder)).free / MIB,
            [*notes, *_notes(config, parts)],
        )  # fmt: skip
    finally:
        engine.finish()


def show(forecast: Forecast) -> list[Table | str]:
    """The forecast as a table and lines."""
    f = forecast
    where = f.device if f.gpus == 1 else f"{f.gpus} of: {f.device}"
    table = Table(
        "stage", "epochs", "steps", "batch", "step", "images/s", "validation", "time", "memory", title=where,
        title_justify="left",
    )  # fmt: skip
    for s in f.stages:
        table.add_row(
            f"{s.resolution} px", str(s.epochs), f"{s.steps:,}", str(s.batch), _step(s),
            f"{s.images_per_s:,.0f}", f"{s.validation_s:.1f} s", runfolder.span(s.seconds), f"{s.peak_mib:,.0f} MiB",
        )  # fmt: skip
    cache = f", teacher's answers {f.cache_mib:,.0f} MiB" if f.cache_mib else ""
    states = ", ".join(f"{name} {size:,.0f}" for name, size in f.states_mib.items())
    lines = [
        f"{runfolder.span(f.seconds)} in all at most, {f.peak_mib:,.0f} MiB of memory a process",
        f"disk: shards {f.shards_mib:,.0f} MiB, checkpoints {f.checkpoints_mib:,.0f} MiB ({f.checkpoint_mib:,.1f} each)"
        f"{cache}; {f.free_mib / 1024:,.1f} GiB are free there",
        f"a checkpoint is written in {f.checkpoint_s:.1f} s, beside the training",
        *(
            [f"the teacher's cache is filled ahead in {runfolder.span(f.cache_s)} (irkd teach)"]
            if f.cache_s
            else []
        ),
        *([f"weights, gradients and moments of a process, MiB by engine: {states}"] if f.gpus > 1 else []),
        *f.notes,
    ]
    return [table, *lines]


def _step(stage: StageForecast) -> str:
    kept = f", {1000 * stage.kept_s:,.0f} kept" if stage.kept_s else ""
    return f"{1000 * stage.step_s:,.0f} ms{kept}"


def to_dict(forecast: Forecast) -> dict[str, Any]:
    """Plain values."""
    return asdict(forecast)


def _stage(parts: Parts, number: int, model: Model, gradient: float, draws: int | None) -> StageForecast:
    """Measure a few steps and a part of a validation; the student is changed, as training changes it.

    draws: how many epochs ask the teacher; the answers of later ones are kept. None: each asks.
    """
    engine, planned, loss = parts.engine, parts.plan.stages[number], parts.config.loss
    _forget_peak(engine)
    began = time.perf_counter()
    restore.load_stage_teacher(parts, number)
    micro.ensure(parts, number)
    train, held_out = build.loaders(parts, planned)
    start = time.perf_counter() - began
    parts.module.train()
    with train, held_out:
        times, rows, batch = list[float](), 0, None
        last = time.perf_counter()
        for at, batch in enumerate(itertools.islice(train.steps(0), WARM + MEASURED)):
            count = parts.micro_batches(number)
            taken = step.take(parts, batch, loss.kd.alpha, loss.saliency.gamma, at, count)
            metrics.row(taken, 0.0).tolist()  # waits for the device
            rows, now = batch[0].size, time.perf_counter()
            times.append(now - last)
            last = now
        used = times[WARM:] or times
        # batches of an epoch differ in resolution under multiscale, else alike: the mean counts
        alone = statistics.mean(used) if planned.multiscale else statistics.median(used)
        teacher = _teacher_s(parts, batch)
        validation = _validation(parts, held_out)
        steps = train.steps_per_epoch
        peak = _peak(engine)
    step_s = model.seconds(alone, gradient)
    asking = min(draws or planned.epochs, planned.epochs)
    kept_s = model.seconds(max(alone - teacher, 0.0), gradient) if asking < planned.epochs else 0.0
    judged = math.ceil(planned.epochs / parts.config.eval_every)
    seconds = (
        start
        + steps * (asking * step_s + (planned.epochs - asking) * kept_s)
        + judged * validation / model.gpus
    )
    return StageForecast(
        planned.resolution, planned.epochs, planned.epochs * steps, planned.batch, step_s, kept_s, validation, start,
        seconds, peak / MIB, rows / step_s, teacher,
    )  # fmt: skip


def _teacher_s(parts: Parts, batches: list[Batch] | None) -> float:
    """Seconds that the teacher takes for a process's part of a step; with its maps where they are learned from."""
    if parts.teacher is None or not batches:
        return 0.0
    loss, times = parts.config.loss, list[float]()
    for _ in range(3):
        began = time.perf_counter()
        for each in batches:
            taught = step.arguments(
                parts.teacher, loss.saliency, each, loss.kd.alpha, loss.saliency.gamma, step=0
            )[3]
            for tensor in (taught.logits, *(taught.maps or ())):
                if tensor is not None:
                    tensor.sum().item()  # waits for the device
        times.append(time.perf_counter() - began)
    return min(times)


def _validation(parts: Parts, loader: Any) -> float:
    """Seconds of a pass over the held-out images, from its first batches."""
    count = min(loader.steps_per_epoch, 3)
    began = time.perf_counter()
    seen = itertools.islice(loader.batches(0), count)
    measure.correct_and_count(parts.student, seen, parts.engine.autocast).tolist()
    seconds = time.perf_counter() - began
    return seconds / count * loader.steps_per_epoch


def _kept_draws(config: Config) -> int | None:
    """After how many epochs of a stage the teacher has said everything; None: it is asked in each."""
    spec = config.teacher
    keeps = spec is not None and spec.cache.folder is not None and spec.cache.mode == "auto"
    return config.augment.draws if keeps else None


def _judged(parts: Parts) -> int:
    count = parts.manifest.splits[build.held_out(parts.manifest)]
    return min(parts.config.data.val_subset or count, count)


def _milestones(config: Config, stages: list[StageForecast]) -> int:
    every = config.checkpoint.keep_epochs
    return 0 if every is None else sum(s.epochs for s in stages) // every


def _cache(config: Config, parts: Parts, stages: list[StageForecast]) -> tuple[float, float]:
    """Bytes of the teacher's answers and seconds to fill them: each sample, draw and stage; logits and maps in fp32."""
    if config.teacher is None or config.teacher.cache.folder is None or parts.teacher is None:
        return 0.0, 0.0
    samples = min(config.data.subset or 2**62, parts.manifest.splits["train"])
    width = {"exact": 4.0, "compact": 1.5}[config.teacher.cache.storage]
    patch, size, seconds = models.patch_size(parts.teacher.model) or 8, 0.0, 0.0
    for stage, told in zip(parts.plan.stages, stages, strict=True):
        draws = min(config.augment.draws or stage.epochs, stage.epochs)
        side = parts.manifest.largest if build.full_view(config) else stage.resolution
        maps = len(parts.taps) * max(side // patch, 1) ** 2 if config.loss.saliency.gamma else 0
        size += samples * draws * (width * (len(parts.manifest.classes) + maps) + 16)  # id and checksum
        seconds += samples * draws / told.batch * told.teacher_s
    return size, seconds


def _states(config: Config, parts: Parts, weights: float, n: int) -> dict[str, float]:
    """Bytes of a process by engine; without those that cannot run this configuration."""
    loss = config.loss.saliency
    second_order = loss.gamma > 0 and methods.inner_gradient(loss.method)
    whole = plan_model.gathered(parts.student, weights, second_order)
    ema = config.optim.ema is not None
    return {
        name: plan_model.states(name, weights, n, ema, whole)
        for name in plan_model.SPREADS
        if not (second_order and name == "zero3") or name == _spread(parts.engine.name)
    }


def _spread(engine: str) -> Spread:
    return "ddp" if engine == "zero0" else cast(Spread, engine)


def _with_teacher(config: Config, file: Path | None, folder: Path) -> tuple[Config, list[str]]:
    """The configuration with a network of random weights (kept in `folder`) for a teacher that is not trained yet."""
    spec = config.teacher
    if spec is None or spec.run is None or file is None or Path(spec.run).exists():
        return config, []
    found = _training_of(Path(spec.run), configuration.find(file))
    if found is None:
        return config, []  # the run's own error says what is missing
    source, theirs = found
    manifest = shards.load_manifest(configuration.shards_of(config))
    student = replace(theirs.student, weights=None, pretrained=False)
    network, arguments, _ = configured.create_student(replace(theirs, student=student), len(manifest.classes))
    weights = folder / "teacher.safetensors"
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, weights)
    own = Network(
        theirs.student.name, theirs.student.patch, image_size=arguments["image_size"],
        distilled=arguments["distilled"], options=theirs.student.options, weights=str(weights),
    )  # fmt: skip
    teacher = replace(spec, run=None, model=own, schedule="final", mean=manifest.mean, std=manifest.std)
    curriculum = config.curriculum
    if curriculum is not None:
        curriculum = replace(curriculum, stages=[replace(s, teacher=None) for s in curriculum.stages])
    note = f"{spec.run} is not there yet: its network is taken from {source}, with random weights"
    return replace(config, teacher=teacher, curriculum=curriculum), [note]


def _training_of(run: Path, file: Path) -> tuple[Path, Config] | None:
    """The configuration beside `file` whose run folder that is."""
    for other in sorted(file.parent.glob("*.yaml")):
        with contextlib.suppress(UserError):  # a study's, a sweep's
            theirs = configuration.load(other)
            if configuration.folder_of(theirs) == run:
                return other, theirs
    return None


def _shards_bytes(config: Config, manifest: shards.Manifest) -> float:
    sizes = (shard.bytes for splits in manifest.shards.values() for some in splits.values() for shard in some)
    return float(sum(sizes))


def _there(folder: Path) -> Path:
    """The folder that is there already, on whose disk this one will be."""
    return next(f for f in [folder, *folder.absolute().parents] if f.is_dir())


def _disk(folder: Path) -> float:
    """Bytes a second that are written and synced there, by a file without a name; infinite where none may be."""
    data, began = bytes(16 * MIB), time.perf_counter()
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(data)
            os.fsync(file.fileno())
    except OSError:
        return math.inf
    return len(data) / (time.perf_counter() - began)


def _notes(config: Config, parts: Parts) -> list[str]:
    found = []
    if config.teacher is not None and config.teacher.cache.folder is not None:
        found.append("what the teacher's cache already has is not counted on: it makes a run shorter")
    if config.compile:
        found.append(
            "torch.compile is not measured: it makes steps shorter and each stage's first step longer"
        )
    if any(s.patience or s.target or s.minutes or s.tokens for s in parts.plan.stages):
        found.append("stages may end earlier: patience, target, minutes or tokens")
    return [*found, *parts.notes]


def _device(engine: Engine) -> str:
    if engine.device.type == "cuda":
        return torch.cuda.get_device_name(engine.device)
    return f"CPU, {torch.get_num_threads()} threads"


def _held(engine: Engine) -> float:
    """Bytes in use now: on the device where there is one, else of the process."""
    if engine.device.type == "cuda":
        return float(torch.cuda.memory_allocated(engine.device))
    return float(psutil.Process().memory_info().rss)


def _forget_peak(engine: Engine) -> None:
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the largest so far is what is taken now


def _peak(engine: Engine) -> float:
    """Bytes at the peak since `_forget_peak`: on the device where there is one, else of the process."""
    if engine.device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(engine.device))
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return float(psutil.Process().memory_info().rss)
