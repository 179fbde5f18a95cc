"""Networks as a configuration describes them: student and teacher, with the weights they start from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from irkd_dist import checkpoint, networks, runfolder
from irkd_dist import config as configuration
from irkd_dist.config import Config, Model
from irkd_dist.data import shards
from irkd_dist.distill import hub, models, weights
from irkd_dist.distill.paper import PAPER_MODELS
from irkd_dist.errors import UserError
from irkd_dist.networks import Network


def create_student(
    config: Config, classes: int, normalisation: tuple[float, ...] | None = None
) -> tuple[nn.Module, dict[str, Any], list[str]]:
    """Build the configured student with the weights it starts from.

    classes, normalisation: of the shards, the latter mean and std; a student that was trained with another one is told.

    Returns:
        The network, the arguments that build it again (kept in checkpoints), and notes on its weights.
    """
    spec = config.student
    named = hub.look_up(spec.name, "student.name")
    arguments = {
        "name": named.architecture,
        "classes": classes,
        "patch": spec.patch,
        "image_size": spec.image_size or configuration.resolutions(config)[-1],
        "distilled": configuration.student_distilled(config),
        "dropout": spec.dropout,
        "drop_path": configuration.drop_path(config),
        "options": {**named.options, **spec.options},
    }
    model, notes = _create(spec, "student", named, arguments)
    own = _own_normalisation(spec, named) if spec.pretrained and spec.weights is None else None
    if own is not None and normalisation is not None and not _near((*own[0], *own[1]), normalisation):
        notes.append(
            f"the student's weights were trained with mean {_short(own[0])} and std {_short(own[1])}, as {own[2]} has "
            "it; it goes on with the shards' own"
        )
    return model, arguments, notes


def students_normalisation(
    config: Config,
) -> tuple[tuple[float, float, float], tuple[float, float, float], str] | None:
    """(mean, std, why) that a student's first weights want their input normalised by, if anything says so."""
    spec = config.student
    ours = own_checkpoint(Path(spec.weights)) if spec.weights is not None else None
    if ours is not None:
        state = checkpoint.load_state(ours)
        return tuple(state["mean"]), tuple(state["std"]), f"its checkpoint {ours}"
    return _own_normalisation(spec, hub.look_up(spec.name, "student.name"))


def read_weights(path: Path, where: str) -> tuple[dict[str, Tensor], list[str]]:
    """Weights by name, and notes: of a checkpoint folder, a run folder (its best), or as `weights.read` takes them."""
    ours, raw = own_checkpoint(path), path.name == runfolder.STUDENT  # which names its file
    return (checkpoint.load_student(ours, not raw), []) if ours is not None else weights.read(path, where)


def own_checkpoint(path: Path) -> Path | None:
    """The checkpoint of ours that a path of weights means, if it does."""
    if path.name in (runfolder.STUDENT, runfolder.AVERAGE) and (path.parent / runfolder.STATE).is_file():
        return path.parent
    if (path / runfolder.STATE).is_file() or (path / runfolder.CHECKPOINTS).is_dir():
        return checkpoint.find(path)[0]
    return None


def load_teacher(config: Config, manifest: shards.Manifest, on_meta: bool = False) -> Network:
    """The configured teacher, checked against the shards; on_meta: without its weights, under a `torch.device("meta")`.

    Raises:
        UserError: another number or order of classes, another normalisation, or a patch grid that does not fit a stage.
    """
    spec = config.teacher
    assert spec is not None
    if spec.run is not None:
        runfolder.check_trained(Path(spec.run), "teacher.run")
        network = networks.load(Path(spec.run), averaged=spec.averaged, on_meta=on_meta)
        where = f"teacher.run={spec.run}"
    else:
        assert spec.model is not None
        network = _timm_teacher(config, manifest, on_meta)
        where = f"teacher.model={spec.model.name}"
    networks.check_classes(network.classes, manifest, str(configuration.shards_of(config)), where)
    ours = (*manifest.mean, *manifest.std)
    theirs = (*network.mean, *network.std)
    if not spec.renormalize and not _near(ours, theirs):
        raise UserError(
            f"{where} was trained with mean {_short(network.mean)}, std {_short(network.std)}; the shards have "
            f"{_short(manifest.mean)}, {_short(manifest.std)}: teacher.renormalize=true feeds it its own"
        )
    patch = models.patch_size(network.model)
    if patch is not None and spec.view == "matched":
        configuration.check_resolutions(config, patch, "teacher")
    elif patch is not None and manifest.largest % patch:
        raise UserError(
            f"teacher.view=full: the shards' {manifest.largest} px is not a multiple of its patch {patch}"
        )
    return network


