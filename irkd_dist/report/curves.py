"""Curves: accuracy over epochs and by resolution, loss terms and speed over steps, several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from irkd_dist.eventlog import Event
from irkd_dist.report import figures, reading
from irkd_dist.report.evaluations import Evaluation
from irkd_dist.report.figures import HALF, NARROW, WIDE, Drawing, Plan, Table, Theme
from irkd_dist.report.reading import Run

STACKED = 4.75  # height of figures of panels over steps, the same so that they stand side by side
LEAST_POINTS = 10.0  # of accuracy in per cent that an axis spans
TERMS = {
    "total": "total",
    "ce": "cross-entropy",
    "kd": "distillation",
    "saliency": "saliency",
    "features": "features",
}


def accuracy(run: Run) -> Plan | None:
    """Training and validation accuracy over epochs, the teacher's as a level in each stage."""
    epochs, teacher, summary = run.of("evaluation"), run.last("teacher"), run.last("summary") or {}
    if not epochs:
        return None
    spans, best = epoch_spans(run), run.best or epochs[-1]
    held = "validation" if epochs[-1]["split"] != "test" else "test, in place of validation"

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        figures.bands(axes, theme, spans)
        if teacher:
            for (start, end, _), level in zip(spans, teacher["accuracy"], strict=False):
                label = "teacher at that resolution"
                axes.plot([start, end], [100 * level] * 2, ":", color=theme.cycle[2], lw=1.4, label=label)
        for own in run.epochs:
            _plot_accuracies(run, axes, theme, "epoch", own, figures.mark(len(epochs)), held)
        if "test_accuracy" in summary:
            style = {"ms": 6, "mfc": theme.surface, "mec": theme.text, "mew": 1.3, "ls": "", "zorder": 5}
            x, y = best["epoch"], 100 * summary["test_accuracy"]
            axes.plot(x, y, "D", clip_on=False, label="test, best checkpoint", **style)
        axes.set(xlabel="epoch", ylabel="accuracy, %", xlim=(spans[0][0], spans[-1][1]))
        axes.xaxis.set_major_locator(figures.ticks(12, whole=True))
        figures.widen(axes, LEAST_POINTS, 0, 100)
        figures.legend(figure, axes)

    shown = ", ".join(f"{r} px" for *_, r in spans)
    last = f"{epochs[-1]['accuracy']:.1%} validation"
    if (trained := epochs[-1]["train_accuracy"]) is not None:
        last += f", {trained:.1%} training"
    caption = "Each band is a stage at one resolution. " if len(spans) > 1 else ""
    caption += "Training accuracy is measured while the weights change, on augmented images; validation "
    caption += "afterwards, on plain ones."
    if count := reading.images(run, epochs[-1]["split"]):
        caption += f" The shade is the 95 % interval of an accuracy counted over {count:,} images."
    alt = f"Training and validation accuracy over {len(epochs)} epochs at {shown}; at the end {last}."
    heights = {WIDE: 3.4, NARROW: 2.9}
    table = columns(epochs, ("step", "stage", "resolution", "epoch", "split", "train_accuracy", "accuracy"))
    return Plan("Accuracy over epochs", alt, caption, (WIDE, NARROW), heights.__getitem__, draw, table=table)


