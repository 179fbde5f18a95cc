"""The look of all figures, and how a plan becomes a picture of the page: light and dark, wide and narrow."""

from __future__ import annotations

import base64
import csv
import functools
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from irkd_dist import files

WIDE, HALF, NARROW = 9.1, 4.3, 3.5  # widths of figures in inches of 100 CSS pixels: page, half page, phone
DPI = 200
MOST_BYTES = 160_000  # of one picture of photographs, of which a page has up to eight


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
Table = tuple[Sequence[str], Sequence[Sequence[Any]]]


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
    table: Table = ((), ())  # what is drawn, as (columns, rows) of a CSV file


def picture(file: Path | None, plan: Plan | None) -> dict[str, Any] | None:
    """Draw a plan in light and dark, for page and phone.

    `file` gets the page's light one as PNG; beside it lie the numbers as CSV and, of what is no photograph, an SVG.
    """
    if plan is None:
        return None
    if file is not None:
        write_table(file.with_suffix(".csv"), plan.table)
        if not plan.photographs:
            _write_svg(file.with_suffix(".svg"), plan)
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
                with files.whole(file) as out:
                    (image if plan.photographs else _few_colors(image, theme)).save(out, "png")
    *others, (_, image, size) = sources
    words = {"title": plan.title, "alt": plan.alt, "caption": plan.caption}
    return {**words, "image": image, "size": size, "sources": others}


def write_table(file: Path, table: Table) -> None:
    """Columns and rows as CSV; nothing where there are no columns."""
    columns, rows = table
    if columns:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([columns, *rows])
        files.write(file, text.getvalue().encode("utf-8", "backslashreplace"))


def _write_svg(file: Path, plan: Plan) -> None:
    width, buffer = plan.widths[0], io.BytesIO()
    with matplotlib.rc_context(_style(LIGHT)):
        figure = Figure((width, plan.height(width)), layout="constrained")
        FigureCanvasSVG(figure)
        plan.draw(figure, LIGHT)
        figure.savefig(
            buffer, format="svg", metadata={"Title": plan.title, "Description": plan.alt, "Date": None}
        )
    files.write(file, buffer.getvalue())


def bands(axes: Axes, theme: Theme, spans: list[tuple[float, float, int]], label: bool = True) -> None:
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


def legend(figure: Figure, axes: Axes) -> None:
    """Keys above the whole figure, each label once."""
    keys = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    columns = len(keys) if figure.get_figwidth() > NARROW else 2
    where = "outside upper left"
    figure.legend(list(keys.values()), list(keys), loc=where, ncols=columns, frameon=False)


def ticks(most: int, whole: bool = False) -> MaxNLocator:
    """At most so many round ticks."""
    return MaxNLocator(most, steps=[1, 2, 5, 10], integer=whole, min_n_ticks=1)


def widen(axes: Axes, least: float, low: float = -np.inf, high: float = np.inf) -> None:
    """Make the vertical range at least so wide, within `low` and `high`: noise must not fill a figure."""
    bottom, top = axes.get_ylim()
    if top - bottom < least:
        middle = min(max((bottom + top) / 2, low + least / 2), high - least / 2)
        axes.set_ylim(middle - least / 2, middle + least / 2)


def drawable(text: str) -> bool:
    """Whether the fonts at hand have a shape for every character; else a figure would show boxes."""
    return all(any(ord(c) in have for have in _characters()) for c in text)


@functools.cache
def _characters() -> tuple[frozenset[int], ...]:
    files = (font_manager.findfont(family) for family in _families())
    return tuple(frozenset(font_manager.get_font(file).get_charmap()) for file in files)


@functools.cache
def _families() -> tuple[str, ...]:
    installed = set(font_manager.get_font_names())
    wanted = ["Inter", "Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans"]
    wanted += ["Noto Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Micro Hei", "Noto Sans Arabic"]
    return (*(f for f in wanted if f in installed),)


def mark(points: int) -> str:
    """Markers while points are few: a single one would draw no line."""
    return "o" if points <= 25 else ""


def _draw(plan: Plan, width: float, theme: Theme) -> Image.Image:
    with matplotlib.rc_context(_style(theme)):
        layout = None if plan.photographs else "constrained"
        figure = Figure((width, plan.height(width)), dpi=DPI, layout=layout)
        canvas = FigureCanvasAgg(figure)
        plan.draw(figure, theme)
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _data_uri(image: Image.Image, plan: Plan, theme: Theme) -> str:
    kind = "webp" if plan.photographs else "png"
    data = _photographs(image) if plan.photographs else _encoded(_few_colors(image, theme), kind)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _photographs(image: Image.Image) -> bytes:
    """As good as a page of under 3 MB has room for, and smaller where the lowest quality is still too large."""
    while True:
        for quality in (85, 65, 45, 25):
            data = _encoded(image, "webp", quality=quality, method=2)
            if len(data) <= MOST_BYTES:
                return data
        image = image.resize((image.width * 2 // 3, image.height * 2 // 3), Image.Resampling.LANCZOS)


def _encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


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
    return {
        "font.family": list(_families()),
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
