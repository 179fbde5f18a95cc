"""From a configuration to the parts of a run: models, taps, loaders, teacher checkpoints, and where to resume."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from irkd_dist import __version__, checkpoint, runs
from irkd_dist import config as configuration
from irkd_dist.config import Config, Stage
from irkd_dist.data import loader as loading
from irkd_dist.data import shards
from irkd_dist.distill import measure, methods, models, taps
from irkd_dist.distill.measure import TappedModel
from irkd_dist.distill.module import Distiller, Objective, Targets
from irkd_dist.distill.teacher import Teacher, freeze
from irkd_dist.errors import UserError
from irkd_dist.training import curriculum, distributed, engines, optim
from irkd_dist.training.engines import Engine


@dataclass
class Position:
    """Where a run stands in its order of samples; everything random is a function of it and the seed."""

    curriculum: curriculum.State = field(default_factory=curriculum.State)
    epoch_step: int = 0  # steps done in the present epoch
    epoch: int = 0  # epochs done in the run
    step: int = 0  # steps done in the run
    stage_step: int = 0  # steps done in the present stage
    finished: bool = False
    stage_bests: list[str] = field(default_factory=list)  # best checkpoint of each ended stage
    sums: list[float] = field(default_factory=list)  # loss terms of the epoch so far; saved: of all processes
    seconds: float = 0.0  # spent on the present epoch
    skipped: list[int] = field(default_factory=list)  # steps without a finite loss since the last checkpoint
    left_out: list[int] = field(default_factory=list)  # steps whose batches are left out after a roll-back

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_state(state: dict[str, Any]) -> Position:
        values: dict[str, Any] = {key: state[key] for key in Position.__dataclass_fields__ if key in state}
        values["curriculum"] = curriculum.State(**values["curriculum"])
        return Position(**values)


@dataclass
class Job:
    """Everything that lives for the whole run."""

    config: Config
    engine: Engine
    folder: Path
    manifest: shards.Manifest
    stages: list[Stage]
    plan: curriculum.Plan
    student: nn.Module  # the network itself
    shapes: dict[str, torch.Size]  # of its weights, before an engine shards them
    module: nn.Module  # Distiller in the engine's wrapper
    optimizer: torch.optim.Optimizer  # its groups hold the learning rate; the engine steps it
    teacher: Teacher | None
    teacher_folders: list[Path | None]  # teacher checkpoint of each stage
    student_taps: list[str]  # module paths; empty if the student has none that the method reads
    identity: dict[str, Any]  # written into every checkpoint: model, classes, normalisation, digests
    notes: list[str]  # what a user should know before the first step


def build(config: Config, engine: Engine) -> Job:
    """Check everything, then build it; nothing is written.

    Raises:
        UserError: shards, teacher and configuration do not fit together.
    """
    data = Path(config.data.shards)
    manifest = shards.load_manifest(data)
    stages = configuration.stages(config)
    _check_data(config, engine, manifest, stages)

    torch.manual_seed(config.seed)
    student, arguments = runs.create_student(config, len(manifest.classes))
    patch = models.patch_size(student)
    if patch is not None:
        configuration.check_resolutions(config, patch, "student")

    notes: list[str] = []
    teacher, teacher_folders = None, _no_folders(stages)
    saliency = config.loss.saliency
    if config.teacher is not None:
        network = runs.load_teacher(config, manifest)
        pairs, tap_notes = _tap_pairs(config, student, network.model)
        notes += tap_notes
        taps = [s.path for s, _ in pairs]
        teacher = _teacher(config, engine, network, manifest, [t.path for _, t in pairs])
        teacher_folders = _teacher_folders(config, stages, network.folder, notes)
    else:
        taps = _taps_alone(config, student)
    second_order = saliency.gamma > 0 and methods.inner_gradient(saliency.method)
    if second_order or engine.device.type == "cpu":
        # fused kernels have no second derivative, and on a CPU their backward is slower than explicit products
        models.without_fused_attention(student)

    objective = Objective(
        config.loss.form,
        config.loss.kd.kind,
        config.loss.kd.temperature,
        saliency.method,
        saliency.normalization,
        tuple(taps),
    )
    _check_forward(config, manifest, stages, student, taps, teacher)
    distiller = Distiller(student, objective, engine.autocast)
    _compile(config, engine, distiller, teacher, notes)
    groups = optim.parameter_groups(student, config.optim.weight_decay)
    # fused: one pass over each tensor, the same arithmetic on every device
    optimizer = torch.optim.AdamW(
        groups, lr=config.optim.lr, betas=config.optim.betas, eps=config.optim.eps, fused=True
    )
    if teacher is not None and _teacher_sharded(config, engine):
        engines.shard(teacher.model, engine.device)
    shapes = {k: v.shape for k, v in student.state_dict().items()}
    module = engine.prepare(distiller, optimizer, config.optim.clip, config.optim.accumulate)
    identity = {
        "model": arguments,
        "classes": manifest.classes,
        "mean": manifest.mean,
        "std": manifest.std,
        "config": configuration.to_dict(config),
        "data_digest": data_digest(manifest),
        "teacher_digest": _digests(teacher_folders) if config.teacher and config.teacher.run else None,
        "package_version": __version__,
    }
    plan = _plan(config, stages, teacher_folders)
    job = Job(
        config, engine, runs.folder_of(config), manifest, stages, plan, student, shapes, module, optimizer, teacher,
        teacher_folders, taps, identity, notes,
    )  # fmt: skip
    if engine.settles and engine.world > 1:
        _settle(job)
    return job


def _compile(
    config: Config, engine: Engine, distiller: Distiller, teacher: Teacher | None, notes: list[str]
) -> None:
    if not config.compile:
        return
    from irkd_dist.distill import compiling

    why = compiling.why_not(engine.device, engine.name)
    if why is not None and config.compile is True:
        raise UserError(f"compile=on, but {why}; use compile=auto or off")
    if why is not None:
        notes.append(f"compile=auto: nothing is compiled, {why}")
        return
    compiling.compiled(distiller)
    if teacher is not None and not _teacher_sharded(config, engine):
        compiling.compiled_teacher(teacher)
    notes.append("torch.compile: the first step of each stage takes a minute or more")


def _settle(job: Job) -> None:
    """Throw one forward and backward away: the first fixes the order in which gradients are summed.

    Without it a resumed run would sum its first step in another order than an unbroken one.
    """
    loss, side = job.config.loss, job.stages[0].resolution
    # two: BatchNorm refuses a single value
    image = torch.zeros(2, 3, side, side, device=job.engine.device)
    label = torch.zeros(2, dtype=torch.long, device=job.engine.device)
    targets = Targets()
    if job.teacher is not None:
        # what it says of a blank image does not matter, which terms there are does
        view = (
            torch.zeros(2, 3, *[max(job.manifest.resolutions)] * 2, device=image.device)
            if full_view(job)
            else image
        )
        targets = job.teacher(view, label, 1 if loss.saliency.gamma else 0, logits=loss.kd.alpha > 0)
    buffers = {k: v.clone() for k, v in job.student.named_buffers()}
    job.module.train()
    terms = job.module(
        image, label, torch.full((2,), 0.5, device=image.device), targets, loss.kd.alpha, loss.saliency.gamma
    )
    job.engine.backward(terms["total"])
    job.engine.discard()
    for key, buffer in job.student.named_buffers():
        buffer.copy_(buffers[key])


def loaders(job: Job, stage: Stage) -> tuple[loading.Loader, loading.Loader]:
    """The training loader of a stage and the one it is validated with (test split if there is no validation)."""
    data, teacher = job.config.data, job.config.teacher
    full = max(job.manifest.resolutions) if teacher is not None and teacher.view == "full" else None
    augment = loading.Augment(mode=job.manifest.mode, **asdict(job.config.augment))
    train = loading.Loader(
        Path(data.shards), job.manifest, "train", stage.resolution,
        batch=configuration.stage_batch(job.config, stage.resolution), seed=job.config.seed,
        rank=job.engine.rank, world=job.engine.world, augment=augment, full_resolution=full, cache=data.cache,
        device=job.engine.device, workers=data.workers, verify="size", subset=data.subset,
    )  # fmt: skip
    return train, evaluation_loader(job, held_out(job.manifest), stage.resolution)


def evaluation_loader(job: Job, split: str, resolution: int, full: bool = False) -> loading.Loader:
    """A loader for measuring: in order, normalised only. `full`: at the teacher's full resolution."""
    data = job.config.data
    return loading.Loader(
        Path(data.shards), job.manifest, split, max(job.manifest.resolutions) if full else resolution,
        batch=max(data.batch, 256 * job.engine.world), seed=job.config.seed,
        rank=job.engine.rank, world=job.engine.world, augment=None, cache=data.cache,
        device=job.engine.device, workers=data.workers, verify="size", centre_crop=data.centre_crop,
    )  # fmt: skip


