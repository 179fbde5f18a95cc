"""Pre-flight checks: on every process of the job to come, one line a check, nothing of the run is written.

A check is a function that every process calls; what it finds (a text, a warning, a failure) is gathered, and rank 0
prints one line: the same finding once, a different one with the process it is from. The checks themselves are those of
training (shards, teacher, engine, loader, forward), called here one after the other.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from irkd_dist import __version__, configured, slurm
from irkd_dist import config as configuration
from irkd_dist.config import Config, Fixed
from irkd_dist.data import sampler, shards
from irkd_dist.distill import measure
from irkd_dist.distill.models import parameter_count
from irkd_dist.errors import UserError, one_line
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
    tracking,
)  # fmt: skip
from irkd_dist.training.engines import Engine
from irkd_dist.training.parts import Parts

LIBRARIES = ("torch", "torchvision", "timm", "accelerate", "deepspeed", "webdataset", "safetensors", "wandb")
# of one check (DeepSpeed compiles at its first use), then a process does not answer: it ends
PATIENCE_S = 300.0
REACH_S = 20.0  # for the launcher's port to answer
VISIBLE_S = 15.0  # for a file to be seen by every process; NFS clients may remember a folder for some seconds
MIB, GIB = 2**20, 2**30
COLOURS = {"ok": "green", "warn": "yellow", "FAIL": "red"}


class Warn(Exception):
    """A finding to look at that does not keep a run from starting."""


@dataclass(frozen=True)
class Finding:
    """What one process found in one check."""

    level: str  # ok, warn, FAIL
    text: str
    who: str  # rank and host


def doctor(path: str | None, overrides: list[str]) -> int:
    """Examine this machine, its processes and, with a configuration, the run to come.

    Returns:
        0: nothing fails (warnings may be there); 1: something does.
    """
    examination = _Examination()
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
        _machine(examination, engine, config if path else None)
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


# ---- the machine


def _machine(examine: _Examination, engine: Engine, config: Config | None) -> None:
    examine("versions", lambda: _versions(engine), alike=True)
    examine("devices", lambda: _devices(engine))
    examine("fused kernels", lambda: _fused(engine))
    examine("bf16", lambda: _bf16(engine, config))
    examine("all-reduce", lambda: _all_reduce(engine))
    folder = Path(config.out) if config is not None else Path("runs")
    examine("file system", lambda: _file_system(engine, folder))
    examine("tracking", lambda: _tracking(engine, config))


def _versions(engine: Engine) -> str:
    said = [f"irkd_dist {__version__}", f"Python {platform.python_version()}"]
    for library in LIBRARIES:
        try:
            said.append(f"{library} {version(library)}")
        except PackageNotFoundError:
            continue  # some are optional
    return ", ".join(said)


def _devices(engine: Engine) -> str:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if engine.device.type == "cuda":
        properties = torch.cuda.get_device_properties(engine.device)
        visible = torch.cuda.device_count()
        text = (
            f"{engine.device} is one of {visible} {properties.name}, {properties.total_memory / GIB:.0f} GiB"
        )
        if local > visible:
            raise Warn(f"{text}; {local} processes share {visible} of them: start one process for each")
        return text
    cores = len(os.sched_getaffinity(0))
    threads = torch.get_num_threads()
    text = f"CPU, {cores} cores, {threads} thread{'s' if threads > 1 else ''} a process"
    if shutil.which("nvidia-smi"):
        raise Warn(
            f"{text}; nvidia-smi is here, but torch {torch.__version__} sees no GPU: wrong build or driver?"
        )
    if threads * local > cores:
        raise Warn(
            f"{text}: {local} processes want {threads * local}; set OMP_NUM_THREADS={max(cores // local, 1)}"
        )
    return text


def _fused(engine: Engine) -> str:
    parameter = torch.zeros(8, device=engine.device, requires_grad=True)
    parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW([parameter], lr=0.1, fused=True).step()
    query = torch.rand(1, 2, 8, 16, device=engine.device, dtype=torch.bfloat16)
    found = []
    backends = torch.nn.attention.SDPBackend
    for name, backend in (
        ("flash", backends.FLASH_ATTENTION),
        ("memory-efficient", backends.EFFICIENT_ATTENTION),
    ):
        with contextlib.suppress(RuntimeError), torch.nn.attention.sdpa_kernel(backend):
            torch.nn.functional.scaled_dot_product_attention(query, query, query)
            found.append(name)
    if not found:
        raise Warn(
            "AdamW in one pass; no fused attention on this device: explicit products, slower at many patches"
        )
    return f"AdamW in one pass, {' and '.join(found)} attention"


def _bf16(engine: Engine, config: Config | None) -> str:
    has = engines.autocast_dtype("auto", engine.device) is not None
    chosen = "bf16" if engine.autocast else "fp32"
    precision = config.precision if config is not None else "auto"
    ratio = _product_time(engine, torch.float32) / _product_time(engine, torch.bfloat16)
    text = f"precision={precision} computes in {chosen} here; a product in bf16 is {ratio:.1f} times as fast as in fp32"
    if engine.autocast and not has:
        raise Warn(f"{text}, and this device emulates bf16: use precision=fp32")
    return text


def _product_time(engine: Engine, dtype: torch.dtype) -> float:
    a = torch.rand(512, 512, device=engine.device, dtype=dtype)
    seconds = []
    for _ in range(6):
        _finish(engine)
        start = time.perf_counter()
        torch.mm(a, a)
        _finish(engine)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _all_reduce(engine: Engine) -> str:
    if engine.world == 1:
        return "one process, nothing to add up"
    small, large = torch.ones(1, device=engine.device), torch.ones(4 * MIB, device=engine.device)  # 16 MiB
    distributed.total(engine, small.clone())
    quick = min(_timed(engine, small) for _ in range(5))
    slow = min(_timed(engine, large) for _ in range(3))
    right = float(distributed.total(engine, torch.full((1,), float(engine.rank), device=engine.device)))
    if right != engine.world * (engine.world - 1) / 2:
        raise UserError(f"the sum of the ranks of {engine.world} processes came out as {right:g}")
    moved = 2 * (engine.world - 1) / engine.world * large.nbytes / slow
    rate = f"{moved / 1e9:.2f} GB/s over the slowest link"
    return f"{engine.world} processes, {rate}, {quick * 1e3:.2f} ms for one number"


def _timed(engine: Engine, values: Tensor) -> float:
    distributed.barrier(engine)
    _finish(engine)
    start = time.perf_counter()
    distributed.total(engine, values)
    _finish(engine)
    return time.perf_counter() - start


def _file_system(engine: Engine, folder: Path) -> str:
    folder = next(f for f in [folder, *folder.absolute().parents] if f.is_dir())  # nothing of the run is made
    name = distributed.broadcast(engine, f".irkd-doctor-{socket.gethostname()}-{os.getpid()}")
    written, error = folder / name, None
    if engine.main:
        try:
            part = written.with_name(f"{name}.part")
            part.write_text(name)
            part.rename(written)
        except OSError as problem:
            error = f"{folder} cannot be written: {problem.strerror}"
    error = distributed.broadcast(engine, error)
    if error:
        raise UserError(error)
    start, seen = time.monotonic(), False
    while not seen and time.monotonic() - start < VISIBLE_S:
        with contextlib.suppress(OSError):
            seen = written.read_text() == name
        if not seen:
            time.sleep(0.05)
    waited = time.monotonic() - start
    distributed.barrier(engine)
    if engine.main:
        with contextlib.suppress(OSError):
            written.unlink()
    slowest = _slowest(engine, waited)
    if not seen:
        raise UserError(
            f"{folder.absolute()}: what rank 0 writes and renames there is not seen after {VISIBLE_S:.0f} s; "
            "out=... must be a folder that all nodes share"
        )
    free = shutil.disk_usage(folder).free
    text = f"{folder.absolute()}: seen by every process after {slowest:.2f} s, {free / GIB:.1f} GiB free"
    if free < GIB:
        raise Warn(f"{text}: make room, checkpoints and panels go there")
    return text


def _tracking(engine: Engine, config: Config | None) -> str:
    if config is None:
        return "events.jsonl always; W&B and TensorBoard when a configuration asks for them"
    return tracking.reach(config.track.backend, config.track.mode) if engine.main else ""


# ---- the run to come


def _run_to_come(examine: _Examination, engine: Engine, config: Config, path: str, chosen: str) -> None:
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
            _finish(engine)
            start = time.perf_counter()
            # as step 0: one at which saliency is aligned, whatever loss.saliency.every says
            count = job.micro_batches(number)
            taken = step.take(job, batches, loss.kd.alpha, loss.saliency.gamma, 0, count)
            _finish(engine)
            if bool(taken.skipped):
                raise UserError("the gradient is not finite: lower optim.lr, or use precision=fp32")
            seconds, size = time.perf_counter() - start, batches[0].size
        batch = next(iter(held_out.batches(0)))
        measure.correct_and_count(job.student, [batch], engine.autocast)
        panels.show(job, held_out, job.plan.stages[number].resolution)
    taps, _ = bookends.probe_taps(job, number)
    peak, kind = _peak(engine)
    slowest = _slowest(engine, seconds)
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


def _finish(engine: Engine) -> None:
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)


def _slowest(engine: Engine, seconds: float) -> float:
    return max(distributed.gather(engine, seconds))


def _processes(count: int) -> str:
    return f"{count} process" + ("es" if count > 1 else "")


def _ranges(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


# ---- asking every process, and printing


# every function above that talks to the other processes does so before it may raise: none waits for another in vain


class _Examination:
    """Calls checks on every process alike, prints a line for each on rank 0, and remembers how they went."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.rank = int(os.environ.get("RANK", "0"))
        self.who = f"rank {self.rank} on {socket.gethostname()}"
        self.levels: list[str] = []
        self.started = time.monotonic()
        self.console = tracking.console()

    def __call__(self, name: str, check: Callable[[], str], alike: bool = False) -> bool:
        """Run a check on every process; True unless it fails. `alike`: processes that differ are a failure."""
        assert self.engine is not None
        with self.watched(name):
            try:
                found = Finding("ok", check(), self.who)
            except Warn as warning:
                found = Finding("warn", str(warning), self.who)
            except (UserError, OSError, RuntimeError) as error:
                found = Finding("FAIL", one_line(error), self.who)
            findings = distributed.gather(self.engine, found)
        worst = max(findings, key=lambda f: list(COLOURS).index(f.level))
        level, text = worst.level, worst.text
        if level != "ok" and any(f.text != text for f in findings):
            text = f"{worst.who}: {text}"
        elif alike and (other := next((f for f in findings if f.text != text), None)):
            level = "FAIL"
            text = f"{worst.who} has {text}; {other.who} has {other.text}: install the same everywhere"
        self._print(name, level, text)
        return level != "FAIL"

    def alone(self, name: str, text: str) -> None:
        """A failure of this process before it could join the others."""
        if self.rank == 0 or name == "rendezvous":
            self._line(name, "FAIL", text if self.rank == 0 else f"{self.who}: {text}")
        self.levels.append("FAIL")

    def rendezvous(self) -> bool:
        """Whether the launcher's address can be reached; without a launcher there is none."""
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if address is None or world == 1:
            self._print("rendezvous", "ok", "one process, none needed")
            return True
        deadline, reason = time.monotonic() + REACH_S, ""
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        while agent or self.rank > 0:  # otherwise rank 0 opens the port itself, when it joins
            try:
                socket.create_connection((address, int(port)), timeout=5.0).close()
                break
            except (OSError, ValueError) as error:
                reason = str(error)
            if time.monotonic() > deadline:
                self.alone(
                    "rendezvous", f"{address}:{port} cannot be reached: {reason}; check name, port, firewall"
                )
                return False
            time.sleep(0.2)
        self._print("rendezvous", "ok", f"{address}:{port} answers, {world} processes announced")
        return True

    def verdict(self) -> int:
        """Print how it went; returns the exit code."""
        failed, warned = self.levels.count("FAIL"), self.levels.count("warn")
        seconds = f"{time.monotonic() - self.started:.0f} s"
        if self.rank == 0:
            warnings = f", with {warned} warning{'s' * (warned > 1)}" if warned else ""
            failures = f"not ready: {failed} check{'s' * (failed > 1)} failed"
            print(f"{failures if failed else f'ready{warnings}'} ({seconds})")
        return 1 if failed else 0

    @contextlib.contextmanager
    def watched(self, name: str) -> Iterator[None]:
        """End this process if it stays in the block for longer than `PATIENCE_S`: another one never came."""

        def give_up() -> None:
            self._line(
                name, "FAIL", f"{self.who}: no answer for {PATIENCE_S:.0f} s: another process ended or hangs"
            )
            sys.stdout.flush()
            os._exit(1)

        timer = threading.Timer(PATIENCE_S, give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _print(self, name: str, level: str, text: str) -> None:
        self.levels.append(level)
        if self.rank == 0:
            self._line(name, level, text)

    def _line(self, name: str, level: str, text: str) -> None:
        self.console.print(f"{level:<4}", style=COLOURS[level], end="  ")
        self.console.print(f"{name:<14} {text}")
