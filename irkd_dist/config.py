"""The typed configuration tree: one YAML is one experiment; strict loading, overrides, and the resolved dump.

Keys are semantic (they change the numbers) or operational (they may change on resume, see `OPERATIONAL`).
"""

from __future__ import annotations

import difflib
import json
import os
import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from irkd_dist.data.recipe import Augment
from irkd_dist.distill.paper import PAPER_MODELS
from irkd_dist.errors import UserError

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]

_strict = ConfigDict(extra="forbid")


def _word(value: Any) -> Any:
    """YAML reads the words on and off as booleans."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


@dataclass(frozen=True)
class Data:
    """Shards rendered by `irkd render`, and how batches are made of them."""

    shards: str = "shards/cifar10"  # folder with manifest.json
    batch: Positive = 128  # global batch, over all processes
    subset: Positive | None = None  # train on this many images (class-balanced, fixed choice)
    leave_out: list[NonNegative] = field(
        default_factory=list
    )  # steps of the run whose batches are not trained on
    centre_crop: bool = False  # crop-mode shards: evaluate on a centre crop instead of a resize
    cache: Literal["none", "ram", "device"] = "ram"  # decoded images kept after the first epoch
    workers: Positive = 2  # decoding threads
    verify: Literal["checksum", "size"] = "checksum"  # of shards, when they are opened
    # slices of each batch that seeds and the order of sums belong to: a power of two; 1, 2, 4, ... processes up to it
    # then give the same bits under engine=ddp. null: a slice a process, and worlds agree up to rounding
    virtual_ranks: Positive | None = None
    __pydantic_config__ = _strict


@dataclass(frozen=True)
class Model:
    """A network: one of the paper's (custom, vit_tiny, vit_small) or any timm model by name."""

    name: str = "custom"
    patch: Positive | None = 4  # null: the model's own
    image_size: Positive | None = None  # size its position embeddings are made for; null: the largest stage
    distilled: bool | Literal["auto"] = "auto"  # distillation token; auto: when logits are distilled
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    pretrained: bool = False  # timm's weights, downloaded
    weights: str | None = None  # safetensors file or checkpoint folder to start from
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of timm.create_model
    __pydantic_config__ = _strict


@dataclass(frozen=True)
class TeacherCache:
    """Keeps what the teacher says of a sample as it is shown, for other runs and epochs (docs/cache.md)."""

    folder: str | None = None  # null: none; several runs may share one
    # auto: read what is there, compute and keep the rest; write: compute and keep all; off: compute, in chunks as well
    mode: Annotated[Literal["off", "read", "write", "auto"], BeforeValidator(_word)] = "auto"
    limit_gib: PositiveFloat | None = None  # of the whole folder
    storage: Literal["exact", "compact"] = "exact"  # compact: fp16 logits, 8-bit maps, a third of the size
    chunk: Positive = (
        64  # samples that a teacher with a cache computes at once, whatever the batch and the world are
    )
    __pydantic_config__ = _strict


@dataclass(frozen=True)
class Teacher:
    """Where the teacher comes from: a run of ours, or any timm model with a weights file."""

    run: str | None = None  # run folder (its best checkpoint is taken) or checkpoint folder
    model: Model | None = None  # instead of a run; its weights from model.weights or model.pretrained
    view: Literal["matched", "full"] = (
        "matched"  # resolution the teacher sees: the student's, or the largest stored
    )
    schedule: Literal["final", "aligned"] = (
        "final"  # aligned: stage i of n gets the teacher as of (i + 1) / n of its run
    )
    shard: bool = False  # spread its parameters over the processes (FSDP2): for one too large for a device
    renormalize: bool = False  # feed it its own mean and std where they differ from the shards'
    mean: tuple[float, float, float] | None = None  # its normalisation, for teacher.model; null: the shards'
    std: tuple[float, float, float] | None = None
    cache: TeacherCache = field(default_factory=TeacherCache)
    __pydantic_config__ = _strict


@dataclass(frozen=True)
class Kd:
    """Distillation of the teacher's logits."""

    alpha: NonNegativeFloat = 0.0  # weight; 0 is off
    kind: Literal["soft", "hard"] = "soft"
    temperature: PositiveFloat = 4.0
    follow_teacher: bool = (
        False  # scale alpha by the teacher's measured competence at each stage's resolution
    )
    __pydantic_config__ = _strict


