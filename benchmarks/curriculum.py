"""Wall time of KD with the resolution curriculum over KD at fixed resolution: same epochs, early stopping off.

    python benchmarks/curriculum.py [--rounds 3] [--images 1280]

Runs `irkd train`'s own loop on shapes: custom student, ViT of 1.8 M parameters as teacher, patch 4; six epochs at
32 px, or one each at 12, 16, 20, 24, 28 and 32 px; validation and checkpoints included, process start not. The
two take turns; the ratio is taken within a round. Token arithmetic for the student and teacher alone gives 0.53.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import timm
import torch

from irkd_dist import config as configuration
from irkd_dist.data import render
from irkd_dist.data.sources import open_source
from irkd_dist.training.train import train

RESOLUTIONS = (12, 16, 20, 24, 28, 32)


def write_configs(folder: Path) -> None:
    """A teacher of one epoch, and the two students."""
    shards = f"data: {{shards: {folder / 'shards'}}}\nout: {folder}\ntrack: {{panels: 0}}\n"
    student = f"{shards}teacher: {{run: {folder / 'teacher-seed0'}}}\nloss: {{kd: {{alpha: 1.0}}}}\n"
    stages = ", ".join(f"{{resolution: {r}}}" for r in RESOLUTIONS)
    texts = {
        "teacher": f"{shards}student: {{options: {{embed_dim: 192, depth: 6, num_heads: 3}}}}\n"
        "fixed: {resolution: 32, epochs: 1}\n",
        "kd": f"{student}fixed: {{resolution: 32, epochs: {len(RESOLUTIONS)}}}\n",
        "kd_cl": f"{student}curriculum: {{epochs: 1, stages: [{stages}]}}\n",
    }
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)


def seconds(folder: Path, name: str, number: int) -> float:
    """Wall time of one training run."""
    start = time.perf_counter()
    train(configuration.load(folder / f"{name}.yaml", [f"name={name}-{number}"]))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=1280)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        samples = {"train": arguments.images, "val": 128, "test": 128}
        source = open_source("synthetic", None, samples=samples, size=32)
        render.render(source, folder / "shards", render.Options(RESOLUTIONS))
        write_configs(folder)
        train(configuration.load(folder / "teacher.yaml"))
        times = [(seconds(folder, "kd", i), seconds(folder, "kd_cl", i)) for i in range(arguments.rounds)]
    ratios = [curriculum / fixed for fixed, curriculum in times]
    result = {
        "benchmark": "curriculum", "device": "cuda" if torch.cuda.is_available() else "cpu", "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(), "rounds": arguments.rounds,
        "kd_seconds": round(statistics.median(t[0] for t in times), 2),
        "kd_cl_seconds": round(statistics.median(t[1] for t in times), 2),
        "kd_cl_over_kd": [round(v, 3) for v in (statistics.median(ratios), min(ratios), max(ratios))],
        "torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version(),
    }  # fmt: skip
    median, low, high = result["kd_cl_over_kd"]
    print(f"KD + CL takes {median:.2f}x the wall time of KD ({low:.2f} to {high:.2f})")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
