"""The look of all figures, and their two forms: SVG that takes the page's colours and font, and PNG files."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

WIDTH = 9.1  # inches of 100 CSS pixels: a card of the page
# (light, dark), CSS variables of the page; the cycle is Okabe and Ito's, safe for colour-blind readers
COLORS = {
    "text": ("#1b1f24", "#e8eaed"),
    "muted": ("#5b6470", "#9aa4b0"),
    "line": ("#e3e6ea", "#2d333b"),
    "card": ("#ffffff", "#161b22"),
    "soft": ("#f4f6f8", "#1c222a"),
    "c0": ("#0072b2", "#56b4e9"),
    "c1": ("#d55e00", "#ff8f4a"),
    "c2": ("#009e73", "#2fc79a"),
    "c3": ("#cc79a7", "#e79ac8"),
    "c4": ("#b07d00", "#f0c04a"),
    "c5": ("#3fa0d8", "#8fb7ff"),
    "c6": ("#6b5fb5", "#b3a7f5"),
}
TEXT, MUTED, LINE, CARD, SOFT, *CYCLE = (light for light, _ in COLORS.values())
STYLE: Any = {
    "font.size": 8,
    "text.color": TEXT,
    "text.parse_math": False,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 8.5,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.markersize": 3,
    "lines.linewidth": 1.5,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "svg.fonttype": "none",
}
# what matplotlib writes around a drawing; clip paths and markers, the ids that are referred to, are kept
NOISE = re.compile(r'(?s)<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->| id="[\w.]+_\d+"')
VARIABLES = {light: f"var(--{name})" for name, (light, _) in COLORS.items()}


@dataclass(frozen=True)
class Picture:
    """A drawn figure with its words; `alt` is what it says to those who cannot see it."""

    title: str
    alt: str
    caption: str
    figure: Figure

    def svg(self) -> str:
        """The figure as an element of a page; its colours are the page's variables, its texts are text."""
        buffer = io.StringIO()
        with matplotlib.rc_context({"svg.hashsalt": self.title}):
            self.figure.savefig(buffer, format="svg", facecolor="none")
        body = NOISE.sub("", buffer.getvalue().partition("<svg")[2].partition(">")[2])
        body = re.sub(r"(?<=: )#[0-9a-f]{6}\b", lambda m: VARIABLES.get(m[0], m[0]), body)
        box = " ".join(f"{72 * side:g}" for side in self.figure.get_size_inches())
        return f'<svg viewBox="0 0 {box}" role="img" aria-label="{escape(self.alt)}">{body}'

    def save(self, file: Path) -> None:
        """Write the figure as PNG, in light colours."""
        self.figure.savefig(file, dpi=200, facecolor=CARD)


@contextmanager
def style() -> Iterator[None]:
    """Figures are drawn and saved in here."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # class names in any script
        yield


def grid(count: int, across: int, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure with `count` axes, at most `across` in a row, each row `height` inches high."""
    rows = -(-count // across)
    columns = -(-count // rows)
    figure = Figure((WIDTH, height * rows), layout="constrained")
    every = list(figure.subplots(rows, columns, squeeze=False, **options).ravel())
    for spare in every[count:]:
        spare.set_axis_off()
    return figure, every[:count]


def legend(figure: Figure, axes: Axes) -> None:
    """Keys above the whole figure, each label once."""
    keys = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(keys.values()), list(keys), loc="outside upper left", ncols=min(len(keys), 6))


def bands(axes: Axes, spans: list[tuple[float, float, int]]) -> None:
    """Mark stages (start, end, resolution): every second one shaded, and its resolution above it."""
    for i, (start, end, size) in enumerate(spans if len(spans) > 1 else []):
        if i % 2:
            axes.axvspan(start, end, color=SOFT, lw=0, zorder=0)
        if i:
            axes.axvline(start, color=LINE, lw=1, zorder=0.5)
        text = f"{size} px" if axes.get_subplotspec().get_gridspec().ncols == 1 else str(size)  # pyright: ignore
        axes.annotate(
            text, ((start + end) / 2, 1), (0, 3), ("data", "axes fraction"), "offset points",
            fontsize=7, color=MUTED, ha="center",
        )  # fmt: skip


def ticks(most: int, whole: bool = False) -> MaxNLocator:
    """At most so many round ticks."""
    return MaxNLocator(most, steps=[1, 2, 5, 10], integer=whole, min_n_ticks=1)


def mark(points: int) -> str:
    """Markers while points are few: a single one would draw no line."""
    return "o" if points <= 25 else ""
