"""Several runs side by side: curves, seeds grouped to mean and interval, what their configurations differ in."""

from __future__ import annotations

import re
import statistics
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from irkd_dist import config as configuration
from irkd_dist import study_page
from irkd_dist.report import course, figures, reading
from irkd_dist.report.curves import LEAST_POINTS
from irkd_dist.report.figures import NARROW, STYLES, WIDE, Plan, Theme
from irkd_dist.report.reading import Run

NO_DEVIATION = ("seed",)  # keys that tell runs of a group apart


def group_of(run: Run) -> str:
    """What runs that differ in the seed alone have in common."""
    return re.sub(r"[-_]seed\d+", "", run.name)


def curves(found: list[Run], keys: list[tuple[int, int]]) -> dict[str, Plan]:
    """Validation accuracy of all runs over epochs, time and operations; `keys` are (colour, line style) of each run.

    Runs of a group are one line, their mean, in a band of its 95 % interval (Student's t), over the epochs that all
    have; over time and operations each run has its own.
    """
    timed = [reading.timed_evaluations(r) for r in found]
    if not any(timed):
        return {}
    minutes = [[(t / 60, 100 * e["accuracy"]) for e, t in own] for own in timed]
    epochs = [[(float(e["epoch"]), 100 * e["accuracy"]) for e, _ in own] for own in timed]
    plans = {
        "epochs": _plan(found, keys, epochs, "Over epochs", "epoch", "At the resolution of the run's stage.", True),
        "minutes": _plan(
            found, keys, minutes, "Over time", "minutes of training", "Time between a stop and a resume is left out."
        ),
    }  # fmt: skip
    counted = [reading.spent_flops(r) for r in found]
    if any(counted):
        power, prefix = course.scale(max(own[-1][1] for own in counted if own))
        lines = [[(n / power, 100 * e["accuracy"]) for e, n in own] for own in counted]
        without = [r.name for r, own in zip(found, counted, strict=True) if not own]
        caption = "Floating-point operations of the student's training and of the teacher's answers that no cache had."
        caption += f" Not counted: {', '.join(without)}." if without else ""
        plans["flops"] = _plan(found, keys, lines, "Over operations", f"{prefix}FLOPs", caption)
    return plans


Lines = list[list[tuple[float, float]]]


def _plan(
    found: list[Run], keys: list[tuple[int, int]], lines: Lines, title: str, label: str, caption: str,
    whole: bool = False,
) -> Plan:  # fmt: skip
    groups = [group_of(r) for r in found]
    several = whole and len({*groups}) < len(groups)
    shown = (
        _means(groups, keys, lines)
        if several
        else [(*k, own, None) for k, own in zip(keys, lines, strict=True)]
    )

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        for color, style, points, band in shown:
            x, y = [p[0] for p in points], np.array([p[1] for p in points])
            drawn = list(STYLES.values())[style] + figures.mark(len(x))
            axes.plot(x, y, drawn, color=theme.cycle[color], lw=1.6, ms=3.5)
            if band is not None:
                axes.fill_between(x, y - band, y + band, color=theme.cycle[color], alpha=0.18, lw=0)
        axes.set(xlabel=label, ylabel="accuracy, %")
        axes.set_xlim(left=0)
        bottom, top = axes.get_ylim()
        axes.set_ylim(max(bottom, -2), min(top, 102))
        figures.widen(axes, LEAST_POINTS, 0, 100)
        axes.xaxis.set_major_locator(figures.ticks(10, whole=whole))

    ends = (f"{run.name} {line[-1][1]:.1f}%" for run, line in zip(found, lines, strict=True) if line)
    alt = f"Validation accuracy of {len(found)} runs; last values: {', '.join(ends)}."
    if several:
        caption += " A line is the mean over seeds, its shade the 95 % interval (Student's t)."
    rows = [[run.name, x, y / 100] for run, line in zip(found, lines, strict=True) for x, y in line]
    heights = {WIDE: 3.2, NARROW: 2.8}
    table = (("run", label, "accuracy"), rows)
    return Plan(title, alt, caption, (WIDE, NARROW), heights.__getitem__, draw, table=table)


def _means(
    groups: list[str], keys: list[tuple[int, int]], lines: Lines
) -> list[tuple[int, int, list[tuple[float, float]], np.ndarray | None]]:
    shown: list[tuple[int, int, list[tuple[float, float]], np.ndarray | None]] = []
    for name in dict.fromkeys(groups):
        own = [(k, dict(line)) for g, k, line in zip(groups, keys, lines, strict=True) if g == name and line]
        if not own:
            continue
        common = sorted(set.intersection(*({*line} for _, line in own)))
        values = [[line[x] for _, line in own] for x in common]
        band = np.array([study_page.interval(v) for v in values]) if len(own) > 1 else None
        points = [(x, statistics.mean(v)) for x, v in zip(common, values, strict=True)]
        shown.append((*own[0][0], points, band))
    return shown


def groups(found: list[Run]) -> dict[str, Any] | None:
    """A row for each group of runs: mean and half the 95 % interval over seeds; None where no group has two."""
    names = [group_of(r) for r in found]
    if len({*names}) == len(names):
        return None
    rows = []
    for name in dict.fromkeys(names):
        own = [r for r, n in zip(found, names, strict=True) if n == name]
        tests = [100 * s["test_accuracy"] for r in own if "test_accuracy" in (s := r.last("summary") or {})]
        bests = [100 * r.best["accuracy"] for r in own if r.best]
        times = [reading.total_seconds(r) / 60 for r in own if r.events]
        seeds = ", ".join(str(r.config.seed) for r in own)
        others = ", ".join(row[0] for row in deviations(own)["rows"])
        rows.append([name, seeds, _mean(tests), _mean(bests), _mean(times, digits=1), others])
    columns = ["group", "seeds", "test, %", "best validation, %", "minutes", "differ in more than the seed"]
    kept = len(columns) if any(row[-1] for row in rows) else len(columns) - 1
    return {"columns": columns[:kept], "rows": [row[:kept] for row in rows]}


def deviations(found: list[Run]) -> dict[str, Any]:
    """The keys that change the numbers and are not the same in all runs, with each run's value."""
    trees = [configuration.semantic_keys(configuration.to_dict(r.config)) for r in found]
    names = [k for k in dict.fromkeys(k for t in trees for k in t) if k not in NO_DEVIATION]
    differing = [k for k in names if len({repr(t.get(k)) for t in trees}) > 1]
    rows = [[k, *(_value(t.get(k, "")) for t in trees)] for k in differing]
    return {"columns": ["key", *(r.name for r in found)], "rows": rows}


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(map(_value, value))
    if isinstance(value, dict):
        told = ((k, v) for k, v in value.items() if v not in (None, [], "", {}))
        return ", ".join(f"{k} {_value(v)}" for k, v in told if not isinstance(v, dict) or any(v.values()))
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _mean(values: list[float], digits: int = 2) -> str:
    if not values:
        return ""
    spread = f" ± {study_page.interval(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"
