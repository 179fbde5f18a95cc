"""Checks of the machine that any run asks for: versions, devices, kernels, the network, the file system."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import socket
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from irkd_dist import __version__
from irkd_dist.config import Config
from irkd_dist.errors import UserError
from irkd_dist.examination import Examination, Warn
from irkd_dist.training import (
    distributed,
    engines,
    tracking,
)  # fmt: skip
from irkd_dist.training.engines import Engine

LIBRARIES = ("torch", "torchvision", "timm", "accelerate", "deepspeed", "webdataset", "safetensors", "wandb")
VISIBLE_S = 15.0  # for a file to be seen by every process; NFS clients may remember a folder for some seconds
MIB, GIB = 2**20, 2**30


def examine_machine(examine: Examination, engine: Engine, config: Config | None) -> None:
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
        finish(engine)
        start = time.perf_counter()
        torch.mm(a, a)
        finish(engine)
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
    finish(engine)
    start = time.perf_counter()
    distributed.total(engine, values)
    finish(engine)
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
    longest = slowest(engine, waited)
    if not seen:
        raise UserError(
            f"{folder.absolute()}: what rank 0 writes and renames there is not seen after {VISIBLE_S:.0f} s; "
            "out=... must be a folder that all nodes share"
        )
    free = shutil.disk_usage(folder).free
    text = f"{folder.absolute()}: seen by every process after {longest:.2f} s, {free / GIB:.1f} GiB free"
    if free < GIB:
        raise Warn(f"{text}: make room, checkpoints and panels go there")
    return text


def _tracking(engine: Engine, config: Config | None) -> str:
    if config is None:
        return "events.jsonl always; W&B and TensorBoard when a configuration asks for them"
    return tracking.reach(config.track.backend, config.track.mode) if engine.main else ""


def finish(engine: Engine) -> None:
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)


def slowest(engine: Engine, seconds: float) -> float:
    return max(distributed.gather(engine, seconds))
