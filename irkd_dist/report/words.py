"""A run in words and numbers: what was run, what came out, and the tables."""

from __future__ import annotations

import statistics
from datetime import UTC, datetime

from irkd_dist import config as configuration
from irkd_dist.config import Config
from irkd_dist.report import reading
from irkd_dist.report.reading import Run

Row = dict[str, str]  # column -> cell


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


def status(run: Run) -> str:
    """Whether the run is finished, and how far it is if not."""
    if run.last("summary"):
        return "finished"
    stage = run.last("stage")
    where = f", in stage {stage['stage'] + 1} of {len(run.stages)}" if stage else ""
    return f"unfinished: at step {run.step:,}{where}" if run.events else "not started"


def notices(run: Run) -> list[str]:
    """What a reader must know before believing the numbers."""
    unfinished = "This run is not finished; what follows is its state so far."
    judged = "There is no validation split: the best checkpoints were chosen by the test split."
    on_test = any(e["split"] == "test" for e in run.of("evaluation"))
    return [*run.notices, *[unfinished] * (not run.last("summary")), *[judged] * on_test]


def facts(run: Run) -> list[tuple[str, str]]:
    """What was run, as (name, value)."""
    config, start = run.config, run.last("resume") or run.last("start")
    student = _model(config.student, configuration.student_distilled(config) is True)
    data = f"{config.data.shards}, batch {config.data.batch}"
    data += f", {config.data.subset:,} training images" if config.data.subset else ""
    result = [("Student" if config.teacher else "Network", student), ("Teacher", _teacher(config))]
    result += [("Loss", _loss(config)), ("Resolutions", _stages(run))]
    result += [("Optimizer", _optimizer(run)), ("Data", data)]
    if start:
        world, began = start["world"], run.events[0]["time"]
        processes = f"{world} process{'es' * (world > 1)} on {start['device']}, {start['precision']}"
        resumed = len(run.of("resume"))
        again = f", resumed {resumed} time{'s' * (resumed > 1)}" if resumed else ""
        result += [("Machine", f"{processes}; irkd_dist {run.version}, torch {start['torch']}")]
        result += [("Started", f"{datetime.fromtimestamp(began, UTC):%Y-%m-%d %H:%M} UTC{again}")]
        result += [("Note", note) for note in start["notes"]]
    return result


def tiles(run: Run) -> list[tuple[str, str, str]]:
    """(label, value, remark) of the numbers that matter most."""
    summary, best, teacher = run.last("summary"), run.best, run.last("teacher")
    result = []
    if summary and "test_accuracy" in summary:
        remark = f"best checkpoint, {summary['resolution']} px; last {summary['test_accuracy_last']:.2%}"
        result.append(("Test accuracy", f"{summary['test_accuracy']:.2%}", remark))
    if best:
        label = "Best validation" if best["split"] != "test" else "Best on test"
        result.append((label, f"{best['accuracy']:.2%}", f"{best['resolution']} px, epoch {best['epoch']}"))
    if teacher:
        remark = f"held out, {teacher['resolutions'][-1]} px"
        result.append(("Teacher", f"{teacher['accuracy'][-1]:.2%}", remark))
    if best:
        count = len(run.of("evaluation"))
        remark = f"{count} epoch{'s' * (count > 1)}, {run.step:,} steps"
        result.append(("Time", duration(_seconds(run)), remark))
    wait = reading.wait_share(run.of("train"))
    if wait is not None:
        result.append(("Waiting for data", f"{wait:.1%}", "of the time in training steps"))
    return result


def stage_table(run: Run) -> list[Row]:
    """A row for each stage; cells of stages not reached are empty."""
    seconds, teacher = reading.stage_seconds(run), run.last("teacher")
    reasons = {e["stage"]: e["reason"] for e in run.of("transition")}
    entered = {e["stage"]: e for e in run.of("stage")}
    varied = len({(e["alpha"], e["gamma"]) for e in entered.values()}) > 1
    rows = []
    for i, stage in enumerate(run.stages):
        epochs, steps, at = run.of("evaluation", i), run.of("train", i), entered.get(i)
        row = {"stage": f"{stage.resolution} px", "epochs": f"{len(epochs)} / {stage.epochs}"}
        if epochs:
            row["train"] = f"{epochs[-1]['train_accuracy']:.2%}"
            row["last val"] = f"{epochs[-1]['accuracy']:.2%}"
            row["best val"] = f"{max(e['accuracy'] for e in epochs):.2%}"
        if teacher:
            row["teacher"] = f"{teacher['accuracy'][i]:.2%}"
        if at and varied:
            row |= {"KD weight": f"{at['alpha']:.3g}", "saliency weight": f"{at['gamma']:.3g}"}
        if steps:
            row["images/s"] = f"{statistics.median(e['images_per_s'] for e in steps):,.0f}"
            row["data wait"] = f"{reading.wait_share(steps):.1%}"
        row["time"] = duration(seconds[i]) if i in seconds else ""
        row["ended"] = reasons.get(i) or ("not reached" if not at else status(run).partition(":")[0])
        rows.append(row)
    return rows


