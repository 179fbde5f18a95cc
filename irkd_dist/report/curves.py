"""Curves: accuracy over epochs and in each stage, loss terms and speed over steps, evaluation, several runs."""

from __future__ import annotations

import re

from matplotlib.axes import Axes

from irkd_dist.report import figures, reading
from irkd_dist.report.figures import CARD, CYCLE, TEXT, Picture
from irkd_dist.report.reading import Event, Run

TERMS = {"total": "total", "ce": "cross-entropy", "kd": "distillation", "saliency": "saliency"}
PACE = {"images_per_s": "images/s", "data_wait": "data wait, %", "lr": "learning rate"}


def accuracy(run: Run) -> Picture | None:
    """Training and validation accuracy over epochs, the teacher's as a level in each stage."""
    epochs, teacher, summary = run.of("evaluation"), run.last("teacher"), run.last("summary") or {}
    if not epochs or not run.best:
        return None
    spans = [(own[0]["epoch"] - 0.5, own[-1]["epoch"] + 0.5, own[0]["resolution"]) for own in run.epochs]
    figure, (axes,) = figures.grid(1, 1, 3.4)
    figures.bands(axes, spans)
    for (start, end, _), level in zip(spans, teacher["accuracy"] if teacher else [], strict=False):
        axes.plot([start, end], [100 * level] * 2, ":", color=CYCLE[2], label="teacher at that resolution")
    for own in run.epochs:
        _train_and_held_out(axes, "epoch", own, len(epochs))
    if "test_accuracy" in summary:
        point = {"color": TEXT, "mfc": CARD, "ms": 6, "mew": 1.3, "zorder": 5, "clip_on": False}
        label = "test, best checkpoint"
        axes.plot(run.best["epoch"], 100 * summary["test_accuracy"], "D", label=label, **point)
    axes.set(xlabel="epoch", ylabel="accuracy, %", xlim=(spans[0][0], spans[-1][1]))
    axes.xaxis.set_major_locator(figures.ticks(12, whole=True))
    figures.legend(figure, axes)
    last = f"{epochs[-1]['accuracy']:.1%} held out, {epochs[-1]['train_accuracy']:.1%} training"
    shown = ", ".join(f"{size} px" for *_, size in spans)
    alt = f"Training and validation accuracy over {len(epochs)} epochs at {shown}; at the end {last}."
    caption = "Each band is a stage at one resolution. " if len(spans) > 1 else ""
    caption += "Training accuracy is measured while the weights change, on augmented images; validation "
    return Picture("Accuracy over epochs", alt, caption + "afterwards, on plain ones.", figure)


def resolutions(run: Run) -> Picture | None:
    """The same within each stage, side by side; None for a run of one stage."""
    stages = run.epochs
    if len(stages) < 2:
        return None
    figure, every = figures.grid(len(stages), 6, 2.2, sharey=True)
    for axes, own in zip(every, stages, strict=True):
        _train_and_held_out(axes, "stage_epoch", own, len(own))
        axes.set_title(f"{own[0]['resolution']} px", loc="left", fontweight="bold")
        axes.set_title(f"{100 * max(e['accuracy'] for e in own):.1f}", loc="right", color=CYCLE[0])
        axes.set(xlim=(0.5, max(own[-1]["stage_epoch"], 2) + 0.5), xlabel="epoch in stage")
        axes.xaxis.set_major_locator(figures.ticks(4, whole=True))
    every[0].set_ylabel("accuracy, %")
    figures.legend(figure, every[0])
    bests = (f"{own[0]['resolution']} px best {max(e['accuracy'] for e in own):.1%}" for own in stages)
    alt = f"Training and validation accuracy within each stage: {', '.join(bests)}."
    caption = "The number at the upper right is the stage's best validation accuracy in per cent."
    return Picture("Accuracy at each resolution", alt, caption, figure)


def losses(run: Run) -> Picture | None:
    """Loss terms over steps."""
    steps = run.of("train")
    shown = {key: label for key, label in TERMS.items() if any(key in e for e in steps)}
    if len(shown) == 2:
        del shown["total"]  # the same as the only term
    ends = ", ".join(f"{label} {steps[-1][key]:.3g}" for key, label in shown.items() if key in steps[-1])
    caption = "Each term as it is before its weight; a point is the mean since the one before."
    flat = max((e.get("flat_maps", 0) for e in steps), default=0)
    caption += f" Maps without a shape, which count as zero: up to {flat:.1f} a step." if flat else ""
    return _over_steps(run, shown, "Loss terms", f"Loss terms over steps; at the end {ends}.", caption)


def pace(run: Run) -> Picture | None:
    """Images a second, waiting for data and learning rate over steps."""
    alt = f"Images per second, time spent waiting for data ({reading.wait_share(run.of('train')) or 0:.1%} overall), "
    caption = "Data wait: the share of the time in training steps that was spent waiting for the next batch."
    return _over_steps(run, PACE, "Speed and learning rate", alt + "and learning rate over steps.", caption)