@dataclass(frozen=True)
class Saliency:
    """Alignment of saliency maps."""

    gamma: NonNegativeFloat = 0.0  # weight; 0 is off
    method: Literal["gradient", "grad_cam", "hirescam", "attention"] = "gradient"
    taps: str | list[Any] = field(
        default_factory=lambda: ["first", "second", "last"]
    )  # or all, numbers, pairs [s, t]
    normalization: Literal["minmax", "l2"] = "minmax"
    every: Positive = 1  # computed on every k-th step
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0  # of the batch
    strict_paper: bool = False  # keep the paper's void last tap
    follow_teacher: bool = False  # scale gamma by the teacher's competence too
    __pydantic_config__ = _strict


@dataclass(frozen=True)
class Loss:
    """CE + alpha KD + gamma saliency (`sum`, paper eq. 1), or (1 - alpha) CE + alpha KD + gamma saliency (`convex`)."""

    form: Literal["sum", "convex"] = "sum"
    kd: Kd = field(default_factory=Kd)
    saliency: Saliency = field(default_factory=Saliency)
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

    resolution: Positive
    epochs: Positive | None = None  # at most; null: curriculum.epochs
    teacher: str | None = None  # checkpoint folder for this stage; null: the teacher's schedule
    __pydantic_config__ = _strict


@dataclass(frozen=True)
class Curriculum(Ends):
    """Stages of resolution, in order; they may go down as well as up. What a stage leaves out is taken from here."""

    stages: list[Stage] = field(default_factory=list)
    epochs: Positive = 10
    start_from: Literal["last", "best"] = "last"  # weights that the next stage starts from
    # tokens: a larger batch at low resolution, so that a batch has the tokens of data.batch at the largest stage
    batch: Literal["fixed", "tokens"] = "fixed"
    # factor of optim.lr where the batch is k times data.batch: 1, square root of k (for Adam), or k
    lr_scaling: Literal["none", "sqrt", "linear"] = "sqrt"
    __pydantic_config__ = _strict


@dataclass(frozen=True)
class Fixed(Ends):
    """Training at one resolution with one optimizer to the end."""

    resolution: Positive
    epochs: Positive
    __pydantic_config__ = _strict


@dataclass(frozen=True)
class Schedule:
    """Learning rate over time, as parts of the peak `optim.lr`."""

    kind: Literal["constant", "cosine", "one_cycle"] = "constant"
    warmup: Fraction = 0.0  # part of the span
    start: NonNegativeFloat = 0.0  # first rate of the warm-up, as a part of the peak
    final: NonNegativeFloat = 0.0  # last rate, as a part of the peak
    span: Literal["auto", "stage", "run"] = "auto"  # auto: a stage under reset, the run otherwise
    __pydantic_config__ = _strict


@dataclass(frozen=True)
class Optim:
    """AdamW and what happens to it at a stage change."""

    lr: PositiveFloat = 3e-4
    weight_decay: NonNegativeFloat = 1e-4  # on weights; none on biases, norms, tokens and position embeddings
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    clip: PositiveFloat | None = None  # global gradient norm
    # micro-batches that each process computes its share of the batch in; the global batch stays
    accumulate: Positive = 1
    # steps without a finite loss, since the last checkpoint, after which the run goes back to it (once)
    max_skips: NonNegative = 10
    policy: Literal["reset", "carry", "rewarm"] = "reset"
    rewarm_steps: Positive = 100  # under rewarm: steps of a linear warm-up at each new stage
    schedule: Schedule = field(default_factory=Schedule)
    __pydantic_config__ = _strict


@dataclass(frozen=True)
class Checkpoint:
    """When checkpoints are written and how many stay; one is always written at the end of an epoch."""

    every_steps: Positive | None = None
    every_minutes: PositiveFloat | None = None
    keep: Positive = 2  # newest ones kept, besides the best of each stage
    keep_epochs: Positive | None = (
        None  # and every n-th epoch's for good (a teacher that intermediate stages use)
    )
    __pydantic_config__ = _strict


@dataclass(frozen=True)
class Track:
    """Where metrics go besides events.jsonl."""

    backend: Literal["none", "wandb", "tensorboard"] = "none"
    mode: Literal["online", "offline"] = "offline"  # of W&B; offline needs no account
    project: str = "irkd"
    log_every: Positive = 20  # steps between loss lines
    panels: NonNegative = 4  # images whose saliency panels are kept at the end of each stage
    samples: bool = False  # write down which samples each step saw, in samples/ of the run folder
    __pydantic_config__ = _strict


