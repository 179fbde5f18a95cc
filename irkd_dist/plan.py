"""`irkd plan`: time, memory and disk of each stage before anything runs, from some real steps on this machine.

The calibration takes student, teacher and loss through a few steps of each stage at its own resolution and batch, in
memory: no run folder is written. More processes are a stated model on top of it (`Model`).
"""

from __future__ import annotations

import contextlib
import itertools
import math
import shutil
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.table import Table

from irkd_dist import config as configuration
from irkd_dist import runfolder
from irkd_dist.config import Config
from irkd_dist.data import shards
from irkd_dist.distill import measure, models
from irkd_dist.training import build, engines, metrics, micro, restore, step
from irkd_dist.training.engines import Engine
from irkd_dist.training.parts import Parts

MIB, GIB = 2**20, 2**30
WARM, MEASURED = 2, 5  # steps of each stage


@dataclass(frozen=True)
class Model:
    """What more processes are taken to cost: the batch is divided, and gradients are summed in a ring.

    A step of N processes takes compute / N / efficiency + 2 (N - 1) / N * gradient bytes / bandwidth + N * latency; the
    two overlap by `overlap`. bandwidth: bytes/s between neighbours, of the slowest link.
    """

    gpus: int = 1  # in all
    bandwidth: float = 10e9
    latency: float = 2e-5
    efficiency: float = 0.9  # of a process with a part of the batch, against one with all of it
    overlap: float = 0.5  # of the exchange that the backward hides

    def seconds(self, alone: float, gradient: float) -> float:
        """Of a step that takes `alone` on one process, with a gradient of so many bytes."""
        n = self.gpus
        if n == 1:
            return alone
        exchange = 2 * (n - 1) / n * gradient / self.bandwidth + n * self.latency
        return alone / n / self.efficiency + (1 - self.overlap) * exchange


@dataclass(frozen=True)
class StageForecast:
    """What a stage will take; seconds of all its epochs."""

    resolution: int
    epochs: int
    steps: int
    batch: int
    step_s: float
    validation_s: float  # of one pass
    start_s: float
    seconds: float
    peak_mib: float
    images_per_s: float


@dataclass(frozen=True)
class Forecast:
    """What a run will take, at most: stages may end early."""

    stages: list[StageForecast]
    seconds: float
    peak_mib: float
    device: str
    gpus: int
    checkpoint_mib: float  # one
    checkpoints_mib: float  # all that are kept at once
    shards_mib: float
    cache_mib: float  # of the teacher's answers; 0 without a cache
    free_mib: float  # where the run folder goes
    notes: list[str]


def plan(config: Config, model: Model = Model()) -> Forecast:
    """Forecast a run on this machine, or with `model` on several devices like this one's.

    Raises:
        UserError: shards, teacher and configuration do not fit together, or the teacher is not there yet.
    """
    began, folder = time.perf_counter(), configuration.folder_of(config)
    light = replace(config, track=replace(config.track, backend="none", panels=0), compile=False)
    if light.teacher is not None:
        cache = replace(light.teacher.cache, folder=None, mode="auto", limit_gib=None, storage="exact")
        light = replace(light, teacher=replace(light.teacher, cache=replace(cache, chunk=64)))
    engine = engines.setup(light)
    try:
        parts = build.build(light, engine)
        opened = time.perf_counter() - began
        gradient = 4.0 * sum(shape.numel() for shape in engine.shapes.values())
        told = [_stage(parts, i, model, gradient) for i in range(len(parts.plan.stages))]
        checkpoint = 3 * gradient + (gradient if config.optim.ema else 0)
        kept = config.checkpoint.keep + len(told) + _milestones(config, told)
        # after the last stage the student is tested twice
        tested = 2 * told[-1].validation_s * parts.manifest.splits.get("test", 0) / max(_judged(parts), 1)
        notes = _notes(config, parts)
        return Forecast(
            told, opened + sum(s.seconds for s in told) + tested, max(s.peak_mib for s in told), _device(engine),
            model.gpus, checkpoint / MIB, kept * checkpoint / MIB, _shards_bytes(config, parts.manifest) / MIB,
            _cache_bytes(config, parts) / MIB, _free(folder) / MIB, notes,
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
            f"{s.resolution} px", str(s.epochs), f"{s.steps:,}", str(s.batch), f"{1000 * s.step_s:,.0f} ms",
            f"{s.images_per_s:,.0f}", f"{s.validation_s:.1f} s", runfolder.span(s.seconds), f"{s.peak_mib:,.0f} MiB",
        )  # fmt: skip
    cache = f", teacher's answers {f.cache_mib:,.0f} MiB" if f.cache_mib else ""
    lines = [
        f"{runfolder.span(f.seconds)} in all at most, {f.peak_mib:,.0f} MiB of memory a process",
        f"disk: shards {f.shards_mib:,.0f} MiB, checkpoints {f.checkpoints_mib:,.0f} MiB ({f.checkpoint_mib:,.1f} each)"
        f"{cache}; {f.free_mib / 1024:,.1f} GiB are free there",
        *f.notes,
    ]
    return [table, *lines]


