"""Processes and devices: the only door to accelerate.

Everything else calls these few functions and knows neither the engine nor how many processes there are.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from torch import Tensor, nn

from irkd_dist.errors import UserError


@dataclass
class Engine:
    """A process's place in the run."""

    accelerator: Accelerator
    autocast: torch.dtype | None  # of forward and backward; parameters stay fp32

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        return self.accelerator.num_processes

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return self.accelerator.device


def setup(precision: Literal["auto", "bf16", "fp32"] = "auto") -> Engine:
    """Join the other processes, if a launcher started any.

    Raises:
        UserError: the launcher's mixed precision disagrees with ours, bf16 is asked for and the device has none,
            or the launcher announced processes that did not join.
    """
    cuda = torch.cuda.is_available()
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher not in ("no", precision) and not (launcher == "bf16" and precision == "auto"):
        raise UserError(
            f"accelerate's mixed_precision={launcher} disagrees with precision={precision} of our configuration; "
            f"set one of them: mixed_precision=no lets ours decide"
        )
    announced = int(os.environ.get("WORLD_SIZE", "1"))
    # without the backend's name accelerate may leave each CPU process believing that it is alone
    handlers: list[Any] = [InitProcessGroupKwargs(backend="gloo")] if announced > 1 and not cuda else []
    accelerator = Accelerator(mixed_precision="no", cpu=not cuda, kwargs_handlers=handlers)
    if announced != accelerator.num_processes:
        raise UserError(f"WORLD_SIZE={announced}, but only {accelerator.num_processes} process joined")
    return Engine(accelerator, autocast_dtype(precision, accelerator.device))


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


def prepare(
    engine: Engine, module: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Wrap a module for this engine; the optimizer comes back as the engine steps it."""
    return engine.accelerator.prepare(module, optimizer)


def inner_grad_context() -> Callable[[], AbstractContextManager[object]]:
    """What this engine needs around the saliency gradient: nothing under DDP."""
    return nullcontext


def unwrap(engine: Engine, module: nn.Module) -> Any:
    """The module inside the engine's wrapper."""
    return engine.accelerator.unwrap_model(module)


def inner_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The torch optimizer inside the engine's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def backward(engine: Engine, loss: Tensor) -> None:
    """Differentiate the loss; gradients are averaged over the processes."""
    engine.accelerator.backward(loss)


def clip(engine: Engine, module: nn.Module, norm: float | None) -> None:
    """Clip the global gradient norm, if a norm is given."""
    if norm is not None:
        engine.accelerator.clip_grad_norm_(module.parameters(), norm)


def total(engine: Engine, values: Tensor) -> Tensor:
    """Sum of each process's tensor."""
    return engine.accelerator.reduce(values, reduction="sum") if engine.world > 1 else values  # type: ignore[return-value]


def broadcast(engine: Engine, value: Any) -> Any:
    """Rank 0's value, on every rank."""
    return broadcast_object_list([value])[0] if engine.world > 1 else value


def barrier(engine: Engine) -> None:
    """Wait for every process."""
    engine.accelerator.wait_for_everyone()


def finish(engine: Engine) -> None:
    """Leave the process group."""
    engine.accelerator.end_training()


def inject_fault(step: int) -> None:
    """Kill this process before `step` where the environment asks for it, as `IRKD_FAULT=sigkill@37`: for tests."""
    kind, _, at = os.environ.get("IRKD_FAULT", "").partition("@")
    if kind == "sigkill" and step == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
