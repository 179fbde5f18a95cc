"""Engines: how a student is spread over the processes. The only door to accelerate and deepspeed.

`ddp` replicates, `zero0` to `zero3` are DeepSpeed's stages, `fsdp2` is PyTorch's fully_shard. Each has the same few
methods, so that the loop, the checkpoints and the tests know none of them. Parameters are fp32 in each, autocast is
the Distiller's own, and a rank's loss is weighted so that the mean over ranks is the mean over the global batch.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore  # torch.distributed exports it without a type
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from irkd_dist import config as configuration
from irkd_dist.config import Config
from irkd_dist.data.shared import Node
from irkd_dist.distill.module import Distiller
from irkd_dist.errors import Passing, UserError
from irkd_dist.training import optim, virtual

MOMENTS = ("exp_avg", "exp_avg_sq")
COLLECTIVE_TIMEOUT = timedelta(
    minutes=30
)  # of a rank that lives and does not come; a dead one is seen much sooner


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
        return {k: _to_cpu(v) for k, v in self.student.state_dict().items()} if self.main else {}

    def moments(self) -> dict[str, Tensor]:
        """AdamW's state as `exp_avg.<parameter>`, `exp_avg_sq.<parameter>`, `step.<parameter>`, as `weights`."""
        result = {}
        for name, parameter in self.student.named_parameters() if self.main else ():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                result[f"{key}.{name}"] = _to_cpu(value)
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
                result[name] = _to_cpu(whole)
        return result

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        release(self.student)
        load_sharded(self.student, weights)

    def _place(self, key: str, value: Tensor, parameter: nn.Parameter) -> Tensor:
        if key == "step":
            return super()._place(key, value, parameter)
        return _distribute_as(value.to(parameter.device, copy=True), parameter)