@dataclass(frozen=True)
class Config:
    """One experiment."""

    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    student: Model = field(default_factory=Model)
    teacher: Teacher | None = None
    loss: Loss = field(default_factory=Loss)
    curriculum: Curriculum | None = None
    fixed: Fixed | None = None
    optim: Optim = field(default_factory=Optim)
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 autocast where the hardware has it
    # auto: what `accelerate launch` was given, else ddp; zero0 to zero3 are DeepSpeed's ZeRO stages
    engine: Literal["auto", "ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2"] = "auto"
    rank_timeout_s: PositiveFloat = 120.0  # a process without a sign of life for so long ends the run
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    track: Track = field(default_factory=Track)
    name: str | None = None  # null: the config's stem and the seed (and the W&B run id in a sweep)
    out: str = "runs"  # folder of run folders
    __pydantic_config__ = _strict


OPERATIONAL = (
    "name",
    "out",
    "engine",
    "rank_timeout_s",
    "optim.accumulate",
    "optim.max_skips",
    "teacher.shard",
    "checkpoint",
    "track",
    "data.shards",  # its content is compared by digest
    "data.cache",
    "data.workers",
    "data.verify",
    "data.leave_out",
    "teacher.run",  # likewise
    "teacher.cache.folder",
    "teacher.cache.mode",
    "teacher.cache.limit_gib",
)

_ADAPTER = TypeAdapter(Config)


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply `a.b=v` or `--a.b=v` overrides, and check everything that needs no data.

    A path that does not exist is also looked up among the configurations that ship with the package.

    Raises:
        UserError: no such file, not YAML, an unknown key, a wrong type, an impossible combination; the message
            names the key, its value and what would be right.
    """
    file = find(path)
    try:
        tree = OmegaConf.load(file)
        if not OmegaConf.is_dict(tree):
            raise UserError(f"{file} is not a mapping of keys to values")
        for override in overrides or []:
            _apply(tree, override)
        values = OmegaConf.to_container(tree, resolve=True)
    except (OmegaConfBaseException, ValueError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: {str(error).splitlines()[0]}") from error
    except Exception as error:
        if type(error).__module__.startswith("yaml"):
            raise UserError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
        raise
    if values.get("name") is None:  # type: ignore[union-attr]
        values["name"] = _run_name(file, values.get("seed", 0))  # type: ignore[index,union-attr]
    return from_dict(values, str(file))


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


def from_dict(values: Any, where: str) -> Config:
    """Build and check a configuration from plain values; `where` is named in errors."""
    try:
        config = _ADAPTER.validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise UserError("\n".join(f"{where}: {_explain(e)}" for e in error.errors()[:5])) from error
    check(config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Plain values of the whole tree, as YAML and JSON can hold them."""
    return json.loads(json.dumps(asdict(config)))


