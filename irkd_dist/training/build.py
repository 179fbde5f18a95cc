"""From a configuration to the parts of a run; nothing is written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from irkd_dist import __version__, checkpoint, configured, networks, runfolder
from irkd_dist import config as configuration
from irkd_dist.config import Config, Stage
from irkd_dist.data import shards
from irkd_dist.data.decoded import Dataset, Work
from irkd_dist.data.geometry import Geometry
from irkd_dist.data.loader import Loader
from irkd_dist.data.sampler import Share
from irkd_dist.data.views import View
from irkd_dist.distill import features, hub, methods, models
from irkd_dist.distill.module import Distiller, Objective
from irkd_dist.distill.teacher import Member, Teacher, freeze
from irkd_dist.errors import UserError
from irkd_dist.training import (
    answers,
    curriculum,
    distributed,
    optim,
    preflight,
    restore,
    sliced,
    virtual,
)  # fmt: skip
from irkd_dist.training.curriculum import StagePlan
from irkd_dist.training.engines import Engine, fsdp2
from irkd_dist.training.parts import Parts


def build(config: Config, engine: Engine) -> Parts:
    """Check everything, then build it.

    Raises:
        UserError: shards, teacher and configuration do not fit together.
    """
    folder = configuration.shards_of(config)
    manifest = distributed.on_main(engine, lambda: shards.load_manifest(folder))
    stages = configuration.stages(config)
    preflight.check_data(config, manifest)
    notes = preflight.notes(config, engine)

    student, (arguments, weight_notes) = distributed.network(engine, lambda: _student(config, manifest))
    notes += weight_notes
    patch = models.patch_size(student)
    if patch is not None:
        configuration.check_resolutions(config, patch, "student")
    teacher_digest = None
    teacher, folders, taps = None, _no_folders(stages), networks.taps_alone(config, student)
    feature_taps: tuple[str, ...] = ()
    parts_of_teacher: sliced.Sliced | None = None
    if config.teacher is not None:
        parts_of_teacher = distributed.on_main(engine, lambda: _sliced(config, engine, manifest))
        if parts_of_teacher is not None:
            network = parts_of_teacher.network
        else:
            model, network = distributed.network(engine, lambda: _teacher_network(config, manifest))
            network = replace(network, model=model)
        notes += network.notes
        of_run = config.teacher.run is not None
        if not of_run and parts_of_teacher is None:
            teacher_digest = restore.weights_digest(network.model)[:16]
            described = (
                hub.look_up(config.teacher.model.name, "teacher.model.name") if config.teacher.model else None
            )
            if described is not None and (described.weights is not None or described.repository):
                # its config.json may change, and the name and the weights stay
                teacher_digest = digest([teacher_digest, described.architecture, described.options])
        side = manifest.largest if full_view(config) else None
        pairs, tap_notes = networks.tap_pairs(config, student, network.model, side)
        notes += tap_notes
        taps = [s.path for s, _ in pairs]
        teacher = _teacher(config, engine, network, manifest, [t.path for _, t in pairs])
        member_digests = _add_members(config, engine, teacher, manifest, notes)
        folders, of_folders, folder_notes = distributed.on_main(
            engine, lambda: _teacher_folders(config, stages, network.folder)
        )
        notes += folder_notes
        teacher_digest = of_folders if of_run else teacher_digest
        if member_digests:
            teacher_digest = digest([teacher_digest, *member_digests])
        feature_taps = _feature_taps(config, manifest, student, network.model, teacher)
    method = config.loss.saliency.method
    second_order = config.loss.saliency.gamma > 0 and methods.inner_gradient(method)
    if second_order or engine.device.type == "cpu":
        # fused kernels have no second derivative, and on a CPU their backward is slower than explicit products
        models.without_fused_attention(student)
    if engine.name == "ddp":  # the others take contiguous parameters only
        models.channels_last(student)
    preflight.check_fraction(config, student)
    preflight.check_layers(config, student)
    preflight.check_forward(config, manifest, student, taps)
    if teacher is not None and parts_of_teacher is None:
        preflight.check_teacher(config, manifest, teacher)
    preflight.check_shards(config, engine, manifest)  # last: it reads every file

    if config.optim.checkpoint_blocks:
        models.checkpoint_blocks(student)
    distiller = Distiller(student, _objective(config, taps, feature_taps), engine.autocast)
    _compile(config, engine, distiller, teacher, second_order, notes)
    groups = optim.parameter_groups(student, config.optim.weight_decay, config.optim.layer_decay)
    # fused: one pass over each tensor, the same arithmetic on every device, and it can leave an update out there
    optimizer = torch.optim.AdamW(
        groups, lr=config.optim.lr, betas=config.optim.betas, eps=config.optim.eps, fused=True
    )
    if teacher is not None and parts_of_teacher is not None:
        sliced.load(teacher.model, parts_of_teacher, engine)
        preflight.check_teacher(config, manifest, teacher)
        if config.teacher is not None and config.teacher.run is None:
            teacher_digest = restore.weights_digest(teacher.model)[:16]
    elif teacher is not None and restore.teacher_sharded(config, engine):
        fsdp2.shard(teacher.model, engine.device)
    module = engine.prepare(distiller, optimizer, config.optim.clip)
    identity = {
        "model": arguments,
        "classes": manifest.classes,
        "mean": manifest.mean,
        "std": manifest.std,
        "taps": taps,
        "method": method,
        "precision": "bf16" if engine.autocast else "fp32",
        "threads": torch.get_num_threads(),
        "config": configuration.to_dict(config),
        "data_digest": shards.data_digest(manifest),
        "geometry": asdict(Geometry.of(manifest, config.data.centre_crop)),
        "teacher_digest": teacher_digest,
        "package_version": __version__,
    }
    plan = _plan(config, stages, folders)
    parts = Parts(
        config, engine, manifest, plan, student, module, optimizer, teacher,
        answers.cached(config, engine, teacher), taps, identity, notes,
    )  # fmt: skip
    if config.optim.ema is not None:
        engine.follow()
    if engine.settles and engine.world > 1:
        preflight.settle(parts)
    return parts


def loaders(parts: Parts, stage: StagePlan) -> tuple[Loader, Loader]:
    """The training loader of a stage and the one it is validated with (test split if there is no validation)."""
    config, engine, manifest = parts.config, parts.engine, parts.manifest
    count = config.data.virtual_ranks
    carried = Share(engine.world, (engine.rank,))
    if count is not None and virtual.exact(count, engine.world):
        carried = Share(count, tuple(virtual.carried(count, engine.rank, engine.world)))
    train = train_loader(parts, stage, carried)
    return train, evaluation_loader(config, manifest, engine, held_out(manifest), stage.resolution)


def train_loader(parts: Parts, stage: StagePlan, carried: Share) -> Loader:
    """The training loader of a stage for what a process carries of each batch."""
    config, engine, manifest, data = parts.config, parts.engine, parts.manifest, parts.config.data
    micro_batches = carried.parts * parts.micro_batches(stage.number)
    full = manifest.largest if full_view(config) else None
    augment = configuration.stage_augment(config, configuration.stages(config)[stage.number])
    return Loader(
        Dataset(
            configuration.shards_of(config), manifest, "train", data.subset, "size", data.order, data.order_block
        ),
        View(stage.resolution, augment, full, manifest.mode),
        scales=stage.multiscale, batch=stage.batch, seed=config.seed, share=carried, work=_work(config, engine),
        least=2 * micro_batches if models.has_batch_norm(parts.student) else 1,
    )  # fmt: skip


def evaluation_loader(
    config: Config, manifest: shards.Manifest, engine: Engine, split: str, resolution: int, full: bool = False
) -> Loader:
    """A loader for measuring: in order, normalised only. `full`: at the teacher's full resolution."""
    size = manifest.largest if full else resolution
    count = config.data.val_subset if split == held_out(manifest) and split != "test" else None
    subset = min(count, manifest.splits[split]) if count is not None else None
    return Loader(
        Dataset(configuration.shards_of(config), manifest, split, subset, verify="size"),
        View(size, centre_crop=config.data.centre_crop),
        batch=config.data.eval_batch * engine.world, seed=config.seed, share=Share(engine.world, (engine.rank,)),
        work=_work(config, engine),
    )  # fmt: skip