def evaluation_table(run: Run) -> list[Row]:
    """A row for each resolution that `irkd evaluate` measured."""
    rows = []
    for size, accuracy in run.measured.get("accuracy", {}).items():
        maps = run.measured["agreement"].get(size, {})
        pointing = run.measured["pointing"].get(size)
        row = {"resolution": f"{size} px", "accuracy": f"{accuracy:.2%}"}
        row |= {"map error (MSE)": f"{maps['mse']:.4f}"} if maps else {}
        row |= {"map correlation": f"{maps['correlation']:.3f}"} if maps else {}
        rows.append(row | ({"pointing": f"{pointing:.2%}"} if pointing is not None else {}))
    return rows


def comparison_table(found: list[Run]) -> list[Row]:
    """A row for each run."""
    rows = []
    for run in found:
        summary, best, student = run.last("summary"), run.best, run.config.student
        sizes = [s.resolution for s in run.stages]
        row = {
            "run": run.name,
            "test": f"{summary['test_accuracy']:.2%}" if summary and "test_accuracy" in summary else "",
            "best val": f"{best['accuracy']:.2%}" if best else "",
            "terms": terms(run.config),
            "student": student.name + (f" / {student.patch}" if student.patch else ""),
            "resolution": f"{sizes[0]} to {sizes[-1]} px" if len(sizes) > 1 else f"{sizes[0]} px",
            "epochs": str(len(run.of("evaluation"))),
            "steps": f"{run.step:,}",
            "time": duration(_seconds(run)),
            "state": status(run).partition(":")[0],
        }
        rows.append(row)
    return rows


def columns(rows: list[Row]) -> list[str]:
    """All columns that a row has, in the order of the fullest row."""
    fullest_first = sorted(rows, key=len, reverse=True)
    return list(dict.fromkeys(name for row in fullest_first for name in row))


def duration(seconds: float) -> str:
    """`42 s`, `3 min 07 s`, `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return "{} min {:02d} s".format(*divmod(round(seconds), 60))
    return "{} h {:02d} min".format(*divmod(round(seconds / 60), 60))


def _seconds(run: Run) -> float:
    return reading.elapsed(run)[-1]


def _model(model: configuration.Model, distilled: bool) -> str:
    parts = [model.name, *([f"patch {model.patch}"] if model.patch else [])]
    parts += ["distillation token"] * distilled + ["pretrained"] * bool(model.pretrained or model.weights)
    return ", ".join(parts)


def _teacher(config: Config) -> str:
    spec = config.teacher
    if spec is None:
        return "none"
    name = spec.run or (_model(spec.model, False) if spec.model else "")
    view = "sees the student's resolution" if spec.view == "matched" else "sees the full resolution"
    return f"{name}, {view}" + (", a checkpoint for each stage" if spec.schedule == "aligned" else "")


def _loss(config: Config) -> str:
    loss, kd, maps = config.loss, config.loss.kd, config.loss.saliency
    parts = ["CE" if loss.form == "sum" or not kd.alpha else f"{1 - kd.alpha:g} CE"]
    if kd.alpha:
        kind = f"soft, T = {kd.temperature:g}" if kd.kind == "soft" else "hard"
        parts.append(f"{kd.alpha:g} KD ({kind}{', weight follows the teacher' * kd.follow_teacher})")
    if maps.gamma:
        taps = maps.taps if isinstance(maps.taps, str) else ", ".join(map(str, maps.taps))
        parts.append(f"{maps.gamma:g} saliency ({maps.method} maps at taps {taps}; {maps.normalization})")
    return " + ".join(parts)


def _stages(run: Run) -> str:
    epochs = [str(s.epochs) for s in run.stages]
    each = " each" if len(epochs) > 1 and len({*epochs}) == 1 else ""
    count = epochs[0] if each else " + ".join(epochs)
    return f"{' → '.join(str(s.resolution) for s in run.stages)} px, {count} epochs{each}"


def _optimizer(run: Run) -> str:
    spec = run.config.optim
    text = f"AdamW, learning rate {spec.lr:g} ({spec.schedule.kind.replace('_', ' ')})"
    text += f", weight decay {spec.weight_decay:g}"
    return text + (f"; at a new stage: {spec.policy}" if len(run.stages) > 1 else "")
