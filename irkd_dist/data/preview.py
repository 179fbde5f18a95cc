"""preview.png: the same images at every resolution, as in the paper's Figure 1."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np

from irkd_dist import files
from irkd_dist.data import shards
from irkd_dist.data.shards import Manifest

PREVIEW = "preview.png"


def write(out: Path, manifest: Manifest, count: int = 8) -> None:
    """Write the picture of a folder of shards, `count` images wide."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    split = "test" if "test" in manifest.splits else "train"
    width, height = 0.7 + 1.1 * count, 0.3 + 1.1 * len(manifest.resolutions)  # inches
    figure = Figure(figsize=(width, height), dpi=130)
    axes = figure.subplots(len(manifest.resolutions), count, squeeze=False)
    for row, resolution in zip(axes, manifest.resolutions, strict=True):
        first = resolution == manifest.resolutions[0]
        opened = shards.open_split(out, manifest, split, resolution, verify="size")
        picked = _one_of_each_class(opened.labels, count)
        for column, axis in enumerate(row):
            axis.set_axis_off()
            if column < len(picked):
                i = picked[column]
                pixels = shards.decode(opened.image(i), manifest.encoding)
                axis.imshow(pixels.permute(1, 2, 0).numpy(), interpolation="nearest")
                if manifest.crop_pct < 1:  # what evaluation sees
                    seen = round(resolution * manifest.crop_pct)
                    edge = (resolution - seen) / 2 - 0.5
                    axis.add_patch(
                        Rectangle((edge, edge), seen, seen, fill=False, color="white", linewidth=0.8)
                    )
                if first:  # a name is no formula, whatever dollars it holds
                    axis.set_title(manifest.classes[opened.labels[i]][:12], fontsize=8, parse_math=False)
        row[0].text(
            -0.12, 0.5, f"{resolution} px", transform=row[0].transAxes, ha="right", va="center", fontsize=9
        )
        opened.close()
    margins = {"left": 0.68 / width, "right": 0.995, "top": 1 - 0.28 / height, "bottom": 0.02 / height}
    figure.subplots_adjust(**margins, wspace=0.06, hspace=0.06)
    image = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # a box stands for it
        figure.savefig(image, format="png", metadata={"Software": None})
    files.write(out / PREVIEW, image.getvalue(), mine=True)


def _one_of_each_class(labels: np.ndarray, count: int) -> list[int]:
    """Sample numbers that show as many classes as fit, in class order."""
    firsts = [int(np.flatnonzero(labels == c)[0]) for c in np.unique(labels)[:count]]
    rest = [i for i in range(min(len(labels), 2 * count)) if i not in firsts]
    return firsts + rest[: count - len(firsts)]
