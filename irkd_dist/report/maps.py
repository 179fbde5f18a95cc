"""Saliency panels: image, teacher's and student's map of a few held-out images, as the run goes (Figure 5)."""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from irkd_dist.report.figures import MUTED, WIDTH, Picture
from irkd_dist.report.reading import Run

ACROSS, MOST_SAMPLES, MOST_SNAPSHOTS = 4, 8, 12
LEFT, TOP, GAP = 0.62, 0.46, 0.16  # inches: row labels, column labels, between samples


def panels(run: Run) -> Picture | None:
    """Samples as blocks of columns; snapshots as rows, from the first stage to the last."""
    shots = run.panels
    if len(shots) > MOST_SNAPSHOTS:  # the end of each stage
        shots = list({stage: (stage, epoch, arrays) for stage, epoch, arrays in shots}.values())
    count = min([MOST_SAMPLES, *(len(arrays["images"]) for *_, arrays in shots)]) if shots else 0
    if not count:
        return None
    sources = [name for name in ("teacher", "student") if all(name in arrays for *_, arrays in shots)]
    columns = ["image", *sources] if len(sources) > 1 else ["image", "map"]
    labels = [_class_name(run, int(y)) for y in shots[0][2]["labels"][:count]]
    across = min(count, ACROSS)
    side = min((WIDTH - LEFT - GAP * (across - 1)) / (across * len(columns)), 1.0)
    block = TOP + side * len(shots) + GAP
    height = -(-count // across) * block - GAP
    figure = Figure((WIDTH, height))
    axes = figure.add_axes((0, 0, 1, 1))
    small = {"fontsize": 7, "color": MUTED}
    for n, label in enumerate(labels):
        left = LEFT + n % across * (side * len(columns) + GAP)
        top = TOP + n // across * block
        axes.text(left, top - 0.24, label, fontweight="bold")
        for j, column in enumerate(columns):
            axes.text(left + (j + 0.5) * side, top - 0.06, column, ha="center", **small)
        for i, (_, epoch, arrays) in enumerate(shots):
            y = top + i * side
            if n % across == 0:
                axes.text(0, y + 0.45 * side, f"{int(arrays['resolution'])} px", fontweight="bold")
                axes.text(0, y + 0.45 * side + 0.15, f"epoch {epoch}", **small)
            image = arrays["images"][n]
            for j, picture in enumerate([image, *(overlay(image, arrays[name][n]) for name in sources)]):
                x = left + j * side
                box = (x + 0.015, x + side - 0.015, y + side - 0.015, y + 0.015)
                axes.imshow(picture, extent=box, aspect="auto", interpolation="none")
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    axes.set_axis_off()
    sizes = dict.fromkeys(str(arrays["resolution"]) for *_, arrays in shots)
    method = run.config.loss.saliency.method.replace("_", "-")
    caption = f"Held-out images as the network sees them, and their saliency: {method} maps averaged over the "
    caption += "taps, each stretched to its own range, from dark (low) to yellow (high)."
    caption += " Only the end of each stage is shown." if len(shots) < len(run.panels) else ""
    alt = f"Saliency maps ({', '.join(columns)}) of {', '.join(labels)} at {', '.join(sizes)} px."
    return Picture("Saliency across resolutions and epochs", alt, caption, figure)


def overlay(image: np.ndarray, values: np.ndarray, side: int = 96) -> np.ndarray:
    """A map (h, w) in colour over the greyed image (H, W, 3) uint8, as (side, side, 3) uint8; flat maps are dark."""
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / (high - low) if high - low > 1e-6 else np.zeros_like(values)
    smooth = Image.fromarray(scaled.astype(np.float32)).resize((side, side), Image.Resampling.BILINEAR)
    color = matplotlib.colormaps["inferno"](np.asarray(smooth))[..., :3]
    grey = Image.fromarray(image).convert("L").resize((side, side), Image.Resampling.NEAREST)
    return (255 * (0.68 * color + 0.32 * np.asarray(grey)[..., None] / 255)).round().astype(np.uint8)


def _class_name(run: Run, label: int) -> str:
    return run.classes[label] if label < len(run.classes) else f"class {label}"
