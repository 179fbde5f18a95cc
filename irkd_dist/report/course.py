"""Figures of what a run costs and how it learns: time and operations, agreement of maps, gradients, the cache."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from irkd_dist.report import figures, reading
from irkd_dist.report.curves import LEAST_POINTS, STACKED, TERMS, columns, epoch_spans, stacked
from irkd_dist.report.figures import HALF, NARROW, WIDE, Plan, Theme
from irkd_dist.report.reading import Run


def cost(run: Run) -> Plan | None:
    """Validation accuracy over hours of training and over floating-point operations."""
    timed, counted = reading.timed_evaluations(run), reading.spent_flops(run)
    if not timed:
        return None
    unit, seconds = ("hours", 3600) if timed[-1][1] > 7200 else ("minutes", 60)
    parts = [(f"{unit} of training", [t / seconds for _, t in timed], timed)]
    if counted:
        power, prefix = scale(counted[-1][1])
        parts.append((f"{prefix}FLOPs of training", [n / power for _, n in counted], counted))

    def draw(figure: Figure, theme: Theme) -> None:
        tall = figure.get_figwidth() <= NARROW
        shape = (len(parts), 1) if tall else (1, len(parts))
        every = figure.subplots(*shape, sharey=True, squeeze=False).ravel()
        for axes, (label, x, events) in zip(every, parts, strict=True):
            y = [100 * e["accuracy"] for e, _ in events]
            for n, stage in enumerate(dict.fromkeys(e["stage"] for e, _ in events)):
                own = [i for i, (e, _) in enumerate(events) if e["stage"] == stage]
                first = own[0] - 1 if own[0] else 0  # joined to the stage before
                line = slice(first, own[-1] + 1)
                color, size = theme.cycle[n % len(theme.cycle)], events[own[0]][0]["resolution"]
                axes.plot(x[line], y[line], "-", color=color, lw=1.6)
                axes.plot(
                    x[own[0] : own[-1] + 1],
                    y[own[0] : own[-1] + 1],
                    "o",
                    ms=3.5,
                    color=color,
                    label=f"{size} px",
                )
            axes.set(xlabel=label, xlim=(0, 1.02 * max(x[-1], 1e-9)))
            axes.xaxis.set_major_locator(figures.ticks(6))
        for axes in every if tall else every[:1]:
            axes.set_ylabel("accuracy, %")
        figures.widen(every[0], LEAST_POINTS, 0, 100)
        figures.legend(figure, every[0])

    alt = f"Validation accuracy over {unit} of training"
    alt += f" and over {parts[1][0].split()[0]}" if counted else ""
    alt += f"; at the end {timed[-1][0]['accuracy']:.1%} after {timed[-1][1] / seconds:.3g} {unit}"
    alt += f" and {counted[-1][1]:.3g} FLOPs." if counted else "."
    caption = "Validation and checkpoints count as time; time between a stop and a resume does not. "
    if counted:
        caption += "Operations are those of an image in each stage as torch counts them, forward, both backwards and "
        caption += "the teacher, times the images; answers out of the teacher's cache cost none."
    else:
        caption += (
            "Operations were not counted: by an earlier release, or by an engine that shards the weights."
        )
    flops = {e["step"]: n for e, n in counted}
    rows = [[e["epoch"], e["resolution"], t, flops.get(e["step"], ""), e["accuracy"]] for e, t in timed]
    table = (["epoch", "resolution", "seconds", "flops", "accuracy"], rows)

    def height(width: float) -> float:
        return 0.5 + 2.1 * len(parts) if width == NARROW else 2.9

    return Plan("Accuracy for its cost", alt, caption, (WIDE, NARROW), height, draw, table=table)


def agreement(run: Run) -> Plan | None:
    """How alike the maps of student and teacher are, and how often the student's points at the object, over epochs."""
    probes = reading.probes(run)
    parts = [
        (label, [(e["epoch"], factor * e[key]) for e in probes if key in e])
        for key, label, factor in (
            ("correlation", "map correlation", 1.0),
            ("mse", "map error (MSE)", 1.0),
            ("pointing", "pointing, %", 100.0),
        )
    ]
    parts = [(label, points) for label, points in parts if points]
    if not parts:
        return None

    def draw(figure: Figure, theme: Theme) -> None:
        tall = figure.get_figwidth() <= NARROW
        shape = (len(parts), 1) if tall else (1, len(parts))
        every = figure.subplots(*shape, sharex=True, squeeze=False).ravel()
        spans = epoch_spans(run)
        for n, (axes, (label, points)) in enumerate(zip(every, parts, strict=True)):
            figures.bands(axes, theme, spans, label=n == 0 or not tall)
            mark = figures.mark(len(points))
            axes.plot(*zip(*points, strict=True), mark + "-", color=theme.cycle[0], lw=1.5, ms=3)
            axes.set_ylabel(label)
            axes.yaxis.set_major_locator(figures.ticks(4))
            axes.margins(y=0.15)
            figures.widen(axes, *((LEAST_POINTS, 0, 100) if label.endswith("%") else (0.02, -1, 1)))
        for axes in every[-1:] if tall else every:
            axes.set(xlabel="epoch", xlim=(spans[0][0], spans[-1][1]) if spans else None)
            axes.xaxis.set_major_locator(figures.ticks(8, whole=True))
        if tall:
            figure.align_ylabels(list(every))

    ends = (f"{label.removesuffix(', %')} from {p[0][1]:.3g} to {p[-1][1]:.3g}" for label, p in parts)
    alt = f"Agreement of the maps over {len(probes)} epochs: {'; '.join(ends)}."
    caption = f"{_images(probes)} at the end of each epoch, at the stage's resolution."
    if any(label.startswith("pointing") for label, _ in parts):
        caption += " Pointing: how often the peak of the student's map lies on the object."
    table = columns(probes, ("epoch", "resolution", "correlation", "mse", "pointing"))

    def height(width: float) -> float:
        return 0.7 + 1.3 * max(len(parts), 2) if width == NARROW else 2.4

    return Plan("Agreement over time", alt, caption, (WIDE, NARROW), height, draw, table=table)