def _timm_teacher(config: Config, manifest: shards.Manifest, on_meta: bool) -> Network:
    spec = config.teacher
    assert spec is not None
    assert spec.model is not None
    own, where = spec.model, f"teacher.model={spec.model.name}"
    named = hub.look_up(own.name, "teacher.model.name")
    comes_with_weights = named.weights is not None or bool(named.repository)
    if not own.pretrained and own.weights is None and not comes_with_weights:
        raise UserError(f"{where} has no weights: give teacher.model.weights, or pretrained=true")
    classes = named.cfg.get("num_classes")
    if spec.logits and own.weights is None and classes is not None and classes != len(manifest.classes):
        raise UserError(
            f"{where}: its pretrained head has {classes} classes, the shards have {len(manifest.classes)}; give it one "
            "by `irkd probe`, fine-tune it (irkd train with student.pretrained=true), or set teacher.logits=false"
        )
    as_named = False if own.name in PAPER_MODELS else None
    arguments = {
        "name": named.architecture,
        "classes": len(manifest.classes) if spec.logits else 0,
        "patch": own.patch,
        "image_size": own.image_size or manifest.largest,
        "distilled": as_named if own.distilled == "auto" else own.distilled,
        "options": {**named.options, **own.options},
    }
    wanted = replace(own, pretrained=own.pretrained or comes_with_weights)
    if on_meta:
        model, notes = models.create_model(**arguments), []
    else:
        model, notes = _create(wanted, "teacher.model", named, arguments)
    if models.is_distilled(model):  # outside training both heads are averaged
        model.set_distilled_training(False)  # type: ignore[operator]
    mean, std, said = _teachers_normalisation(config, manifest, named)
    size, method = arguments["image_size"], config.loss.saliency.method
    return Network(
        model.eval(), manifest.classes, mean, std, size, (), method, Path(own.weights or "."), {}, (*notes, *said)
    )  # fmt: skip


def _teachers_normalisation(
    config: Config, manifest: shards.Manifest, named: hub.Named
) -> tuple[tuple[float, float, float], tuple[float, float, float], list[str]]:
    """Mean and std that a teacher by name was trained with, as far as anything says so, and what to tell of them."""
    spec = config.teacher
    assert spec is not None
    assert spec.model is not None
    if spec.mean is not None and spec.std is not None:
        return spec.mean, spec.std, []
    found = _own_normalisation(spec.model, named)
    ours = own_checkpoint(Path(spec.model.weights)) if spec.model.weights is not None else None
    if ours is not None:
        state = checkpoint.load_state(ours)
        found = tuple(state["mean"]), tuple(state["std"]), f"its checkpoint {ours}"
    if found is None or _near((*found[0], *found[1]), (*manifest.mean, *manifest.std)):
        return manifest.mean, manifest.std, []
    mean, std, why = found
    theirs = f"mean {_short(mean)} and std {_short(std)}, as {why} has it"
    shown = f"the shards' {_short(manifest.mean)} and {_short(manifest.std)}"
    if not spec.renormalize:
        note = f"the teacher's own {theirs}, are not used, as teacher.renormalize=false asks: it is fed with {shown}"
        return manifest.mean, manifest.std, [note]
    note = f"the teacher is fed with {theirs}, not with {shown}; teacher.mean and teacher.std give others"
    return mean, std, [f"{note}, teacher.renormalize=false the shards'"]


def _near(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) <= 1e-3


def _short(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{v:.4f}" for v in values) + ")"


# ---- a network by name, and weights from elsewhere


def _create(
    spec: Model, key: str, named: hub.Named, arguments: dict[str, Any]
) -> tuple[nn.Module, list[str]]:
    """Create the network of `spec`, the configuration's `key`, and load the weights that it starts from.

    named: what its name stands for; arguments: of `models.create_model`.

    Returns:
        The network, and notes on what was chosen, changed and left out.

    Raises:
        UserError: no such model or weights, weights that do not fit or are not finite, or a server that is away.
    """
    if spec.weights is not None:
        model, where = models.create_model(**arguments), f"{key}.weights={spec.weights}"
        return model, _load(model, *read_weights(Path(spec.weights), where), where, spec, key)
    if named.weights is not None or named.repository:
        model, where = models.create_model(**arguments), f"{key}.name={spec.name}"
        if not spec.pretrained:
            return model, [f"{where}: its weights are not loaded; {key}.pretrained=true starts from them"]
        file = named.weights or hub.fetch(named.repository, weights.NAMES, where)
        return model, _load(model, *weights.read(file, where), where, spec, key)
    if not spec.pretrained:
        return models.create_model(**arguments), []
    return _of_timm(spec, key, named, arguments)


def _load(
    model: nn.Module, tensors: dict[str, Any], notes: list[str], where: str, spec: Model, key: str
) -> list[str]:
    """Fit weights to a network and load them; returns the notes, with those on the fit."""
    reset_key = f"{key}.reset_head" if key == "student" else ""
    if key == "teacher.model" and not getattr(model, "num_classes", 1):
        tensors, more = weights.without_head(model, tensors, where)
        notes = [*notes, *more]
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
    with weights.loading() as loaded:
        model = models.create_model(**arguments, pretrained=True)
    weights.require_whole(model, loaded, where)
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


def _own_normalisation(
    spec: Model, named: hub.Named
) -> tuple[tuple[float, float, float], tuple[float, float, float], str] | None:
    """(mean, std, why) that a network with foreign weights wants its input normalised by; None if nothing says so."""
    mean, std, described = (
        named.cfg.get("mean"),
        named.cfg.get("std"),
        bool(named.weights or named.repository),
    )
    if not mean or not std or (not described and spec.name in models.PAPER_MODELS):
        return None
    source = "its config.json" if described else f"timm's description of {named.architecture}"
    return _three(mean, spec), _three(std, spec), source


def _three(values: Any, spec: Model) -> tuple[float, float, float]:
    if len(values) != 3:
        raise UserError(f"{spec.name} wants {len(values)} colour channels; images have 3")
    first, second, third = map(float, values)
    return first, second, third
