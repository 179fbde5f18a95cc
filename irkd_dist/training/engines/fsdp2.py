"""FSDP2: PyTorch's fully_shard, of a student, or of a teacher alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from irkd_dist.distill.module import Distiller
from irkd_dist.training.engines.base import Engine, to_cpu


class Fsdp2(Engine):
    """FSDP2: every block's parameters, gradients and moments are sharded over the processes."""

    name = "fsdp2"
    replicated = False
    settles = False

    def _wrap(self, distiller: Distiller) -> nn.Module:
        names = {id(p): name for name, p in distiller.student.named_parameters()}
        shard(distiller.student, self.device)
        # the optimizer was made for the whole parameters: give it the sharded ones of the same names
        sharded = dict(distiller.student.named_parameters())
        for group in self.optimizer.param_groups:
            group["params"] = [sharded[names[id(p)]] for p in group["params"]]
        return distiller

    def inner_grad_context(self, model: nn.Module) -> Callable[[], AbstractContextManager[object]]:
        return lambda: kept_gathered(model)

    @contextmanager
    def micro_batch(self, last: bool):
        assert isinstance(self.student, FSDPModule)
        self.student.set_requires_gradient_sync(last)
        yield

    def step(self) -> Tensor:
        release(self.student)
        return super().step()

    def discard(self) -> None:
        release(self.student)
        super().discard()

    def weights(self) -> dict[str, Tensor]:
        release(self.student)
        return self._full(self.student.state_dict())

    def moments(self) -> dict[str, Tensor]:
        named = {
            f"{key}.{name}": value
            for name, parameter in self.student.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        return self._full(named)

    def _live(self) -> list[Tensor]:
        release(self.student)
        return [v.to_local() if isinstance(v, DTensor) else v for v in super()._live()]

    def _full(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        result = {}
        for name, value in tensors.items():  # one at a time: no process holds all of them on its device
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if self.main:
                result[name] = to_cpu(whole)
        return result

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        release(self.student)
        load_sharded(self.student, weights)

    def _place(self, key: str, value: Tensor, parameter: nn.Parameter) -> Tensor:
        if key == "step":
            return super()._place(key, value, parameter)
        return _distribute_as(value.to(parameter.device, copy=True), parameter)


def shard(model: nn.Module, device: torch.device, fill: bool = False) -> None:
    """Shard a model's parameters over all processes in place: each block, then what is left.

    fill: the model is on no device, and gets memory of unknown content for this process's part alone.
    """
    mesh: DeviceMesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if fill:
        model.to_empty(device=device)
    else:
        model.to(device)  # buffers


@contextmanager
def kept_gathered(model: nn.Module):
    """Around an inner gradient: sharded parameters stay gathered from here to `release`.

    The backward to come differentiates through the inner gradient and reads them again; FSDP2 by itself frees them
    after a block's first backward.
    """
    for module in _sharded(model):
        module.set_reshard_after_backward(False, recurse=False)
    yield


def release(model: nn.Module) -> None:
    """Free what forward or an inner gradient left gathered."""
    for module in _sharded(model):
        module.set_reshard_after_backward(True, recurse=False)
        module.reshard()


def _sharded(model: nn.Module) -> list[FSDPModule]:
    return [m for m in model.modules() if isinstance(m, FSDPModule)]


def load_sharded(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put full weights into a sharded model."""
    with torch.no_grad():
        for name, value in model.state_dict(keep_vars=True).items():
            whole = weights[name].to(value.device, value.dtype)
            value.copy_(_distribute_as(whole, value) if isinstance(value, DTensor) else whole)


def _distribute_as(whole: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return whole
    # every process has the whole: none needs to send it
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