def accuracy(job: Job, model: nn.Module, loader: loading.Loader) -> float:
    """Top-1 accuracy over all processes, from integer counts: each sample once."""
    counts = measure.correct_and_count(model, loader.batches(0), job.engine.autocast)
    right, count = distributed.total(job.engine, counts).tolist()
    return right / count


def full_view(job: Job) -> bool:
    """Whether the teacher sees the full-resolution image."""
    return job.config.teacher is not None and job.config.teacher.view == "full"


def held_out(manifest: shards.Manifest) -> str:
    """The split that stages are judged by."""
    return "val" if "val" in manifest.splits else "test"


def tapped_student(job: Job) -> TappedModel:
    """The student as its maps are read for panels and agreement."""
    return TappedModel(job.student, job.student_taps, job.config.loss.saliency.method, job.engine.autocast)


def _plan(config: Config, stages: list[Stage], teachers: list[Path | None]) -> curriculum.Plan:
    start_from = config.curriculum.start_from if config.curriculum is not None else "last"
    planned = []
    for s, teacher in zip(stages, teachers, strict=True):
        batch, lr = (
            configuration.stage_batch(config, s.resolution),
            configuration.stage_lr(config, s.resolution),
        )
        ends = (s.epochs or 1, s.min_epochs or 1, s.patience, s.target, s.minutes, s.tokens)
        planned.append(
            curriculum.StagePlan(s.resolution, batch, lr, *ends, str(teacher) if teacher else None)
        )
    return curriculum.Plan(tuple(planned), config.optim.policy, start_from)


