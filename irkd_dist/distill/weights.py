"""Weights as others keep them: safetensors and PyTorch files, read without running code, and fitted to a model."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from irkd_dist.errors import UserError, one_line, unreadable

# in a folder, the first there
NAMES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
# where training scripts keep the weights, the averaged ones first, as timm takes them
CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module")
PREFIXES = ("module.", "_orig_mod.", "student.", "model.", "backbone.")


def read(path: Path, where: str) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of a file, or of a folder's model.safetensors or pytorch_model.bin, and notes on what was chosen.

    A PyTorch file is read with `weights_only`. Of a training script's file one of `CONTAINERS` is taken; prefixes that
    all names have are cut off. `where` begins every message.

    Raises:
        UserError: there is no such file, it cannot be read, would run code, or holds no weights.
    """
    file = _file(path, where)
    try:
        with file.open("rb") as handle:
            start = handle.read(2)
        pickled = start in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
        content: Any = _unpickle(file, where) if pickled else load_file(file)
    except OSError as error:
        raise unreadable(file, error) from error
    except SafetensorError as error:
        raise UserError(f"{where} is neither a safetensors nor a PyTorch file: {error}") from error
    notes: list[str] = []
    tensors = without_prefixes(_tensors(content, where, notes), where, notes)
    return tensors, notes


def _file(path: Path, where: str) -> Path:
    if path.is_dir():
        found = [path / name for name in NAMES if (path / name).is_file()]
        for end in (".safetensors", ".pth", ".pth.tar", ".pt", ".bin"):
            found += sorted(path.glob(f"*{end}"))
        if not found:
            raise UserError(f"{where}: no weights in that folder; looked for {', '.join(NAMES)}")
        return found[0]
    if not path.exists():
        raise UserError(f"{where}: no such file or folder")
    if not path.is_file():
        raise UserError(f"{where} is no file and no folder")
    return path


def _unpickle(file: Path, where: str) -> Any:
    # plain containers of values, which scripts keep beside the weights
    numbers = (type(np.dtype(np.float64)), type(np.dtype(np.float32)))
    harmless: list[Any] = [argparse.Namespace, np.dtype, *numbers]
    scalar: Any = np.float64(0).__reduce__()[0]
    harmless += [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")]
    try:
        with torch.serialization.safe_globals(harmless):
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises anything
        reason = one_line(error).rpartition("WeightsUnpickler error: ")[2]
        blocked = re.search(r"GLOBAL (\S+\.\S+)", reason)
        if blocked:
            raise UserError(
                f"{where} holds {blocked[1]}, and reading that could run code; where you trust it, write "
                "torch.save(model.state_dict(), ...) or safetensors from it"
            ) from error
        raise UserError(f"{where} is damaged or no PyTorch file: {reason[:200]}") from error


def _tensors(content: Any, where: str, notes: list[str]) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        name = next((n for n in CONTAINERS if isinstance(content.get(n), Mapping) and content[n]), None)
        if name is None:
            break
        others = [str(key) for key in content if key != name]
        notes.append(
            f"{where}: {name} was taken" + (f"; left out: {', '.join(others[:8])}" if others else "")
        )
        content = content[name]
    found = (
        {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    )
    if not found:
        holds = (
            ", ".join(map(str, [*content][:8])) if isinstance(content, Mapping) else type(content).__name__
        )
        raise UserError(
            f"{where} holds no weights by name or under {', '.join(CONTAINERS)}: it has {holds or 'nothing'}"
        )
    rest = [str(key) for key in content if key not in found]
    if rest:
        notes.append(f"{where}: left out, as they are no tensors: {', '.join(rest[:8])}")
    return {str(key): value for key, value in found.items()}


def without_prefixes(tensors: dict[str, Tensor], where: str, notes: list[str]) -> dict[str, Tensor]:
    """The same in the same order without the prefixes that all names have; a note says which."""
    cut = ""
    while prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in tensors)), None):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
        cut += prefix
    if cut:
        notes.append(f"{where}: read without the prefix {cut}")
    return tensors


