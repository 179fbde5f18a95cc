"""Engines: how a student is spread over the processes.

`ddp` replicates, `zero0` to `zero3` are DeepSpeed's stages, `fsdp2` is PyTorch's fully_shard. Each has the same few
methods (base.py), so that the loop, the checkpoints and the tests know none of them. Parameters are fp32 in each,
autocast is the Distiller's own, and a rank's loss is weighted so that the mean over ranks is the mean over the global
batch.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import InitProcessGroupKwargs
from torch._C._distributed_c10d import HashStore  # torch.distributed exports it without a type

from irkd_dist import config as configuration
from irkd_dist.config import Config
from irkd_dist.errors import Passing, UserError
from irkd_dist.training.engines import zero
from irkd_dist.training.engines.base import Engine, Exact, without_launchers_choices
from irkd_dist.training.engines.fsdp2 import Fsdp2
from irkd_dist.training.engines.zero import Zero

COLLECTIVE_TIMEOUT = timedelta(
    minutes=30
)  # of a rank that lives and does not come; a dead one is seen much sooner


def setup(config: Config) -> Engine:
    """Join the other processes, if a launcher started any, and make the engine; the environment stays as it is.

    Raises:
        UserError: the launcher's choices disagree with ours, bf16 is asked for and the device has none, deepspeed is
            missing, or the launcher announced processes that did not join.
    """
    cuda = torch.cuda.is_available()
    if not cuda and torch.cuda.device_count():  # the driver counts them without starting one
        raise Passing(
            f"this host has {torch.cuda.device_count()} GPUs, but CUDA does not start on it, so this process would "
            "train on the CPU: see nvidia-smi and dmesg there, or hide them with CUDA_VISIBLE_DEVICES=''"
        )
    _check_precision(config.precision)
    name = choose(config)
    settings = zero.settings(config, int(name[-1])) if name.startswith("zero") else {}
    announced, owns_group = int(os.environ.get("WORLD_SIZE", "1")), not dist.is_initialized()
    # without the backend's name accelerate may leave each CPU process believing that it is alone
    backend = "nccl" if cuda else "gloo"
    handlers: list[Any] = []
    if announced > 1 and owns_group and PartialState._shared_state:
        # the store has the addresses of the group that ended: a second one of the same name may read those
        raise Passing(
            "this process has been in a run of several processes, whose process group has ended: for one run after "
            "the other call torch.distributed.init_process_group before the first; it is left as it is"
        )
    if announced > 1 and owns_group:
        handlers = [InitProcessGroupKwargs(backend=backend, timeout=COLLECTIVE_TIMEOUT)]
    with without_launchers_choices():
        accelerator = Accelerator(mixed_precision="no", cpu=not cuda, kwargs_handlers=handlers)
    if announced != accelerator.num_processes:
        raise UserError(f"WORLD_SIZE={announced}, but only {accelerator.num_processes} process joined")
    if name != "ddp" and not dist.is_initialized():  # these need a group, be it of one
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    autocast = autocast_dtype(config.precision, accelerator.device)
    engine: Engine
    if settings:
        engine = Zero(accelerator, autocast, settings)
    elif name == "fsdp2":
        engine = Fsdp2(accelerator, autocast)
    else:
        engine = (Exact if config.data.virtual_ranks else Engine)(accelerator, autocast)
    engine.owns_group = owns_group
    return engine


def choose(config: Config) -> str:
    """The engine's name: the configuration's, or under `auto` what `accelerate launch` was given, else ddp.

    Raises:
        UserError: both are given and differ, or the launcher asks for what we have not.
    """
    launcher, where = None, ""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        if file and file != "none":
            stage = zero.read_json(Path(file)).get("zero_optimization", {}).get("stage", 0)
            where = f"{file} (accelerate's deepspeed_config_file)"
        else:
            stage, where = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"), "accelerate's zero_stage"
        launcher = f"zero{stage}"
    elif os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise UserError("accelerate's fsdp_version=1: we have FSDP2 only; set fsdp_version: 2")
        launcher, where = "fsdp2", "accelerate's use_fsdp"
    if config.engine == "auto":
        name = launcher or "ddp"
        configuration.check_engine(config, name)
        return name
    if launcher is not None and launcher != config.engine:
        raise UserError(
            f"{where} chooses {launcher}, our configuration engine={config.engine}; set one of them: engine=auto takes "
            "the launcher's"
        )
    return config.engine


def autocast_dtype(precision: Literal["auto", "bf16", "fp32"], device: torch.device) -> torch.dtype | None:
    """bf16 where it is asked for, or where `auto` finds that the device computes in it; None is fp32."""
    if precision == "fp32":
        return None
    has_bf16 = (
        torch.cuda.is_bf16_supported(including_emulation=False)
        if device.type == "cuda"
        else bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    )
    if precision == "bf16" and device.type == "cuda" and not has_bf16:
        raise UserError("precision=bf16, but this GPU does not compute in bf16; use precision=fp32")
    return torch.bfloat16 if has_bf16 or precision == "bf16" else None


def _check_precision(precision: str) -> None:
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher not in ("no", precision) and not (launcher == "bf16" and precision == "auto"):
        raise UserError(
            f"accelerate's mixed_precision={launcher} disagrees with precision={precision} of our configuration; "
            f"set one of them: mixed_precision=no lets ours decide"
        )
