"""A run in numbers: the tiles at the top of the page, and the tables."""

from __future__ import annotations

import statistics
from typing import Any

from irkd_dist import happened as happened_
from irkd_dist.report import course, reading, scores, words
from irkd_dist.report.evaluations import Evaluation
from irkd_dist.report.reading import Run

MOST_ROWS = 60  # of what happened; the CSV has all
Table = dict[str, Any]  # columns, rows of as many cells, and what the page marks in them


def tiles(run: Run) -> list[tuple[str, str, str]]:
    """(label, value, remark) of the numbers that matter most."""
    summary, best = run.last("summary") or {}, run.best
    found = []
    if "test_accuracy" in summary:
        remark = f"best checkpoint, {run.stages[-1].resolution} px; last {_percent(summary.get('test_accuracy_last'))}"
        remark += _between(summary["test_accuracy"], reading.images(run, "test"), "; 95 %: ")
        found.append(("Test accuracy", f"{summary['test_accuracy']:.2%}", remark))
    if best:
        label = "Best validation" if best["split"] != "test" else "Best on test"
        remark = f"{best['resolution']} px, epoch {best['epoch']}"
        remark += _between(best["accuracy"], reading.images(run, best["split"]), "; 95 %: ")
        found.append((label, f"{best['accuracy']:.2%}", remark))
    teacher = run.last("teacher")
    if teacher and teacher["accuracy"]:
        remark = f"held out, {teacher['resolutions'][-1]} px"
        found.append(("Teacher", f"{teacher['accuracy'][-1]:.2%}", remark))
    if count := len(run.passed()):
        count = f"{count} epoch{'s' * (count > 1)}, {run.events[-1]['step']:,} steps"
        found.append(("Time", _duration(reading.total_seconds(run)), count))
    wait = reading.wait_share(run.of("train"))
    if wait is not None:
        found.append(("Waiting for data", f"{wait:.1%}", "of the time in training steps"))
    return found


def stages(run: Run) -> Table:
    """The summary by stage; stages not reached have empty cells."""
    seconds, decided = reading.stage_seconds(run), reading.ends(run)
    rows = []
    for i, stage in enumerate(run.stages):
        epochs, steps = run.of("evaluation", i), run.of("train", i)
        wait = reading.wait_share(steps)
        values = {
            "stage": f"{stage.resolution} px",
            "epochs": f"{len(run.passed(i))} / {stage.epochs}",
            "train": _percent(epochs[-1]["train_accuracy"]) if epochs else "",
            "best val": f"{max(e['accuracy'] for e in epochs):.2%}" if epochs else "",
            "last val": f"{epochs[-1]['accuracy']:.2%}" if epochs else "",
            "images/s": f"{statistics.median(e['images_per_s'] for e in steps):,.0f}" if steps else "",
            "data wait": "" if wait is None else f"{wait:.1%}",
            "time": _duration(seconds[i]) if i in seconds else "",
            "ended": decided.get(i) or _end(run, i),
        }
        rows.append(values)
    return {"columns": list(rows[0]), "rows": [list(r.values()) for r in rows]}


def teacher(run: Run) -> Table | None:
    """The teacher's accuracy at each resolution, and how far the student is from it."""
    measured = run.last("teacher")
    if measured is None:
        return None
    weights = {e["stage"]: (f"{e.get('alpha', 0):.3g}", f"{e.get('gamma', 0):.3g}") for e in run.of("stage")}
    rows = []
    for i, (size, _) in enumerate(zip(measured["resolutions"], measured["accuracy"], strict=False)):
        best = max((e["accuracy"] for e in run.of("evaluation", i)), default=None)
        level = measured["accuracy"][i]
        gap = "" if best is None else f"{100 * (best - level):+.2f}".replace("-", "\N{MINUS SIGN}")
        rows.append([f"{size} px", f"{level:.2%}", gap, *weights.get(i, ("", ""))])
    columns = ["resolution", "teacher", "student minus teacher", "KD weight", "saliency weight"]
    return {"columns": columns, "rows": rows}


def evaluation(measured: Evaluation) -> Table:
    """What `irkd evaluate` measured at each resolution."""
    names = ["accuracy", "map error (MSE)", "map correlation", "pointing"]
    forms = ["{:.2%}", "{:.4f}", "{:.3f}", "{:.2%}"]
    kept = [i for i in range(4) if any(row[i + 1] is not None for row in measured.rows)]
    rows = [
        [f"{row[0]} px", *("" if row[i + 1] is None else forms[i].format(row[i + 1]) for i in kept)]
        for row in measured.rows
    ]
    if measured.samples and 0 in kept:
        names.insert(1, "95 %")
        kept = [0, 1, *(i + 1 for i in kept[1:])]
        for cells, row in zip(rows, measured.rows, strict=True):
            cells.insert(2, "" if row[1] is None else _between(row[1], measured.samples))
    title = f"{measured.split} split" + (f", {measured.checkpoint}" if measured.checkpoint else "")
    title += f", {measured.samples:,} images" if measured.samples else ""
    title += f", shards {measured.data}" if measured.data else ""
    return {"title": title, "columns": ["resolution", *(names[i] for i in kept)], "rows": rows}


