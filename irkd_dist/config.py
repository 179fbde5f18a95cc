"""The typed configuration tree: one YAML is one experiment; strict loading, overrides, and the resolved dump.

Keys are semantic (they change the numbers) or, where `OPERATIONAL` stands at them, may change on resume.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from irkd_dist import keys, plain, reading
from irkd_dist.data import remote
from irkd_dist.data.recipe import Augment
from irkd_dist.data.remote import Url
from irkd_dist.distill import methods
from irkd_dist.distill.paper import PAPER_MODELS, PAPER_PATCH
from irkd_dist.errors import UserError
from irkd_dist.keys import OPERATIONAL, PATH

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Side = Annotated[int, Field(gt=0, le=4096)]  # of an image, in pixels
Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
BetaShape = Annotated[float, Field(ge=0, le=1000)]

_strict = ConfigDict(extra="forbid", allow_inf_nan=False)


def _word(value: Any) -> Any:
    """YAML reads the words on and off as booleans."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


@dataclass(frozen=True)
class Data:
    """Shards rendered by `irkd render`, and how batches are made of them."""

    # folder with manifest.json, or https://, s3://, gs://, hf://datasets/ of one (docs/streaming.md); operational
    # because its content is compared by digest
    shards: Annotated[str, OPERATIONAL, PATH] = "shards/cifar10"
    # of an epoch: any sample may follow any, or (shard) blocks of shards, shuffled within: for data that no disk holds
    order: Literal["exact", "shard"] = "exact"
    order_block: Positive = 8  # under order=shard: shards of a block
    shard_cache: Annotated[remote.Settings, OPERATIONAL] = field(default_factory=remote.Settings)
    batch: Annotated[int, Field(gt=0, le=2**20)] = 128  # global batch, over all processes
    subset: Positive | None = None  # train on this many images (class-balanced, fixed choice)
    val_subset: Positive | None = None  # stages are judged by this many held-out images (class-balanced)
    # steps of the run whose batches are not trained on
    leave_out: Annotated[list[NonNegative], OPERATIONAL] = field(default_factory=list)
    centre_crop: bool = False  # crop-mode shards: evaluate on a centre crop instead of a resize
    # samples of a process that are measured at once
    eval_batch: Annotated[int, Field(gt=0, le=2**16), OPERATIONAL] = 256
    # decoded images kept after the first epoch; in RAM one copy for the processes of a node
    cache: Annotated[Literal["none", "ram", "device"], OPERATIONAL] = "ram"
    workers: Annotated[int, Field(gt=0, le=1024), OPERATIONAL] = 2  # decoding threads
    # of shards, when they are opened
    verify: Annotated[Literal["checksum", "size"], OPERATIONAL] = "checksum"
    # slices of each batch that seeds and the order of sums belong to: a power of two; 1, 2, 4, ... processes up to it
    # then give the same bits under engine=ddp. null: a slice a process, and worlds agree up to rounding
    virtual_ranks: Positive | None = None
    __pydantic_config__ = _strict


@dataclass(frozen=True)
class Model:
    """A network: one of the paper's (custom, vit_tiny, vit_small), any timm model by name, or one with its weights:
    `local-dir:FOLDER` (as timm saves it) or `hf-hub:ORG/NAME`."""

    name: str = "custom"  # as above
    patch: Side | None = None  # null: the model's own; left out: 4 for the paper's models, else null
    image_size: Side | None = None  # size its position embeddings are made for; null: the largest stage
    distilled: bool | Literal["auto"] = "auto"  # distillation token; auto: when logits are distilled
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # on the embeddings and in the blocks' projections
    # stochastic depth: rate of the last block, linear below
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    pretrained: bool = False  # the weights that timm, the folder or the hub has for it
    # weights to start from: a safetensors or PyTorch file, or a run, checkpoint or Hugging Face folder
    weights: Annotated[str | None, PATH] = None
    reset_head: bool = False  # a new head where that of the weights has another number of classes
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of timm.create_model
    __pydantic_config__ = _strict


@dataclass(frozen=True)
class TeacherCache:
    """Keeps what the teacher says of a sample as it is shown, for other runs and epochs (docs/cache.md)."""

    # null: none; several runs may share one
    folder: Annotated[str | None, OPERATIONAL, PATH] = None
    # auto: read what is there, compute and keep the rest; write: compute and keep all; off: compute, in chunks as well
    mode: Annotated[Literal["off", "read", "write", "auto"], BeforeValidator(_word), OPERATIONAL] = "auto"
    limit_gib: Annotated[PositiveFloat | None, OPERATIONAL] = None  # of the whole folder
    storage: Literal["exact", "compact"] = "exact"  # compact: fp16 logits, 8-bit maps, a third of the size
    chunk: Positive = (
        64  # samples that a teacher with a cache computes at once, whatever the batch and the world are
    )
    __pydantic_config__ = _strict