def evaluation(run: Run) -> Picture | None:
    """What `irkd evaluate` measured, over resolution."""
    parts: dict[str, dict[str, float]] = {
        "accuracy, %": {size: 100 * v for size, v in run.measured.get("accuracy", {}).items()},
        "map correlation": {size: v["correlation"] for size, v in run.measured.get("agreement", {}).items()},
        "pointing, %": {size: 100 * v for size, v in run.measured.get("pointing", {}).items()},
    }
    parts = {label: values for label, values in parts.items() if values}
    if not parts:
        return None
    trained = {s.resolution for s in run.stages}
    figure, every = figures.grid(len(parts), 3, 2.1)
    for axes, (label, values) in zip(every, parts.items(), strict=True):
        sizes = [int(size) for size in values]
        axes.plot(sizes, list(values.values()), color=CYCLE[0])
        for size, value in zip(sizes, values.values(), strict=True):
            axes.plot(size, value, "o", ms=5, mfc=CYCLE[0] if size in trained else CARD, mec=CYCLE[0])
        axes.set(xlabel="resolution, px", ylabel=label, xticks=sizes)
        axes.margins(y=0.2)
    ends = (f"{label.removesuffix(', %')} {[*values.values()][-1]:.3g}" for label, values in parts.items())
    alt = f"Measured on the {run.measured['split']} split over resolution; at the largest: {', '.join(ends)}."
    caption = "Filled points are resolutions that the run was trained at."
    return Picture("Evaluation over resolution", alt, caption, figure)


def comparison(found: list[Run]) -> Picture | None:
    """Validation accuracy of several runs over epochs and over time; seeds of one experiment share a colour."""
    if not any(run.epochs for run in found):
        return None
    groups = [re.sub(r"[-_]seed\d+", "", run.name) for run in found]
    names, ends = list(dict.fromkeys(groups)), []
    figure, every = figures.grid(2, 2, 3.6, sharey=True)
    for run, group in zip(found, groups, strict=True):
        timed = zip(run.events, reading.elapsed(run), strict=False)
        points = [(e["epoch"], t / 60, 100 * e["accuracy"]) for e, t in timed if e["event"] == "evaluation"]
        if not points:
            continue
        epochs, minutes, values = zip(*points, strict=True)
        k = names.index(group)
        line = ("-", "--", ":")[k // len(CYCLE) % 3] + figures.mark(len(values))
        for axes, x in zip(every, (epochs, minutes), strict=True):
            axes.plot(x, values, line, color=CYCLE[k % len(CYCLE)], lw=1.3, label=group)
        ends.append(f"{run.name} {values[-1]:.1f}%")
    every[0].set(xlabel="epoch", ylabel="validation accuracy, %")
    every[0].xaxis.set_major_locator(figures.ticks(8, whole=True))
    every[1].set_xlabel("minutes of training")
    figures.legend(figure, every[0])
    alt = f"Validation accuracy of {len(found)} runs; last values: {', '.join(ends)}."
    caption = "Each at the resolution of the run's stage; runs that differ in the seed alone share a colour. "
    caption += "Time between a stop and a resume is left out."
    return Picture("Over epochs and over time", alt, caption, figure)


def _train_and_held_out(axes: Axes, key: str, epochs: list[Event], points: int) -> None:
    """Training and held-out accuracy over `key`, `epoch` or `stage_epoch`."""
    x, dots = [e[key] for e in epochs], figures.mark(points)
    held_out = "validation" if epochs[-1]["split"] != "test" else "test, in place of validation"
    train = [100 * e["train_accuracy"] for e in epochs]
    axes.plot(x, train, f"--{dots}", color=CYCLE[1], lw=1.2, label="training")
    axes.plot(x, [100 * e["accuracy"] for e in epochs], f"-{dots}", color=CYCLE[0], lw=1.8, label=held_out)


def _over_steps(run: Run, shown: dict[str, str], title: str, alt: str, caption: str) -> Picture | None:
    """One axes for each key of the train events, with the stages marked."""
    steps = run.of("train")
    if not steps:
        return None
    entered = {e["stage"]: e for e in reversed(run.of("stage"))}  # the first entry of each
    starts = [e["step"] for _, e in sorted(entered.items())]
    sizes = [e["resolution"] for _, e in sorted(entered.items())]
    spans = list(zip(starts, [*starts[1:], run.step], sizes, strict=True))
    figure, every = figures.grid(len(shown), 4, 2.1)
    for axes, (key, label) in zip(every, shown.items(), strict=True):
        figures.bands(axes, spans)
        own = [e for e in steps if key in e]
        y = [e[key] * (100 if label.endswith("%") else 1) for e in own]
        axes.plot([e["step"] for e in own], y, figures.mark(len(own)) + "-", color=CYCLE[0], lw=1.3)
        axes.set(xlabel="step", ylabel=label, xlim=(0, run.step))
        axes.xaxis.set_major_locator(figures.ticks(4, whole=True))
        axes.yaxis.set_major_locator(figures.ticks(4))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        if key in PACE:
            axes.set_ylim(0, 1.2 * max([*y, 1e-12]))
    return Picture(title, alt, caption, figure)
