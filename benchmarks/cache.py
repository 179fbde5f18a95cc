"""What a teacher's cache is worth, and what reading it costs: PYTHONPATH=. python benchmarks/cache.py [--steps N]

A ViT-Tiny student and a ViT-Small teacher, patch 4, KD and KD + saliency; synthetic images. For each resolution: images
a second with a live teacher and with its answers from memory (/dev/shm), a disk, and a disk that needs 20 ms for every
read; the share of a step that training waits for the cache; medians over rounds. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from irkd_dist import config
from irkd_dist.data import render
from irkd_dist.data.sources import open_source
from irkd_dist.distill import cache_shards, models
from irkd_dist.teach import teach
from irkd_dist.training import answers, build, curriculum, engines, step
from irkd_dist.training.position import Position

SLOW_S = 0.02  # a read of the throttled disk
read_at = cache_shards.read_at


def slow(descriptor: int, size: int, offset: int) -> bytes:
    """A read from a disk that is far away."""
    time.sleep(SLOW_S)
    return read_at(descriptor, size, offset)


def settings(
    root: Path, resolution: int, batch: int, steps: int, gamma: float, cache: str | None
) -> config.Config:
    """One stage with a teacher of random weights: what they are has no influence on speed."""
    values = {
        "name": "bench", "out": str(root),
        "data": {"shards": str(root / f"r{resolution}"), "batch": batch, "subset": None},
        "student": {"name": "vit_tiny", "patch": 4},
        "teacher": {
            "model": {"name": "vit_small", "patch": 4, "image_size": 32, "weights": str(root / "teacher.safetensors")},
            "cache": {"folder": cache},
        },
        "loss": {"kd": {"alpha": 1.0}, "saliency": {"gamma": gamma}},
        "fixed": {"resolution": resolution, "epochs": 1},
    }  # fmt: skip
    return config.from_dict(values, "benchmark")


def measure(spec: config.Config, steps: int) -> tuple[float, float]:
    """Images a second, and the share of the time that training waited for the cache; the first step is not counted."""
    engine = engines.setup(spec)
    try:
        parts = build.build(spec, engine)
        train_set, held_out = build.loaders(parts, parts.plan.stages[0])
        loss, position = spec.loss, Position(curriculum=curriculum.State())
        with train_set, held_out:
            answers.enter(parts, 0, train_set)
            images, began = 0, 0.0
            for i, batches in enumerate(
                answers.steps(parts, train_set, position, loss.kd.alpha, loss.saliency.gamma)
            ):
                step.take(parts, batches, loss.kd.alpha, loss.saliency.gamma, i, 1)
                if i == 0:
                    began = time.perf_counter()
                    answers.counted(parts, 1.0)
                    continue
                images += sum(len(b.ids) for b in batches)
                if i == steps:
                    break
            seconds = time.perf_counter() - began
            told = answers.counted(parts, seconds)
            if parts.answers is not None:
                parts.answers.close()
                assert not told["cache_misses"], told
        return images / seconds, told.get("cache_wait", 0.0)
    finally:
        engine.finish()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--resolutions", default="12,32")
    arguments = parser.parse_args()
    result: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        root = Path(folder)
        network = models.create_model("vit_small", classes=10, patch=4, image_size=32)
        from safetensors.torch import save_file

        save_file(network.state_dict(), root / "teacher.safetensors")
        count = arguments.batch * (arguments.steps + 1)
        for resolution in map(int, arguments.resolutions.split(",")):
            source = open_source("synthetic", None, samples={"train": count, "test": 20}, size=resolution)
            render.render(source, root / f"r{resolution}", render.Options((resolution,), val_fraction=0.0))
            for gamma in (0.0, 0.8):
                method = "irkd" if gamma else "kd"
                places = {"memory": Path(memory, f"{resolution}"), "disk": root / f"cache-{resolution}"}
                teach(
                    settings(root, resolution, arguments.batch, 0, gamma, str(places["memory"])),
                    say=lambda text: None,
                )
                shutil.rmtree(places["disk"], ignore_errors=True)
                shutil.copytree(places["memory"], places["disk"])
                places["slow disk"] = places["disk"]
                rates: dict[str, list[tuple[float, float]]] = {}
                for _ in range(arguments.rounds):
                    for name in ("live", *places):
                        cache_shards.read_at = slow if name == "slow disk" else read_at
                        where = str(places[name]) if name in places else None
                        spec = settings(root, resolution, arguments.batch, arguments.steps, gamma, where)
                        rates.setdefault(name, []).append(measure(spec, arguments.steps))
                cache_shards.read_at = read_at
                live = [rate for rate, _ in rates["live"]]
                row = {"live images/s": statistics.median(live)}
                for name in places:
                    ratios = [rate / base for (rate, _), base in zip(rates[name], live, strict=True)]
                    row[name] = statistics.median(ratios)
                    row[f"{name}, wait"] = statistics.median(wait for _, wait in rates[name])
                size = cache_shards.size_of(places["disk"]) / count
                result[f"{method} {resolution} px"] = {k: round(v, 4) for k, v in row.items()} | {
                    "bytes a sample": round(size)
                }
                print(f"{method} {resolution} px: {result[f'{method} {resolution} px']}", flush=True)
    facts = {"threads": torch.get_num_threads(), "load": os.getloadavg()[0], "torch": torch.__version__}
    print(json.dumps({**facts, "batch": arguments.batch, "cells": result}))


if __name__ == "__main__":
    main()