@dataclass(frozen=True)
class Member:
    """One more teacher, whose logits count too: keys as the teacher's."""

    run: Annotated[str | None, PATH] = None  # as teacher.run, and so on below
    model: Model | None = None  # instead of a run
    renormalize: bool = (
        False  # its own mean and std where they differ from the shards'; left out: true for model
    )
    mean: tuple[float, float, float] | None = None  # null: what its weights or timm say, else the shards'
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None  # goes with mean
    __pydantic_config__ = _strict


@dataclass(frozen=True)
class Teacher:
    """Where the teacher comes from: a run of ours, or any timm model with a weights file."""

    # run folder (its best checkpoint is taken) or checkpoint folder; its content is compared by digest
    run: Annotated[str | None, OPERATIONAL, PATH] = None
    model: Model | None = None  # instead of a run; its weights from model.weights or model.pretrained
    # resolution the teacher sees: the student's, or the largest stored
    view: Literal["matched", "full"] = "matched"
    # aligned: stage i of n gets the teacher as of (i + 1) / n of its run
    schedule: Literal["final", "aligned"] = "final"
    # false: a backbone without a head (DINOv2), for loss.features and attention maps alone
    logits: bool = True
    averaged: bool = True  # take the moving average of a run's weights where it keeps one (optim.ema)
    # spread its parameters over the processes (FSDP2): for one too large for a device
    shard: Annotated[bool, OPERATIONAL] = False
    # feed it its own mean and std where they differ from the shards'; left out: true for teacher.model
    renormalize: bool = False
    # its normalisation, for teacher.model; null: what its weights or timm say, else the shards'
    mean: tuple[float, float, float] | None = None
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None  # goes with mean
    cache: TeacherCache = field(default_factory=TeacherCache)
    # more teachers, whose logits are averaged with this one's; maps and features are this one's alone
    ensemble: list[Member] = field(default_factory=list)
    mix: Literal["probabilities", "logits"] = (
        "probabilities"  # what is averaged, the former at loss.kd.temperature
    )
    # competence: by (validation accuracy - chance) at each stage's resolution; else a share for each, this one's first
    shares: Literal["equal", "competence"] | list[NonNegativeFloat] = "equal"
    __pydantic_config__ = _strict


@dataclass(frozen=True)
class Kd:
    """Distillation of the teacher's logits."""

    alpha: NonNegativeFloat = 0.0  # weight; 0 is off
    # soft: KL to the teacher's distribution; hard: CE with its decision
    kind: Literal["soft", "hard"] = "soft"
    temperature: PositiveFloat = 4.0  # of both softmaxes; the term is scaled by its square
    follow_teacher: bool = False  # scale alpha by the teacher's measured competence at a stage's resolution
    __pydantic_config__ = _strict


@dataclass(frozen=True)
class Saliency:
    """Alignment of saliency maps."""

    gamma: NonNegativeFloat = 0.0  # weight; 0 is off
    method: str = "gradient"  # a file of irkd_dist/distill/methods
    # or all, numbers, pairs [s, t]
    taps: str | list[Any] = field(default_factory=lambda: ["first", "second", "last"])
    normalization: Literal["minmax", "l2"] = "minmax"  # of a map: by its range, or by its length
    every: Positive = 1  # computed on every k-th step
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0  # of the batch
    strict_paper: bool = False  # keep the paper's void last tap
    follow_teacher: bool = False  # scale gamma by the teacher's competence too
    __pydantic_config__ = _strict


@dataclass(frozen=True)
class Features:
    """Alignment of features through a learned linear projection (FitNets)."""

    beta: NonNegativeFloat = 0.0  # weight; 0 is off
    kind: Literal["cosine", "mse"] = "cosine"  # distance of a projected feature to the teacher's
    taps: list[Any] = field(default_factory=lambda: ["last"])  # as saliency's; the projections are by pair
    __pydantic_config__ = _strict


