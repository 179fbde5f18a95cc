"""Run folders -> figures and one self-contained HTML page: a run's course, or several runs side by side.

Everything comes from what a run leaves behind (events, configuration, panels, evaluation), so a report needs neither
images nor weights, and a run that is still going, or was cut short, has one too.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import re
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import matplotlib
import numpy as np
from jinja2 import Environment, StrictUndefined
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from irkd_dist import __version__, runs
from irkd_dist import config as configuration
from irkd_dist.config import Config
from irkd_dist.data import shards
from irkd_dist.errors import UserError
from irkd_dist.evaluate import RESULT
from irkd_dist.training import checkpoint, panels
from irkd_dist.training.tracking import EVENTS, read_events

PAGE, FIGURES, TEMPLATE = "report.html", "figures", "report.html.j2"
WIDE, HALF, NARROW = 9.1, 4.3, 3.5  # widths of figures in inches of 100 CSS pixels: page, half page, phone
STACKED = 4.75  # height of figures of panels over steps, the same so that they stand side by side
DPI = 200
MOST_SAMPLES, MOST_SNAPSHOTS = 8, 12  # of a saliency figure
TERMS = {"total": "total", "ce": "cross-entropy", "kd": "distillation", "saliency": "saliency"}


@dataclass(frozen=True)
class Run:
    """What a run folder tells."""

    folder: Path
    name: str
    config: Config
    events: list[dict[str, Any]]
    classes: tuple[str, ...]  # empty if not at hand
    version: str | None  # of the package, as of the newest checkpoint
    panels: list[tuple[int, int, dict[str, np.ndarray]]]
    evaluation: Evaluation | None
    notices: list[str]  # what a reader must know about the record itself

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Events of one kind, in order."""
        return [e for e in self.events if e["event"] == kind]

    def last(self, kind: str) -> dict[str, Any] | None:
        """The newest event of one kind."""
        return next((e for e in reversed(self.events) if e["event"] == kind), None)

    def evaluations(self, stage: int) -> list[dict[str, Any]]:
        """The evaluations of one stage, an epoch each."""
        return [e for e in self.of("evaluation") if e["stage"] == stage]


@dataclass(frozen=True)
class Evaluation:
    """What `irkd evaluate` measured: rows of (resolution, accuracy, map error, map correlation, pointing)."""

    split: str
    rows: list[tuple[int, float | None, float | None, float | None, float | None]]


@dataclass(frozen=True)
class Theme:
    """Colours of a figure; the cycle is Okabe and Ito's, safe for colour-blind readers, lightened for dark pages."""

    text: str
    muted: str
    grid: str
    surface: str
    band: str
    cycle: tuple[str, ...]  # validation and student; train; teacher; others


LIGHT = Theme(
    "#1b1f24", "#5b6470", "#e3e6ea", "#ffffff", "#f4f6f8",
    ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b07d00", "#3fa0d8", "#5b6470"),
)  # fmt: skip
DARK = Theme(
    "#e8eaed", "#9aa4b0", "#2d333b", "#161b22", "#1c222a",
    ("#56b4e9", "#ff8f4a", "#2fc79a", "#e79ac8", "#f0c04a", "#8fb7ff", "#9aa4b0"),
)  # fmt: skip
STYLES = {"solid": "-", "dashed": "--", "dotted": ":"}  # CSS and matplotlib, of lines whose colours repeat

Drawing = Callable[[Figure, Theme], None]


@dataclass(frozen=True)
class Plan:
    """A figure before it is drawn: its words, its widths, `height(width)` in inches, and `draw` on an empty figure."""

    title: str
    alt: str
    caption: str
    widths: tuple[float, ...]  # on the page and, where it differs, on a phone
    height: Callable[[float], float]
    draw: Drawing
    photographs: bool = False


def write(folders: list[Path], out: Path | None = None) -> Path:
    """Write the report of one run, or the comparison of several, and return the page's path.

    One run: `report.html` (or `out`) and `figures/*.png` in its folder. Several: one page, `report.html` in their
    common parent folder unless `out` names another file.

    Raises:
        UserError: a folder is no run, or nothing can be written.
    """
    unique = list({f.resolve(): f for f in folders}.values())
    if not unique:
        raise UserError("no run to report: give at least one run folder, e.g. irkd report runs/student-seed0")
    found = [read(f) for f in unique]
    if len(found) == 1:
        page = found[0].folder / PAGE if out is None else out
        context = _run_page(found[0])
    else:
        parent = os.path.commonpath([r.folder.resolve().parent for r in found])
        page = Path(parent) / PAGE if out is None else out
        context = _comparison_page(_distinct_names(found))
    common = {
        "version": __version__,
        "palettes": {"light": LIGHT, "dark": DARK},
        "run": None,
        "comparison": None,
    }
    _write_text(page, _template().render(common | context))
    return page


