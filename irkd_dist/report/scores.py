"""Figures of an evaluation: trained stage by tested resolution, class by class, and who is taken for whom."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from irkd_dist import runfolder
from irkd_dist.errors import printable
from irkd_dist.report import figures
from irkd_dist.report.evaluations import Evaluation
from irkd_dist.report.figures import HALF, NARROW, WIDE, Plan, Theme
from irkd_dist.report.reading import Run

MOST_CLASSES = 20  # in a figure; of more, those that matter most
NUMBERED = 12  # classes at most where a confusion's cells have numbers
LONGEST_NAME = 16


def matrix(run: Run, measured: Evaluation) -> Plan | None:
    """Accuracy of the teacher and of each stage's best checkpoint, at each resolution that was tested."""
    own = {size: accuracy for size, accuracy, *_ in measured.rows if accuracy is not None}
    stages = run.stages
    last = _stage_of(measured, len(stages))
    tested = {**measured.stages, last: own} if last is not None else {**measured.stages}
    rows = [
        (f"stage {i + 1}, {stages[i].resolution} px", tested[i]) for i in sorted(tested) if i < len(stages)
    ]
    if last is None:
        rows.append(("student", own))
    if measured.teacher:
        rows.insert(0, ("teacher", measured.teacher))
    sizes = sorted({size for _, row in rows for size in row})
    if len(rows) < 2 or not sizes:
        return None
    values = np.array([[100 * row.get(size, np.nan) for size in sizes] for _, row in rows])
    trained = {i: stages[i].resolution for i in sorted(tested) if i < len(stages)}
    diagonal = [
        (n, sizes.index(r)) for n, r in enumerate(trained.values(), len(rows) - len(trained)) if r in sizes
    ]

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        _cells(axes, theme, values, [name for name, _ in rows], list(map(str, sizes)), "{:.1f}")
        for y, x in diagonal:
            edge = {"fill": False, "ec": theme.text, "lw": 1.6}
            axes.add_patch(Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, **edge))
        axes.set_xlabel("tested at, px")

    best = ", ".join(f"{name} {np.nanmax(row):.1f}%" for (name, _), row in zip(rows, values, strict=True))
    alt = f"Accuracy of {len(rows)} networks at {len(sizes)} resolutions; the best of each: {best}."
    caption = f"Accuracy in % on the {measured.split} split. A row is the teacher, or the best checkpoint of a stage; "
    caption += "a frame is where it was trained."
    table = (
        ["network", *(f"{s} px" for s in sizes)],
        [[n, *(row.get(s, "") for s in sizes)] for n, row in rows],
    )
    heights = {w: 0.75 + 0.4 * len(rows) for w in (WIDE, NARROW, HALF)}
    return Plan(
        "Trained stage by tested resolution", alt, caption, (HALF,), heights.__getitem__, draw, table=table
    )


def classes(measured: Evaluation) -> Plan | None:
    """Accuracy of student and teacher in each class, from where the student is furthest behind."""
    student, teacher = (measured.right_by_class(who) for who in ("student", "teacher"))
    if len(student) < 2:
        return None

    def share(who: dict[int, tuple[int, int]], label: int) -> float:
        right, every = who.get(label, (0, 0))
        return 100 * right / every if every else float("nan")

    found = [(label, share(student, label), share(teacher, label)) for label in student]
    found.sort(key=lambda row: (row[1] - row[2] if teacher else row[1], row[0]))
    shown = found
    if len(found) > MOST_CLASSES:
        shown = found[: MOST_CLASSES // 2] + found[-MOST_CLASSES // 2 :]
    names = [_short(measured, label) for label, *_ in shown]

    def draw(figure: Figure, theme: Theme) -> None:
        axes, y = figure.subplots(), np.arange(len(shown))[::-1]
        ours, theirs = (np.array(v) for v in zip(*((s, t) for _, s, t in shown), strict=True))
        axes.hlines(y, np.fmin(ours, theirs), np.fmax(ours, theirs), color=theme.grid, lw=3)
        if teacher:
            axes.plot(theirs, y, "D", ms=4.5, color=theme.cycle[2], label="teacher")
        axes.plot(ours, y, "o", ms=5.5, color=theme.cycle[0], label="student")
        axes.set_yticks(y, names)
        axes.set(xlabel="accuracy, %", ylim=(-0.7, len(shown) - 0.3))
        axes.margins(x=0.06)
        axes.grid(axis="y", visible=False)
        figures.legend(figure, axes)

    worst, best = shown[0], shown[-1]

    def told(row: tuple[int, float, float]) -> str:
        return f"{_name(measured, row[0])} {row[1]:.1f}%" + (f" (teacher {row[2]:.1f}%)" if teacher else "")

    alt = f"Accuracy in each class at {measured.resolution} px; from {told(worst)} to {told(best)}."
    order = (
        "where the student is furthest behind its teacher come first" if teacher else "the worst come first"
    )
    caption = f"The {measured.split} split at {measured.resolution} px; classes {order}."
    if len(found) > len(shown):
        half = MOST_CLASSES // 2
        caption += f" Of {len(found)} classes the first and the last {half} are shown; the CSV has all."
    columns = ["class", "student", "teacher", "images"]
    rows = [[measured.name_of(c), s / 100, t / 100 if teacher else "", student[c][1]] for c, s, t in found]
    heights = {w: 0.85 + 0.2 * len(shown) for w in (WIDE, NARROW, HALF)}
    title = "Student and teacher by class" if teacher else "Accuracy by class"
    return Plan(title, alt, caption, (HALF,), heights.__getitem__, draw, table=(columns, rows))


def confusion(measured: Evaluation) -> Plan | None:
    """Who the student takes for whom, in % of a row's images."""
    triples = measured.confusion.get("student")
    if triples is None or not len(triples):
        return None
    every = sorted({*triples[:, 0].tolist(), *triples[triples[:, 1] >= 0, 1].tolist()})
    labels = every if len(every) <= MOST_CLASSES else _most_confused(triples)
    at = {label: i for i, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels)))
    totals: dict[int, int] = {}
    for label, predicted, count in triples.tolist():
        totals[label] = totals.get(label, 0) + count
        if label in at and predicted in at:
            counts[at[label], at[predicted]] += count
    sums = np.array([max(totals.get(label, 0), 1) for label in labels])
    values = 100 * counts / sums[:, None]
    names = [_short(measured, label) for label in labels]
    form = "{:.0f}" if len(labels) <= NUMBERED else ""

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        _cells(axes, theme, values, names, names, form, high=100)
        axes.set(xlabel="answer", ylabel="class")
        axes.tick_params(axis="x", rotation=60)

    pairs = most_mistaken(measured, 1)
    alt = f"Confusion of {len(labels)} classes, in per cent of each class's images."
    alt += (
        f" The most frequent mistake: {pairs[0][0]} taken for {pairs[0][1]}, {pairs[0][2]} times."
        if pairs
        else ""
    )
    caption = f"In % of the images of a class, on the {measured.split} split at {measured.resolution} px."
    if len(labels) < len(every):
        caption += (
            f" Of {len(every)} classes those {len(labels)} that are mistaken most often; the CSV has all."
        )
    rows = [
        [measured.name_of(a), measured.name_of(b) if b >= 0 else "not finite", n]
        for a, b, n in triples.tolist()
    ]
    return Plan(
        "Confusion", alt, caption, (HALF,), lambda _: 4.1, draw, table=(["class", "answer", "images"], rows)
    )


