"""The teacher's cache in a run: what decides an answer, what a step will ask, and what the log says of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from irkd_dist import checkpoint
from irkd_dist import config as configuration
from irkd_dist.config import Config
from irkd_dist.data.loader import Batch, Loader
from irkd_dist.distill import cache_files, cache_shards, hub
from irkd_dist.distill.cache import CachedTeacher, Keys, Wanted
from irkd_dist.distill.teacher import Teacher
from irkd_dist.training import distributed, restore
from irkd_dist.training.engines import Engine
from irkd_dist.training.parts import Parts
from irkd_dist.training.position import Position
from irkd_dist.training.tracking import Tracker

MACHINE = ("chunk", "torch", "machine", "threads", "fused_attention")  # of a key: what decides the last bits


def cached(config: Config, engine: Engine, teacher: Teacher | None) -> CachedTeacher | None:
    """The teacher with its cache, if it has one. Raises UserError for a folder that is something else."""
    if teacher is None or config.teacher is None or config.teacher.cache.folder is None:
        return None
    spec, folder = config.teacher.cache, Path(config.teacher.cache.folder)
    if spec.mode != "off":
        cache_files.check_cache(folder, create=spec.mode != "read")
    limit = None if spec.limit_gib is None else int(spec.limit_gib * 2**30)

    def most(numbers: list[int]) -> list[int]:
        values = torch.tensor(numbers, device=engine.device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values.tolist()

    together = most if restore.teacher_sharded(config, engine) else None
    return CachedTeacher(teacher, folder, spec.mode, spec.storage, spec.chunk, limit, together)


def enter(parts: Parts, stage: int, loader: Loader) -> list[str]:
    """Let the cache serve a stage, whose teacher is loaded; and write down that it serves this run.

    Returns what the user should know: another machine, or another number of threads, has computed what is there.
    """
    answers, config = parts.answers, parts.config
    if answers is None or answers.mode == "off":
        return []
    found = keys(parts, stage, loader)
    answers.enter(
        found, parts.manifest.splits["train"], config.augment.draws is not None, _grids(parts, loader)
    )
    if parts.engine.main:
        for store in answers.stores:
            cache_files.note_use(answers.folder, store.key, str(configuration.folder_of(config).resolve()))
    return [f"{answers.folder}: {text}" for text in cache_files.near(answers.folder, found.logits, MACHINE)]


def _grids(parts: Parts, loader: Loader) -> list[tuple[int, ...]]:
    """(h, w) of each tap's maps; every process must call it, for a sharded teacher."""
    assert parts.teacher is not None
    if not parts.config.loss.saliency.gamma:
        return []
    side, device = loader.view.full or loader.resolution, parts.engine.device
    blank, label = (
        torch.zeros(1, 3, side, side, device=device),
        torch.zeros(1, dtype=torch.long, device=device),
    )
    return [m.shape[1:] for m in parts.teacher(blank, label, 1, logits=False).maps or []]


def keys(parts: Parts, stage: int, loader: Loader) -> Keys:
    """Everything that decides the teacher's input and its answer but the sample and the draw.

    The machine belongs to it where all bits are kept: other kernels round otherwise.
    """
    config, teacher = parts.config, parts.teacher
    assert config.teacher is not None
    assert teacher is not None
    spec, saliency, device = config.teacher.cache, config.loss.saliency, parts.engine.device
    model, weights = _origin(parts, stage)
    view = loader.view_key()
    common = {
        "format": cache_shards.FORMAT, "data": parts.identity["data_digest"], "model": model, "weights": weights,
        "renormalize": None if teacher.renormalize is None else [t.flatten().tolist() for t in teacher.renormalize],
        "precision": parts.identity["precision"], "storage": spec.storage,
        **{f"view.{key}": value for key, value in view.items()},
    }  # fmt: skip
    if spec.storage == "exact":
        fused = any(getattr(m, "fused_attn", False) for m in teacher.model.modules())
        kind = (
            torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else torch.backends.cpu.get_cpu_capability()
        )
        threads = None if device.type == "cuda" else torch.get_num_threads()
        common |= {"chunk": spec.chunk, "torch": torch.__version__, "machine": kind, "threads": threads}
        common |= {"fused_attention": fused, "compiled": config.compile is not False}
    maps = [{**common, "answer": "maps", "method": saliency.method, "tap": path} for path in teacher.paths]
    return Keys({**common, "answer": "logits"}, maps if saliency.gamma > 0 else [])