@dataclass(frozen=True)
class Loss:
    """CE + alpha KD + gamma saliency (`sum`, paper eq. 1), or (1 - alpha) CE + alpha KD + gamma saliency (`convex`);
    and beta times the distance of features."""

    form: Literal["sum", "convex"] = "sum"  # as above
    kd: Kd = field(default_factory=Kd)
    saliency: Saliency = field(default_factory=Saliency)
    features: Features = field(default_factory=Features)
    __pydantic_config__ = _strict


@dataclass(frozen=True, kw_only=True)
class Ends:
    """What ends a stage before its last epoch; looked at when an epoch ends."""

    min_epochs: Positive | None = None  # before patience or target may end it
    patience: Positive | None = None  # epochs without a better validation accuracy
    target: Fraction | None = None  # validation accuracy
    minutes: PositiveFloat | None = None  # of training and validation
    tokens: PositiveFloat | None = None  # patch tokens that the student sees (pixels, if it has no patches)
    __pydantic_config__ = _strict


@dataclass(frozen=True)
class Stage(Ends):
    """One resolution of the curriculum."""

    resolution: Side  # pixels a side
    epochs: Positive | None = None  # at most; null: curriculum.epochs
    # each step is at one of these or at `resolution`, drawn evenly; one that is named twice comes twice as often
    multiscale: list[Side] = field(default_factory=list)
    lr: PositiveFloat | None = None  # peak; null: optim.lr, scaled with the batch
    drop_path: Annotated[float, Field(ge=0, lt=1)] | None = None  # null: student.drop_path
    augment: dict[str, Any] = field(default_factory=dict)  # keys of `augment` that are other in this stage
    # checkpoint folder for this stage; null: the teacher's schedule
    teacher: Annotated[str | None, PATH] = None
    __pydantic_config__ = _strict


@dataclass(frozen=True)
class Curriculum(Ends):
    """Stages of resolution, in order; they may go down as well as up. What a stage leaves out is taken from here."""

    stages: list[Stage] = field(default_factory=list)
    epochs: Positive = 10  # at most, of each stage
    start_from: Literal["last", "best"] = "last"  # weights that the next stage starts from
    # tokens: a larger batch at low resolution, so that a batch has the tokens of data.batch at the largest stage
    batch: Literal["fixed", "tokens"] = "fixed"
    # factor of optim.lr where the batch is k times data.batch: 1, square root of k (for Adam), or k
    lr_scaling: Literal["none", "sqrt", "linear"] = "sqrt"
    __pydantic_config__ = _strict


@dataclass(frozen=True)
class Fixed(Ends):
    """Training at one resolution with one optimizer to the end."""

    resolution: Side  # pixels a side
    epochs: Positive  # at most
    multiscale: list[Side] = field(default_factory=list)  # as a stage's
    __pydantic_config__ = _strict


@dataclass(frozen=True)
class Schedule:
    """Learning rate over time, as parts of the peak `optim.lr`."""

    # after the warm-up: flat, or a half cosine down
    kind: Literal["constant", "cosine", "one_cycle"] = "constant"
    warmup: Fraction = 0.0  # part of the span
    start: NonNegativeFloat = 0.0  # first rate of the warm-up, as a part of the peak
    final: NonNegativeFloat = 0.0  # last rate, as a part of the peak
    span: Literal["auto", "stage", "run"] = "auto"  # auto: a stage under reset, the run otherwise
    __pydantic_config__ = _strict


@dataclass(frozen=True)
class Ema:
    """A moving average of the student's weights and buffers: what is then judged, reported and taught with."""

    decay: Beta = 0.9998  # of each step
    warmup: bool = True  # at step t (0, 1, ...) at most 1 - (1 + t)^(-2/3), as timm's with use_warmup
    __pydantic_config__ = _strict


@dataclass(frozen=True)
class Optim:
    """AdamW and what happens to it at a stage change."""

    lr: PositiveFloat = 3e-4  # peak learning rate
    weight_decay: NonNegativeFloat = 1e-4  # on weights; none on biases, norms, tokens and position embeddings
    betas: tuple[Beta, Beta] = (0.9, 0.999)  # decay of first and second moments
    eps: PositiveFloat = 1e-8  # AdamW's
    clip: PositiveFloat | None = None  # global gradient norm
    # micro-batches that each process computes its share of the batch in; the global batch stays. auto: as many in each
    # stage as its memory asks for, recorded in the run
    accumulate: Annotated[Annotated[int, Field(gt=0)] | Literal["auto"], OPERATIONAL] = 1
    # steps without a finite loss, since the last checkpoint, after which the run goes back to it (once)
    max_skips: Annotated[int, Field(ge=0), OPERATIONAL] = 10
    # at a stage change: zero moments and a new schedule, both go on, or both go on with a new warm-up
    policy: Literal["reset", "carry", "rewarm"] = "reset"
    rewarm_steps: Positive = 100  # under rewarm: steps of a linear warm-up at each new stage
    schedule: Schedule = field(default_factory=Schedule)
    ema: Ema | None = None
    # rate of a layer n below the head: times this to the power of n (timm's layer groups); null: the same for all
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    # keep no activations within a block, compute them again: less memory, a forward more
    checkpoint_blocks: Annotated[bool, OPERATIONAL] = False
    __pydantic_config__ = _strict