class Zero(Engine):
    """DeepSpeed's ZeRO: stage 1 shards the moments, 2 the gradients too, 3 the parameters too; 0 is its plain mode."""

    settles = False

    def __init__(
        self, accelerator: Accelerator, autocast: torch.dtype | None, settings: dict[str, Any]
    ) -> None:
        super().__init__(accelerator, autocast)
        self._settings = settings
        self._stage: int = settings["zero_optimization"]["stage"]
        self.name = f"zero{self._stage}"
        self.replicated = self._stage < 3
        self.no_inner_gradient = self._stage == 3

    def _wrap(self, distiller: Distiller) -> nn.Module:
        deepspeed = import_deepspeed()
        before = {k: _to_cpu(v) for k, v in distiller.student.state_dict().items()}
        alone = "LOCAL_RANK" not in os.environ  # a single process without a launcher; DeepSpeed asks for it
        os.environ.setdefault("LOCAL_RANK", "0")
        try:
            with _without_launchers_choices():
                self._deepspeed, *_ = deepspeed.initialize(
                    model=distiller,
                    optimizer=self.optimizer,
                    dist_init_required=False,
                    config=self._settings,
                )
        finally:
            if alone:
                del os.environ["LOCAL_RANK"]
        if self._stage > 0:
            self._check_state(before)
        return self._deepspeed

    def _check_state(self, before: Mapping[str, Tensor]) -> None:
        """Put known moments into DeepSpeed's partitions, whose fields are private, and read them and the weights back.

        Raises:
            UserError: on every rank alike: this version keeps its state elsewhere than the ones that we know.
        """
        put: dict[str, Tensor] = {}
        for i, (name, _) in enumerate(self.student.named_parameters()):
            shape, count = before[name].shape, before[name].numel()
            put[f"step.{name}"] = torch.tensor(3.0)  # one count for a partition of several
            for j, key in enumerate(MOMENTS):
                put[f"{key}.{name}"] = (torch.arange(count) % 1021 + i + j / 2).float().view(shape)
        self.load_moments(put)
        weights, got = self.weights(), self.moments()
        self.reset_moments()
        same = not self.main or (
            all(torch.equal(weights[k], v) for k, v in before.items())
            and got.keys() == put.keys()
            and all(torch.equal(got[k], v) for k, v in put.items())
        )
        answer = [same]
        if self.world > 1:
            dist.broadcast_object_list(answer)
        if not answer[0]:
            raise UserError(
                f"deepspeed {import_deepspeed().__version__} does not give back weights and moments as they were put "
                "into its ZeRO partitions: checkpoints would be wrong; use deepspeed>=0.16,<0.20, or engine=fsdp2"
            )

    @contextmanager
    def micro_batch(self, last: bool):
        self._deepspeed.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        # times one: at stage 0 DeepSpeed's hook on its own output would divide by the micro-batches all the same
        self._deepspeed.backward(loss * 1.0, scale_wrt_gas=False)

    def _norm(self) -> Tensor:
        inner = self._deepspeed.optimizer
        if self._stage == 0:  # summed already; DeepSpeed clips them
            return nn.utils.get_total_norm([p.grad for p in self.student.parameters() if p.grad is not None])
        parts = [g for group in inner.averaged_gradients.values() for g in group or () if g is not None]
        norm = nn.utils.get_total_norm(parts).to(self.device)  # of this process's part
        if self.world > 1:
            dist.all_reduce(norm)  # a sum of norms: as finite as the norm of all
        return norm

    def _update(self) -> None:
        self._deepspeed.step()

    def discard(self) -> None:
        inner = self._deepspeed.optimizer
        if self._stage == 0:
            self._deepspeed.zero_grad()
            return
        inner.zero_grad(set_to_none=True)
        inner.averaged_gradients = {} if self._stage == 3 else dict.fromkeys(inner.averaged_gradients)
        inner.micro_step_id = 0 if self._stage == 3 else -1

    def finish(self) -> None:
        if self.owns_group:
            import_deepspeed().utils.groups._WORLD_GROUP = None  # its copy of the group that ends here
        super().finish()

    def weights(self) -> dict[str, Tensor]:
        if self._stage < 3:
            return super().weights()
        result = {k: _to_cpu(v) for k, v in self.student.named_buffers()} if self.main else {}
        for name, parameter in self.student.named_parameters():
            whole = self._whole(parameter)
            if self.main:
                result[name] = _to_cpu(whole)
        return result

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        if self._stage < 3:
            super().load_weights(weights)
            for parameter in self.student.parameters():
                if (mapping := getattr(parameter, "_hp_mapping", None)) is not None:
                    mapping.update_hp()  # the partition that the optimizer steps is a copy
            return
        for name, buffer in self.student.named_buffers():
            buffer.copy_(weights[name])
        parameters = dict(self.student.named_parameters())
        self._put(weights)
        for name, parameter in parameters.items():  # and the partition that the optimizer steps
            (theirs, ours), flat = self._partition(parameter)
            assert flat is not None
            flat.data[ours] = weights[name].flatten()[theirs].to(self.device)

    @torch.no_grad()
    def _put(self, weights: Mapping[str, Tensor]) -> None:
        """Give stage 3's module full weights; rank 0's count."""
        parameters = dict(self.student.named_parameters())
        gathered = import_deepspeed().zero.GatheredParameters(list(parameters.values()), modifier_rank=0)
        with gathered:
            for name, parameter in parameters.items():
                if name in weights:
                    parameter.copy_(weights[name])

    def _live(self) -> list[Tensor]:
        if self._stage < 3:
            return super()._live()
        partitions = self._deepspeed.optimizer.fp32_partitioned_groups_flat
        return [*(p.detach() for p in partitions), *self.student.buffers()]

    def _exchange(self) -> None:
        super()._exchange()
        if self._stage == 3 and self.average is not None:
            self._put(self.weights())  # those that forward gathers; `weights` is of the partitions

    def moments(self) -> dict[str, Tensor]:
        if self._stage == 0:
            return super().moments()
        result: dict[str, Tensor] = {}
        for name, parameter in self.student.named_parameters():
            _, flat = self._partition(parameter)
            step = self.optimizer.state.get(flat, {}).get("step") if flat is not None else None
            steps = torch.tensor(-1.0 if step is None else float(step), device=self.device)
            dist.all_reduce(steps, op=dist.ReduceOp.MAX)
            if steps < 0:
                continue  # no step was taken since the last reset
            if self.main:
                result[f"step.{name}"] = _to_cpu(steps)
            for key in MOMENTS:
                whole = self._whole(parameter, key)
                if self.main:
                    result[f"{key}.{name}"] = _to_cpu(whole)
        return result

    def _whole(self, parameter: nn.Parameter, key: str | None = None) -> Tensor:
        """A parameter's fp32 weights, or a moment of it, put together from all processes' partitions."""
        (theirs, ours), flat = self._partition(parameter)
        whole = torch.zeros(getattr(parameter, "ds_numel", parameter.numel()), device=self.device)
        if flat is not None:
            whole[theirs] = (flat.detach() if key is None else self.optimizer.state[flat][key])[ours]
        dist.all_reduce(whole)
        return whole.view(getattr(parameter, "ds_shape", parameter.shape))

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        if self._stage == 0:
            super().load_moments(moments)
            return
        self.reset_moments()
        for name, parameter in self.student.named_parameters():
            part, flat = self._partition(parameter)
            if flat is None or f"step.{name}" not in moments:
                continue
            state = self.optimizer.state[flat]
            if not state:
                state["step"] = moments[f"step.{name}"].to(
                    self.device if self.optimizer.defaults.get("fused") else "cpu"
                )
                state.update({key: torch.zeros_like(flat) for key in MOMENTS})
            theirs, ours = part
            for key in MOMENTS:
                state[key][ours] = moments[f"{key}.{name}"].flatten()[theirs].to(self.device)

    def _partition(self, parameter: nn.Parameter) -> tuple[tuple[slice, slice], Tensor | None]:
        """Which part of a flattened parameter this process keeps, where in its flat partition, and that partition."""
        nothing = (slice(0, 0), slice(0, 0))
        if self._stage == 3:
            inner = self._deepspeed.optimizer
            group, start, _ = inner.grad_position[inner.get_param_id(parameter)]
            length = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            begin = self.rank * length
            real = max(min(length, parameter.ds_numel - begin), 0)  # type: ignore[attr-defined]
            return (
                slice(begin, begin + real),
                slice(start, start + real),
            ), inner.fp32_partitioned_groups_flat[group]
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            return nothing, None
        theirs, ours = mapping.lp_fragment_address, mapping.hp_fragment_address
        flat = self._deepspeed.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        return (
            slice(theirs.start, theirs.start + theirs.numel),
            slice(ours.start, ours.start + ours.numel),
        ), flat