def _work(config: Config, engine: Engine) -> Work:
    return Work(config.data.cache, engine.device, config.data.workers, engine.node)


def full_view(config: Config) -> bool:
    """Whether the teacher sees the full-resolution image."""
    return config.teacher is not None and config.teacher.view == "full"


def held_out(manifest: shards.Manifest) -> str:
    """The split that stages are judged by."""
    return "val" if "val" in manifest.splits else "test"


def tokens_per_image(student: nn.Module, resolutions: Sequence[int]) -> float:
    """Patch tokens of an image at these resolutions, in the mean; pixels for a student without patches."""
    patch = models.patch_size(student) or 1
    return sum((r // patch) ** 2 for r in resolutions) / len(resolutions)


def digest(values: Any) -> str:
    """16 hexadecimal digits of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def config_digest(config: Config) -> str:
    """Of the semantic keys: what decisions depend on."""
    return digest(configuration.semantic_keys(configuration.to_dict(config)))


def _compile(
    config: Config,
    engine: Engine,
    distiller: Distiller,
    teacher: Teacher | None,
    inner_gradient: bool,
    notes: list[str],
) -> None:
    if config.compile is False:
        return
    from irkd_dist.distill import compiling

    why = compiling.why_not(engine.device, engine.name, inner_gradient)
    if why is not None and config.compile is True:
        raise UserError(f"compile=on, but {why}; use compile=auto or off")
    if why is not None:
        notes.append(f"compile=auto: nothing is compiled, {why}")
        return
    compiling.compiled(distiller)
    if teacher is not None and not restore.teacher_sharded(config, engine):
        compiling.compiled_teacher(teacher)
    notes.append("torch.compile: the first step of each stage takes a minute or more")


def _feature_taps(
    config: Config, manifest: shards.Manifest, student: nn.Module, network: nn.Module, teacher: Teacher
) -> tuple[str, ...]:
    """Give the student its projections, and the teacher its feature taps; returns the student's."""
    spec, side = config.loss.features, configuration.resolutions(config)[-1]
    if not spec.beta:
        return ()
    ours, theirs = zip(*features.pairs(student, network, spec.taps), strict=True)
    seen = manifest.largest if full_view(config) else side
    sizes = features.widths(student, ours, side), features.widths(network, theirs, seen, teacher.autocast)
    features.attach(student, *sizes, config.seed)
    teacher.feature_paths = theirs
    features.put_keepers(network, theirs)
    return ours


def _objective(config: Config, taps: list[str], feature_taps: tuple[str, ...]) -> Objective:
    kd, saliency = config.loss.kd, config.loss.saliency
    kinds = (config.loss.form, kd.kind, kd.temperature, saliency.method, saliency.normalization)
    return Objective(*kinds, tuple(taps), config.loss.features.kind, feature_taps)


def _plan(config: Config, stages: list[Stage], teachers: list[Path | None]) -> curriculum.Plan:
    start_from = config.curriculum.start_from if config.curriculum is not None else "last"
    planned = []
    for i, (s, teacher) in enumerate(zip(stages, teachers, strict=True)):
        batch = configuration.stage_batch(config, s.resolution)
        lr = configuration.stage_lr(config, s)
        ends = (s.epochs or 1, s.min_epochs or 1, s.patience, s.target, s.minutes, s.tokens)
        planned.append(
            StagePlan(s.resolution, batch, lr, *ends, str(teacher) if teacher else None, (*s.multiscale,), i)
        )
    return curriculum.Plan(tuple(planned), config.optim.policy, start_from)


def _teacher(
    config: Config, engine: Engine, network: networks.Network, manifest: shards.Manifest, paths: list[str]
) -> Teacher:
    saliency = config.loss.saliency
    renormalize = None
    if config.teacher is not None and config.teacher.renormalize:
        ours_mean, ours_std = (
            torch.tensor(v, device=engine.device).view(3, 1, 1) for v in (manifest.mean, manifest.std)
        )
        mean, std = (torch.tensor(v, device=engine.device).view(3, 1, 1) for v in (network.mean, network.std))
        renormalize = (ours_std / std, (ours_mean - mean) / std)
    # with a cache explicit attention without maps too: runs of both kinds can share its logits
    cached = config.teacher is not None and config.teacher.cache.folder is not None
    explicit = cached or (saliency.gamma > 0 and methods.inner_gradient(saliency.method))
    if restore.teacher_sharded(config, engine):  # shards are of one type, and reach the device one by one
        model = freeze(network.model, None, explicit, engine.device)
    else:
        model = models.channels_last(network.model.to(engine.device))
        model = freeze(model, engine.autocast, explicit, engine.device)
    return Teacher(model, paths, saliency.method, engine.autocast, renormalize)


def _sliced(config: Config, engine: Engine, manifest: shards.Manifest) -> sliced.Sliced | None:
    """The teacher to be read in slices, where it is to be sharded and can be."""
    file = sliced.possible(config, engine)
    return None if file is None else sliced.describe(config, manifest, file)


def _add_members(
    config: Config, engine: Engine, teacher: Teacher, manifest: shards.Manifest, notes: list[str]
) -> list[str]:
    """Give the teacher those that teach beside it; returns digests of their weights."""
    spec, members, digests = config.teacher, [], []
    assert spec is not None
    for one in spec.ensemble:
        alone = replace(
            spec, run=one.run, model=one.model, mean=one.mean, std=one.std, ensemble=[], shares="equal"
        )
        own = replace(config, teacher=replace(alone, renormalize=one.renormalize))
        model, network = distributed.network(engine, lambda own=own: _teacher_network(own, manifest))
        notes += network.notes
        digests.append(restore.weights_digest(model)[:16])
        made = _teacher(own, engine, replace(network, model=model), manifest, [])
        members.append(Member(made.model, made.renormalize))
    teacher.members = tuple(members)
    if members:
        given = spec.shares if isinstance(spec.shares, list) else [1.0] * (1 + len(members))
        teacher.shares = tuple(given)
        teacher.mix = config.loss.kd.temperature if spec.mix == "probabilities" else None
    return digests


def _student(config: Config, manifest: shards.Manifest) -> tuple[nn.Module, tuple[dict[str, Any], list[str]]]:
    torch.manual_seed(config.seed)
    normalisation = (*manifest.mean, *manifest.std)
    model, arguments, notes = configured.create_student(config, len(manifest.classes), normalisation)
    return model, (arguments, notes)


def _teacher_network(config: Config, manifest: shards.Manifest) -> tuple[nn.Module, networks.Network]:
    """The teacher, and what there is to know of it."""
    network = configured.load_teacher(config, manifest)
    return network.model, replace(network, model=nn.Identity())


def _teacher_folders(
    config: Config, stages: list[Stage], final: Path
) -> tuple[list[Path | None], str, list[str]]:
    """Teacher checkpoint of each stage, None where its weights are not a run's; their digest, and notes."""
    spec = config.teacher
    assert spec is not None
    folders: list[Path | None]
    if spec.run is None:
        folders = _no_folders(stages)
    elif spec.schedule == "aligned":
        folders = [*_aligned(runfolder.run_of(Path(spec.run)), len(stages))]
    else:
        folders = [final] * len(stages)
    for i, stage in enumerate(stages):
        if stage.teacher is not None:
            folders[i] = checkpoint.find(Path(stage.teacher))[0]
    named = (f"{s.resolution} px: {f}" for s, f in zip(stages, folders, strict=True))
    notes = ["teacher checkpoints by stage: " + ", ".join(named)] if len(set(folders)) > 1 else []
    return folders, restore.teachers_digest(folders, config), notes


def _no_folders(stages: list[Stage]) -> list[Path | None]:
    return [None] * len(stages)


def _aligned(run: Path, count: int) -> list[Path]:
    found = {runfolder.step_of(f): f for f in runfolder.steps(run / runfolder.CHECKPOINTS)}
    if len(found) < count:
        raise UserError(
            f"teacher.schedule=aligned: {run} keeps {len(found)} checkpoints, {count} stages need as many; train the "
            "teacher with checkpoint.keep_epochs=1"
        )
    last = max(found)
    nearest = [min(found, key=lambda step, i=i: abs(step - last * (i + 1) / count)) for i in range(count)]
    return [found[step] for step in nearest]
