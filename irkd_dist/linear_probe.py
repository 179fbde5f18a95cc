"""A linear head for a backbone without one: `irkd probe CONFIG` writes a run folder, which `teacher.run` reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from irkd_dist import __version__, checkpoint, configured, files, networks, runfolder
from irkd_dist import config as configuration
from irkd_dist.config import Config
from irkd_dist.data import shards
from irkd_dist.data.geometry import Geometry
from irkd_dist.errors import UserError
from irkd_dist.training import build, curriculum, engines, preflight, restore
from irkd_dist.training.engines import Engine
from irkd_dist.training.position import Position

PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # of half the squared weights, tried one after the other
ROWS = 65536  # of features whose logits are in memory at once
ITERATIONS = 100  # of L-BFGS, for each penalty


@dataclass(frozen=True)
class Probed:
    """What came of it: the run folder, validation accuracy by penalty, and the best."""

    folder: Path
    accuracy: float
    penalty: float
    tried: dict[float, float]
    computed: bool  # False: the features were there


def probe(config: Config, say: Callable[[str], None] = print) -> Probed:
    """Train a linear head on the frozen `student` of a configuration, at its largest resolution.

    Features of both splits are computed once, as validation shows the images, and kept in the folder; the head is
    fitted by full-batch L-BFGS for each of `PENALTIES`, and the one that is best on the held-out split is written.

    Raises:
        UserError: no weights, no linear head, several processes, or a folder that something else has written.
    """
    engine = engines.setup(config)
    try:
        if engine.world > 1:
            raise UserError(
                f"irkd probe runs in one process, not in {engine.world}: start it without a launcher"
            )
        return _probe(config, engine, say)
    finally:
        engine.finish()


def _probe(config: Config, engine: Engine, say: Callable[[str], None]) -> Probed:
    folder = configuration.folder_of(config).with_name(f"{configuration.folder_of(config).name}-probe")
    _check_folder(folder)
    manifest = shards.load_manifest(configuration.shards_of(config))
    preflight.check_data(config, manifest)
    preflight.check_shards(config, engine, manifest)
    model, arguments, mean, std = _backbone(config, manifest, say)
    model.to(engine.device).eval().requires_grad_(False)
    side = configuration.resolutions(config)[-1]
    view = _view(manifest, mean, std, engine.device)
    held_out = build.held_out(manifest)
    found, computed = {}, False
    for split in ("train", held_out):
        facts = [restore.weights_digest(model)[:16], shards.data_digest(manifest), side, mean, std, split,
                 str(engine.autocast), config.data.subset, config.data.val_subset]  # fmt: skip
        name = f"features-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]}.safetensors"
        if (kept := _kept(folder / name)) is None:
            say(f"computing features of the {split} split at {side} px")
            kept = _features(config, manifest, engine, model, split, side, view)
            folder.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_file(kept, folder / name)
            computed = True
        found[split] = {k: v.to(engine.device) for k, v in kept.items()}
    best, penalty, tried = _best(found["train"], found[held_out], len(manifest.classes), say)
    head: Any = model.get_classifier()  # type: ignore[operator]
    with torch.no_grad():
        head.weight.copy_(best[0])
        head.bias.copy_(best[1])
    _write(config, folder, manifest, model, arguments, engine, (mean, std), tried)
    return Probed(folder, tried[penalty], penalty, tried, computed)


def _check_folder(folder: Path) -> None:
    for old in runfolder.steps(folder / runfolder.CHECKPOINTS):
        if "probe" not in checkpoint.load_state(old):
            raise UserError(f"{folder} is a run that irkd probe has not written; give name=...")


def _backbone(
    config: Config, manifest: shards.Manifest, say: Callable[[str], None]
) -> tuple[nn.Module, dict[str, Any], tuple[float, ...], tuple[float, ...]]:
    spec = config.student
    if not spec.pretrained and spec.weights is None:
        raise UserError(
            f"student.name={spec.name} would start from random weights: give student.weights, or pretrained=true"
        )
    asked = replace(config, student=replace(spec, reset_head=True, distilled=False))
    model, arguments, notes = configured.create_student(asked, len(manifest.classes))
    for note in notes:
        say(note)
    own = configured.students_normalisation(config)
    mean, std = own[:2] if own is not None else (manifest.mean, manifest.std)
    head = model.get_classifier() if hasattr(model, "get_classifier") else None  # type: ignore[operator]
    if not isinstance(head, nn.Linear) or head.bias is None or not hasattr(model, "forward_head"):
        raise UserError(
            f"student.name={spec.name}: {type(model).__name__} has no linear head with a bias to train"
        )
    with torch.no_grad():  # the digest of what gives features is then of them alone
        head.weight.zero_()
        head.bias.zero_()
    return model, arguments, mean, std


def _view(
    manifest: shards.Manifest, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """(scale, shift) from the shards' normalisation to the backbone's own."""
    ours_mean, ours_std, own_mean, own_std = (
        torch.tensor(v, device=device).view(3, 1, 1) for v in (manifest.mean, manifest.std, mean, std)
    )
    return ours_std / own_std, (ours_mean - own_mean) / own_std


@torch.no_grad()
def _features(
    config: Config, manifest: shards.Manifest, engine: Engine, model: Any, split: str, side: int,
    view: tuple[Tensor, Tensor],
) -> dict[str, Tensor]:  # fmt: skip
    """Features before the head (N, D) in fp32, and labels (N,)."""
    features, labels = list[Tensor](), list[Tensor]()
    limited = replace(config, data=replace(config.data, cache="none"))
    with build.evaluation_loader(limited, manifest, engine, split, side) as loader:
        for batch in loader.batches(0):
            real = batch.weight > 0
            images = batch.images[real] * view[0] + view[1]
            with torch.autocast(images.device.type, engine.autocast, enabled=engine.autocast is not None):
                found = model.forward_head(model.forward_features(images), pre_logits=True)
            features.append(found.float().cpu())
            labels.append(batch.labels[real].cpu())
    return {"features": torch.cat(features).contiguous(), "labels": torch.cat(labels).contiguous()}


def _kept(file: Path) -> dict[str, Tensor] | None:
    try:
        return safetensors.torch.load_file(file) if file.is_file() else None
    except (OSError, SafetensorError):
        return None  # half written: computed again


def _best(
    train: dict[str, Tensor], held_out: dict[str, Tensor], classes: int, say: Callable[[str], None]
) -> tuple[tuple[Tensor, Tensor], float, dict[float, float]]:
    """The head of the best penalty, that penalty, and the accuracy of each."""
    heads, tried = {}, dict[float, float]()
    for penalty in PENALTIES:
        weight, bias = heads[penalty] = fit(train["features"], train["labels"], classes, penalty)
        right = (held_out["features"] @ weight.T + bias).argmax(1) == held_out["labels"]
        tried[penalty] = float(right.float().mean())
        say(f"penalty {penalty:g}: validation accuracy {tried[penalty]:.2%}")
    best = max(tried, key=lambda p: (tried[p], p))
    return heads[best], best, tried


def fit(features: Tensor, labels: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Weight (K, D) and bias (K,) of the logistic regression on features (N, D), by full-batch L-BFGS from zero.

    It minimises the mean cross-entropy + penalty / 2 times the squared weights on standardised features; the
    standardisation is then folded into the result.
    """
    mean, std = features.mean(0), features.std(0, correction=0).clamp_min(1e-6)
    weight = torch.zeros(classes, features.shape[1], device=features.device, requires_grad=True)
    bias = torch.zeros(classes, device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=ITERATIONS,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        total = penalty / 2 * weight.square().sum()
        total.backward()
        total = total.detach()
        for rows, target in zip(features.split(ROWS), labels.split(ROWS), strict=True):
            logits = ((rows - mean) / std) @ weight.T + bias
            part = F.cross_entropy(logits, target, reduction="sum") / len(features)
            part.backward()
            total = total + part.detach()
        return total

    optimizer.step(objective)  # type: ignore[arg-type]
    found = weight.detach() / std
    return found, bias.detach() - found @ mean


def _write(
    config: Config, folder: Path, manifest: shards.Manifest, model: nn.Module, arguments: dict[str, Any],
    engine: Engine, normalisation: tuple[tuple[float, ...], tuple[float, ...]], tried: dict[float, float],
) -> None:  # fmt: skip
    own = replace(config, name=folder.name)
    # the last stage's, at whose resolution the head was fitted
    position = Position(
        curriculum=curriculum.State(stage=len(configuration.stages(config)) - 1), finished=True
    )
    state = {
        **asdict(position), "model": arguments, "classes": manifest.classes,
        "mean": normalisation[0], "std": normalisation[1], "taps": networks.taps_alone(config, model),
        "method": config.loss.saliency.method, "precision": "bf16" if engine.autocast else "fp32",
        "threads": torch.get_num_threads(), "config": configuration.to_dict(own),
        "data_digest": shards.data_digest(manifest), "teacher_digest": None, "package_version": __version__,
        "geometry": asdict(Geometry.of(manifest, config.data.centre_crop)),
        "probe": {f"{p:g}": a for p, a in tried.items()},
    }  # fmt: skip
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    checkpoint.save(folder / runfolder.CHECKPOINTS / checkpoint.name(0), weights, {}, state)
    files.write(folder / runfolder.CONFIG, configuration.to_yaml(own))
    runfolder.write_status(folder, "finished", 0, 1)