def read(folder: Path) -> Run:
    """Read a run folder; what is missing or broken besides its configuration and events becomes a notice.

    Raises:
        UserError: it has no configuration or no events.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no run folder: there is no such folder")
    config, events = runs.load_config(folder), _each_epoch_once(read_events(folder))
    notices = []
    cut = sum(not _is_json(line) for line in (folder / EVENTS).read_text().splitlines())
    if cut:
        notices.append(
            f"{cut} line{'s' * (cut > 1)} of {EVENTS} cut short, as when a run is killed, and left out here."
        )
    state = _newest_state(folder)
    try:
        snapshots = panels.load(folder)
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        snapshots = []
        notices.append(f"The saliency panels cannot be read: {error}")
    evaluation, problem = _read_evaluation(folder / RESULT)
    classes = tuple(state.get("classes", ())) or _classes_of_shards(config)
    name, version = folder.resolve().name, state.get("package_version")
    return Run(folder, name, config, events, classes, version, snapshots, evaluation, [*notices, *problem])


def _newest_state(folder: Path) -> dict[str, Any]:
    kept = [*(folder / runs.BEST).glob("*step-*"), *(folder / runs.CHECKPOINTS).glob("step-*")]
    for candidate in sorted(kept, key=lambda f: f.name.rpartition("step-")[2], reverse=True):
        try:
            return checkpoint.load_state(candidate)
        except UserError:
            continue  # a damaged checkpoint is training's concern
    return {}


def _classes_of_shards(config: Config) -> tuple[str, ...]:
    try:
        return shards.load_manifest(Path(config.data.shards)).classes
    except UserError:
        return ()


def _read_evaluation(file: Path) -> tuple[Evaluation | None, list[str]]:
    if not file.is_file():
        return None, []
    try:
        values = json.loads(file.read_text())
        parts = [values.get(key) or {} for key in ("accuracy", "agreement", "pointing")]
        accuracy, agreement, pointing = ({int(k): v for k, v in part.items()} for part in parts)
        rows = []
        for size in sorted({*accuracy, *agreement, *pointing}):
            maps = agreement.get(size) or {}
            row = (accuracy.get(size), maps.get("mse"), maps.get("correlation"), pointing.get(size))
            rows.append((size, *(None if v is None or v != v else float(v) for v in row)))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return None, [f"{file.name} is not what irkd evaluate writes and was left out: {error}"]
    return Evaluation(str(values.get("split", "test")), rows) if rows else None, []


def _is_json(line: str) -> bool:
    try:
        json.loads(line or "{}")
    except ValueError:
        return False
    return True


def _each_epoch_once(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A run killed between an epoch's evaluation and its checkpoint evaluates again at the same step."""
    newest = {e["epoch"]: e for e in events if e["event"] == "evaluation"}
    return [e for e in events if e["event"] != "evaluation" or newest[e["epoch"]] is e]


def _distinct_names(found: list[Run]) -> list[Run]:
    """Runs of equal names are told apart by their paths."""
    names = [r.name for r in found]
    return [replace(r, name=str(r.folder)) if names.count(r.name) > 1 else r for r in found]


# --- pages ---


def _run_page(run: Run) -> dict[str, Any]:
    folder = run.folder / FIGURES
    return {
        "title": run.name,
        "run": {
            **_text(run),
            "tiles": _tiles(run),
            "pictures": {
                name: _picture(folder / f"{name}.png", plan) for name, plan in _figures(run).items()
            },
            "teacher": _teacher_table(run),
            "has_teacher": run.config.teacher is not None,
            "evaluation": _evaluation_table(run.evaluation),
            "yaml": configuration.to_yaml(run.config),
        },
    }