def resolutions(run: Run) -> Plan | None:
    """The same within each stage, side by side; None for a run of one stage."""
    stages = run.epochs
    if len(stages) < 2:
        return None

    def grid(width: float) -> tuple[int, int]:
        rows = -(-len(stages) // (6 if width > NARROW else 2))
        return rows, -(-len(stages) // rows)

    def draw(figure: Figure, theme: Theme) -> None:
        rows, columns = grid(figure.get_figwidth())
        every = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
        for k, (axes, own) in enumerate(zip(every, stages, strict=False)):
            _plot_accuracies(run, axes, theme, "stage_epoch", own, figures.mark(len(own)), "validation")
            axes.set_title(f"{own[0]['resolution']} px", loc="left", fontweight="bold")
            best = max(e["accuracy"] for e in own)
            axes.set_title(f"{100 * best:.1f}", loc="right", color=theme.cycle[0])
            axes.set_xlim(0.5, max(own[-1]["stage_epoch"], 2) + 0.5)
            axes.xaxis.set_major_locator(figures.ticks(4, whole=True))
            axes.set_ylabel("accuracy, %" if k % columns == 0 else "")
            axes.set_xlabel("epoch in stage" if k // columns == rows - 1 else "")
        figures.widen(every[0], LEAST_POINTS, 0, 100)
        for axes in every[len(stages) :]:
            axes.set_axis_off()
        figures.legend(figure, every[0])

    bests = (f"{own[0]['resolution']} px best {max(e['accuracy'] for e in own):.1%}" for own in stages)
    alt = f"Training and validation accuracy within each stage: {', '.join(bests)}."
    caption = "The number at the upper right is the stage's best validation accuracy in per cent."
    title = "Accuracy within each stage"
    table = columns(run.of("evaluation"), ("resolution", "stage_epoch", "train_accuracy", "accuracy"))
    return Plan(
        title, alt, caption, (WIDE, NARROW), lambda width: 0.5 + 1.85 * grid(width)[0], draw, table=table
    )


def losses(run: Run) -> Plan | None:
    """Loss terms over steps."""
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
    table = columns(steps, ("step", "stage", *names))
    return Plan("Loss terms", alt, caption, (HALF,), lambda _: STACKED, stacked(run, rows), table=table)


def pace(run: Run) -> Plan | None:
    """Images a second, waiting for data and learning rate over steps."""
    steps = run.of("train")
    if not steps:
        return None
    keys = {
        "images_per_s": ("images/s", 1.0),
        "data_wait": ("data wait, %", 100.0),
        "lr": ("learning rate", 1.0),
    }
    draw = stacked(run, [(key, *rest) for key, rest in keys.items()], zero=True)
    alt = f"Images per second, share of time spent waiting for data ({reading.wait_share(steps) or 0:.1%} overall), "
    alt += "and learning rate over steps."
    caption = "Data wait: the share of the time in training steps that was spent waiting for the next batch."
    table = columns(steps, ("step", "stage", "seconds", *keys))
    return Plan("Speed, data, learning rate", alt, caption, (HALF,), lambda _: STACKED, draw, table=table)


def teacher(run: Run) -> Plan | None:
    """The teacher's accuracy at each resolution beside the student's best."""
    measured = run.last("teacher")
    if measured is None:
        return None
    pairs = list(zip(measured["resolutions"], measured["accuracy"], strict=False))
    sizes, levels = [size for size, _ in pairs], [100 * a for _, a in pairs]
    reached = [[e["accuracy"] for e in run.of("evaluation", i)] for i in range(len(sizes))]
    bests = [100 * max(own, default=np.nan) for own in reached]

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
        figures.legend(figure, axes)

    full = run.config.teacher is not None and run.config.teacher.view == "full"
    seen = "at full resolution, as it sees them throughout" if full else "at each stage's resolution"
    pairs = zip(sizes, levels, bests, strict=True)
    told = (f"{r} px teacher {t:.1f}%" + (f", student {b:.1f}%" if b == b else "") for r, t, b in pairs)
    alt = f"Held-out accuracy by resolution: {'; '.join(told)}."
    caption = f"The teacher's accuracy was measured before training, on images {seen}."
    table = (
        ("resolution", "teacher", "student"),
        [[s, t / 100, b / 100] for s, t, b in zip(sizes, levels, bests, strict=True)],
    )
    return Plan("Teacher by resolution", alt, caption, (HALF,), lambda _: 2.9, draw, table=table)


def evaluation(run: Run, measured: Evaluation) -> Plan | None:
    """What `irkd evaluate` measured, over resolution."""
    rows, parts = measured.rows, []
    for i, label, factor in (
        (1, "accuracy, %", 100.0),
        (3, "map correlation", 1.0),
        (4, "pointing, %", 100.0),
    ):
        points = [(row[0], factor * value) for row in rows if (value := row[i]) is not None]
        parts += [(label, points)] if points else []
    if not parts:
        return None
    trained = {s.resolution for s in run.stages}

    def draw(figure: Figure, theme: Theme) -> None:
        every = figure.subplots(len(parts), 1, sharex=True, squeeze=False).ravel()
        for axes, (label, points) in zip(every, parts, strict=True):
            axes.plot(*zip(*points, strict=True), "-", color=theme.cycle[0], lw=1.4)
            for size, value in points:
                fill = theme.cycle[0] if size in trained else theme.surface
                axes.plot(size, value, "o", ms=5, mfc=fill, mec=theme.cycle[0], mew=1.3)
            axes.set_ylabel(label)
            axes.yaxis.set_major_locator(figures.ticks(4))
            axes.margins(y=0.2)
            figures.widen(axes, *((LEAST_POINTS, 0, 100) if label.endswith("%") else (0.1, -1, 1)))
        every[-1].set_xticks([row[0] for row in rows])
        every[-1].set_xlabel("resolution, px")
        figure.align_ylabels(list(every))

    ends = (f"{label.removesuffix(', %')} {points[-1][1]:.3g}" for label, points in parts)
    alt = f"Measured on the {measured.split} split over resolution; at the largest: {', '.join(ends)}."
    caption = "Filled points are resolutions that the run was trained at."
    height = 0.9 + 1.15 * max(len(parts), 2)
    names = ("resolution", "accuracy", "mse", "correlation", "pointing")
    table = (names, [["" if v is None else v for v in row] for row in rows])
    return Plan("Evaluation by resolution", alt, caption, (HALF,), lambda _: height, draw, table=table)


def _plot_accuracies(
    run: Run, axes: Axes, theme: Theme, key: str, epochs: list[Event], mark: str, held: str
) -> None:
    """Training and validation accuracy over `key`, `epoch` or `stage_epoch`."""
    if count := reading.images(run, epochs[-1]["split"]):
        ends = [reading.wilson(e["accuracy"], count) for e in epochs]
        low, high = ([100 * v for v in side] for side in zip(*ends, strict=True))
        axes.fill_between([e[key] for e in epochs], low, high, color=theme.cycle[0], alpha=0.15, lw=0)
    for name, color, style, width, label in (
        ("train_accuracy", 1, "--", 1.2, "training"),
        ("accuracy", 0, "-", 1.8, held),
    ):
        y = [np.nan if e[name] is None else 100 * e[name] for e in epochs]
        line = {"color": theme.cycle[color], "lw": width, "ms": 3, "label": label}
        axes.plot([e[key] for e in epochs], y, style + mark, **line)


def stacked(
    run: Run, rows: list[tuple[str, str, float]], zero: bool = False, steps: list[Event] | None = None
) -> Drawing:
    """Panels over steps, one above the other: (key of the train event, label, factor); `zero`: axes start there."""
    steps, spans = run.of("train") if steps is None else steps, _step_spans(run)

    def draw(figure: Figure, theme: Theme) -> None:
        every = figure.subplots(len(rows), 1, sharex=True, squeeze=False).ravel()
        for i, (axes, (key, label, factor)) in enumerate(zip(every, rows, strict=True)):
            figures.bands(axes, theme, spans, label=i == 0)
            own = [e for e in steps if key in e]
            x, y = [e["step"] for e in own], [factor * e[key] for e in own]
            axes.plot(x, y, figures.mark(len(own)) + "-", color=theme.cycle[0], lw=1.3, ms=3)
            axes.set_ylabel(label)
            axes.yaxis.set_major_locator(figures.ticks(4))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
            if zero:
                axes.set_ylim(0, 1.2 * max([*y, 1e-12]))
            elif y:
                figures.widen(axes, 0.1 * abs(float(np.mean(y))))
        every[-1].set(xlabel="step", xlim=(0, steps[-1]["step"]))
        every[-1].xaxis.set_major_locator(figures.ticks(5, whole=True))
        figure.align_ylabels(list(every))

    return draw


def columns(events: list[Event], names: Sequence[str]) -> Table:
    """These values of events, as a table."""
    return names, [["" if (value := e.get(name)) is None else value for name in names] for e in events]


def epoch_spans(run: Run) -> list[tuple[float, float, int]]:
    """Each stage's first and last epoch, half an epoch wider on both sides, and its resolution."""
    judged = [run.passed(own[0]["stage"]) for own in run.epochs]
    return [(own[0]["epoch"] - 0.5, own[-1]["epoch"] + 0.5, own[0]["resolution"]) for own in judged]


def _step_spans(run: Run) -> list[tuple[float, float, int]]:
    """Each stage's first and last step, and its resolution."""
    entered = {e["stage"]: e for e in reversed(run.of("stage"))}  # the first entry of each
    sizes = [s.resolution for s in run.stages]
    starts = [(e["step"], sizes[i]) for i, e in sorted(entered.items()) if i < len(sizes)]
    ends = [start for start, _ in starts[1:]] + [max(e["step"] for e in run.events)]
    return [(start, end, size) for (start, size), end in zip(starts, ends, strict=False)]
