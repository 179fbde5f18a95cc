"""A network as a configuration describes it, with the weights it starts from, and what was done to fit them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from irkd_dist.config import Model
from irkd_dist.distill import hub, models, weights
from irkd_dist.errors import UserError


def create(
    spec: Model,
    key: str,
    named: hub.Named,
    arguments: dict[str, Any],
    read: Callable[[Path, str], tuple[dict[str, Any], list[str]]] = weights.read,
) -> tuple[nn.Module, list[str]]:
    """Create the network of `spec`, the configuration's `key`, and load the weights that it starts from.

    named: what its name stands for; arguments: of `models.create_model`; read: what reads `spec.weights`.

    Returns:
        The network, and notes on what was chosen, changed and left out.

    Raises:
        UserError: no such model or weights, weights that do not fit or are not finite, or a server that is away.
    """
    if spec.weights is not None:
        model, where = models.create_model(**arguments), f"{key}.weights={spec.weights}"
        return model, load(model, *read(Path(spec.weights), where), where, spec, key)
    if named.weights is not None or named.repository:
        model, where = models.create_model(**arguments), f"{key}.name={spec.name}"
        if not spec.pretrained:
            return model, [f"{where}: its weights are not loaded; {key}.pretrained=true starts from them"]
        file = named.weights or hub.fetch(named.repository, weights.NAMES, where)
        return model, load(model, *weights.read(file, where), where, spec, key)
    if not spec.pretrained:
        return models.create_model(**arguments), []
    return _of_timm(spec, key, named, arguments)


def load(
    model: nn.Module, tensors: dict[str, Any], notes: list[str], where: str, spec: Model, key: str
) -> list[str]:
    """Fit weights to a network and load them; returns the notes, with those on the fit."""
    reset_key = f"{key}.reset_head" if key == "student" else ""
    fitted, changes = weights.fit(model, tensors, where, spec.reset_head and bool(reset_key), reset_key)
    models.load_weights(model, fitted, where)
    return [*notes, *changes]


def _of_timm(
    spec: Model, key: str, named: hub.Named, arguments: dict[str, Any]
) -> tuple[nn.Module, list[str]]:
    where = f"{key}.pretrained=true: {named.architecture}"
    overlay = dict(arguments["options"].get("pretrained_cfg_overlay") or {})
    if "file" not in overlay:
        overlay |= hub.local_copy(named, f"{key}.pretrained=true")
    arguments = {**arguments, "options": {**arguments["options"], "pretrained_cfg_overlay": overlay}}
    model = models.create_model(**arguments, pretrained=True)
    weights.require_finite(model.state_dict(), where)
    notes, cfg = [], named.cfg
    if cfg.get("num_classes") != arguments["classes"]:
        notes.append(f"{where}: its head ({cfg.get('num_classes')} classes) is replaced by a new one")
    size = (cfg.get("input_size") or (3, 0, 0))[-1]
    if cfg.get("fixed_input_size") and size != arguments["image_size"]:
        notes.append(
            f"{where}: its position embeddings, of {size} px, are resampled to {arguments['image_size']} px"
        )
    if spec.patch is not None:
        notes.append(f"{where}: its patch embedding is resampled if it is not of patch size {spec.patch}")
    return model, notes


def own_normalisation(
    spec: Model, named: hub.Named
) -> tuple[tuple[float, float, float], tuple[float, float, float], str] | None:
    """(mean, std, why) that a network with foreign weights wants its input normalised by; None if nothing says so."""
    mean, std = named.cfg.get("mean"), named.cfg.get("std")
    if (
        not mean
        or not std
        or (named.weights is None and not named.repository and spec.name in models.PAPER_MODELS)
    ):
        return None
    source = (
        "its config.json"
        if named.weights or named.repository
        else f"timm's description of {named.architecture}"
    )
    return _three(mean, spec), _three(std, spec), source


def _three(values: Any, spec: Model) -> tuple[float, float, float]:
    if len(values) != 3:
        raise UserError(f"{spec.name} wants {len(values)} colour channels; images have 3")
    first, second, third = map(float, values)
    return first, second, third