@dataclass(frozen=True)
class Checkpoint:
    """When checkpoints are written and how many stay; one is always written at the end of an epoch."""

    every_steps: Positive | None = None  # null: not by steps
    every_minutes: PositiveFloat | None = None  # null: not by time
    keep: Positive = 2  # newest ones kept, besides the best of each stage
    keep_epochs: Positive | None = None  # and every n-th epoch's for good (for intermediate stages' teachers)
    __pydantic_config__ = _strict


@dataclass(frozen=True)
class Track:
    """Where metrics go besides events.jsonl."""

    # none: events.jsonl alone
    backend: Literal["none", "wandb", "tensorboard", "mlflow", "trackio"] = "none"
    mode: Literal["online", "offline"] = "offline"  # of W&B; offline needs no account
    project: str = "irkd"  # at W&B and Trackio; MLflow's experiment
    log_every: Positive = 20  # steps between loss lines
    # images whose saliency panels are kept at the end of each stage
    panels: Annotated[int, Field(ge=0, le=1024)] = 4
    # held-out images that each epoch's end measures agreement of maps and gradients of terms on; 0: none
    probe: Annotated[int, Field(ge=0, le=1024)] = 64
    samples: bool = False  # write down which samples each step saw, in samples/ of the run folder
    __pydantic_config__ = _strict


@dataclass(frozen=True)
class Config:
    """One experiment."""

    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0  # of weights, order, augmentation and dropout
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    student: Model = field(default_factory=Model)
    teacher: Teacher | None = None
    loss: Loss = field(default_factory=Loss)
    curriculum: Curriculum | None = None
    fixed: Fixed | None = None
    optim: Optim = field(default_factory=Optim)
    eval_every: Positive = 1  # epochs from one validation to the next; a stage's last is always judged
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 autocast where the hardware has it
    # auto: what `accelerate launch` was given, else ddp; zero0 to zero3 are DeepSpeed's ZeRO stages
    engine: Annotated[Literal["auto", "ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2"], OPERATIONAL] = (
        "auto"
    )
    # torch.compile of student and teacher: on, off, or auto: where engine and machine can (YAML reads on as true)
    compile: Annotated[bool | Literal["auto"], OPERATIONAL] = False
    # a process without a sign of life for so long ends the run
    rank_timeout_s: Annotated[float, Field(gt=0, le=10**7), OPERATIONAL] = 120.0
    checkpoint: Annotated[Checkpoint, OPERATIONAL] = field(default_factory=Checkpoint)
    track: Annotated[Track, OPERATIONAL] = field(default_factory=Track)
    # one folder below `out`; null: the config's stem and the seed (and the W&B run id in a sweep)
    name: Annotated[str | None, OPERATIONAL] = None
    out: Annotated[str, OPERATIONAL, PATH] = "runs"  # folder of run folders
    # no key: `${...}` as it was written, by key, for `to_dict`; its value may be a secret and is not written down
    references: Annotated[dict[str, str], OPERATIONAL] = field(default_factory=dict)
    __pydantic_config__ = _strict


