"""The figure of wrong answers: image, teacher's map, student's map, and what both networks said."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from irkd_dist.errors import printable
from irkd_dist.report import figures, maps
from irkd_dist.report.evaluations import Evaluation
from irkd_dist.report.figures import NARROW, WIDE, Plan, Theme

LEFT, TOP, GAP, HEAD = 0.0, 0.5, 0.16, 0.3


def mistakes(measured: Evaluation) -> Plan | None:
    """The images whose class the student finds least likely, and those of its surest wrong answers."""
    kept = measured.gallery
    if not kept:
        return None
    kinds = [name for name in ("teacher", "student") if name in kept]
    columns = ["image", *kinds]
    worst = np.asarray(kept["worst"], bool)
    blocks = [
        (title, np.flatnonzero(chosen))
        for title, chosen in (("The class found least likely", worst), ("The surest other wrong answers", ~worst))
        if chosen.any()
    ]  # fmt: skip

    def cell(width: float) -> tuple[int, float]:
        """Samples side by side, and the side of an image in inches."""
        across = 4 if width > NARROW else 2
        return across, min((width - GAP * (across - 1)) / (across * len(columns)), 1.0)

    def height(width: float) -> float:
        across, side = cell(width)
        return sum(HEAD + -(-len(rows) // across) * (TOP + side + GAP) for _, rows in blocks)

    def draw(figure: Figure, theme: Theme) -> None:
        width, tall = (float(v) for v in figure.get_size_inches())
        across, side = cell(width)
        axes, down = figure.add_axes((0, 0, 1, 1)), 0.0
        for title, rows in blocks:
            axes.text(0, down + 0.14, title, fontsize=8.5, va="center", color=theme.muted)
            down += HEAD
            for n, row in enumerate(rows):
                x0 = n % across * (side * len(columns) + GAP)
                y0 = down + n // across * (TOP + side + GAP) + TOP
                first, second = _words(measured, int(row), 20 if width > NARROW else 15)
                axes.text(
                    x0, y0 - 0.38, first, fontweight="bold", fontsize=7.5, va="center", color=theme.text
                )
                axes.text(x0, y0 - 0.22, second, fontsize=7, va="center", color=theme.muted)
                for j, column in enumerate(columns):
                    at = x0 + (j + 0.5) * side
                    axes.text(at, y0 - 0.07, column, ha="center", va="center", fontsize=6, color=theme.muted)
                    picture = (
                        kept["images"][row]
                        if j == 0
                        else maps.overlay(kept["images"][row], kept[column][row])
                    )
                    left, below = x0 + j * side, y0
                    box = (left + 0.015, left + side - 0.015, below + side - 0.015, below + 0.015)
                    axes.imshow(picture, extent=box, aspect="auto", interpolation="nearest")
            down += -(-len(rows) // across) * (TOP + side + GAP)
        axes.set(xlim=(0, width), ylim=(tall, 0))
        axes.set_axis_off()

    told = [_row(measured, int(row)) for _, rows in blocks for row in rows]
    listed = ", ".join(f"{row[1]} taken for {row[2]} ({row[3]:.0%})" for row in told[:4])
    alt = f"{len(told)} images that the student judges wrong, with {' and '.join(columns[1:]) or 'no'} maps: {listed}"
    alt += f" and {len(told) - 4} more." if len(told) > 4 else "."
    caption = (
        f"{measured.split} split, {measured.resolution} px. Above each: its class, what the student says, how"
    )
    caption += " sure it is; and what the teacher says. " if "teacher_predicted" in kept else " sure it is. "
    caption += "Maps are of the class's score, each stretched to its own range." if kinds else ""
    table = (("id", "class", "student", "confidence", "probability of the class", "teacher"), told)
    return Plan("Wrong answers", alt, caption, (WIDE, NARROW), height, draw, True, table=table)


def _row(measured: Evaluation, row: int) -> list[str | int | float]:
    kept = measured.gallery
    label, answer = int(kept["labels"][row]), int(kept["student_predicted"][row])
    theirs = measured.name_of(int(kept["teacher_predicted"][row])) if "teacher_predicted" in kept else ""
    return [
        int(kept["ids"][row]) if "ids" in kept else "", printable(measured.name_of(label)),
        printable(measured.name_of(answer)), float(kept["student_confidence"][row]),
        float(kept["student_truth"][row]), printable(theirs),
    ]  # fmt: skip


def _words(measured: Evaluation, row: int, most: int) -> tuple[str, str]:
    kept = measured.gallery
    label, answer = int(kept["labels"][row]), int(kept["student_predicted"][row])
    names = [_short(measured, c, most // 2 + 2) for c in (label, answer)]
    first = f"{names[0]} \N{RIGHTWARDS ARROW} {names[1]} {kept['student_confidence'][row]:.0%}"
    if "teacher_predicted" not in kept:
        return first, f"its class {kept['student_truth'][row]:.1%}"
    said = int(kept["teacher_predicted"][row])
    return first, "teacher is right" if said == label else f"teacher: {_short(measured, said, most)}"


def _short(measured: Evaluation, label: int, most: int) -> str:
    name = printable(measured.name_of(label))
    if not figures.drawable(name):
        return f"class {label}"
    return name if len(name) <= most else name[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"