def tokens_per_image(job: Job, resolution: int) -> int:
    """Patch tokens of an image at a resolution; pixels for a student without patches."""
    return (resolution // (models.patch_size(job.student) or 1)) ** 2


def resume(job: Job) -> tuple[Position, list[str]]:
    """Load the newest complete checkpoint, if there is one; returns the position and what was skipped, and why.

    Raises:
        UserError: the run was started with other semantic keys, other data or another teacher.
    """
    # one process looks, for all: others may see another state of a network file system
    folder, skipped, state = distributed.on_main(job.engine, lambda: _newest(job.folder / runs.CHECKPOINTS))
    if folder is None:
        return Position(), skipped
    changed = configuration.semantic_difference(_known_keys(state["config"]), job.identity["config"])
    for key, name in (("data_digest", "data"), ("teacher_digest", "teacher")):
        if state[key] != job.identity[key]:
            changed.append(f"{name}: its content is not what the run was started with")
    if changed:
        raise UserError(
            f"{job.folder} was started with another configuration: {'; '.join(changed)}. Give the run another name "
            f"(name=...), or restore these"
        )
    load_into(job, folder)
    position = Position.from_state(state)
    if not job.engine.main:
        position.sums = []  # they are the sums over all processes, and are summed again
    return position, skipped


def _newest(folder: Path) -> tuple[Path | None, list[str], dict[str, Any]]:
    found, skipped = checkpoint.newest(folder)
    return found, skipped, checkpoint.load_state(found) if found is not None else {}


def _await(folder: Path, seconds: float = 60.0) -> None:
    """Wait until a checkpoint that rank 0 has seen is here too: network file systems remember what was not there."""
    deadline = time.monotonic() + seconds
    while not (folder / checkpoint.STATE).is_file() and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            os.listdir(folder.parent)  # asks anew
        time.sleep(0.5)


def load_into(job: Job, folder: Path, moments: bool = True) -> dict[str, Any]:
    """Load a checkpoint into the live student and, with `moments`, the live optimizer; returns its state."""
    _await(folder)
    student, optimizer, state = checkpoint.load(folder)
    models.check_weights(job.shapes, student, str(folder))
    job.engine.load_weights(student)
    if moments:
        job.engine.load_moments(optimizer)
    return state


def snapshot(job: Job, position: Position) -> checkpoint.Content:
    """All of a checkpoint, on the CPU of rank 0; every rank must call it."""
    weights, moments = job.engine.weights(), job.engine.moments()
    return checkpoint.Content(weights, moments, {**position.state_dict(), **job.identity})


def load_stage_teacher(job: Job, stage: int) -> None:
    """Give the teacher the weights of this stage's checkpoint, where the schedule changes them."""
    folder = job.teacher_folders[stage]
    if job.teacher is not None and folder is not None and len(set(job.teacher_folders)) > 1:
        weights, where = checkpoint.load_student(folder), f"teacher of stage {stage}: {folder}"
        if _teacher_sharded(job.config, job.engine):
            models.check_weights(
                {k: v.shape for k, v in job.teacher.model.state_dict().items()}, weights, where
            )
            engines.load_sharded(job.teacher.model, weights)
        else:
            job.teacher.load(weights, where)


def _teacher_sharded(config: Config, engine: Engine) -> bool:
    return config.teacher is not None and config.teacher.shard and engine.world > 1


def data_digest(manifest: shards.Manifest) -> str:
    """A digest of what the shards hold, whatever folder they are in."""
    content = [
        manifest.classes,
        manifest.splits,
        manifest.mode,
        {k: _plain(v) for k, v in manifest.shards.items()},
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _plain(splits: dict[str, tuple[shards.Shard, ...]]) -> dict[str, list[dict[str, Any]]]:
    return {split: [asdict(s) for s in files] for split, files in splits.items()}


def _check_data(config: Config, engine: Engine, manifest: shards.Manifest, stages: list[Stage]) -> None:
    data = Path(config.data.shards)
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
        missing = sorted({s.resolution for s in stages} - set(manifest.resolutions))
        if missing:
            raise UserError(
                f"stages need {', '.join(map(str, missing))} px, but {data} was rendered at "
                f"{', '.join(map(str, manifest.resolutions))}: render again with --resolutions "
                + ",".join(str(r) for r in sorted({*missing, *manifest.resolutions}))
            )
    check_shards(config, engine, manifest)  # now, not in the fifth stage of a long run


def used_shards(config: Config, manifest: shards.Manifest) -> list[tuple[Path, shards.Shard]]:
    """Each file that a run will read."""
    used = {s.resolution for s in configuration.stages(config)}
    if manifest.mode == "crop":
        used = set(manifest.resolutions)
    elif config.teacher is not None and config.teacher.view == "full":
        used.add(max(manifest.resolutions))
    folder = Path(config.data.shards)
    return [
        (folder / f"r{r}" / shard.name, shard)
        for r in sorted(used)
        for split in manifest.shards[f"r{r}"].values()
        for shard in split
    ]


def check_shards(config: Config, engine: Engine, manifest: shards.Manifest) -> None:
    """Compare each file that the run will read with the manifest, in one of the processes.

    Raises:
        UserError: on every rank alike; files are missing, truncated or altered, or cannot be read.
    """
    files = used_shards(config, manifest)[engine.rank :: engine.world]
    own = [
        f"{file} {why}" for file, shard in files if (why := shards.damage(file, shard, config.data.verify))
    ]
    damaged = [problem for some in distributed.gather(engine, own) for problem in some]
    if damaged:
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        raise UserError(f"{damaged[0]}{more}; `irkd render` with the same arguments repairs what is damaged")


def _check_forward(
    config: Config, manifest: shards.Manifest, stages: list[Stage], student: nn.Module, taps: list[str],
    teacher: Teacher | None,
) -> None:  # fmt: skip
    """One blank image through student and teacher at every resolution: what timm refuses, it refuses now."""
    method, classes = config.loss.saliency.method, len(manifest.classes)
    full = config.teacher is not None and config.teacher.view == "full"
    label = torch.zeros(1, dtype=torch.long)
    for resolution in sorted({s.resolution for s in stages}):
        image, role = torch.zeros(1, 3, resolution, resolution), f"student.name={config.student.name}"
        try:
            training = student.training
            with torch.no_grad():
                logits = models.inference_logits(student.eval()(image))
            student.train(training)
            if taps:
                TappedModel(student, taps, method).maps(image, label)
            if teacher is not None:
                role, side = "the teacher", max(manifest.resolutions) if full else resolution
                device = next(teacher.model.parameters()).device
                view = torch.zeros(1, 3, side, side, device=device)
                teacher(view, label.to(device), aligned=1 if teacher.paths else 0)
        except (RuntimeError, AssertionError, ValueError, TypeError, LookupError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(f"{role} cannot take images at the stage of {resolution} px: {reason}") from error
        if logits.shape[1:] != (classes,):
            raise UserError(
                f"student.options: the model gives logits {tuple(logits.shape[1:])}, the shards have {classes} classes"
            )


def _tap_pairs(
    config: Config, student: nn.Module, teacher: nn.Module
) -> tuple[list[tuple[taps.Tap, taps.Tap]], list[str]]:
    spec = config.loss.saliency
    try:
        pairs = taps.tap_pairs(student, teacher, spec.taps, spec.method, spec.strict_paper)
    except UserError:
        if spec.gamma:
            raise
        return [], []  # taps serve the panels only
    notes = []
    kept = [pair for pair in pairs if spec.strict_paper or not (pair[0].void or pair[1].void)]
    void = [f"{s.path} | {t.path}" for s, t in pairs if s.void or t.void]
    if spec.gamma:
        if void and not kept:
            raise UserError(
                f"saliency.taps: every tap is void ({', '.join(void)}): its map is zero; use last, or a lower block"
            )
        notes.append("taps (student | teacher): " + ", ".join(f"{s.path} | {t.path}" for s, t in kept))
        if void:
            what = "kept, as strict_paper asks" if spec.strict_paper else "left out of the average"
            notes.append(
                f"void taps, their map is zero or constant whatever the weights: {', '.join(void)}; {what}"
            )
    return kept, notes


def _taps_alone(config: Config, student: nn.Module) -> list[str]:
    spec = config.loss.saliency
    try:
        pairs = taps.tap_pairs(student, student, spec.taps, spec.method)
    except UserError:
        return []
    return [s.path for s, _ in pairs if not s.void]


def _teacher(
    config: Config, engine: Engine, network: runs.Network, manifest: shards.Manifest, paths: list[str]
) -> Teacher:
    saliency = config.loss.saliency
    renormalize = None
    if config.teacher is not None and config.teacher.renormalize:
        ours_mean, ours_std = (
            torch.tensor(v, device=engine.device).view(3, 1, 1) for v in (manifest.mean, manifest.std)
        )
        mean, std = (torch.tensor(v, device=engine.device).view(3, 1, 1) for v in (network.mean, network.std))
        renormalize = (ours_std / std, (ours_mean - mean) / std)
    inner_gradient = saliency.gamma > 0 and methods.inner_gradient(saliency.method)
    if _teacher_sharded(config, engine):  # shards are of one type, and reach the device one by one
        model = freeze(network.model, None, inner_gradient, engine.device)
    else:
        model = freeze(network.model.to(engine.device), engine.autocast, inner_gradient, engine.device)
    return Teacher(model, paths, saliency.method, engine.autocast, renormalize)


def _teacher_folders(config: Config, stages: list[Stage], final: Path, notes: list[str]) -> list[Path | None]:
    spec = config.teacher
    assert spec is not None
    folders: list[Path | None]
    if spec.run is None:
        folders = _no_folders(stages)
    elif spec.schedule == "aligned":
        folders = [*_aligned(runs.run_of(Path(spec.run)), len(stages))]
    else:
        folders = [final] * len(stages)
    for i, stage in enumerate(stages):
        if stage.teacher is not None:
            folders[i] = runs.checkpoint_of(Path(stage.teacher))
    if len(set(folders)) > 1:
        named = (f"{s.resolution} px: {f}" for s, f in zip(stages, folders, strict=True))
        notes.append("teacher checkpoints by stage: " + ", ".join(named))
    return folders


def _no_folders(stages: list[Stage]) -> list[Path | None]:
    return [None] * len(stages)


def _aligned(run: Path, count: int) -> list[Path]:
    found = {int(f.name.removeprefix("step-")): f for f in (run / runs.CHECKPOINTS).glob("step-*")}
    if len(found) < count:
        raise UserError(
            f"teacher.schedule=aligned: {run} keeps {len(found)} checkpoints, {count} stages need as many; train the "
            "teacher with checkpoint.keep_epochs=1"
        )
    last = max(found)
    nearest = [min(found, key=lambda step, i=i: abs(step - last * (i + 1) / count)) for i in range(count)]
    return [found[step] for step in nearest]


def _known_keys(tree: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's configuration with the keys that this release added, at their defaults."""
    try:
        return configuration.to_dict(configuration.from_dict(tree, "checkpoint"))
    except UserError:
        return tree


def _digests(folders: list[Path | None]) -> str:
    states = [checkpoint.load_state(f)["sha256"][checkpoint.STUDENT] if f else None for f in folders]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16]
