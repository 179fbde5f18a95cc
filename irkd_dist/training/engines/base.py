"""What every engine can do, and the two that replicate: DDP, and virtual ranks under it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from irkd_dist.data.shared import Node
from irkd_dist.distill.module import Distiller
from irkd_dist.training import optim, virtual

MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine:
    """One process, or DDP: every process holds the whole student and its moments."""

    name = "ddp"
    replicated = True  # every process holds the student's full weights
    no_inner_gradient = False  # whether it cannot compute saliency gradients
    settles = (
        True  # its first backward fixes the order of its sums, so one is thrown away: resuming is exact then
    )
    exact = False  # whether any number of processes adds gradients up in the same order

    def __init__(self, accelerator: Accelerator, autocast: torch.dtype | None) -> None:
        self.accelerator = accelerator
        self.autocast = autocast  # of forward and backward; parameters stay fp32
        self.rank: int = accelerator.process_index
        self.world: int = accelerator.num_processes
        self.main = self.rank == 0
        self.device = _numbered(accelerator.device)
        # its processes share decoded images; none on a system without anonymous files
        meet = self.world > 1 and hasattr(os, "memfd_create")
        self.node = Node(dist.distributed_c10d._get_default_store()) if meet else None
        self.owns_group = True  # the process group began with this engine, and ends with it
        self.module: nn.Module = nn.Identity()
        self.student: nn.Module = nn.Identity()
        self.optimizer: torch.optim.Optimizer
        self.shapes: dict[str, torch.Size] = {}  # of the student's weights, before they are sharded
        # moving average of `_live`, spread over the processes as that is; None: none is kept
        self.average: list[Tensor] | None = None
        self._clip: float | None = None

    def prepare(self, distiller: Distiller, optimizer: torch.optim.AdamW, clip: float | None) -> nn.Module:
        """Spread the student; returns the module to call. `optimizer` stays the object whose groups hold the rate."""
        distiller.inner_grad_context = self.inner_grad_context(distiller.student)
        self.student, self.optimizer, self._clip = distiller.student, optimizer, clip
        self.shapes = {k: v.shape for k, v in distiller.student.state_dict().items()}
        self.module = self._wrap(distiller.to(self.device))
        return self.module

    def _wrap(self, distiller: Distiller) -> nn.Module:
        # of a class token, [1, 1, width], whose strides mean nothing
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        return self.accelerator.prepare_model(distiller)

    def inner_grad_context(self, model: nn.Module) -> Callable[[], AbstractContextManager[object]]:
        """What this engine needs around the saliency gradient of `model`."""
        return nullcontext

    def micro_batch(self, last: bool) -> AbstractContextManager[object]:
        """Goes around forward and backward of each micro-batch; gradients are summed over processes at the last."""
        return nullcontext() if last or self.world == 1 else self.module.no_sync()  # type: ignore[operator]

    def backward(self, loss: Tensor) -> None:
        """Differentiate the loss; gradients add up over micro-batches and are averaged over processes."""
        loss.backward()

    def step(self) -> Tensor:
        """Clip, step the optimizer, clear the gradients.

        Returns:
            1 if the norm of the gradient is not finite, else 0: a scalar on the device, the same on every process.
            AdamW changes nothing then; nobody waits to know.
        """
        skipped = (~torch.isfinite(self._norm())).float()
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]  # what GradScaler sets for a fused optimizer
        self._update()
        return skipped

    def _norm(self) -> Tensor:
        """Norm of the whole gradient, before it is clipped here."""
        if self._clip is not None:
            norm = nn.utils.clip_grad_norm_(self.student.parameters(), self._clip)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in self.student.parameters() if p.grad is not None])
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def discard(self) -> None:
        """Drop the gradients of a step that is not taken."""
        self.optimizer.zero_grad()

    def reset_moments(self) -> None:
        """Forget all moments and step counts in place: the next step is a new AdamW's first."""
        self.optimizer.state.clear()

    def weights(self) -> dict[str, Tensor]:
        """Full weights by name on the CPU of rank 0, an empty dict elsewhere. Every process must call it."""
        return {k: to_cpu(v) for k, v in self.student.state_dict().items()} if self.main else {}

    def moments(self) -> dict[str, Tensor]:
        """AdamW's state as `exp_avg.<parameter>`, `exp_avg_sq.<parameter>`, `step.<parameter>`, as `weights`."""
        result = {}
        for name, parameter in self.student.named_parameters() if self.main else ():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                result[f"{key}.{name}"] = to_cpu(value)
        return result

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Put full weights into the live student."""
        self.student.load_state_dict(weights)

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        """Put back what `moments` gave; a parameter without entries starts anew."""
        self.reset_moments()
        for name, parameter in self.student.named_parameters():
            for key in ("step", *MOMENTS):
                if (value := moments.get(f"{key}.{name}")) is not None:
                    self.optimizer.state[parameter][key] = self._place(key, value, parameter)

    def _place(self, key: str, value: Tensor, parameter: nn.Parameter) -> Tensor:
        # AdamW keeps its step counter on the CPU unless it is fused
        on = parameter.device if key != "step" or self.optimizer.defaults.get("fused") else "cpu"
        if key == "step":
            return value.to(on, copy=True)
        # in the parameter's layout: a fused kernel walks through both at once, whatever their strides are
        return torch.empty_like(parameter).copy_(value)

    def follow(self) -> None:
        """Begin a moving average of the student's weights and buffers at what they are."""
        self.average = [value.detach().clone() for value in self._live()]

    @torch.no_grad()
    def move_average(self, decay: float, skipped: Tensor) -> None:
        """Move the average towards the weights, unless the step was not taken: `skipped` is what `step` returned."""
        assert self.average is not None
        optim.move_average(self.average, self._live(), (1 - skipped) * (1 - decay))

    @contextmanager
    def averaged(self):
        """Inside, the student has the averaged weights, if there are any. Every process must enter it."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for average, live in zip(self.average, self._live(), strict=True) if self.average else ():
            kept = live.clone()
            live.copy_(average)
            average.copy_(kept)

    def _live(self) -> list[Tensor]:
        """The weights and buffers that this process steps."""
        return [*self.student.state_dict().values()]

    def finish(self) -> None:
        """Leave the process group, if it is this engine's own."""
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()


class Exact(Engine):
    """Virtual ranks under DDP: the gradients of the slices are added in one order, whoever computed them."""

    settles = False
    exact = True
    _sums: virtual.TreeSum

    def _wrap(self, distiller: Distiller) -> nn.Module:
        self._sums = virtual.TreeSum()
        return distiller

    @contextmanager
    def micro_batch(self, last: bool):
        yield
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        self._sums.add([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
        for parameter in parameters:
            parameter.grad = None
        if last:
            total = self._sums.total()
            virtual.sum_over_processes(total, self.rank, self.world)
            for parameter, gradient in zip(parameters, total, strict=True):
                parameter.grad = gradient.div_(self.world)


def to_cpu(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True).contiguous()


def _numbered(device: torch.device) -> torch.device:
    """`cuda` as `cuda:0`: a single process gets it from accelerate without its number, which threads must name."""
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device


@contextmanager
def without_launchers_choices():
    """Around what accelerate reads from the environment: it would wrap with its own defaults."""
    own = [k for k in os.environ if k.startswith(("ACCELERATE_USE_", "ACCELERATE_DEEPSPEED_", "FSDP_"))]
    kept = {key: os.environ.pop(key) for key in own}
    try:
        yield
    finally:
        os.environ.update(kept)