def _comparison_page(found: list[Run]) -> dict[str, Any]:
    groups = [_group(r) for r in found]
    names = list(dict.fromkeys(groups))
    colors = len(LIGHT.cycle)
    keys = [(i % colors, i // colors % len(STYLES)) for i in map(names.index, groups)]
    swatch = {group: (color, list(STYLES)[style]) for group, (color, style) in zip(groups, keys, strict=True)}
    plans = _comparison_figures(found, keys)
    return {
        "title": f"{len(found)} runs compared",
        "comparison": {
            "table": _comparison_table(found),
            "swatches": [swatch[g] for g in groups],
            "legend": [(name, *swatch[name], groups.count(name)) for name in names],
            "pictures": {name: _picture(None, plan) for name, plan in plans.items()},
            "runs": [_text(r) for r in found],
        },
    }


def _text(run: Run) -> dict[str, Any]:
    return {
        "name": run.name,
        "status": _status(run),
        "finished": run.last("summary") is not None,
        "notices": _notices(run),
        "facts": _facts(run),
        "stages": _stage_table(run),
        "terms": terms(run.config),
    }


def _group(run: Run) -> str:
    """What runs that differ in the seed alone have in common."""
    return re.sub(r"[-_]seed\d+", "", run.name)


def _template() -> Any:
    text = resources.files("irkd_dist").joinpath(TEMPLATE).read_text("utf-8")
    strict = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return strict.from_string(text)


def _write_text(page: Path, text: str) -> None:
    part = page.with_name(page.name + ".part")
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, "utf-8")
        part.replace(page)
    except OSError as error:
        raise UserError(f"cannot write the report {page}: {error}") from error


# --- words and numbers ---


def terms(config: Config) -> str:
    """The terms that are on, as the paper names them: `CE + KD + CL + saliency`."""
    alpha = config.loss.kd.alpha
    parts = {
        "CE": config.loss.form == "sum" or alpha < 1,
        "KD": alpha > 0,
        "CL": len(configuration.stages(config)) > 1,
        "saliency": config.loss.saliency.gamma > 0,
    }
    return " + ".join(name for name, on in parts.items() if on)


def _status(run: Run) -> str:
    if run.last("summary") is not None:
        return "finished"
    if not run.events:
        return "not started"
    stages, stage = configuration.stages(run.config), run.last("stage")
    where = f", in stage {stage['stage'] + 1} of {len(stages)}" if stage else ""
    return f"unfinished: at step {run.events[-1]['step']:,}{where}"


def _notices(run: Run) -> list[str]:
    notices = list(run.notices)
    epochs = run.of("evaluation")
    if run.last("summary") is None:
        notices.append("This run is not finished; what follows is its state so far.")
    if not epochs:
        notices.append("No epoch has been completed yet, so there are no accuracies.")
    elif len(epochs) == 1:
        notices.append("There is only one epoch, so each curve is a single point.")
    if any(e["split"] == "test" for e in epochs):
        notices.append(
            "There is no validation split: stages were judged, and the best checkpoint chosen, by the test split."
        )
    return notices


def _facts(run: Run) -> list[tuple[str, str]]:
    config, start = run.config, run.last("resume") or run.last("start")
    first = run.last("start")
    facts = [
        (
            "Student" if config.teacher else "Network",
            _model(config.student, configuration.student_distilled(config)),
        ),
        ("Teacher", _teacher(config)),
        ("Loss", _loss(config)),
        ("Saliency", _saliency(config)),
        ("Resolutions", _stages(config)),
        ("Optimizer", _optimizer(config)),
        ("Data", _data(config)),
        ("Augmentation", _augmentation(config)),
        ("Seed", str(config.seed)),
    ]
    if start:
        world = start["world"]
        facts += [
            ("Machine", f"{world} process{'es' * (world > 1)} on {start['device']}, {start['precision']}"),
            ("Versions", f"irkd_dist {run.version or 'unknown'}, torch {start['torch']}"),
        ]
    if first:
        resumed = sum(e["step"] < run.events[-1]["step"] for e in run.of("resume"))
        again = f", resumed {resumed} time{'s' * (resumed > 1)}" if resumed else ""
        began = datetime.fromtimestamp(first["time"], UTC)
        facts.append(("Started", f"{began:%Y-%m-%d %H:%M} UTC{again}"))
    facts += [("Note", note) for note in (start or {}).get("notes", [])]
    return facts


def _model(model: configuration.Model, distilled: object) -> str:
    parts = [model.name]
    parts += [f"patch {model.patch}"] if model.patch else []
    parts += ["distillation token"] if distilled is True else []
    parts += [f"dropout {model.dropout:g}"] if model.dropout else []
    parts += [f"drop path {model.drop_path:g}"] if model.drop_path else []
    parts += ["pretrained"] if model.pretrained or model.weights else []
    return ", ".join(parts)


def _teacher(config: Config) -> str:
    spec = config.teacher
    if spec is None:
        return "none"
    name = spec.run if spec.run else _model(spec.model, False) if spec.model else ""
    view = "sees the student's resolution" if spec.view == "matched" else "sees the full resolution"
    return f"{name}, {view}" + (", a checkpoint for each stage" if spec.schedule == "aligned" else "")


def _loss(config: Config) -> str:
    loss = config.loss
    alpha, gamma = loss.kd.alpha, loss.saliency.gamma
    parts = ["CE" if loss.form == "sum" or not alpha else f"{1 - alpha:g} CE"]
    if alpha:
        kind = f"soft, T = {loss.kd.temperature:g}" if loss.kd.kind == "soft" else "hard"
        follows = ", weight follows the teacher" if loss.kd.follow_teacher else ""
        parts.append(f"{alpha:g} KD ({kind}{follows})")
    parts += [f"{gamma:g} saliency"] if gamma else []
    return " + ".join(parts)


def _saliency(config: Config) -> str:
    spec = config.loss.saliency
    if not spec.gamma:
        return f"not in the loss (maps shown: {spec.method})"
    taps = spec.taps if isinstance(spec.taps, str) else ", ".join(map(str, spec.taps))
    text = f"{spec.method} maps at taps {taps}; {spec.normalization}"
    text += f"; every {spec.every} steps" if spec.every > 1 else ""
    return text + (f"; on {spec.fraction:.0%} of the batch" if spec.fraction < 1 else "")


def _stages(config: Config) -> str:
    stages, spec = configuration.stages(config), config.curriculum or config.fixed
    epochs = [str(s.epochs) for s in stages]
    same = len(set(epochs)) == 1
    text = " → ".join(str(s.resolution) for s in stages) + " px, "
    text += (epochs[0] if same else " + ".join(epochs)) + f" epoch{'s' * (epochs != ['1'])}"
    text += " each" if same and len(stages) > 1 else ""
    text += f", patience {spec.patience}" if spec and spec.patience else ""
    best = config.curriculum is not None and config.curriculum.start_from == "best"
    return text + (", each from the best of the one before" if best and len(stages) > 1 else "")


def _optimizer(config: Config) -> str:
    spec = config.optim
    text = f"AdamW, learning rate {spec.lr:g} ({spec.schedule.kind.replace('_', ' ')})"
    text += f", weight decay {spec.weight_decay:g}"
    several = len(configuration.stages(config)) > 1
    return text + (f"; at a new stage: {spec.policy}" if several else "")


def _data(config: Config) -> str:
    subset = f", {config.data.subset:,} training images" if config.data.subset else ""
    return f"{config.data.shards}{subset}, batch {config.data.batch}"


def _augmentation(config: Config) -> str:
    spec = config.augment
    parts = [f"crop with {spec.padding} px padding"] if spec.padding else []
    parts += ["flip"] if spec.flip else []
    named = {"auto_augment": "AutoAugment", "erase": "erasing", "mixup": "MixUp", "cutmix": "CutMix"}
    parts += [f"{label} {getattr(spec, key):g}" for key, label in named.items() if getattr(spec, key)]
    parts += [f"label smoothing {spec.smoothing:g}"] if spec.smoothing else []
    return ", ".join(parts) or "none"


def _best_of_last_stage(run: Run) -> dict[str, Any] | None:
    """The evaluation whose weights the run is judged by, the earliest of equal ones."""
    last = run.last("evaluation")
    return max(run.evaluations(last["stage"]), key=lambda e: e["accuracy"]) if last else None


def _accuracies(run: Run, stage: int) -> list[float]:
    return [e["accuracy"] for e in run.evaluations(stage)]


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """(label, value, remark) of the numbers that matter most."""
    summary, epochs = run.last("summary") or {}, run.of("evaluation")
    tiles = []
    if "test_accuracy" in summary:
        remark = f"best checkpoint, {summary['resolution']} px; last {summary['test_accuracy_last']:.2%}"
        tiles.append(("Test accuracy", f"{summary['test_accuracy']:.2%}", remark))
    best = _best_of_last_stage(run)
    if best:
        label = "Best validation" if best["split"] != "test" else "Best on test"
        tiles.append((label, f"{best['accuracy']:.2%}", f"{best['resolution']} px, epoch {best['epoch']}"))
    teacher = run.last("teacher")
    if teacher:
        remark = f"held out, {teacher['resolutions'][-1]} px"
        tiles.append(("Teacher", f"{teacher['accuracy'][-1]:.2%}", remark))
    if epochs:
        count = f"{len(epochs)} epoch{'s' * (len(epochs) > 1)}, {run.events[-1]['step']:,} steps"
        tiles.append(("Time", _duration(_total_seconds(run)), count))
    wait = _wait_share(run.of("train"))
    if wait is not None:
        tiles.append(("Waiting for data", f"{wait:.1%}", "of the time in training steps"))
    return tiles


def _stage_table(run: Run) -> dict[str, Any]:
    """Header and rows of the summary by stage; stages not reached have empty cells."""
    seconds, moved = _seconds(run), {e["stage"]: e["reason"] for e in run.of("transition")}
    rows = []
    for i, stage in enumerate(configuration.stages(run.config)):
        epochs, steps = run.evaluations(i), [e for e in run.of("train") if e["stage"] == i]
        wait = _wait_share(steps)
        values = {
            "stage": f"{stage.resolution} px",
            "epochs": f"{len(epochs)} / {stage.epochs}",
            "train": f"{epochs[-1]['train_accuracy']:.2%}" if epochs else "",
            "best val": f"{max(e['accuracy'] for e in epochs):.2%}" if epochs else "",
            "last val": f"{epochs[-1]['accuracy']:.2%}" if epochs else "",
            "images/s": f"{statistics.median(e['images_per_s'] for e in steps):,.0f}" if steps else "",
            "data wait": "" if wait is None else f"{wait:.1%}",
            "time": _duration(seconds[i]) if i in seconds else "",
            "ended": moved.get(i, "") or _end(run, i),
        }
        rows.append(values)
    return {"columns": list(rows[0]), "rows": [list(r.values()) for r in rows]}


def _teacher_table(run: Run) -> dict[str, Any] | None:
    teacher = run.last("teacher")
    if teacher is None:
        return None
    weights = {e["stage"]: (f"{e['alpha']:.3g}", f"{e['gamma']:.3g}") for e in run.of("stage")}
    rows = []
    for i, size in enumerate(teacher["resolutions"]):
        best = max(_accuracies(run, i), default=None)
        gap = "" if best is None else f"{100 * (best - teacher['accuracy'][i]):+.2f}"
        rows.append(
            [
                f"{size} px",
                f"{teacher['accuracy'][i]:.2%}",
                gap.replace("-", "\N{MINUS SIGN}"),
                *weights.get(i, ("", "")),
            ]
        )
    columns = ["resolution", "teacher", "student minus teacher", "KD weight", "saliency weight"]
    return {"columns": columns, "rows": rows}


def _end(run: Run, stage: int) -> str:
    epochs = run.evaluations(stage)
    entered = any(e["stage"] == stage for e in run.of("stage"))
    if not entered:
        return "not reached"
    if run.last("summary") is None:
        return "unfinished"
    planned = configuration.stages(run.config)[stage].epochs
    return f"{len(epochs)} epochs done" if len(epochs) == planned else "no better validation accuracy"


def _elapsed(events: list[dict[str, Any]]) -> list[float]:
    """Seconds of training up to each event; pauses before a resume and the final test are left out."""
    steps = [0.0]
    for before, event in itertools.pairwise(events):
        outside = event["event"] in ("start", "resume", "summary")
        steps.append(0.0 if outside else max(event["time"] - before["time"], 0.0))
    return list(itertools.accumulate(steps))


def _seconds(run: Run) -> dict[int, float]:
    """Seconds spent in each stage; -1 is before the first one."""
    spent: dict[int, float] = {}
    stage, entered = -1, 0.0
    for event, now in zip(run.events, _elapsed(run.events), strict=False):
        spent[stage] = spent.get(stage, 0.0) + now - entered
        stage, entered = event["stage"] if event["event"] == "stage" else stage, now
    return spent


def _timed_evaluations(run: Run) -> list[tuple[dict[str, Any], float]]:
    timed = zip(run.events, _elapsed(run.events), strict=False)
    return [(e, seconds) for e, seconds in timed if e["event"] == "evaluation"]


def _total_seconds(run: Run) -> float:
    summary = run.last("summary")
    return summary["seconds"] if summary else _elapsed(run.events)[-1]


def _wait_share(steps: list[dict[str, Any]]) -> float | None:
    """Share of the time in training steps that was spent waiting for data."""
    counts = np.diff([0, *(e["step"] for e in steps)]) if steps else np.zeros(0)
    if steps and len(steps) > 1:
        counts[0] = counts[1]  # the first line's start is not in the record
    times = np.array([n / e["images_per_s"] for n, e in zip(counts, steps, strict=True)])
    if not times.sum():
        return None
    return float((times * [e["data_wait"] for e in steps]).sum() / times.sum())


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 600:
        return "{} min {:02d} s".format(*divmod(round(seconds), 60))
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def _evaluation_table(evaluation: Evaluation | None) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    names = ["accuracy", "map error (MSE)", "map correlation", "pointing"]
    forms = ["{:.2%}", "{:.4f}", "{:.3f}", "{:.2%}"]
    kept = [i for i in range(4) if any(row[i + 1] is not None for row in evaluation.rows)]
    rows = [
        [f"{row[0]} px", *("" if row[i + 1] is None else forms[i].format(row[i + 1]) for i in kept)]
        for row in evaluation.rows
    ]
    return {"split": evaluation.split, "columns": ["resolution", *(names[i] for i in kept)], "rows": rows}


def _comparison_table(found: list[Run]) -> dict[str, Any]:
    rows, scores = [], []
    for run in found:
        summary, config = run.last("summary") or {}, run.config
        test, best = summary.get("test_accuracy"), _best_of_last_stage(run)
        scores.append([test, best["accuracy"] if best else None])
        stages = [s.resolution for s in configuration.stages(config)]
        row = {
            "run": run.name,
            "test": f"{test:.2%}" if test is not None else "" if summary else "unfinished",
            "best val": f"{best['accuracy']:.2%}" if best else "",
            "terms": terms(config),
            "student": config.student.name + (f" / {config.student.patch}" if config.student.patch else ""),
            "resolution": f"{stages[0]} to {stages[-1]} px" if len(stages) > 1 else f"{stages[0]} px",
            "stages": str(len(stages)),
            "epochs": str(len(run.of("evaluation"))),
            "steps": f"{run.events[-1]['step'] if run.events else 0:,}",
            "time": _duration(_total_seconds(run)),
        }
        rows.append(row)
    best = [max((s for s in column if s is not None), default=None) for column in zip(*scores, strict=True)]
    marked = [[s is not None and s == top for s, top in zip(own, best, strict=True)] for own in scores]
    tops = [[False, *marks, *[False] * 7] for marks in marked]
    return {"columns": list(rows[0]), "rows": [list(r.values()) for r in rows], "tops": tops}


# --- figures ---


def _figures(run: Run) -> dict[str, Plan | None]:
    """The figures of a run by name; None where it has no data for one."""
    return {
        "accuracy": _accuracy_plan(run),
        "resolutions": _resolutions_plan(run),
        "losses": _losses_plan(run),
        "pace": _pace_plan(run),
        "teacher": _teacher_plan(run),
        "saliency": _saliency_plan(run),
        "evaluation": _evaluation_plan(run),
    }


def _accuracy_plan(run: Run) -> Plan | None:
    epochs, teacher, summary = run.of("evaluation"), run.last("teacher"), run.last("summary") or {}
    if not epochs:
        return None
    spans, best = _epoch_spans(run), _best_of_last_stage(run) or epochs[-1]
    held = "validation" if epochs[-1]["split"] != "test" else "test, in place of validation"

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        _bands(axes, theme, spans)
        if teacher:
            for (start, end, _), level in zip(spans, teacher["accuracy"], strict=False):
                label = "teacher at that resolution"
                axes.plot([start, end], [100 * level] * 2, ":", color=theme.cycle[2], lw=1.4, label=label)
        for own in _epochs_by_stage(run):
            _plot_accuracies(axes, theme, "epoch", own, _mark(len(epochs)), held)
        if "test_accuracy" in summary:
            style = {"ms": 6, "mfc": theme.surface, "mec": theme.text, "mew": 1.3, "ls": "", "zorder": 5}
            x, y = best["epoch"], 100 * summary["test_accuracy"]
            axes.plot(x, y, "D", clip_on=False, label="test, best checkpoint", **style)
        axes.set(xlabel="epoch", ylabel="accuracy, %", xlim=(spans[0][0], spans[-1][1]))
        axes.xaxis.set_major_locator(_ticks(12, whole=True))
        _legend(figure, axes)

    shown = ", ".join(f"{r} px" for *_, r in spans)
    last = f"{epochs[-1]['accuracy']:.1%} validation, {epochs[-1]['train_accuracy']:.1%} training"
    caption = "Each band is a stage at one resolution. " if len(spans) > 1 else ""
    caption += "Training accuracy is measured while the weights change, on augmented images; validation "
    caption += "afterwards, on plain ones."
    alt = f"Training and validation accuracy over {len(epochs)} epochs at {shown}; at the end {last}."
    heights = {WIDE: 3.4, NARROW: 2.9}
    return Plan("Accuracy over epochs", alt, caption, (WIDE, NARROW), heights.__getitem__, draw)


def _resolutions_plan(run: Run) -> Plan | None:
    stages = _epochs_by_stage(run)
    if len(stages) < 2:
        return None

    def grid(width: float) -> tuple[int, int]:
        rows = -(-len(stages) // (6 if width > NARROW else 2))
        return rows, -(-len(stages) // rows)

    def draw(figure: Figure, theme: Theme) -> None:
        rows, columns = grid(figure.get_figwidth())
        every = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
        for k, (axes, own) in enumerate(zip(every, stages, strict=False)):
            _plot_accuracies(axes, theme, "stage_epoch", own, _mark(len(own)), "validation")
            axes.set_title(f"{own[0]['resolution']} px", loc="left", fontweight="bold")
            best = max(e["accuracy"] for e in own)
            axes.set_title(f"{100 * best:.1f}", loc="right", color=theme.cycle[0])
            axes.set_xlim(0.5, max(own[-1]["stage_epoch"], 2) + 0.5)
            axes.xaxis.set_major_locator(_ticks(4, whole=True))
            axes.set_ylabel("accuracy, %" if k % columns == 0 else "")
            axes.set_xlabel("epoch in stage" if k // columns == rows - 1 else "")
        for axes in every[len(stages) :]:
            axes.set_axis_off()
        _legend(figure, every[0])

    bests = (f"{own[0]['resolution']} px best {max(e['accuracy'] for e in own):.1%}" for own in stages)
    alt = f"Training and validation accuracy within each stage: {', '.join(bests)}."
    caption = "The number at the upper right is the stage's best validation accuracy in per cent."
    title = "Accuracy within each stage"
    return Plan(title, alt, caption, (WIDE, NARROW), lambda width: 0.5 + 1.85 * grid(width)[0], draw)


def _plot_accuracies(
    axes: Axes, theme: Theme, key: str, epochs: list[dict[str, Any]], mark: str, held: str
) -> None:
    """Training and validation accuracy over `key`, `epoch` or `stage_epoch`."""
    for name, color, style, width, label in (
        ("train_accuracy", 1, "--", 1.2, "training"),
        ("accuracy", 0, "-", 1.8, held),
    ):
        y = [100 * e[name] for e in epochs]
        line = {"color": theme.cycle[color], "lw": width, "ms": 3, "label": label}
        axes.plot([e[key] for e in epochs], y, style + mark, **line)


def _losses_plan(run: Run) -> Plan | None:
    steps = run.of("train")
    if not steps:
        return None
    names = [t for t in TERMS if any(t in e for e in steps)]
    if names == ["total", "ce"]:
        names = ["ce"]  # the only term: the total is the same
    ends = (f"{TERMS[n]} ends at {steps[-1][n]:.3g}" for n in names if n in steps[-1])
    caption = "Each term as it is before its weight; a point is the mean since the one before."
    flat = [e["flat_maps"] for e in steps if e.get("flat_maps")]
    if flat:
        caption += f" Maps without a shape, which count as zero: up to {max(flat):.1f} a step."
    rows = [(n, TERMS[n], 1.0) for n in names]
    alt = f"Loss terms over {steps[-1]['step']:,} steps: {', '.join(ends)}."
    return Plan("Loss terms", alt, caption, (HALF,), lambda _: STACKED, _stacked(run, rows))


def _pace_plan(run: Run) -> Plan | None:
    steps = run.of("train")
    if not steps:
        return None
    keys = {
        "images_per_s": ("images/s", 1.0),
        "data_wait": ("data wait, %", 100.0),
        "lr": ("learning rate", 1.0),
    }
    draw = _stacked(run, [(key, *rest) for key, rest in keys.items()], zero=True)
    alt = f"Images per second, share of time spent waiting for data ({_wait_share(steps) or 0:.1%} overall), "
    alt += "and learning rate over steps."
    caption = "Data wait: the share of the time in training steps that was spent waiting for the next batch."
    return Plan("Speed, data, learning rate", alt, caption, (HALF,), lambda _: STACKED, draw)


def _stacked(run: Run, rows: list[tuple[str, str, float]], zero: bool = False) -> Drawing:
    """Panels over steps, one above the other: (key of the train event, label, factor); `zero`: axes start there."""
    steps, spans = run.of("train"), _step_spans(run)

    def draw(figure: Figure, theme: Theme) -> None:
        every = figure.subplots(len(rows), 1, sharex=True, squeeze=False).ravel()
        for i, (axes, (key, label, factor)) in enumerate(zip(every, rows, strict=True)):
            _bands(axes, theme, spans, label=i == 0)
            own = [e for e in steps if key in e]
            x, y = [e["step"] for e in own], [factor * e[key] for e in own]
            axes.plot(x, y, _mark(len(own)) + "-", color=theme.cycle[0], lw=1.3, ms=3)
            axes.set_ylabel(label)
            axes.yaxis.set_major_locator(_ticks(4))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
            if zero:
                axes.set_ylim(0, 1.2 * max([*y, 1e-12]))
        every[-1].set(xlabel="step", xlim=(0, steps[-1]["step"]))
        every[-1].xaxis.set_major_locator(_ticks(5, whole=True))
        figure.align_ylabels(list(every))

    return draw


def _teacher_plan(run: Run) -> Plan | None:
    teacher = run.last("teacher")
    if teacher is None:
        return None
    sizes, levels = teacher["resolutions"], [100 * a for a in teacher["accuracy"]]
    bests = [100 * max(_accuracies(run, i), default=np.nan) for i in range(len(sizes))]

    def draw(figure: Figure, theme: Theme) -> None:
        axes, x = figure.subplots(), np.arange(len(sizes))
        for shift, values, color, label in (
            (-0.2, levels, theme.cycle[2], "teacher"),
            (0.2, bests, theme.cycle[0], "student, best of its stage"),
        ):
            bars = axes.bar(x + shift, values, 0.36, color=color, label=label)
            numbers = [f"{v:.0f}" if np.isfinite(v) else "" for v in values]
            axes.bar_label(bars, numbers, padding=2, fontsize=7.5, color=theme.muted)
        axes.set_xticks(x, [str(r) for r in sizes])
        axes.set(
            xlabel="resolution, px", ylabel="held-out accuracy, %", xlim=(-0.6, max(len(sizes), 3) - 0.4)
        )
        axes.margins(y=0.12)
        axes.grid(axis="x", visible=False)
        _legend(figure, axes)

    full = run.config.teacher is not None and run.config.teacher.view == "full"
    seen = "at full resolution, as it sees them throughout" if full else "at each stage's resolution"
    pairs = zip(sizes, levels, bests, strict=True)
    told = (f"{r} px teacher {t:.1f}%" + (f", student {b:.1f}%" if b == b else "") for r, t, b in pairs)
    alt = f"Held-out accuracy by resolution: {'; '.join(told)}."
    caption = f"The teacher's accuracy was measured before training, on images {seen}."
    return Plan("Teacher by resolution", alt, caption, (HALF,), lambda _: 2.9, draw)


def _evaluation_plan(run: Run) -> Plan | None:
    if run.evaluation is None:
        return None
    rows, parts = run.evaluation.rows, []
    for i, label, factor in (
        (1, "accuracy, %", 100.0),
        (3, "map correlation", 1.0),
        (4, "pointing, %", 100.0),
    ):
        points = [(row[0], factor * value) for row in rows if (value := row[i]) is not None]
        parts += [(label, points)] if points else []
    if not parts:
        return None
    trained = {s.resolution for s in configuration.stages(run.config)}

    def draw(figure: Figure, theme: Theme) -> None:
        every = figure.subplots(len(parts), 1, sharex=True, squeeze=False).ravel()
        for axes, (label, points) in zip(every, parts, strict=True):
            axes.plot(*zip(*points, strict=True), "-", color=theme.cycle[0], lw=1.4)
            for size, value in points:
                fill = theme.cycle[0] if size in trained else theme.surface
                axes.plot(size, value, "o", ms=5, mfc=fill, mec=theme.cycle[0], mew=1.3)
            axes.set_ylabel(label)
            axes.yaxis.set_major_locator(_ticks(4))
            axes.margins(y=0.2)
        every[-1].set_xticks([row[0] for row in rows])
        every[-1].set_xlabel("resolution, px")
        figure.align_ylabels(list(every))

    ends = (f"{label.removesuffix(', %')} {points[-1][1]:.3g}" for label, points in parts)
    alt = f"Measured on the {run.evaluation.split} split over resolution; at the largest: {', '.join(ends)}."
    caption = "Filled points are resolutions that the run was trained at."
    height = 0.9 + 1.15 * max(len(parts), 2)
    return Plan("Evaluation by resolution", alt, caption, (HALF,), lambda _: height, draw)


def _saliency_plan(run: Run) -> Plan | None:
    """Samples as blocks of columns (image, teacher, student); snapshots as rows, from the first stage to the last."""
    shots = run.panels
    if len(shots) > MOST_SNAPSHOTS:
        shots = list({stage: (stage, epoch, arrays) for stage, epoch, arrays in shots}.values())
    samples = min((len(arrays["images"]) for *_, arrays in shots), default=0)
    shown = min(samples, MOST_SAMPLES)
    if not shown:
        return None
    has_teacher = all("teacher" in arrays for *_, arrays in shots)
    columns = ["image", "teacher", "student"] if has_teacher else ["image", "map"]
    labels = [_class_name(run, int(y)) for y in shots[0][2]["labels"][:shown]]
    left, top, gap = 0.62, 0.46, 0.16

    def cell(width: float) -> tuple[int, float]:
        """Samples side by side, and the side of an image in inches."""
        across = min(shown, 4 if width > NARROW else 2)
        return across, min((width - left - gap * (across - 1)) / (across * len(columns)), 1.0)

    def height(width: float) -> float:
        across, side = cell(width)
        return -(-shown // across) * (top + side * len(shots) + gap) - gap

    def draw(figure: Figure, theme: Theme) -> None:
        width, tall = (float(v) for v in figure.get_size_inches())
        across, side = cell(width)
        axes = figure.add_axes((0, 0, 1, 1))
        for n in range(shown):
            x0 = left + n % across * (side * len(columns) + gap)
            y0 = top + n // across * (top + side * len(shots) + gap)
            axes.text(x0, y0 - 0.26, labels[n], fontweight="bold", va="center", color=theme.text)
            for j, column in enumerate(columns):
                at = x0 + (j + 0.5) * side
                axes.text(at, y0 - 0.09, column, ha="center", va="center", fontsize=7, color=theme.muted)
            for i, (_, epoch, arrays) in enumerate(shots):
                if n % across == 0:
                    words = f"{int(arrays['resolution'])} px"
                    axes.text(0, y0 + (i + 0.4) * side, words, va="center", fontweight="bold", fontsize=8)
                    place = (0, y0 + (i + 0.4) * side + 0.15)
                    axes.text(*place, f"epoch {epoch}", va="center", fontsize=7, color=theme.muted)
                for j, picture in enumerate(_cells(arrays, n, has_teacher)):
                    x, y = x0 + j * side, y0 + i * side
                    box = (x + 0.015, x + side - 0.015, y + side - 0.015, y + 0.015)
                    axes.imshow(picture, extent=box, aspect="auto", interpolation="nearest")
        axes.set(xlim=(0, width), ylim=(tall, 0))
        axes.set_axis_off()

    sizes = list(dict.fromkeys(int(arrays["resolution"]) for *_, arrays in shots))
    method = run.config.loss.saliency.method.replace("_", "-")
    caption = (
        f"Held-out images as the network sees them, and their saliency: {method} maps averaged over the "
    )
    caption += "taps, each stretched to its own range, from dark (low) to yellow (high)."
    caption += f" The first {shown} of {samples} images." if samples > shown else ""
    caption += " Only the end of each stage is shown." if len(shots) < len(run.panels) else ""
    alt = f"Saliency maps ({', '.join(columns)}) of {', '.join(labels)} at {', '.join(map(str, sizes))} px."
    return Plan("Saliency across resolutions and epochs", alt, caption, (WIDE, NARROW), height, draw, True)


def _cells(arrays: dict[str, np.ndarray], n: int, has_teacher: bool) -> list[np.ndarray]:
    image = arrays["images"][n]
    maps = [arrays[name][n] for name in (["teacher"] * has_teacher + ["student"])]
    return [image, *(overlay(image, m) for m in maps)]


def overlay(image: np.ndarray, values: np.ndarray, side: int = 96) -> np.ndarray:
    """A map (h, w) in colour over the greyed image (H, W, 3) uint8, as (side, side, 3) uint8; flat maps are dark."""
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / (high - low) if high - low > 1e-6 else np.zeros_like(values)
    smooth = Image.fromarray(scaled.astype(np.float32)).resize((side, side), Image.Resampling.BILINEAR)
    color = matplotlib.colormaps["inferno"](np.asarray(smooth))[..., :3]
    grey = Image.fromarray(image).convert("L").resize((side, side), Image.Resampling.NEAREST)
    return (255 * (0.68 * color + 0.32 * np.asarray(grey)[..., None] / 255)).round().astype(np.uint8)


def _class_name(run: Run, label: int) -> str:
    return run.classes[label] if label < len(run.classes) else f"class {label}"


def _comparison_figures(found: list[Run], keys: list[tuple[int, int]]) -> dict[str, Plan]:
    """Validation curves of all runs over epochs and over time; `keys` are (colour, line style) of each run."""
    lines = [[(e["epoch"], t / 60, 100 * e["accuracy"]) for e, t in _timed_evaluations(r)] for r in found]
    if not any(lines):
        return {}

    def plan(column: int, title: str, label: str, caption: str) -> Plan:
        def draw(figure: Figure, theme: Theme) -> None:
            axes = figure.subplots()
            for line, (color, style) in zip(lines, keys, strict=True):
                x, y = [p[column] for p in line], [p[2] for p in line]
                drawn = list(STYLES.values())[style] + _mark(len(x))
                axes.plot(x, y, drawn, color=theme.cycle[color], lw=1.6, ms=3.5)
            axes.set(xlabel=label, ylabel="accuracy, %")
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(_ticks(10, whole=column == 0))

        ends = (f"{run.name} {line[-1][2]:.1f}%" for run, line in zip(found, lines, strict=True) if line)
        alt = f"Validation accuracy of {len(found)} runs; last values: {', '.join(ends)}."
        return Plan(title, alt, caption, (WIDE, NARROW), {WIDE: 3.2, NARROW: 2.8}.__getitem__, draw)

    stops = "Time between a stop and a resume is left out."
    return {
        "epochs": plan(0, "Over epochs", "epoch", "Each at the resolution of the run's stage."),
        "minutes": plan(1, "Over time", "minutes of training", stops),
    }


def _epochs_by_stage(run: Run) -> list[list[dict[str, Any]]]:
    return [own for i in range(len(configuration.stages(run.config))) if (own := run.evaluations(i))]


def _epoch_spans(run: Run) -> list[tuple[float, float, int]]:
    """Each stage's first and last epoch, half an epoch wider on both sides, and its resolution."""
    stages = _epochs_by_stage(run)
    return [(own[0]["epoch"] - 0.5, own[-1]["epoch"] + 0.5, own[0]["resolution"]) for own in stages]


def _step_spans(run: Run) -> list[tuple[float, float, int]]:
    entered = {e["stage"]: e for e in reversed(run.of("stage"))}  # the first entry of each
    starts = [(e["step"], e["resolution"]) for _, e in sorted(entered.items())]
    ends = [start for start, _ in starts[1:]] + [max(e["step"] for e in run.events)]
    return [(start, end, size) for (start, size), end in zip(starts, ends, strict=False)]


def _bands(axes: Axes, theme: Theme, spans: list[tuple[float, float, int]], label: bool = True) -> None:
    """Shade every second stage, and name each one's resolution at the top where there is more than one."""
    style = {"fontsize": 7.5, "color": theme.muted, "ha": "center", "va": "bottom"}
    for i, (start, end, size) in enumerate(spans):
        if i % 2:
            axes.axvspan(start, end, color=theme.band, lw=0, zorder=0)
        if i:
            axes.axvline(start, color=theme.grid, lw=1, zorder=0.5)
        if label and len(spans) > 1:
            part = (end - start) / (spans[-1][1] - spans[0][0])
            text = f"{size} px" if part > 0.12 else str(size)
            at = ("data", "axes fraction")
            axes.annotate(text, ((start + end) / 2, 1), (0, 3), at, "offset points", **style)


def _legend(figure: Figure, axes: Axes) -> None:
    """Keys above the whole figure, each label once."""
    keys = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    columns = len(keys) if figure.get_figwidth() > NARROW else 2
    where = "outside upper left"
    figure.legend(list(keys.values()), list(keys), loc=where, ncols=columns, frameon=False)


def _ticks(most: int, whole: bool = False) -> MaxNLocator:
    return MaxNLocator(most, steps=[1, 2, 5, 10], integer=whole, min_n_ticks=1)


def _mark(points: int) -> str:
    """Markers while points are few: a single one would draw no line."""
    return "o" if points <= 25 else ""


def _picture(file: Path | None, plan: Plan | None) -> dict[str, Any] | None:
    """Draw a plan in light and dark, for page and phone; `file` gets the page's light one, as PNG."""
    if plan is None:
        return None
    sources = []
    for width in reversed(plan.widths):
        size = (round(100 * width), round(100 * plan.height(width)))
        phone = " and (max-width: 640px)" if width != plan.widths[0] else ""
        for dark in (True, False):
            theme = DARK if dark else LIGHT
            image = _draw(plan, width, theme)
            query = "screen" + " and (prefers-color-scheme: dark)" * dark + phone
            sources.append((query, _data_uri(image, plan, theme), size))
            if file is not None and not dark and width == plan.widths[0]:
                _save_png(image, file, plan, theme)
    *others, (_, image, size) = sources
    words = {"title": plan.title, "alt": plan.alt, "caption": plan.caption}
    return {**words, "image": image, "size": size, "sources": others}


def _draw(plan: Plan, width: float, theme: Theme) -> Image.Image:
    with matplotlib.rc_context(_style(theme)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # class names in any script
        layout = None if plan.photographs else "constrained"
        figure = Figure((width, plan.height(width)), dpi=DPI, layout=layout)
        canvas = FigureCanvasAgg(figure)
        plan.draw(figure, theme)
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _data_uri(image: Image.Image, plan: Plan, theme: Theme) -> str:
    kind = "webp" if plan.photographs else "png"
    buffer = io.BytesIO()
    if plan.photographs:
        image.save(buffer, kind, quality=85, method=2)
    else:
        _few_colors(image, theme).save(buffer, kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _save_png(image: Image.Image, file: Path, plan: Plan, theme: Theme) -> None:
    try:
        file.parent.mkdir(exist_ok=True)
        (image if plan.photographs else _few_colors(image, theme)).save(file)
    except OSError as error:
        raise UserError(f"cannot write the figure {file}: {error}") from error


def _few_colors(image: Image.Image, theme: Theme) -> Image.Image:
    """Lines and text need the theme's colours and their blends with the ground: a third of the bytes."""
    plain = [to_rgb(color) for color in (theme.surface, theme.band, theme.grid)]
    inks = (theme.text, theme.muted, *theme.cycle)
    blends = [np.linspace(plain[0], to_rgb(ink), 13)[1:] for ink in inks]
    colors = np.concatenate([plain, *blends])
    palette = Image.new("P", (1, 1))
    palette.putpalette((255 * colors).round().astype(np.uint8).tobytes())
    return image.quantize(palette=palette, dither=Image.Dither.NONE)


def _style(theme: Theme) -> Any:
    installed = set(font_manager.get_font_names())
    families = [f for f in ("Inter", "Helvetica Neue", "Arial", "Liberation Sans") if f in installed]
    return {
        "font.family": [*families, "DejaVu Sans"],
        "font.size": 8,
        "axes.titlesize": 8.5,
        "axes.labelsize": 8,
        "axes.labelcolor": theme.muted,
        "axes.titlecolor": theme.text,
        "axes.edgecolor": theme.grid,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.formatter.useoffset": False,
        "grid.color": theme.grid,
        "grid.linewidth": 0.6,
        "xtick.color": theme.grid,
        "ytick.color": theme.grid,
        "xtick.labelcolor": theme.muted,
        "ytick.labelcolor": theme.muted,
        "xtick.labelsize": 7.5,
        "ytick.labelsize": 7.5,
        "figure.facecolor": theme.surface,
        "savefig.facecolor": theme.surface,
        "text.color": theme.text,
        "text.parse_math": False,
        "legend.fontsize": 7.5,
        "lines.solid_capstyle": "round",
    }