_ADAPTER, _AUGMENT = TypeAdapter(Config), TypeAdapter(Augment)


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply `a.b=v` or `--a.b=v` overrides, and check everything that needs no data.

    A path that does not exist is also looked up among the configurations that ship with the package. `${...}` and a
    leading `~` are resolved here and nowhere else: not when a run folder or a checkpoint is read (`from_dict`).

    Raises:
        UserError: no such file, not YAML, an unknown key, a wrong type, an impossible combination; the message
            names the key, its value and what would be right.
    """
    file = find(path)
    return from_values(reading.mapping(file), overrides, str(file), file.stem)


def from_values(
    values: Mapping[str, Any],
    overrides: Sequence[str] | None = None,
    source: str = "config",
    stem: str = "run",
) -> Config:
    """A configuration from plain values, as `load` makes it from those of a file.

    source: what to call it in messages; stem: begins the run's name, where none is given.
    """
    tree = copy.deepcopy(dict(values))
    given = [reading.apply(tree, text, Config) for text in overrides or []]
    where = reading.Origin(source, tuple(given))
    values, references = reading.resolved(tree, Config, where)
    reading.expand_home(values, Config, where)
    if values.get("name") is None:
        values["name"] = _run_name(stem, values.get("seed", 0))
    config = from_dict(values, where)
    _check_name(config.name, where)
    if remote.literal_secret(references.get("data.shards", config.data.shards)):
        raise UserError(
            f"data.shards={remote.without_secrets(config.data.shards)} carries a password "
            "or a query, which would be written into the run folder: put it into an environment variable, and give "
            "data.shards='${oc.env:NAME}'"
        )
    return replace(config, references=references)


def find(path: str | Path) -> Path:
    """The configuration file: as given, or `configs/...` as shipped with the package."""
    given = Path(path)
    if given.is_file():
        return given
    package = Path(__file__).resolve().parent
    relative = Path(*given.parts[1:]) if given.parts[:1] == ("configs",) else given
    for root in (package / "configs", package.parent / "configs"):
        if (root / relative).is_file():
            return root / relative
    raise UserError(f"no configuration file {str(path)!r}; those in configs/ can be named from anywhere")


def from_dict(values: Any, where: str | reading.Origin) -> Config:
    """Build and check a configuration from plain values; `where` is named in errors."""
    origin = reading.Origin(where) if isinstance(where, str) else where
    if isinstance(values, dict) and "references" in values:
        raise UserError(f"{origin.of('references')}: unknown key references")
    if (wrong := plain.odd(values)) is not None:
        raise UserError(f"{origin.of(wrong[0])}: {wrong[1]}")
    try:
        config = _ADAPTER.validate_json(json.dumps(_with_defaults(values)), strict=True)
    except ValidationError as error:
        raise UserError(reading.explain(error.errors(), Config, origin)) from error
    check(config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Plain values of the whole tree, as YAML and JSON can hold them; a `${...}` that stood in a text as it was."""
    tree = json.loads(json.dumps(asdict(config)))
    for key, text in tree.pop("references").items():
        plain.put(tree, plain.keys_of(key) or [], text)
    return tree


def to_yaml(config: Config) -> str:
    """The tree as YAML, with its defaults."""
    return plain.dump(to_dict(config))


def stages(config: Config) -> list[Stage]:
    """The stages to run, each with its epochs and what may end it; a fixed-resolution run has one."""
    if config.fixed is not None:
        return [Stage(**asdict(config.fixed))]
    assert config.curriculum is not None
    common = config.curriculum
    inherited = ("epochs", *(f.name for f in fields(Ends)))
    return [
        replace(s, **{key: getattr(common, key) for key in inherited if getattr(s, key) is None})
        for s in common.stages
    ]


def stage_batch(config: Config, resolution: int) -> int:
    """Global batch at a resolution: data.batch, or (curriculum.batch=tokens) with the tokens of the largest stage."""
    if config.curriculum is None or config.curriculum.batch == "fixed":
        return config.data.batch
    largest = max(s.resolution for s in config.curriculum.stages)
    return max(round(config.data.batch * (largest / resolution) ** 2), 1)


def stage_lr(config: Config, stage: Stage) -> float:
    """Peak learning rate of a stage: its own, or optim.lr scaled with its batch (curriculum.lr_scaling)."""
    if stage.lr is not None:
        return stage.lr
    rule = "none" if config.curriculum is None else config.curriculum.lr_scaling
    ratio = stage_batch(config, stage.resolution) / config.data.batch
    return config.optim.lr * {"none": 1.0, "sqrt": ratio**0.5, "linear": ratio}[rule]


def stage_augment(config: Config, stage: Stage) -> Augment:
    """How a stage's images are changed: `augment` with the stage's own keys."""
    return _AUGMENT.validate_json(json.dumps({**asdict(config.augment), **stage.augment}), strict=True)


def drop_path(config: Config, stage: Stage | None = None) -> float:
    """Rate of drop path in a stage, or the largest of all: what the student is made with."""
    if stage is None:
        return max(drop_path(config, s) for s in stages(config))
    return config.student.drop_path if stage.drop_path is None else stage.drop_path


