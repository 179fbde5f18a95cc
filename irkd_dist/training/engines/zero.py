"""ZeRO: the only door to deepspeed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from irkd_dist import config as configuration
from irkd_dist.config import Config
from irkd_dist.distill.module import Distiller
from irkd_dist.errors import UserError
from irkd_dist.training.engines.base import MOMENTS, Engine, to_cpu, without_launchers_choices


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
        before = {k: to_cpu(v) for k, v in distiller.student.state_dict().items()}
        alone = "LOCAL_RANK" not in os.environ  # a single process without a launcher; DeepSpeed asks for it
        os.environ.setdefault("LOCAL_RANK", "0")
        try:
            with without_launchers_choices():
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
        result = {k: to_cpu(v) for k, v in self.student.named_buffers()} if self.main else {}
        for name, parameter in self.student.named_parameters():
            whole = self._whole(parameter)
            if self.main:
                result[name] = to_cpu(whole)
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
                result[f"step.{name}"] = to_cpu(steps)
            for key in MOMENTS:
                whole = self._whole(parameter, key)
                if self.main:
                    result[f"{key}.{name}"] = to_cpu(whole)
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


def settings(config: Config, stage: int) -> dict[str, Any]:
    """DeepSpeed's settings: the file given to accelerate, or configs/deepspeed; what we decide ourselves is ours."""
    import_deepspeed()
    given = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    file = Path(given) if given != "none" else configuration.find(f"configs/deepspeed/zero{stage}.json")
    settings = read_json(file)
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


def read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} (deepspeed's settings) cannot be read: {error}") from error


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