def gradients(run: Run) -> Plan | None:
    """The norm of each term's gradient times its weight, over epochs."""
    probes = [e for e in reading.probes(run) if isinstance(e.get("gradients"), dict) and e["gradients"]]
    names = [n for n in TERMS if any(n in e["gradients"] for e in probes)]
    if not names:
        return None
    weights = {e["stage"]: e for e in run.of("stage")}
    convex = run.config.loss.form == "convex"

    def weight(event: reading.Event, name: str) -> float:
        stage = weights.get(event["stage"], {})
        alpha, gamma = stage.get("alpha", 0.0), stage.get("gamma", 0.0)
        beta = run.config.loss.features.beta
        return {"ce": 1 - alpha if convex else 1.0, "kd": alpha, "saliency": gamma, "features": beta}[name]

    lines = {
        n: [(e["epoch"], weight(e, n) * e["gradients"][n]) for e in probes if n in e["gradients"]]
        for n in names
    }

    def draw(figure: Figure, theme: Theme) -> None:
        axes, spans = figure.subplots(), epoch_spans(run)
        figures.bands(axes, theme, spans)
        for n, (name, style) in enumerate(zip(names, ("o-", "s--", "^-.", "D:"), strict=False)):
            points = [(x, y) for x, y in lines[name] if y > 0]
            line = {"color": theme.cycle[n], "lw": 1.5, "ms": 3.5, "label": TERMS[name]}
            axes.plot(*(zip(*points, strict=True) if points else ((), ())), style, **line)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set(
            xlabel="epoch", ylabel="norm times weight", xlim=(spans[0][0], spans[-1][1]) if spans else None
        )
        axes.xaxis.set_major_locator(figures.ticks(8, whole=True))
        figures.legend(figure, axes)

    ends = (f"{TERMS[n]} {p[-1][1]:.3g}" for n, p in lines.items() if p)
    alt = f"Gradient norm of each loss term over {len(probes)} epochs; at the end {', '.join(ends)}."
    caption = f"Of all the student's weights. {_images(probes)} at the end of each epoch."
    rows = [[e["epoch"], e["resolution"], *(e["gradients"].get(n, "") for n in names), *(weight(e, n) for n in names)]
            for e in probes]  # fmt: skip
    names_of_columns = ["epoch", "resolution", *names, *(f"weight of {n}" for n in names)]
    return Plan(
        "Gradients of the terms", alt, caption, (HALF,), lambda _: 3.1, draw, table=(names_of_columns, rows)
    )


def cache(run: Run) -> Plan | None:
    """The share of the teacher's answers that its cache had, and what asking it cost."""
    steps = [e for e in run.of("train") if e.get("cache_hits", 0) + e.get("cache_misses", 0)]
    if not steps:
        return None
    hits, asked = (
        sum(e["cache_hits"] for e in steps),
        sum(e["cache_hits"] + e["cache_misses"] for e in steps),
    )
    shares = [e | {"found": e["cache_hits"] / (e["cache_hits"] + e["cache_misses"])} for e in steps]
    rows = [("found", "found, %", 100.0), ("cache_wait", "cache wait, %", 100.0)]
    draw = stacked(run, rows, zero=True, steps=shares)
    alt = (
        f"Answers of the teacher that were in its cache, over steps: {hits / asked:.1%} of {asked:,} in all."
    )
    caption = (
        f"{hits:,} of {asked:,} answers came out of it. Cache wait: the share of the time that asking took."
    )
    table = columns(steps, ("step", "cache_hits", "cache_misses", "cache_wait"))
    return Plan("Teacher's cache", alt, caption, (HALF,), lambda _: STACKED - 1.65, draw, table=table)


def scale(value: float) -> tuple[float, str]:
    """A power of a thousand and its prefix, so that the value reads well."""
    for power, prefix in ((1e18, "exa"), (1e15, "peta"), (1e12, "tera"), (1e9, "giga")):
        if value >= power:
            return power, prefix
    return 1e6, "mega"


def _images(probes: list[reading.Event]) -> str:
    return f"Measured on the same {probes[-1].get('images', '?')} held-out images"
