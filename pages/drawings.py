"""Draws curriculum.svg, cache.svg and saliency.svg of docs/images for docs/concepts.md: `python pages/drawings.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from irkd_dist.training import optim

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
BLUE, AMBER, GREY, INK = "#2b6cb0", "#b7791f", "#829ab1", "#1f2933"
FILL = {BLUE: "#e6f0fa", AMBER: "#fff7e6", GREY: "#f5f7fa"}


def box(
    axes: Axes, x: float, y: float, title: str, below: str = "", colour: str = GREY, width: float = 2.0
) -> None:
    """A box with its centre at (x, y)."""
    shape = FancyBboxPatch(
        (x - width / 2, y - 0.45),
        width,
        0.9,
        boxstyle="round,pad=0,rounding_size=0.1",
        fc=FILL[colour],
        ec=colour,
    )
    axes.add_patch(shape)
    axes.text(
        x, y + (0.14 if below else 0), title, ha="center", va="center", weight="bold", color=INK, size=10
    )
    axes.text(x, y - 0.2, below, ha="center", va="center", color="#52606d", size=8)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], label: str = "", bend: float = 0
) -> None:
    """An arrow with a word beside it."""
    style = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=12, color="#486581", connectionstyle=style
        )
    )
    axes.text(
        (start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.12, label, ha="center", size=8, style="italic"
    )


def flow(width: float, height: float) -> Axes:
    """Empty axes in which a unit is as wide as it is high."""
    axes = plt.figure(figsize=(width * 0.9, height * 0.9)).add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.axis("off")
    return axes


def draw_curriculum() -> None:
    """Resolution and learning rate over the epochs of three stages, under each optimizer policy."""
    sides, epochs, steps = (12, 20, 32), 10, 20
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(8, 4.6), sharex=True, height_ratios=(1, 1.3))
    for stage, side in enumerate(sides):
        upper.bar((stage + 0.5) * epochs, side, width=epochs * 0.96, color=FILL[BLUE], edgecolor=BLUE)
        upper.text(
            (stage + 0.5) * epochs, side / 2, f"stage {stage}: {side} px", ha="center", va="center", color=INK
        )
    upper.set(ylabel="pixels a side", ylim=(0, 36))
    span, whole = epochs * steps, len(sides) * epochs * steps
    go_on = [optim.lr_factor("cosine", step, whole, warmup=0.05) for step in range(whole)]
    warm = [optim.rewarm_factor(step % span, 60) if step >= span else 1 for step in range(whole)]
    rates = {
        "reset: zero moments, the schedule starts anew": [
            optim.lr_factor("cosine", step % span, span, warmup=0.15) for step in range(whole)
        ],
        "carry: moments and schedule go on": go_on,
        "rewarm: both go on, the rate is warmed up": [a * b for a, b in zip(go_on, warm, strict=True)],
    }
    for (label, rate), colour, line in zip(rates.items(), (BLUE, GREY, AMBER), ("-", "--", ":"), strict=True):
        lower.plot(
            [step / steps for step in range(whole)], rate, line, color=colour, label=label, linewidth=2
        )
    lower.set(ylabel="learning rate / peak", xlabel="epoch", ylim=(0, 1.45), xlim=(0, len(sides) * epochs))
    lower.legend(loc="upper right", frameon=False, fontsize=8)
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()


def draw_cache() -> None:
    """Who asks the teacher's cache, and what decides an answer."""
    axes = flow(10.4, 3.6)
    box(axes, 1.4, 2.9, "a sample's view", "resolution, draw, seed", width=2.4)
    box(axes, 1.4, 0.8, "the teacher", "weights, precision, taps", BLUE, width=2.4)
    box(axes, 5.2, 1.85, "the cache", "logits and maps, apart", AMBER, width=2.2)
    for y, title in (
        (3.1, "later epochs, restarts"),
        (1.85, "sweeps over the losses"),
        (0.6, "another student"),
    ):
        box(axes, 8.9, y, title, width=2.6)
        arrow(axes, (6.3, 1.85), (7.6, y))
    arrow(axes, (2.6, 2.9), (4.1, 2.1), "key", bend=-0.1)
    arrow(axes, (2.6, 0.8), (4.1, 1.6), "asked once", bend=0.1)
    axes.text(5.2, 1.1, "bit by bit the same as asking again", ha="center", size=8, style="italic")


def draw_saliency() -> None:
    """From one batch to the loss between maps; the student's map is differentiated again."""
    axes = flow(10.8, 3.8)
    box(axes, 1.1, 2.1, "images", "one batch, one size", width=1.9)
    for y, who, colour, taps in ((3.1, "teacher", BLUE, "frozen"), (1.1, "student", AMBER, "trained")):
        box(axes, 3.7, y, who, taps, colour, width=1.7)
        box(axes, 6.3, y, "ds/dA at taps", "a map a tap", colour, width=2.0)
        arrow(axes, (2.05, 2.1), (2.85, y))
        arrow(axes, (4.55, y), (5.3, y), "score s")
        arrow(axes, (7.3, y), (8.35, 2.1 + (0.2 if y > 2.1 else -0.2)))
    box(axes, 9.5, 2.1, "gamma S", "squared error of maps", width=2.3)
    arrow(axes, (9.5, 1.63), (3.7, 0.63), bend=-0.3)
    axes.text(6.4, 0.1, "second derivative", ha="center", size=8, style="italic")


DRAWN: dict[str, Callable[[], None]] = {
    "curriculum": draw_curriculum,
    "cache": draw_cache,
    "saliency": draw_saliency,
}

if __name__ == "__main__":
    plt.rcParams |= {
        "svg.hashsalt": "irkd",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
    }
    for name, draw in DRAWN.items():
        draw()
        plt.savefig(IMAGES / f"{name}.svg", metadata={"Date": None, "Creator": None}, facecolor="white")
        plt.close()
