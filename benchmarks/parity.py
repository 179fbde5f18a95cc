"""How far each engine is from a single process: the table of docs/operations.md.

    python benchmarks/parity.py [--engines ddp zero0 ...] [--worlds 2 3 4]

For each engine and world: the largest relative difference of a parameter's gradient over all cases of
tests/training/parity_worker.py at equal weights; over 20 steps across a transition with saliency (zero3: without), at
AdamW's eps of 1e-3 and of its default 1e-8, the largest relative difference of a loss, and of the weights at the end,
over the distance they travelled. fp32, dropout off, clipping at 1. Prints Markdown; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from irkd_dist import checkpoint
from tests import chaos
from tests.training.launch import REPOSITORY, irkd, launch_engine, losses

STEPS = ["curriculum.stages[0].epochs=2", "curriculum.stages[1].epochs=3", "optim.clip=1.0"]


def gradients(folder: Path, engine: str, world: int) -> dict:
    """Gradients of every case, computed by the tests' own worker."""
    subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world}", "--standalone", "-m",
            "tests.training.parity_worker", engine, str(folder / "teacher-seed0"), str(folder / "shapes"), str(folder),
        ],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True,
    )  # fmt: skip
    return torch.load(folder / f"{engine}-{world}.pt")


def worst_gradient(one: dict, many: dict) -> float:
    """Largest relative difference over parameters and cases; a tensor of rounding alone is compared to the largest."""
    worst = 0.0
    for case, result in many.items():
        if result is None:
            continue
        norms = {k: float(v.norm()) for k, v in one[case].items() if k.startswith("grad.")}
        for name, norm in norms.items():
            difference = float((result[name] - one[case][name]).norm())
            worst = max(worst, difference / max(norm, 1e-4 * max(norms.values())))
    return worst


def run(folder: Path, name: str, engine: str, world: int, eps: str) -> tuple[Path, Path]:
    """20 steps; returns the run and the checkpoint of its end."""
    more = ["loss.saliency.gamma=0"] if engine == "zero3" or name.endswith("plain") else []
    keep = "checkpoint.keep=9"
    arguments = [
        "train",
        str(folder / "student.yaml"),
        f"name={name}",
        f"optim.eps={eps}",
        keep,
        *STEPS,
        *more,
    ]
    launch_engine(engine, world, *arguments) if world > 1 else irkd(*arguments)
    return folder / name, folder / name / "checkpoints" / checkpoint.name(20)


def first(run: Path) -> Path:
    return min((run / "checkpoints").glob("step-*"))


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float((a[k] - b[k]).square().sum()) for k in a))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", default=["ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2"])
    parser.add_argument("--worlds", nargs="+", type=int, default=[2, 3, 4])
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        chaos.prepare(folder)
        irkd("train", str(folder / "student.yaml"), "name=warm", "optim.lr=3e-3")
        one = gradients(folder, "ddp", 1)
        kinds = [(eps, kind) for eps in ("1e-3", "1e-8") for kind in ("saliency", "plain")]
        single = {(e, k): run(folder, f"one-{e}-{k}", "ddp", 1, e) for e, k in kinds}
        # the distance is taken from the end of the first epoch, the first weights that are kept
        begin = checkpoint.load_student(first(single["1e-3", "saliency"][0]))
        for engine in arguments.engines:
            for world in arguments.worlds:
                row = {
                    "engine": engine,
                    "processes": world,
                    "gradient": worst_gradient(one, gradients(folder, engine, world)),
                }
                for eps in ("1e-3", "1e-8"):
                    ours, end = run(folder, f"{engine}-{world}-{eps}", engine, world, eps)
                    theirs, their_end = single[eps, "plain" if engine == "zero3" else "saliency"]
                    pairs = zip(losses(theirs), losses(ours), strict=True)
                    row[f"loss, eps {eps}"] = max(abs(a["total"] - b["total"]) / a["total"] for a, b in pairs)
                    weights, their_weights = checkpoint.load_student(end), checkpoint.load_student(their_end)
                    row[f"weights, eps {eps}"] = distance(weights, their_weights) / distance(
                        their_weights, begin
                    )
                rows.append(row)
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{v:.1e}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
    print(json.dumps({"benchmark": "parity", "rows": rows, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
