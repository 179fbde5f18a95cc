"""What virtual ranks cost: images/s of a run of one process with `data.virtual_ranks: 4` against one without.

Both train the paper's custom student by distillation alone on synthetic shards (batch 128), in turn, so that a busy
machine slows both. Prints the ratios of time with over time without, at 12 and 32 px, as one line of JSON.

    python benchmarks/virtual.py [--rounds 3]
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch

from irkd_dist import config as configuration
from irkd_dist import eventlog
from irkd_dist.data import render
from irkd_dist.data.sources import open_source
from irkd_dist.training.train import train

CONFIG = """
data: {{shards: {folder}/shards, batch: 128}}
student: {{name: custom, patch: 4}}
fixed: {{resolution: {resolution}, epochs: 2}}
track: {{log_every: 1000, panels: 0}}
out: {folder}
"""


def rate(folder: Path, name: str, more: list[str]) -> float:
    """Images/s of the second epoch: the first decodes."""
    train(configuration.load(folder / "c.yaml", [f"name={name}", *more]))
    lines = [e for e in eventlog.read_events(folder / name) if e["event"] == "train"]
    return lines[-1]["images_per_s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        source = open_source("synthetic", None, samples={"train": 1408, "test": 20}, size=32)
        render.render(source, folder / "shards", render.Options((12, 32), val_fraction=0.1))
        for resolution in (12, 32):
            (folder / "c.yaml").write_text(CONFIG.format(folder=folder, resolution=resolution))
            for i in range(rounds):
                without = rate(folder, f"without-{resolution}-{i}", [])
                sliced = rate(folder, f"with-{resolution}-{i}", ["data.virtual_ranks=4"])
                found.setdefault(f"{resolution} px", []).append(without / sliced)
    ratios = {size: [round(v, 3) for v in sorted(values)] for size, values in found.items()}
    medians = {size: round(statistics.median(values), 3) for size, values in found.items()}
    print(
        json.dumps(
            {
                "time_ratio": medians,
                "all": ratios,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