def mistaken(measured: Evaluation) -> Table | None:
    """The student's most frequent mistakes, and how often the teacher makes them."""
    pairs = scores.most_mistaken(measured, 8)
    if not pairs:
        return None
    rows = [[a, b, str(n), "" if theirs is None else str(theirs)] for a, b, n, theirs in pairs]
    return {"columns": ["class", "taken for", "by the student", "by the teacher"], "rows": rows}


def cost(run: Run, price: float | None) -> Table:
    """Time, operations, energy and money of training, as far as they are known."""
    seconds, joules, counted = reading.total_seconds(run), reading.joules(run), reading.spent_flops(run)
    world = (run.last("resume") or run.last("start") or {}).get("world")
    rows = [["time", _duration(seconds), "training; stops and the final test left out"]]
    if world:
        rows.append(["time of all processes", _duration(seconds * world), f"{world} at the last start"])
    if counted:
        power, prefix = course.scale(counted[-1][1])
        rate = counted[-1][1] / max(reading.timed_evaluations(run)[-1][1], 1e-9)
        rates = course.scale(rate)
        told = f"counted; {rate / rates[0]:.3g} {rates[1]}FLOPs a second"
        rows.append(["operations", f"{counted[-1][1] / power:.3g} {prefix}FLOPs", told])
    else:
        rows.append(
            ["operations", "not counted", "by an earlier release, or an engine that shards the weights"]
        )
    if joules is not None:
        told = "as processors (RAPL) and GPUs (NVML) count it"
        rows.append(["energy", f"{joules / 3.6e6:.3g} kWh", told])
    else:
        rows.append(["energy", "not told", "the machine has no counters that may be read (RAPL, NVML)"])
    if price is not None:
        rows.append(["money", f"{seconds / 3600 * price:,.2f}", f"at {price:g} an hour (--price)"])
    return {"columns": ["what", "value", "how it is known"], "rows": rows}


def happened(run: Run) -> Table:
    """Starts, transitions with what became of the optimizer, faults, and the end: whatever a resume did again too."""
    rows, began = [], run.log[0]["time"] if run.log else 0.0
    policies = {e["stage"]: e for e in run.log if e["event"] == "stage"}
    for event in run.log:
        told = happened_.words(event, policies)
        if told is not None:
            clock = f"+{_duration(event['time'] - began)}"
            rows.append([f"{event['step']:,}", clock, *told])
    return {"columns": ["step", "time", "what", "details"], "rows": rows}


def shortened(table: Table) -> Table:
    """The first and the last rows of a long table, and how many there are between them."""
    rows, half = table["rows"], MOST_ROWS // 2
    if len(rows) <= MOST_ROWS:
        return table
    left = ["", "", "left out here", f"{len(rows) - MOST_ROWS} rows, which table-happened.csv has"]
    return table | {"rows": [*rows[:half], left, *rows[-half:]]}


def comparison(found: list[Run]) -> Table:
    """A row for each run; `tops` marks the best scores."""
    rows, scores = [], []
    for run in found:
        summary, config = run.last("summary") or {}, run.config
        test, best = summary.get("test_accuracy"), run.best
        scores.append([test, best["accuracy"] if best else None])
        sizes = [s.resolution for s in run.stages]
        row = {
            "run": run.name,
            "test": f"{test:.2%}" if test is not None else "" if summary else "unfinished",
            "best val": f"{best['accuracy']:.2%}" if best else "",
            "terms": words.terms(config),
            "student": config.student.name + (f" / {config.student.patch}" if config.student.patch else ""),
            "resolution": f"{sizes[0]} to {sizes[-1]} px" if len(sizes) > 1 else f"{sizes[0]} px",
            "stages": str(len(sizes)),
            "epochs": str(len(run.passed())),
            "steps": f"{run.events[-1]['step'] if run.events else 0:,}",
            "time": _duration(reading.total_seconds(run)),
        }
        rows.append(row)
    best = [max((s for s in column if s is not None), default=None) for column in zip(*scores, strict=True)]
    marked = [[s is not None and s == top for s, top in zip(own, best, strict=True)] for own in scores]
    tops = [[False, *marks, *[False] * 7] for marks in marked]
    return {"columns": list(rows[0]), "rows": [list(r.values()) for r in rows], "tops": tops}


def _end(run: Run, stage: int) -> str:
    epochs = run.passed(stage)
    if not run.of("stage", stage):
        return "not reached"
    if run.last("summary") is None:
        return "unfinished"
    planned = run.stages[stage].epochs
    return f"{len(epochs)} epochs done" if len(epochs) == planned else "no better validation accuracy"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _between(accuracy: float, count: int | None, before: str = "") -> str:
    """The 95 % interval of an accuracy, if the number of images is known."""
    if not count:
        return ""
    low, high = reading.wilson(accuracy, count)
    return f"{before}{100 * low:.1f} to {100 * high:.1f}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 600:
        return "{} min {:02d} s".format(*divmod(round(seconds), 60))
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