# ---- choosing and starting


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
    settings = _zero_settings(config, int(name[-1])) if name.startswith("zero") else {}
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
    with _without_launchers_choices():
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


@contextmanager
def _without_launchers_choices():
    """Around what accelerate reads from the environment: it would wrap with its own defaults."""
    own = [k for k in os.environ if k.startswith(("ACCELERATE_USE_", "ACCELERATE_DEEPSPEED_", "FSDP_"))]
    kept = {key: os.environ.pop(key) for key in own}
    try:
        yield
    finally:
        os.environ.update(kept)


def choose(config: Config) -> str:
    """The engine's name: the configuration's, or under `auto` what `accelerate launch` was given, else ddp.

    Raises:
        UserError: both are given and differ, or the launcher asks for what we have not.
    """
    launcher, where = None, ""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        if file and file != "none":
            stage = _read_json(Path(file)).get("zero_optimization", {}).get("stage", 0)
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


def import_deepspeed() -> Any:
    """The deepspeed package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import deepspeed
    except ImportError:
        raise UserError("engine=zero0 to zero3 needs deepspeed: pip install 'irkd_dist[all]'") from None
    return deepspeed


def _numbered(device: torch.device) -> torch.device:
    """`cuda` as `cuda:0`: a single process gets it from accelerate without its number, which threads must name."""
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device


def _check_precision(precision: str) -> None:
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher not in ("no", precision) and not (launcher == "bf16" and precision == "auto"):
        raise UserError(
            f"accelerate's mixed_precision={launcher} disagrees with precision={precision} of our configuration; "
            f"set one of them: mixed_precision=no lets ours decide"
        )


def _zero_settings(config: Config, stage: int) -> dict[str, Any]:
    """DeepSpeed's settings: the file given to accelerate, or configs/deepspeed; what we decide ourselves is ours."""
    import_deepspeed()
    given = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    file = Path(given) if given != "none" else configuration.find(f"configs/deepspeed/zero{stage}.json")
    settings = _read_json(file)
    ours: dict[str, Any] = {
        "gradient_clipping": config.optim.clip or 0.0,
        # we say at which micro-batch a step ends; not known yet: any number above 1 says that there are some
        "gradient_accumulation_steps": 2 if config.optim.accumulate == "auto" else config.optim.accumulate,
    }
    for key, value in ours.items():
        if settings.get(key, "auto") not in ("auto", value):
            raise UserError(
                f"{file}: {key}={settings[key]}, our configuration has {value}; remove it there, or write auto"
            )
    for key in ("optimizer", "scheduler", "train_batch_size", "train_micro_batch_size_per_gpu"):
        if settings.get(key, "auto") != "auto":
            raise UserError(f"{file}: {key} is ours to set (optim.*, data.batch); remove it there")
    for key in ("fp16", "bf16", "torch_autocast"):
        if settings.get(key, {}).get("enabled", False) not in (False, "auto"):
            raise UserError(f"{file}: {key}.enabled is ours to set; use precision={config.precision} alone")
        settings.pop(key, None)
    return {
        **settings,
        **ours,
        "train_micro_batch_size_per_gpu": 1,  # a number that it asks for; our batches are the loader's
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} (deepspeed's settings) cannot be read: {error}") from error


# ---- FSDP2, of a student or of a teacher alone


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


def _to_cpu(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True).contiguous()