def semantic_keys(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The keys of a tree of plain values that change the numbers, as `a.b: value`."""
    if isinstance(tree, dict) and tree:
        parts = (semantic_keys(below, f"{prefix}.{key}".lstrip(".")) for key, below in tree.items())
        return {key: value for part in parts for key, value in part.items()}
    return {} if keys.is_operational(Config, prefix) else {prefix: tree}


def semantic_difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines `key: old -> new` for each semantic key that differs between two trees of plain values."""
    before, after = semantic_keys(old), semantic_keys(new)
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    ]


def check(config: Config) -> None:
    """Refuse combinations that cannot work, before anything else starts."""
    if (config.curriculum is None) == (config.fixed is None):
        both = config.fixed is not None
        raise UserError(
            "curriculum and fixed are both given: a run has stages or one fixed resolution; remove one of them"
            if both
            else "neither curriculum nor fixed is given: add `curriculum: {stages: [...]}` or `fixed: {resolution: 32, "
            "epochs: 60}`"
        )
    if config.curriculum is not None and not config.curriculum.stages:
        raise UserError("curriculum.stages is empty: give at least one {resolution: ..., epochs: ...}")
    loss = config.loss
    if loss.saliency.method not in methods.names():
        raise UserError(
            f"loss.saliency.method={loss.saliency.method!r} is none of {', '.join(methods.names())}"
        )
    weights = {
        "kd.alpha": loss.kd.alpha,
        "saliency.gamma": loss.saliency.gamma,
        "features.beta": loss.features.beta,
    }
    if config.teacher is None and any(weights.values()):
        key, value = next((k, v) for k, v in weights.items() if v)
        raise UserError(
            f"loss.{key}={value} needs a teacher: add `teacher: {{run: runs/...}}` or set it to 0"
        )
    if loss.form == "convex" and loss.kd.alpha > 1:
        raise UserError(
            f"loss.kd.alpha={loss.kd.alpha} with loss.form=convex makes CE's weight negative; use 0 to 1"
        )
    if config.teacher is not None:
        if (config.teacher.run is None) == (config.teacher.model is None):
            raise UserError("teacher needs either run (a run folder) or model (with weights), and not both")
        if config.teacher.schedule == "aligned" and config.teacher.run is None:
            raise UserError("teacher.schedule=aligned takes its checkpoints from a run: give teacher.run")
        own = [i for i, s in enumerate(stages(config)) if s.teacher is not None]
        if own and config.teacher.run is None:
            raise UserError(
                f"curriculum.stages[{own[0]}].teacher names a checkpoint: give teacher.run, not teacher.model"
            )
        if not config.teacher.logits:
            _check_headless(config)
        _check_ensemble(config, config.teacher)
        cache = config.teacher.cache
        mixed = next((s.multiscale for s in stages(config) if s.multiscale), None)
        if mixed and cache.folder is not None:
            raise UserError(
                f"multiscale={mixed} with teacher.cache.folder: a cache keeps one resolution a stage; leave one "
                "of them out"
            )
        if loss.features.beta and cache.folder is not None:
            raise UserError(
                f"loss.features.beta={loss.features.beta} with teacher.cache.folder: a cache keeps logits and maps, "
                "not features; leave one of them out"
            )
        if cache.folder is None and replace(cache, mode="auto") != TeacherCache():
            changed = next(
                f.name for f in fields(cache) if f.name != "mode" and getattr(cache, f.name) != f.default
            )
            raise UserError(
                f"teacher.cache.{changed}={getattr(cache, changed)} without a cache: give teacher.cache.folder"
            )
        _check_normalisation(config.teacher)
    if config.student.distilled is True and config.student.name in PAPER_MODELS and not loss.kd.alpha:
        raise UserError(
            "student.distilled=true with loss.kd.alpha=0: nothing teaches the distillation token; use auto"
        )
    _check_augment(config)
    if config.optim.checkpoint_blocks and config.compile is not False:
        raise UserError("optim.checkpoint_blocks=true with compile: one of them at a time; set compile=false")
    if config.data.order == "shard" and config.augment.draws is not None and config.augment.mixes:
        raise UserError(
            f"data.order=shard with augment.draws={config.augment.draws} and MixUp or CutMix: partners then come from "
            "the whole split; leave out draws, or use data.order=exact"
        )
    if config.engine != "auto":
        check_engine(config, config.engine)
    for i, stage in enumerate(stages(config)):
        if stage.min_epochs is not None and stage.min_epochs > (stage.epochs or 0):
            raise UserError(
                f"stage {i}: min_epochs={stage.min_epochs} is above its epochs={stage.epochs}; lower the first"
            )
    count = config.data.virtual_ranks
    if count is not None and (count & (count - 1) or count > config.data.batch):
        raise UserError(
            f"data.virtual_ranks={count}: give a power of two, at most data.batch={config.data.batch}"
        )
    if count is not None and config.optim.accumulate != 1:
        raise UserError(
            f"data.virtual_ranks={count} with optim.accumulate={config.optim.accumulate}: virtual ranks are the "
            "micro-batches; raise their number instead, and leave accumulate at 1"
        )
    if not isinstance(loss.saliency.taps, str) and not loss.saliency.taps:
        raise UserError(
            "loss.saliency.taps is empty: name taps, e.g. [first, second, last], or set gamma to 0"
        )
    if loss.features.beta and not loss.features.taps:
        raise UserError("loss.features.taps is empty: name taps, e.g. [last], or set beta to 0")
    patches = {"student": config.student}
    if config.teacher is not None and config.teacher.model is not None:
        patches["teacher"] = config.teacher.model
    for role, model in patches.items():
        if model.name in PAPER_MODELS and model.patch is not None:
            check_resolutions(config, model.patch, role)