def fit(
    model: nn.Module, tensors: Mapping[str, Tensor], where: str, reset_head: bool = False, reset_key: str = ""
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights in the shapes of a model, as far as that is known how, and notes on what was changed.

    A position embedding of another square grid is resampled. With `reset_head` the model keeps its own new head where
    the file's is missing or has another number of classes; `reset_key` is the key to advise where that is not asked.

    Raises:
        UserError: the head has another number of classes, and `reset_head` is not given.
    """
    own, fitted, notes = model.state_dict(), dict(tensors), []
    for name in _heads(model):
        names = [key for key in (f"{name}.weight", f"{name}.bias") if key in own]
        different = [key for key in names if key not in fitted or fitted[key].shape != own[key].shape]
        if not different or not all(_same_but_classes(fitted.get(key), own[key]) for key in names):
            continue
        classes = len(fitted[names[0]]) if names[0] in fitted else "no"
        if not reset_head:
            advice = (
                f"; {reset_key}=true starts a new head"
                if reset_key
                else "; give it one of these by `irkd probe`, fine-tune it first, or set teacher.logits=false"
            )
            raise UserError(
                f"{where}: its head {name} has {classes} classes, the shards have {len(own[names[0]])}{advice}"
            )
        fitted |= {key: own[key] for key in names}
        notes.append(
            f"{where}: its head {name} ({classes} classes) is replaced by a new one of {len(own[names[0]])}"
        )
    theirs, ours = fitted.get("pos_embed"), own.get("pos_embed")
    if theirs is not None and ours is not None and theirs.shape != ours.shape:
        resampled = _resampled(model, theirs, ours)
        if resampled is not None:
            notes.append(f"{where}: pos_embed of {theirs.shape[1]} tokens is resampled to {ours.shape[1]}")
            fitted["pos_embed"] = resampled
    return fitted, notes


def without_head(
    model: nn.Module, tensors: Mapping[str, Tensor], where: str
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights without those of a head that the model has not, and a note if there are any."""
    heads = tuple(f"{name}." for name in _heads(model))
    kept = {k: v for k, v in tensors.items() if not k.startswith(heads)}
    gone = (
        [f"{where}: its head is left out, as teacher.logits=false asks"] if len(kept) < len(tensors) else []
    )
    return kept, gone


@contextmanager
def loading() -> Iterator[list[tuple[list[str], list[str]]]]:
    """Inside, notes the (missing, unexpected) names of each set of weights that a module takes: timm leaves them out
    without a word where the number of classes differs."""
    found: list[tuple[list[str], list[str]]] = []
    theirs = nn.Module.load_state_dict

    def noting(self: nn.Module, *arguments: Any, **options: Any) -> Any:
        result = theirs(self, *arguments, **options)
        found.append((list(result.missing_keys), list(result.unexpected_keys)))
        return result

    nn.Module.load_state_dict = noting  # type: ignore[method-assign]
    try:
        yield found
    finally:
        nn.Module.load_state_dict = theirs  # type: ignore[method-assign]


def require_whole(model: nn.Module, loaded: list[tuple[list[str], list[str]]], where: str) -> None:
    """Refuse weights that were left out, or that a network does not have; its head and its buffers aside.

    Raises:
        UserError: names some of them.
    """
    aside = (*(f"{name}." for name in _heads(model)), *(name for name, _ in model.named_buffers()))
    missing = [name for names, _ in loaded for name in names if not name.startswith(aside)]
    unexpected = [name for _, names in loaded for name in names if not name.startswith(aside)]
    told = []
    if missing:
        told.append(
            f"{len(missing)} of its weights are not in the file ({', '.join(missing[:3])}), and would be random"
        )
    if unexpected:
        told.append(f"{len(unexpected)} of the file's are none of its own ({', '.join(unexpected[:3])})")
    if told:
        raise UserError(
            f"{where}: {'; '.join(told)}: options that change the network do not go with these weights"
        )


def _heads(model: nn.Module) -> list[str]:
    named: Any = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return [named] if isinstance(named, str) else [*named]


def _same_but_classes(file: Tensor | None, own: Tensor) -> bool:
    return file is None or file.shape[1:] == own.shape[1:]


def _resampled(model: nn.Module, file: Tensor, own: Tensor) -> Tensor | None:
    grid: Any = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is None or file.ndim != 3 or own.ndim != 3 or file.shape[2] != own.shape[2]:
        return None
    prefix = own.shape[1] - math.prod(grid)  # class token and the like
    if prefix < 0 or math.isqrt(file.shape[1] - prefix) ** 2 != file.shape[1] - prefix:
        return None
    return resample_abs_pos_embed(file, [*grid], num_prefix_tokens=prefix)


def require_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights with NaN or infinity in them.

    Raises:
        UserError: it names the first such tensor.
    """
    bad = [k for k, v in tensors.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
    if bad:
        raise UserError(
            f"{where}: {len(bad)} of its tensors {'hold' if len(bad) > 1 else 'holds'} NaN or infinity, the first is "
            f"{bad[0]}: it is damaged, or its training had diverged"
        )
