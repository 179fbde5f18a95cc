"""How cost grows: a step against resolution, batch, taps, depth and method; loader, cache, checkpoint, processes.

    python benchmarks/growth.py [--quick] [--only cache,batch] [--out FILE.json] [--figure FILE.svg]

Each point of a step is `irkd plan`'s calibration (5 steps after 2) in a process of its own, whose peak memory is its
own too: the paper's custom student and a ViT-Tiny teacher, patch 4, KD + saliency, all else at the first value. The
loader's points are images/s of an epoch of decoded images with crop and flip; the cache's are answers/s written and
read, by values a sample; the checkpoint's are seconds to write, with checksums and fsync. `processes`: a step of N
processes that share this machine's cores, against what `plan_model.Model` says of it: the work of one at the model's
efficiency, on as many cores as there are, and the exchange. The last line is one JSON object; the figure has a panel
for each curve.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from irkd_dist import checkpoint, eventlog, plan
from irkd_dist import config as configuration
from irkd_dist.data import render, shards
from irkd_dist.data.decoded import Dataset, Work
from irkd_dist.data.loader import Loader
from irkd_dist.data.recipe import Augment
from irkd_dist.data.sources import open_source
from irkd_dist.data.views import View
from irkd_dist.distill import cache_shards, models

FORK = multiprocessing.get_context("forkserver")
Point = dict[str, Any]

CONFIG = """
data: {{shards: {root}/shards, batch: 64}}
student: {{name: custom, patch: 4}}
teacher: {{model: {{name: vit_tiny, patch: 4, image_size: 32, weights: {root}/teacher.safetensors}}}}
loss: {{kd: {{alpha: 1.0}}, saliency: {{gamma: 0.8}}}}
fixed: {{resolution: 16, epochs: 1}}
track: {{log_every: 1, panels: 0}}
out: {root}
name: run
"""
# axis -> values, and what each sets
STEP: dict[str, tuple[list[Any], Callable[[Any], list[str]]]] = {
    "resolution": ([12, 16, 20, 24, 28, 32], lambda v: [f"fixed.resolution={v}"]),
    "batch": ([16, 32, 64, 128], lambda v: [f"data.batch={v}"]),
    "taps": ([1, 2, 4, 6], lambda v: [f"loss.saliency.taps={list(range(v))}"]),
    "depth": ([2, 4, 6, 8, 12], lambda v: [f"student.options={{depth: {v}}}"]),
    "method": (
        ["none", "attention", "gradient", "grad_cam", "hirescam"],
        lambda v: ["loss.saliency.gamma=0"] if v == "none" else [f"loss.saliency.method={v}"],
    ),
}
QUICK = {"resolution": [12, 16], "batch": [16]}


def step_point(root: Path, overrides: list[str], results: Any) -> None:
    """In a process of its own: milliseconds of a step, of the teacher in it, and MiB at the peak."""
    (stage,) = plan.plan(configuration.load(root / "c.yaml", overrides)).stages
    results.put(
        {"step_ms": 1000 * stage.step_s, "teacher_ms": 1000 * stage.teacher_s, "peak_mib": stage.peak_mib}
    )


def steps(root: Path, quick: bool) -> dict[str, list[Point]]:
    return {axis: points for axis in STEP if (points := step(root, axis, quick))}


def step(root: Path, axis: str, quick: bool) -> list[Point]:
    """The points of one axis."""
    found: list[Point] = []
    values, overrides = STEP[axis]
    for value in QUICK.get(axis, []) if quick else values:
        results = FORK.Queue()
        process = FORK.Process(target=step_point, args=(root, overrides(value), results))
        process.start()
        found.append({axis: value, **{k: round(v, 1) for k, v in results.get(timeout=600).items()}})
        process.join()
        print(found[-1], flush=True)
    return found


def loader(root: Path, quick: bool) -> list[Point]:
    """Images/s from RAM, against samples and workers."""
    found, manifest = [], shards.load_manifest(root / "shards")
    largest = manifest.splits["train"]
    for samples in [largest] if quick else [largest // 8, largest // 2, largest]:
        for workers in [1] if quick else [1, 2, 4, 8]:
            data = Dataset(root / "shards", manifest, "train", samples, verify="size")
            view, work = View(32, Augment(padding=4, flip=True)), Work("ram", workers=workers)
            with Loader(data, view, batch=64, seed=0, work=work) as made:
                times, count = list[float](), 0
                for epoch in range(2 if quick else 4):
                    began = time.perf_counter()
                    count = sum(len(b.labels) for b in made.batches(epoch))
                    times.append(time.perf_counter() - began)
            rates = {
                "first": round(count / times[0]),
                "images_per_s": round(count / statistics.median(times[1:])),
            }
            found.append({"samples": samples, "workers": workers, **rates})
    return found


def cache(root: Path, quick: bool) -> list[Point]:
    """Answers/s of a teacher's cache written and read in any order, against the values that it keeps of a sample."""
    found, count = [], 256 if quick else 4096
    rng = np.random.default_rng(0)
    for values in [10] if quick else [10, 100, 1000]:
        layout, ids = cache_shards.Layout((values,), "exact"), np.arange(count)
        began = time.perf_counter()
        rows = layout.encode([rng.random((count, values), np.float32)])
        file = cache_shards.write_shard(root / "cache", f"of-{values}", 0, layout, ids, rows)
        written = time.perf_counter() - began
        began = time.perf_counter()
        shard = cache_shards.open_shard(file)
        for batch in np.array_split(rng.permutation(count), count // 64):
            records, sound = shard.read(np.sort(batch))
            assert sound.all()
            layout.decode(records)
        read = time.perf_counter() - began
        found.append(
            {"values": values, "written_per_s": round(count / written), "read_per_s": round(count / read)}
        )
    return found


def checkpoints(root: Path, quick: bool) -> list[Point]:
    """Seconds to write a checkpoint, against the student's parameters."""
    found = []
    for depth in [2] if quick else [2, 6, 12, 24]:
        student = models.create_model("custom", classes=10, patch=4, image_size=32, options={"depth": depth})
        weights = {name: value.detach() for name, value in student.state_dict().items()}
        moments = {f"{k}.{n}": v.clone() for n, v in weights.items() for k in ("exp_avg", "exp_avg_sq")}
        times = []
        for i in range(1 if quick else 3):
            began = time.perf_counter()
            checkpoint.save(root / f"step-{depth}-{i}", weights, moments, {"step": 0})
            times.append(time.perf_counter() - began)
        size = 3 * sum(v.numel() * v.element_size() for v in weights.values()) / 2**20
        found.append({"mib": round(size, 1), "seconds": round(statistics.median(times), 3)})
    return found


def processes(root: Path, quick: bool) -> list[Point]:
    """Milliseconds of a step of 1, 2 and 4 processes that share this machine's cores, and what the model adds."""
    found = []
    student = models.create_model("custom", classes=10, patch=4, image_size=32)
    gradient, cores = 4.0 * models.parameter_count(student), len(os.sched_getaffinity(0))
    for n in [1, 2] if quick else [1, 2, 4]:
        launch = ["-m", "torch.distributed.run", f"--nproc-per-node={n}", "--standalone", "-m", "irkd_dist"]
        command = [
            sys.executable,
            *launch,
            "train",
            str(root / "c.yaml"),
            f"name=world-{n}",
            "fixed.epochs=2",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
        lines = [e for e in eventlog.read_events(root / f"world-{n}") if e["event"] == "train"]
        rate = statistics.median(e["images_per_s"] for e in lines[2:])
        step_ms = 1000 * 64 / rate
        alone = found[0]["step_ms"] if found else step_ms
        # N processes on c cores do the work of min(N, c)
        shared = replace(plan.Model(), gpus=n).seconds(alone / 1000, gradient) * n / min(n, cores) * 1000
        found.append({"processes": n, "step_ms": round(step_ms, 1), "model_ms": round(shared, 1)})
    return found


def draw(found: dict[str, Any], file: Path) -> None:
    """A panel for each curve, as SVG or PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "growth"
    from matplotlib import pyplot as plt

    panels: list[tuple[str, list[Point], str, str]] = [
        *((f"step, ms, by {axis}", rows, axis, "step_ms") for axis, rows in found.get("step", {}).items()),
        *(
            (f"memory, MiB, by {axis}", rows, axis, "peak_mib")
            for axis, rows in found.get("step", {}).items()
        ),
        ("loader, images/s, by samples", found.get("loader", []), "samples", "images_per_s"),
        ("cache, answers/s read, by values", found.get("cache", []), "values", "read_per_s"),
        ("checkpoint, s, by MiB", found.get("checkpoint", []), "mib", "seconds"),
        ("step, ms, by processes", found.get("processes", []), "processes", "step_ms"),
    ]
    columns = 5
    figure, axes = plt.subplots(
        -(-len(panels) // columns),
        columns,
        figsize=(2.5 * columns, 2 * -(-len(panels) // columns)),
        squeeze=False,
    )
    for axis in axes.flat:
        axis.set_visible(False)
    for axis, (title, rows, x, y) in zip(axes.flat, panels, strict=False):
        axis.set_visible(True)
        axis.plot(
            [str(r[x]) if isinstance(r[x], str) else r[x] for r in rows], [r[y] for r in rows], "o-", ms=3
        )
        axis.set_title(title, fontsize=8)
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=7)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


SECTIONS = {
    "cache": cache,
    "checkpoint": checkpoints,
    "loader": loader,
    "processes": processes,
    "step": steps,  # or one of its axes
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a point or two of each, to see that it runs")
    parser.add_argument(
        "--only", default=",".join(SECTIONS), help="these, in this order; an axis of step too"
    )
    parser.add_argument("--out", type=Path, help="the JSON")
    parser.add_argument("--figure", type=Path, help="the curves, .svg or .png")
    arguments = parser.parse_args()
    FORK.set_forkserver_preload(["irkd_dist.plan"])
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        samples = 320 if arguments.quick else 2560
        source = open_source("synthetic", None, samples={"train": samples, "test": 20}, size=32)
        render.render(source, root / "shards", render.Options((12, 16, 20, 24, 28, 32), val_fraction=0.1))
        save_file(
            models.create_model("vit_tiny", classes=10, patch=4, image_size=32).state_dict(),
            root / "teacher.safetensors",
        )
        (root / "c.yaml").write_text(CONFIG.format(root=root))
        found: dict[str, Any] = {"benchmark": "growth", "quick": arguments.quick}
        for name in arguments.only.split(","):
            if name in STEP:
                found.setdefault("step", {})[name] = step(root, name, arguments.quick)
            else:
                found[name] = SECTIONS[name](root, arguments.quick)
            found |= {
                "seconds": round(time.perf_counter() - began), "cores": len(os.sched_getaffinity(0)),
                "load": round(os.getloadavg()[0], 1), "threads": torch.get_num_threads(),
                "torch": torch.__version__, "python": platform.python_version(),
            }  # fmt: skip
            if arguments.out is not None:  # what is measured is kept, whatever becomes of the rest
                arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.figure is not None:
        draw(found, arguments.figure)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
