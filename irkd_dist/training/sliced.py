"""A sharded teacher's weights, read slice by slice: no process ever holds a whole copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from irkd_dist import checkpoint, configured, runfolder
from irkd_dist.config import Config
from irkd_dist.data import shards
from irkd_dist.distill import models, weights
from irkd_dist.errors import UserError, one_line
from irkd_dist.networks import Network
from irkd_dist.training import distributed
from irkd_dist.training.engines import Engine, fsdp2


@dataclass(frozen=True)
class Sliced:
    """A network on no device, and where its weights lie: names in the file by the network's own."""

    network: Network
    file: Path
    names: dict[str, str]
    whole: dict[str, Tensor]  # those that were changed to fit (position embeddings)


def possible(config: Config, engine: Engine) -> Path | None:
    """The safetensors file of a teacher that can be read in slices, if it is to be sharded and has one."""
    spec = config.teacher
    if spec is None or not spec.shard or engine.world == 1 or spec.schedule == "aligned":
        return None
    if any(stage.teacher is not None for stage in (config.curriculum.stages if config.curriculum else [])):
        return None  # weights change by stage
    if spec.run is not None:
        folder, _ = checkpoint.find(Path(spec.run))
        return folder / checkpoint.weights_file(checkpoint.load_state(folder), spec.averaged)
    path = Path(spec.model.weights) if spec.model is not None and spec.model.weights is not None else None
    if path is None:
        return None
    if (ours := configured.own_checkpoint(path)) is not None:
        averaged = path.name != runfolder.STUDENT  # a file that is named is taken
        return ours / checkpoint.weights_file(checkpoint.load_state(ours), averaged)
    file = path / weights.NAMES[0] if path.is_dir() else path
    return file if file.suffix == ".safetensors" and file.is_file() else None


def describe(config: Config, manifest: shards.Manifest, file: Path) -> Sliced | None:
    """The teacher without its weights, matched with the names and shapes in its file; None if it must be read whole.

    Raises:
        UserError: the file does not fit the network, or the network the shards.
    """
    with torch.device("meta"):
        network = configured.load_teacher(config, manifest, on_meta=True)
    model = network.model
    blocks: Any = getattr(model, "blocks", ())
    plain = len(blocks) > 0 and isinstance(blocks[-1], Block) and not [*model.buffers()]
    if not plain:
        return None  # its taps are measured, and buffers that no file has are computed when it is made
    where = f"the teacher's {file}"
    if (file.parent / runfolder.STATE).is_file():
        checkpoint.check_file(file)
    try:
        with safe_open(file, "pt") as opened:
            shapes = {k: torch.empty(opened.get_slice(k).get_shape(), device="meta") for k in opened.keys()}  # noqa: SIM118
            notes: list[str] = []
            names = _own_names(shapes, notes, where)
            own = model.state_dict()
            names = {k: v for k, v in names.items() if not k.startswith(f"{runfolder.PROJECTIONS}.")}
            theirs: dict[str, Tensor] = {k: shapes[v] for k, v in names.items()}
            if (
                "pos_embed" in theirs
                and "pos_embed" in own
                and theirs["pos_embed"].shape != own["pos_embed"].shape
            ):
                theirs["pos_embed"] = opened.get_tensor(names["pos_embed"])
    except (SafetensorError, OSError) as error:
        raise UserError(f"{where} cannot be read: {one_line(error)}") from error
    if not getattr(model, "num_classes", 1):
        theirs, more = weights.without_head(model, theirs, where)
        notes += more
    fitted, changed = weights.fit(model, theirs, where)
    models.check_weights({k: v.shape for k, v in own.items()}, fitted, where, type(model).__name__)
    whole = {k: v for k, v in fitted.items() if v.device.type != "meta"}
    told = f"the teacher's weights are read by each process in slices of its own: {file}"
    network = replace(network, notes=(*network.notes, *notes, *changed, told))
    return Sliced(network, file, {k: names[k] for k in fitted}, whole)


def _own_names(shapes: Mapping[str, Tensor], notes: list[str], where: str) -> dict[str, str]:
    stripped = weights.without_prefixes(dict(shapes), where, notes)
    return dict(zip(stripped, shapes, strict=True))


def load(model: nn.Module, sliced: Sliced, engine: Engine) -> None:
    """Shard a network that is on no device, and fill each process's part of it from the file.

    Raises:
        UserError: on every rank alike: a process cannot read the file, or a weight is not finite.
    """
    fsdp2.shard(model, engine.device, fill=True)
    problem = ""
    try:
        with safe_open(sliced.file, "pt") as opened, torch.no_grad():
            for name, value in model.state_dict(keep_vars=True).items():
                local = value.to_local() if isinstance(value, DTensor) else value
                rows = _rows(value, engine)
                source = sliced.whole[name] if name in sliced.whole else opened.get_slice(sliced.names[name])
                local.copy_(source[rows])
                if not bool(local.isfinite().all()):
                    problem = f"the teacher's {sliced.file}: {name} holds NaN or infinity"
    except (SafetensorError, OSError) as error:
        problem = (
            f"the teacher's {sliced.file} cannot be read on {distributed.name(engine)}: {one_line(error)}"
        )
    told = [text for text in distributed.gather(engine, problem) if text]
    if told:
        raise UserError(told[0])


def _rows(value: Tensor, engine: Engine) -> slice:
    """A process's rows of a parameter, as FSDP2 deals them out: in chunks of one size, the last ones shorter."""
    count = value.shape[0]
    if not isinstance(value, DTensor):
        return slice(0, count)
    chunk = -(-count // dist.get_world_size())
    return slice(min(engine.rank * chunk, count), min((engine.rank + 1) * chunk, count))
