"""Saliency panels: image, teacher's and student's map of a few held-out images, as the run goes."""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from irkd_dist.errors import printable
from irkd_dist.report import figures
from irkd_dist.report.figures import NARROW, WIDE, Plan, Theme
from irkd_dist.report.reading import Run

MOST_SAMPLES, MOST_SNAPSHOTS = 8, 12  # of a saliency figure
LONGEST_LABEL = 22  # characters above a sample


def saliency(run: Run) -> Plan | None:
    """Samples as blocks of columns (image, teacher, student); snapshots as rows, from the first stage to the last."""
    shots = _of_the_same_images(run)
    others = len(run.panels) - len(shots)
    if len(shots) > MOST_SNAPSHOTS:
        shots = list({stage: (stage, epoch, arrays) for stage, epoch, arrays in shots}.values())
    samples = min((len(arrays["images"]) for *_, arrays in shots), default=0)
    shown = min(samples, MOST_SAMPLES)
    if not shown:
        return None
    has_teacher = all("teacher" in arrays for *_, arrays in shots)
    columns = ["image", "teacher", "student"] if has_teacher else ["image", "map"]
    classes = [int(y) for y in shots[-1][2]["labels"][:shown]]
    names = [_class_name(run, y) for y in classes]
    labels = [_label(name, y) for name, y in zip(names, classes, strict=True)]
    left, top, gap = 0.62, 0.46, 0.16

    def cell(width: float) -> tuple[int, float]:
        """Samples side by side, and the side of an image in inches."""
        across = min(shown, 4 if width > NARROW else 2)
        return across, min((width - left - gap * (across - 1)) / (across * len(columns)), 1.0)

    def height(width: float) -> float:
        across, side = cell(width)
        return -(-shown // across) * (top + side * len(shots) + gap) - gap

    def draw(figure: Figure, theme: Theme) -> None:
        width, tall = (float(v) for v in figure.get_size_inches())
        across, side = cell(width)
        axes = figure.add_axes((0, 0, 1, 1))
        for n in range(shown):
            x0 = left + n % across * (side * len(columns) + gap)
            y0 = top + n // across * (top + side * len(shots) + gap)
            axes.text(x0, y0 - 0.26, labels[n], fontweight="bold", va="center", color=theme.text)
            for j, column in enumerate(columns):
                at = x0 + (j + 0.5) * side
                axes.text(at, y0 - 0.09, column, ha="center", va="center", fontsize=7, color=theme.muted)
            for i, (_, epoch, arrays) in enumerate(shots):
                if n % across == 0:
                    words = f"{int(arrays['resolution'])} px"
                    axes.text(0, y0 + (i + 0.4) * side, words, va="center", fontweight="bold", fontsize=8)
                    place = (0, y0 + (i + 0.4) * side + 0.15)
                    axes.text(*place, f"epoch {epoch}", va="center", fontsize=7, color=theme.muted)
                for j, picture in enumerate(_cells(arrays, n, has_teacher)):
                    x, y = x0 + j * side, y0 + i * side
                    box = (x + 0.015, x + side - 0.015, y + side - 0.015, y + 0.015)
                    axes.imshow(picture, extent=box, aspect="auto", interpolation="nearest")
        axes.set(xlim=(0, width), ylim=(tall, 0))
        axes.set_axis_off()

    sizes = list(dict.fromkeys(int(arrays["resolution"]) for *_, arrays in shots))
    method = run.config.loss.saliency.method.replace("_", "-")
    caption = f"Held-out images as the network sees them, and their saliency: {method} maps averaged over "
    caption += "the taps, each stretched to its own range, from dark (low) to yellow (high)."
    caption += f" The first {shown} of {samples} images." if samples > shown else ""
    caption += " Only the end of each stage is shown." if len(shots) + others < len(run.panels) else ""
    caption += f" Left out: {others} of other images, as an earlier release chose them." if others else ""
    other = {label: name for label, name in zip(labels, names, strict=True) if label != name}
    caption += "".join(f" {label.capitalize()} is {name}." for label, name in other.items())
    alt = f"Saliency maps ({', '.join(columns)}) of {', '.join(names)} at {', '.join(map(str, sizes))} px."
    return Plan("Saliency across resolutions and epochs", alt, caption, (WIDE, NARROW), height, draw, True)


def overlay(image: np.ndarray, values: np.ndarray, side: int = 96) -> np.ndarray:
    """A map (h, w) in colour over the greyed image (H, W, 3) uint8, as (side, side, 3) uint8; flat maps are dark."""
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / (high - low) if high - low > 1e-6 else np.zeros_like(values)
    smooth = Image.fromarray(scaled.astype(np.float32)).resize((side, side), Image.Resampling.BILINEAR)
    color = matplotlib.colormaps["inferno"](np.asarray(smooth))[..., :3]
    grey = Image.fromarray(image).convert("L").resize((side, side), Image.Resampling.NEAREST)
    return (255 * (0.68 * color + 0.32 * np.asarray(grey)[..., None] / 255)).round().astype(np.uint8)


def _of_the_same_images(run: Run) -> list[tuple[int, int, dict[str, np.ndarray]]]:
    """The panels of the images that the last one has: a column is one image, and has one name."""
    last = run.panels[-1][2]["ids"].tolist() if run.panels else []
    return [shot for shot in run.panels if shot[2]["ids"].tolist() == last]


def _label(name: str, number: int) -> str:
    """A class's name as a figure can show it: short, and in characters that its fonts have."""
    return name if len(name) <= LONGEST_LABEL and figures.drawable(name) else f"class {number}"


def _cells(arrays: dict[str, np.ndarray], n: int, has_teacher: bool) -> list[np.ndarray]:
    image = arrays["images"][n]
    maps = [arrays[name][n] for name in (["teacher"] * has_teacher + ["student"])]
    return [image, *(overlay(image, m) for m in maps)]


def _class_name(run: Run, label: int) -> str:
    return printable(run.classes[label]) if 0 <= label < len(run.classes) else f"class {label}"