def _check_normalisation(teacher: Teacher) -> None:
    """Refuse means and deviations that nobody would read."""
    named = [
        ("teacher", teacher),
        *((f"teacher.ensemble[{i}]", one) for i, one in enumerate(teacher.ensemble)),
    ]
    for key, one in named:
        if (one.mean is None) != (one.std is None):
            raise UserError(f"{key}.mean and {key}.std go together: give both or none")
        if one.mean is not None and one.run is not None:
            raise UserError(
                f"{key}.mean with {key}.run: a run knows what it was trained with; leave mean and std out"
            )


def _check_ensemble(config: Config, teacher: Teacher) -> None:
    """Refuse what several teachers cannot do together."""
    for i, member in enumerate(teacher.ensemble):
        if (member.run is None) == (member.model is None):
            raise UserError(f"teacher.ensemble[{i}] needs either run or model (with weights), and not both")
    count, shares = 1 + len(teacher.ensemble), teacher.shares
    if isinstance(shares, list) and (len(shares) != count or not sum(shares)):
        raise UserError(
            f"teacher.shares={shares}: give a share for each of {count} teachers, not all of them 0"
        )
    if not teacher.ensemble:
        if shares == "competence":
            raise UserError("teacher.shares=competence without teacher.ensemble: there is one teacher alone")
        return
    wrong = {
        f"teacher.cache.folder={teacher.cache.folder}": teacher.cache.folder is not None,
        "teacher.schedule=aligned": teacher.schedule == "aligned",
        "teacher.shard=true": teacher.shard,
        "teacher.logits=false": not teacher.logits,
        "a stage's own teacher": any(s.teacher is not None for s in stages(config)),
    }
    if found := next((key for key, is_wrong in wrong.items() if is_wrong), None):
        raise UserError(f"teacher.ensemble with {found}: leave one of them out")


def _check_headless(config: Config) -> None:
    """Refuse what a teacher without logits cannot teach."""
    loss, teacher = config.loss, config.teacher
    assert teacher is not None
    wrong = {
        f"loss.kd.alpha={loss.kd.alpha}": bool(loss.kd.alpha),
        f"loss.saliency.method={loss.saliency.method}": bool(loss.saliency.gamma)
        and methods.inner_gradient(loss.saliency.method),
        "loss.saliency.follow_teacher=true": loss.saliency.follow_teacher,
        f"teacher.run={teacher.run}": teacher.run is not None,
        f"teacher.cache.folder={teacher.cache.folder}": teacher.cache.folder is not None,
    }
    if found := next((key for key, is_wrong in wrong.items() if is_wrong), None):
        raise UserError(
            f"teacher.logits=false with {found}: a backbone without a head has features and attention maps alone; give "
            "it one by `irkd probe`, or use loss.features and loss.saliency.method=attention"
        )