def to_yaml(config: Config) -> str:
    """The resolved tree as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


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


def stage_lr(config: Config, resolution: int) -> float:
    """Peak learning rate at a resolution, scaled with its batch (curriculum.lr_scaling)."""
    rule = "none" if config.curriculum is None else config.curriculum.lr_scaling
    ratio = stage_batch(config, resolution) / config.data.batch
    return config.optim.lr * {"none": 1.0, "sqrt": ratio**0.5, "linear": ratio}[rule]


def semantic_keys(tree: dict[str, Any]) -> dict[str, Any]:
    """The keys of a tree of plain values that change the numbers, as `a.b: value`."""
    return {
        key: value
        for key, value in _flatten(tree).items()
        if not any(key == op or key.startswith(op + ".") for op in OPERATIONAL)
    }


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
    if config.teacher is None and (loss.kd.alpha or loss.saliency.gamma):
        key, value = ("kd.alpha", loss.kd.alpha) if loss.kd.alpha else ("saliency.gamma", loss.saliency.gamma)
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
        cache = config.teacher.cache
        if cache.folder is None and replace(cache, mode="auto") != TeacherCache():
            changed = next(
                f.name for f in fields(cache) if f.name != "mode" and getattr(cache, f.name) != f.default
            )
            raise UserError(
                f"teacher.cache.{changed}={getattr(cache, changed)} without a cache: give teacher.cache.folder"
            )
        if (config.teacher.mean is None) != (config.teacher.std is None):
            raise UserError("teacher.mean and teacher.std go together: give both or none")
    if config.student.distilled is True and config.student.name in PAPER_MODELS and not loss.kd.alpha:
        raise UserError(
            "student.distilled=true with loss.kd.alpha=0: nothing teaches the distillation token; use auto"
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
    if count is not None and config.optim.accumulate > 1:
        raise UserError(
            f"data.virtual_ranks={count} with optim.accumulate={config.optim.accumulate}: virtual ranks are the "
            "micro-batches; raise their number instead, and leave accumulate at 1"
        )
    if not isinstance(loss.saliency.taps, str) and not loss.saliency.taps:
        raise UserError(
            "loss.saliency.taps is empty: name taps, e.g. [first, second, last], or set gamma to 0"
        )
    patches = {"student": config.student}
    if config.teacher is not None and config.teacher.model is not None:
        patches["teacher"] = config.teacher.model
    for role, model in patches.items():
        if model.name in PAPER_MODELS and model.patch is not None:
            check_resolutions(config, model.patch, role)


def check_engine(config: Config, engine: str) -> None:
    """Refuse what an engine cannot compute."""
    saliency = config.loss.saliency
    if engine == "zero3" and saliency.gamma and saliency.method != "attention":
        raise UserError(
            f"engine=zero3 with loss.saliency.method={saliency.method}: ZeRO-3 frees the parameters that the saliency "
            "gradient needs a second time, and DeepSpeed cannot differentiate through it; use engine=fsdp2 (fully "
            "sharded too), or zero2"
        )


def check_resolutions(config: Config, patch: int, role: str) -> None:
    """Every resolution must be a multiple of the patch size of `role` (student or teacher)."""
    for key, resolution in _resolutions(config).items():
        if resolution % patch:
            lower = resolution // patch * patch
            choices = " or ".join(str(r) for r in (lower, lower + patch) if r > 0)
            raise UserError(
                f"{key}={resolution} is not a multiple of patch size {patch} ({role}); use {choices}"
            )


def folder_of(config: Config) -> Path:
    """The run folder of a configuration."""
    assert config.name is not None
    return Path(config.out) / config.name


def student_distilled(config: Config) -> bool:
    """Whether the student carries a distillation token (`auto`: when logits are distilled)."""
    if config.student.distilled == "auto":
        return config.loss.kd.alpha > 0 and config.student.name in PAPER_MODELS
    return config.student.distilled


def _resolutions(config: Config) -> dict[str, int]:
    if config.fixed is not None:
        return {"fixed.resolution": config.fixed.resolution}
    assert config.curriculum is not None
    return {
        f"curriculum.stages[{i}].resolution": s.resolution for i, s in enumerate(config.curriculum.stages)
    }


def _apply(tree: Any, override: str) -> None:
    key, value = _parse_override(override)
    try:
        OmegaConf.update(tree, key, value, merge=False, force_add=True)
    except (OmegaConfBaseException, IndexError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"override {override!r} does not fit: {str(error).splitlines()[0]}") from error


def _parse_override(text: str) -> tuple[str, Any]:
    key, separator, value = text.removeprefix("--").partition("=")
    if not separator or not re.fullmatch(r"[A-Za-z_][\w.\[\]]*", key):
        raise UserError(f"override {text!r} is not of the form key=value or --key=value")
    parsed = OmegaConf.from_dotlist([f"value={value}"]).get("value")
    if OmegaConf.is_config(parsed):
        parsed = OmegaConf.to_container(parsed)
    return key, _plain(parsed)


def _plain(value: Any) -> Any:
    """Python's None as W&B writes it, `None` in the midst of lists and mappings, is YAML's null."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if value == "None" else value


def _run_name(file: Path, seed: object) -> str:
    sweep = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
    return f"{file.stem}-seed{seed}" + (f"-{sweep}" if sweep else "")


def _explain(error: Any) -> str:
    # a union's branch stands in pydantic's location too: a type's name, never a key of ours
    branches = {"bool", "str", "int"}
    path = [
        p for p in error["loc"] if isinstance(p, int) or (re.fullmatch(r"[a-z_]+", p) and p not in branches)
    ]
    key = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _known_keys(path[:-1])
        close = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        return f"unknown key {key}={error['input']!r}; {hint}"
    message = error["msg"][0].lower() + error["msg"][1:]
    if error["type"] == "missing":
        return f"{key} is missing"
    hint = ""
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        close = difflib.get_close_matches(error["input"], re.findall(r"'([^']+)'", message), n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]}?" if close else ""
    return f"{key}={error['input']!r}: {message}{hint}"


def _known_keys(path: list[Any]) -> list[str]:
    kind: Any = Config
    for part in path:
        if not isinstance(part, int):
            kind = get_type_hints(kind).get(part)
        while kind is not None and not is_dataclass(kind):
            candidates = [a for a in get_args(kind) if is_dataclass(a)]
            kind = candidates[0] if candidates else None
        if kind is None:
            return []
    return [f.name for f in fields(kind)]


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    result: dict[str, Any] = {}
    for key, value in tree.items():
        result |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return result
