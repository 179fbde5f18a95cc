"""What is checked before a run starts, so that it does not fail in its fifth stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from irkd_dist import config as configuration
from irkd_dist.config import Config
from irkd_dist.data import shards
from irkd_dist.data.remote import Url
from irkd_dist.distill import compiling, models
from irkd_dist.distill.measure import TappedModel
from irkd_dist.distill.module import Targets
from irkd_dist.distill.teacher import Teacher
from irkd_dist.errors import UserError
from irkd_dist.training import distributed, virtual
from irkd_dist.training.engines import Engine
from irkd_dist.training.parts import Parts


def check_data(config: Config, manifest: shards.Manifest) -> None:
    """Compare the shards' manifest and the configuration.

    Raises:
        UserError: a split or a resolution is missing.
    """
    data = configuration.shards_of(config)
    if "train" not in manifest.splits:
        raise UserError(f"{data} has no train split; it has {', '.join(manifest.splits)}")
    if not {"val", "test"} & set(manifest.splits):
        raise UserError(
            f"{data} has neither a val nor a test split to judge stages by; render with --val-fraction 0.1"
        )
    if config.data.subset is not None and config.data.subset > manifest.splits["train"]:
        raise UserError(
            f"data.subset={config.data.subset}, but {data} has {manifest.splits['train']} training images"
        )
    if manifest.mode == "resize":
        missing = sorted(r for r in configuration.resolutions(config) if manifest.stored(r) is None)
        if missing:
            raise UserError(
                f"stages need {', '.join(map(str, missing))} px, but {data} was rendered at "
                f"{', '.join(map(str, manifest.resolutions))}: render again with --resolutions "
                + ",".join(str(r) for r in sorted({*missing, *manifest.resolutions}))
            )


def used_shards(config: Config, manifest: shards.Manifest) -> list[tuple[Path | Url, shards.Shard]]:
    """Each file that a run will read."""
    wanted = {*configuration.resolutions(config)}
    if config.teacher is not None and config.teacher.view == "full":
        wanted.add(manifest.largest)
    used = {stored for r in wanted if (stored := manifest.stored(r)) is not None}
    if manifest.mode == "crop":
        used = set(manifest.resolutions)
    folder = configuration.shards_of(config)
    return [
        (folder / f"r{r}" / shard.name, shard)
        for r in sorted(used)
        for split in manifest.shards[f"r{r}"].values()
        for shard in split
    ]


def check_shards(config: Config, engine: Engine, manifest: shards.Manifest) -> None:
    """Compare each file that the run will read with the manifest, in one of the processes.

    What lies behind a URL is compared when it is downloaded.

    Raises:
        UserError: on every rank alike; files are missing, truncated or altered, or cannot be read.
    """
    files = used_shards(config, manifest)[engine.rank :: engine.world]
    own = [
        f"{file} {why}"
        for file, shard in files
        if isinstance(file, Path) and (why := shards.damage(file, shard, config.data.verify))
    ]
    damaged = [problem for some in distributed.gather(engine, own) for problem in some]
    if damaged:
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        raise UserError(f"{damaged[0]}{more}; `irkd render` with the same arguments repairs what is damaged")


def check_fraction(config: Config, student: nn.Module) -> None:
    """Refuse what would part a batch that is normalised as a whole: aligned samples run apart from the others."""
    spec = config.loss.saliency
    if spec.gamma and spec.fraction < 1 and models.has_batch_norm(student):
        raise UserError(
            f"loss.saliency.fraction={spec.fraction} with student.name={config.student.name}: BatchNorm would take its "
            "statistics of two parts of a batch; use fraction=1, and loss.saliency.every=2 or more to align less"
        )


def check_layers(config: Config, student: nn.Module) -> None:
    """Refuse rates by layer for a student that does not say which layers it has."""
    if config.optim.layer_decay is not None and not hasattr(student, "group_matcher"):
        raise UserError(
            f"optim.layer_decay={config.optim.layer_decay}: {type(student).__name__} does not say which layers it has; "
            "leave it out"
        )


def check_forward(
    config: Config, manifest: shards.Manifest, student: nn.Module, taps: list[str]
) -> None:  # fmt: skip
    """One blank image through the student at every resolution: what timm refuses, it refuses now."""
    method, classes = config.loss.saliency.method, len(manifest.classes)
    label = torch.zeros(1, dtype=torch.long)
    for resolution in configuration.resolutions(config):
        image, role = torch.zeros(1, 3, resolution, resolution), f"student.name={config.student.name}"
        with _refused_by_timm(role, resolution, student):
            training = student.training
            with torch.no_grad():
                logits = models.inference_logits(student.eval()(image))
            student.train(training)
            if taps:
                TappedModel(student, taps, method).maps(image, label)
        if logits.shape[1:] != (classes,):
            raise UserError(
                f"student.options: the model gives logits {tuple(logits.shape[1:])}, the shards have {classes} classes"
            )


def check_teacher(config: Config, manifest: shards.Manifest, teacher: Teacher) -> None:
    """The same through the teacher; every process must call it, for sharded parameters."""
    full = config.teacher is not None and config.teacher.view == "full"
    for resolution in configuration.resolutions(config):
        side, device = manifest.largest if full else resolution, next(teacher.model.parameters()).device
        view, label = (
            torch.zeros(1, 3, side, side, device=device),
            torch.zeros(1, dtype=torch.long, device=device),
        )
        with _refused_by_timm("the teacher", resolution, teacher.model):
            teacher(view, label, aligned=1 if teacher.paths else 0)


@contextmanager
def _refused_by_timm(role: str, resolution: int, network: nn.Module) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, AssertionError, ValueError, TypeError, LookupError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"{role} cannot take images at the stage of {resolution} px: {reason}{models.sizes_it_takes(network)}"
        ) from error


def notes(config: Config, engine: Engine) -> list[str]:
    """What a user should know of the processes before the first step."""
    count = config.data.virtual_ranks
    if count is None:
        return []
    what = f"data.virtual_ranks={count} over {engine.world} process{'es' if engine.world > 1 else ''}"
    if not engine.exact:
        return [f"{what}: {engine.name} adds gradients in an order of its own, so other worlds "
                "agree up to rounding only; engine=ddp gives the same bits"]  # fmt: skip
    if not virtual.exact(count, engine.world):
        return [f"{what}: no whole branches of the tree of sums, so other worlds agree up to rounding only; "
                f"1, 2, 4, ... {count} processes give the same bits"]  # fmt: skip
    return [
        f"{what}, {torch.get_num_threads()} threads each: 1, 2, 4, ... {count} processes give the same bits"
    ]


def settle(parts: Parts) -> None:
    """Throw one forward and backward away: the first fixes the order in which an engine sums gradients.

    Without it a resumed run would sum its first step in another order than an unbroken one.
    """
    # two that are aligned and two that are not: BatchNorm refuses a single value
    blank_step(parts, parts.plan.stages[0].resolution, 4)


def blank_step(parts: Parts, side: int, count: int) -> None:
    """Forward and backward of `count` blank images, half of them aligned, of which nothing stays."""
    loss, device = parts.config.loss, parts.engine.device
    image = torch.zeros(count, 3, side, side, device=device)
    label = torch.zeros(count, dtype=torch.long, device=device)
    targets = Targets()
    if parts.teacher is not None:
        # what it says of a blank image does not matter, which terms there are does
        full = parts.config.teacher is not None and parts.config.teacher.view == "full"
        large = torch.zeros(count, 3, *[parts.manifest.largest] * 2, device=device)
        aligned = count // 2 if loss.saliency.gamma else 0
        view = large if full else image
        featured = loss.features.beta > 0
        with compiling.paused():
            targets = parts.teacher(view, label, aligned, logits=loss.kd.alpha > 0, featured=featured)
    buffers = {k: v.clone() for k, v in parts.student.named_buffers()}
    parts.module.train()
    weight = torch.full((count,), 1 / count, device=device)
    weights = loss.kd.alpha, loss.saliency.gamma, 1.0, loss.features.beta
    with compiling.paused(), parts.engine.micro_batch(last=True):
        terms = parts.module(image, label, weight, targets, *weights)
        parts.engine.backward(terms["total"])
    parts.engine.discard()
    for key, buffer in parts.student.named_buffers():
        buffer.copy_(buffers[key])