def to_dict(forecast: Forecast) -> dict[str, Any]:
    """Plain values."""
    return asdict(forecast)


def _stage(parts: Parts, number: int, model: Model, gradient: float) -> StageForecast:
    """Measure a few steps and a part of a validation; the student is changed, as training changes it."""
    engine, planned, loss = parts.engine, parts.plan.stages[number], parts.config.loss
    _forget_peak(engine)
    began = time.perf_counter()
    restore.load_stage_teacher(parts, number)
    micro.ensure(parts, number)
    train, held_out = build.loaders(parts, planned)
    start = time.perf_counter() - began
    parts.module.train()
    with train, held_out:
        times, rows = list[float](), 0
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
        validation = _validation(parts, held_out)
        steps = train.steps_per_epoch
        peak = _peak(engine)
    step_s = model.seconds(alone, gradient)
    judged = math.ceil(planned.epochs / parts.config.eval_every)
    seconds = start + planned.epochs * steps * step_s + judged * validation / model.gpus
    return StageForecast(
        planned.resolution, planned.epochs, planned.epochs * steps, planned.batch, step_s, validation, start, seconds,
        peak / MIB, rows / step_s,
    )  # fmt: skip


def _validation(parts: Parts, loader: Any) -> float:
    """Seconds of a pass over the held-out images, from its first batches."""
    count = min(loader.steps_per_epoch, 3)
    began = time.perf_counter()
    seen = itertools.islice(loader.batches(0), count)
    measure.correct_and_count(parts.student, seen, parts.engine.autocast).tolist()
    seconds = time.perf_counter() - began
    return seconds / count * loader.steps_per_epoch


def _judged(parts: Parts) -> int:
    count = parts.manifest.splits[build.held_out(parts.manifest)]
    return min(parts.config.data.val_subset or count, count)


def _milestones(config: Config, stages: list[StageForecast]) -> int:
    every = config.checkpoint.keep_epochs
    return 0 if every is None else sum(s.epochs for s in stages) // every


def _cache_bytes(config: Config, parts: Parts) -> float:
    """What the teacher's answers take: logits and, with saliency, maps of each sample, draw and stage; fp32."""
    if config.teacher is None or config.teacher.cache.folder is None or parts.teacher is None:
        return 0.0
    samples = min(config.data.subset or 2**62, parts.manifest.splits["train"])
    width = {"exact": 4.0, "compact": 1.5}[config.teacher.cache.storage]
    patch, total = models.patch_size(parts.teacher.model) or 8, 0.0
    for stage in parts.plan.stages:
        draws = min(config.augment.draws or stage.epochs, stage.epochs)
        side = parts.manifest.largest if build.full_view(config) else stage.resolution
        maps = len(parts.taps) * max(side // patch, 1) ** 2 if config.loss.saliency.gamma else 0
        total += samples * draws * (width * (len(parts.manifest.classes) + maps) + 16)  # id and checksum
    return total


def _shards_bytes(config: Config, manifest: shards.Manifest) -> float:
    sizes = (shard.bytes for splits in manifest.shards.values() for some in splits.values() for shard in some)
    return float(sum(sizes))


def _free(folder: Path) -> int:
    there = next(f for f in [folder, *folder.absolute().parents] if f.is_dir())
    return shutil.disk_usage(there).free


def _notes(config: Config, parts: Parts) -> list[str]:
    found = []
    if config.teacher is not None and config.teacher.cache.folder is not None:
        found.append("the teacher's cache is not counted on: what it already has makes a run shorter")
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
