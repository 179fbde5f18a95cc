"""Pre-flight checks: on every process of the job to come, one line a check, nothing of the run is written.

A check is a function that every process calls; what it finds (a text, a warning, a failure) is gathered, and rank 0
prints one line: the same finding once, a different one with the process it is from. The checks themselves are those of
training (shards, teacher, engine, loader, forward), called here one after the other.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from irkd_dist import config as configuration
from irkd_dist import configured, doctor_machine, slurm
from irkd_dist.config import Config, Fixed
from irkd_dist.data import sampler, shards
from irkd_dist.distill import measure
from irkd_dist.distill.models import parameter_count
from irkd_dist.errors import UserError
from irkd_dist.examination import Examination, Warn
from irkd_dist.training import (
    bookends,
    build,
    distributed,
    engines,
    micro,
    panels,
    preflight,
    restore,
    step,
)  # fmt: skip
from irkd_dist.training.engines import Engine
from irkd_dist.training.parts import Parts

MIB, GIB = 2**20, 2**30


def doctor(path: str | None, overrides: list[str]) -> int:
    """Examine this machine, its processes and, with a configuration, the run to come.

    Returns:
        0: nothing fails (warnings may be there); 1: something does.
    """
    examination = Examination()
    config = Config(fixed=Fixed(32, 1), name="doctor")
    if path is not None:
        try:
            config = configuration.load(path, overrides)
        except UserError as error:
            # every process says the same of the same file, before there is a way to tell one another
            examination.alone("configuration", str(error))
            return examination.verdict()
    if not examination.rendezvous():
        return 1
    try:
        with examination.watched("processes"):
            chosen = engines.choose(config)  # before the launcher's environment is cleared
            engine = engines.setup(config)
    except UserError as error:
        examination.alone("processes", str(error))
        return 1
    try:
        examination.engine = engine
        doctor_machine.examine_machine(examination, engine, config if path else None)
        if path is not None:
            _run_to_come(examination, engine, config, path, chosen)
        return examination.verdict()
    finally:
        engine.finish()


def over_the_allocation(arguments: list[str]) -> int:
    """Run `irkd doctor ...` on every node of the present SLURM allocation; returns its exit code.

    Raises:
        UserError: not inside an allocation.
    """
    if "SLURM_JOB_ID" not in os.environ:
        raise UserError(
            "--slurm examines the nodes of an allocation, and this is none (SLURM_JOB_ID is not set): "
            "salloc --nodes 2 irkd doctor --slurm CONFIG, or call it in an sbatch script"
        )
    command, environment = slurm.torchrun(["-m", "irkd_dist", "doctor", *arguments])
    return subprocess.call(command, env=environment)


# ---- the run to come


def _run_to_come(examine: Examination, engine: Engine, config: Config, path: str, chosen: str) -> None:
    stages = configuration.stages(config)
    sizes = ", ".join(str(s.resolution) for s in stages)
    examine(
        "configuration",
        lambda: f"{path}: {config.student.name}, {sizes} px, run folder {configuration.folder_of(config)}",
    )
    manifest: Any = None

    def shards_whole() -> str:
        nonlocal manifest
        manifest = shards.load_manifest(configuration.shards_of(config))
        return _shards(engine, config, manifest)

    def teacher_fits() -> str:
        if config.teacher is None:
            return "none"
        network = configured.load_teacher(config, manifest)
        count = parameter_count(network.model) / 1e6
        fits = "same classes and normalisation, its patches fit every stage"
        return f"{network.folder}: {count:.2f} M parameters, {fits}"

    if not examine("shards", shards_whole) or not examine("teacher", teacher_fits):
        return
    examine("batch", lambda: _batch(engine, config, manifest))
    job: Any = None

    def parts_fit() -> str:
        nonlocal job
        # verified above, each file by one process; decoded images need not be kept for one step
        light = replace(config, data=replace(config.data, verify="size", cache="none"))
        job = build.build(light, engine)
        distributed.barrier(engine)
        weights = sum(shape.numel() for shape in engine.shapes.values())
        gradient = f"a gradient of {4 * weights / MIB:.1f} MiB"
        said = f"{config.student.name} under {chosen}, {weights / 1e6:.2f} M parameters, {gradient}"
        folder = configuration.folder_of(config)
        free = shutil.disk_usage(next(f for f in [folder, *folder.absolute().parents] if f.is_dir())).free
        needed = 12 * weights * (config.checkpoint.keep + 1 + len(stages))  # weights and two moments each
        if free < needed:
            raise UserError(
                f"{said}; checkpoints need {needed / GIB:.1f} GiB, {free / GIB:.1f} are free at {config.out}"
            )
        return f"{said}; checkpoints take up to {needed / MIB:,.0f} MiB"

    if not examine("student", parts_fit):
        return
    for i, stage in enumerate(stages):
        if stage.resolution not in [s.resolution for s in stages[:i]]:
            examine(f"step at {stage.resolution} px", lambda i=i: _step(job, i))


def _shards(engine: Engine, config: Config, manifest: shards.Manifest) -> str:
    """Each file that the run reads is checked by one process."""
    folder, verify = configuration.shards_of(config), config.data.verify
    files, start = preflight.used_shards(config, manifest), time.perf_counter()
    preflight.check_shards(config, engine, manifest)
    seconds = time.perf_counter() - start
    size = sum(shard.bytes for _, shard in files) / MIB
    what = "checksums agree" if verify == "checksum" else "sizes agree (data.verify=size)"
    what = what if isinstance(folder, Path) else "each is checked when it is downloaded"
    splits = ", ".join(f"{n:,} {split}" for split, n in manifest.splits.items())
    return f"{folder}: {len(files)} files, {size:,.0f} MiB, {what} ({seconds:.1f} s); {splits}"


def _batch(engine: Engine, config: Config, manifest: shards.Manifest) -> str:
    count = config.data.subset or manifest.splits["train"]
    batches = [configuration.stage_batch(config, s.resolution) for s in configuration.stages(config)]
    batch = min(batches)
    steps = sampler.steps_per_epoch(count, batch)
    last = count - (steps - 1) * batch
    shares = [len(sampler.share(min(batch, count), rank, engine.world)) for rank in range(engine.world)]
    more = f" (up to {max(batches)} at low resolution)" if max(batches) > batch else ""
    each = f"{batch}{more} over {_processes(engine.world)}: {_ranges(shares)} each"
    text = f"{each}; {steps} steps an epoch, the last has {last}"
    if min(shares) == 0:
        raise Warn(
            f"{text}: {shares.count(0)} processes have nothing to do; data.batch={engine.world} or fewer processes"
        )
    if batch > count:
        raise Warn(f"{text}: data.batch={batch} is larger than the {count} training images")
    return text


def _step(job: Parts, number: int) -> str:
    """Two training steps: the first one warms up, the second is timed; then what a stage's end computes."""
    engine, loss = job.engine, job.config.loss
    _forget_peak(engine)
    restore.load_stage_teacher(job, number)
    micro.ensure(job, number)
    training, held_out = build.loaders(job, job.plan.stages[number])
    seconds, size = 0.0, 0
    with training, held_out:
        for batches in itertools.islice(training.steps(0), 2):
            distributed.barrier(engine)
            doctor_machine.finish(engine)
            start = time.perf_counter()
            # as step 0: one at which saliency is aligned, whatever loss.saliency.every says
            count = job.micro_batches(number)
            taken = step.take(job, batches, loss.kd.alpha, loss.saliency.gamma, 0, count)
            doctor_machine.finish(engine)
            if bool(taken.skipped):
                raise UserError("the gradient is not finite: lower optim.lr, or use precision=fp32")
            seconds, size = time.perf_counter() - start, batches[0].size
        batch = next(iter(held_out.batches(0)))
        measure.correct_and_count(job.student, [batch], engine.autocast)
        panels.show(job, held_out, job.plan.stages[number].resolution)
    taps, _ = bookends.probe_taps(job, number)
    peak, kind = _peak(engine)
    slowest = doctor_machine.slowest(engine, seconds)
    text = f"{slowest:.3f} s, {size / slowest:,.0f} images/s, peak {peak / GIB:.2f} GiB {kind} a process"
    if engine.device.type == "cuda":
        total = torch.cuda.get_device_properties(engine.device).total_memory
        if peak > 0.9 * total:
            raise Warn(
                f"{text}, of {total / GIB:.0f}: little is left; a smaller data.batch or more processes"
            )
    if taps:
        raise Warn(f"{text}; {taps}")
    return f"{text}; validation and panels run"


def _forget_peak(engine: Engine) -> None:
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def _peak(engine: Engine) -> tuple[int, str]:
    """Bytes of the most memory in use, and of which memory."""
    if engine.device.type == "cuda":
        return torch.cuda.max_memory_allocated(engine.device), "of the GPU"
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024, "resident"


def _processes(count: int) -> str:
    return f"{count} process" + ("es" if count > 1 else "")


def _ranges(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"