def _check_augment(config: Config) -> None:
    shown = [("augment", config.augment)]
    for i, stage in enumerate(stages(config)):
        key = f"curriculum.stages[{i}].augment"
        if wrong := {"draws", "repeats"} & stage.augment.keys():
            raise UserError(f"{key}.{min(wrong)}: it holds for the whole run; set augment.{min(wrong)} alone")
        try:
            shown.append((key, stage_augment(config, stage)))
        except ValidationError as error:
            raise UserError(
                f"{key}: {reading.explain(error.errors(), Augment, reading.Origin(key))}"
            ) from error
    for key, own in shown:
        for name in ("scale", "ratio"):
            low, high = getattr(own, name)
            if low > high:
                raise UserError(
                    f"{key}.{name}=[{low}, {high}]: the first is above the second; give [low, high]"
                )
        if own.repeats > 1 and own.draws is not None:
            raise UserError(f"{key}.repeats={own.repeats} with draws={own.draws}: leave one of them out")
    cached = config.teacher is not None and config.teacher.cache.folder is not None
    if config.augment.repeats > 1 and cached:
        raise UserError(
            f"augment.repeats={config.augment.repeats} with teacher.cache.folder: a cache keeps one draw of a "
            "sample an epoch; leave one of them out"
        )


def check_engine(config: Config, engine: str) -> None:
    """Refuse what an engine cannot compute."""
    saliency = config.loss.saliency
    if engine == "zero3" and saliency.gamma and methods.inner_gradient(saliency.method):
        raise UserError(
            f"engine=zero3 with loss.saliency.method={saliency.method}: ZeRO-3 frees the parameters that the saliency "
            "gradient needs a second time, and DeepSpeed cannot differentiate through it; use engine=fsdp2 (fully "
            "sharded too), or zero2"
        )


def check_resolutions(config: Config, patch: int, role: str) -> None:
    """Every resolution must be a multiple of the patch size of `role` (student or teacher)."""
    sides = [
        (i, key, size)
        for i, stage in enumerate(stages(config))
        for key, some in (("resolution", [stage.resolution]), ("multiscale", stage.multiscale))
        for size in some
    ]
    for i, name, size in sides:
        lower = size // patch * patch
        if size > lower:
            key = f"curriculum.stages[{i}].{name}" if config.fixed is None else f"fixed.{name}"
            choices = " or ".join(str(r) for r in (lower, lower + patch) if r > 0)
            raise UserError(f"{key}={size} is not a multiple of patch size {patch} ({role}); use {choices}")


def resolutions(config: Config) -> list[int]:
    """Every resolution that the run trains at, ascending."""
    return sorted({size for s in stages(config) for size in (s.resolution, *s.multiscale)})


def folder_of(config: Config) -> Path:
    """The run folder of a configuration."""
    assert config.name is not None
    return Path(config.out) / config.name


def shards_of(config: Config) -> Path | Url:
    """Where the shards are: as text it shows no secret.

    Raises:
        UserError: a URL of a protocol that is not read here.
    """
    return remote.place(config.data.shards, config.data.shard_cache)


def student_distilled(config: Config) -> bool:
    """Whether the student carries a distillation token (`auto`: when logits are distilled)."""
    if config.student.distilled == "auto":
        return config.loss.kd.alpha > 0 and config.student.name in PAPER_MODELS
    return config.student.distilled


def _with_defaults(values: Any) -> Any:
    """Fill in what is left out and whose default is another key's business."""
    if not isinstance(values, dict):
        return values
    values = dict(values)
    teacher = values.get("teacher")
    if isinstance(teacher, dict):
        own = teacher.get("model")
        values["teacher"] = {
            "renormalize": own is not None,
            **teacher,
            **({"model": _with_patch(own)} if own else {}),
        }
        if isinstance(members := teacher.get("ensemble"), list):
            values["teacher"]["ensemble"] = [_member_with_defaults(m) for m in members]
    values["student"] = _with_patch(values.get("student", {}))
    return values


def _member_with_defaults(member: Any) -> Any:
    if not isinstance(member, dict):
        return member
    own = member.get("model")
    return {"renormalize": own is not None, **member, **({"model": _with_patch(own)} if own else {})}


def _with_patch(model: Any) -> Any:
    if not isinstance(model, dict):
        return model
    ours = model.get("name", Model.name) in [*PAPER_MODELS]  # a list: the name may be anything
    return {"patch": PAPER_PATCH if ours else None, **model}


def _check_name(name: str | None, where: reading.Origin) -> None:
    parts = (name or "").split("/")
    if {"", ".", ".."} & set(parts) or max(len(part.encode()) for part in parts) > 200:
        raise UserError(
            f"{where.of('name')}: name={reading.short(name)} is not the name of a folder below `out`: neither "
            "absolute nor with . or .., and no part over 200 bytes; `out` says where runs go"
        )


def _run_name(stem: str, seed: object) -> str:
    sweep = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
    return f"{stem}-seed{seed}" + (f"-{sweep}" if sweep else "")