def most_mistaken(measured: Evaluation, count: int) -> list[tuple[str, str, int, int | None]]:
    """The student's most frequent mistakes: class, answer, how often, and how often the teacher makes the same."""
    triples = measured.confusion.get("student", np.zeros((0, 3), int)).tolist()
    theirs = {(a, b): n for a, b, n in measured.confusion.get("teacher", np.zeros((0, 3), int)).tolist()}
    wrong = sorted(
        ((n, a, b) for a, b, n in triples if a != b and b >= 0), key=lambda row: (-row[0], *row[1:])
    )
    known = bool(theirs)
    return [
        (_name(measured, a), _name(measured, b), n, theirs.get((a, b), 0) if known else None)
        for n, a, b in wrong[:count]
    ]


def _most_confused(triples: np.ndarray) -> list[int]:
    mistakes: dict[int, int] = {}
    for label, predicted, count in triples.tolist():
        if label != predicted and predicted >= 0:
            for one in (label, predicted):
                mistakes[one] = mistakes.get(one, 0) + count
    return sorted(sorted(mistakes, key=lambda c: (-mistakes[c], c))[:MOST_CLASSES])


def _cells(
    axes: Axes, theme: Theme, values: np.ndarray, rows: list[str], columns: list[str], form: str,
    high: float | None = None,
) -> None:  # fmt: skip
    """A grid of values in shades of one colour, with numbers that stand out against them."""
    shades = LinearSegmentedColormap.from_list("", [theme.surface, theme.cycle[0]])
    low, top = (0.0, high) if high is not None else (float(np.nanmin(values)), float(np.nanmax(values)))
    reach = max(top - low, 1e-9)
    low -= 0 if high is not None else 0.15 * reach  # the smallest is seen too
    axes.imshow(values, cmap=shades, vmin=low, vmax=top if top > low else low + 1, aspect="auto")
    size = 7.5 if len(rows) * len(columns) <= 60 else 6.5
    for (y, x), value in np.ndenumerate(values):
        if form and np.isfinite(value) and (high is None or value >= 0.5):
            ground = shades((value - low) / max(top - low, 1e-9))[:3]
            ink = max((theme.text, theme.surface), key=lambda c: _contrast(to_rgb(c), ground))
            axes.text(x, y, form.format(value), ha="center", va="center", fontsize=size, color=ink)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Contrast of two colours as WCAG 2 defines it, 1 to 21."""

    def light(color: tuple[float, ...]) -> float:
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


def _stage_of(measured: Evaluation, count: int) -> int | None:
    """The stage whose best checkpoint was measured; None of another checkpoint."""
    stage = runfolder.stage_of(Path(measured.checkpoint)) if measured.checkpoint else None
    return stage if stage is not None and stage < count else None


def _name(measured: Evaluation, label: int) -> str:
    return printable(measured.name_of(label))


def _short(measured: Evaluation, label: int) -> str:
    name = _name(measured, label)
    return name if len(name) <= LONGEST_NAME and figures.drawable(name) else f"class {label}"