def steps(
    parts: Parts, loader: Loader, position: Position, alpha: float, gamma: float
) -> Iterator[list[Batch]]:
    """The rest of the loader's epoch; with a cache each batch comes when what is kept of it is in memory."""
    batches = loader.steps(position.epoch, position.epoch_step)
    if parts.answers is None:
        return batches
    parts.answers.look(parts.config.augment.draw(position.epoch))
    return parts.answers.ahead(
        batches, _wanted(parts, loader, position, alpha, gamma), parts.config.data.workers
    )


def _wanted(parts: Parts, loader: Loader, position: Position, alpha: float, gamma: float) -> Iterator[Wanted]:
    for step in range(position.epoch_step, loader.steps_per_epoch):
        at = position.step + step - position.epoch_step
        count = parts.micro_batches(position.curriculum.stage)
        yield wanted(parts.config, loader, position.epoch, step, at, alpha, gamma, count)


def wanted(
    config: Config,
    loader: Loader,
    epoch: int,
    step: int,
    at: int,
    alpha: float,
    gamma: float,
    accumulate: int,
) -> Wanted:
    """What a step of an epoch, the run's step `at`, will ask of the cache: see `step.arguments`."""
    spec, (ids, positions, size), aligned = config.loss.saliency, loader.samples(epoch, step), 0
    if gamma and at % spec.every == 0:
        chosen = int((positions < math.ceil(spec.fraction * size)).sum())
        # a slice without a chosen sample aligns its first one, at weight 0; so does a micro-batch
        aligned = max(chosen, len(loader.share.own)) if accumulate == 1 else len(ids)
    return Wanted(config.augment.draw(epoch), ids, aligned, alpha > 0)


def counted(parts: Parts, seconds: float) -> dict[str, float]:
    """For the log: samples found and computed by all processes since the last line, and the share of time it cost."""
    if parts.answers is None:
        return {}
    own = torch.tensor(parts.answers.counts.take(), dtype=torch.float64)
    if parts.engine.world > 1:
        own = own.to(parts.engine.device, torch.float32)
    hits, misses, waited = distributed.total(parts.engine, own).tolist()
    return {
        "cache_hits": int(hits),
        "cache_misses": int(misses),
        "cache_wait": waited / parts.engine.world / seconds,
    }


def end_epoch(parts: Parts, tracker: Tracker, step: int) -> None:
    """Put what was computed on the disk, and say what any process has met; every process must call it."""
    if parts.answers is None:
        return
    parts.answers.flush()
    told = distributed.gather(
        parts.engine, (distributed.name(parts.engine), parts.answers.news(), parts.answers.errors)
    )
    for who, news, _ in told:
        for text in news:
            tracker.event("cache", step, rank=who, what=text)
            tracker.say(f"warning: teacher cache: {text}" + (f" ({who})" if parts.engine.world > 1 else ""))
    logits, maps = (max(errors[i] for _, _, errors in told) for i in range(2))
    if logits or maps:
        tracker.event("cache_error", step, logits=logits, maps=maps)
        tracker.say(
            f"teacher cache, compact: largest error {logits:.1e} of the range of logits, {maps:.1e} of maps"
        )


def _origin(parts: Parts, stage: int) -> tuple[dict[str, Any], str]:
    """The arguments that build the teacher, and a digest of its weights."""
    spec, folder = parts.config.teacher, parts.plan.stages[stage].teacher
    assert spec is not None
    assert parts.teacher is not None
    if folder is not None:
        state = checkpoint.load_state(Path(folder))
        return dict(state["model"]), restore.teacher_digest(state, parts.config)
    assert spec.model is not None
    model = {k: v for k, v in asdict(spec.model).items() if k not in ("weights", "pretrained")}
    model["image_size"] = spec.model.image_size or parts.manifest.largest
    described = hub.look_up(spec.model.name, "teacher.model.name")
    if (
        described.weights is not None or described.repository
    ):  # its config.json may change, and the name stays
        model |= {"architecture": described.architecture, "described": described.options}
    return model, restore.weights_digest(parts.teacher.model)
