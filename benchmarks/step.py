"""Training steps a second and peak memory: our KD step against timm's, our saliency step against our KD step.

    python benchmarks/step.py [--resolutions 12,32] [--student vit_tiny] [--batch 128] [--rounds 7]

All variants: the same ViT-Small teacher and student (patch 4, one head, random weights), the same random batch, bf16
autocast where the device has it, AdamW (fused), forward, backward and optimizer step. `timm` is
timm.task.LogitDistillationTask as its users run it, `kd` our Distiller with our Teacher, `saliency` the same with
gradient maps at the first, second and last block. The variants take turns within a round and each ratio is taken
within a round: the median over the rounds is quoted, with the smallest and the largest. Peak memory is that of
a process that runs one variant alone (on a GPU: allocated by torch). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.task import LogitDistillationTask
from torch import nn

from irkd_dist.distill import models, taps
from irkd_dist.distill.module import Distiller, Objective, Targets
from irkd_dist.distill.teacher import Teacher, freeze
from irkd_dist.training.engines import autocast_dtype

VARIANTS = ("timm", "kd", "saliency")
TEMPERATURE = 4.0


def make_step(
    variant: str, student_name: str, resolution: int, batch: int, device: torch.device
) -> Callable[[], float]:
    """One training step of a variant, as a function that returns its loss."""
    torch.manual_seed(0)
    autocast = autocast_dtype("auto", device)
    options: dict[str, Any] = {"classes": 10, "patch": 4, "image_size": 32}
    student = models.create_model(student_name, **options).to(device)
    teacher = models.create_model("vit_small", **options).to(device)
    images = torch.randn(batch, 3, resolution, resolution, device=device)
    labels = torch.randint(0, 10, (batch,), device=device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-4, fused=True)

    if variant == "timm":
        task = LogitDistillationTask(
            student, teacher, nn.CrossEntropyLoss(), task_loss_weight=1.0, distill_loss_weight=1.0,
            temperature=TEMPERATURE, device=device, verbose=False,
        ).train()  # fmt: skip

        def loss() -> torch.Tensor:
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                return task(images, labels)["loss"]
    else:
        gamma = 0.8 if variant == "saliency" else 0.0
        pairs = taps.tap_pairs(student, teacher, ["first", "second", "last"], "gradient")
        if gamma or device.type == "cpu":
            models.without_fused_attention(student)
        objective = Objective(temperature=TEMPERATURE, taps=tuple(s.path for s, _ in pairs))
        module = Distiller(student, objective, autocast).train()
        frozen = Teacher(
            freeze(teacher, autocast, gamma > 0), [t.path for _, t in pairs], "gradient", autocast
        )
        weight = torch.full((batch,), 1 / batch, device=device)

        def loss() -> torch.Tensor:
            targets: Targets = frozen(images, labels, aligned=batch if gamma else 0)
            return module(images, labels, weight, targets, alpha=1.0, gamma=gamma)["total"]

    def step() -> float:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(value.detach())

    return step


def timed(step: Callable[[], float], device: torch.device, repeats: int) -> float:
    """Seconds a step."""
    start = time.perf_counter()
    for _ in range(repeats):
        step()  # reads the loss, which waits for the device
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def peak_memory(variant: str, arguments: argparse.Namespace, resolution: int) -> float:
    """MiB at the peak of a process of its own."""
    command = [
        sys.executable, __file__, "--memory-of", variant, "--resolutions", str(resolution),
        "--student", arguments.student, "--batch", str(arguments.batch),
    ]  # fmt: skip
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def spread(values: list[float]) -> list[float]:
    """Median, smallest, largest."""
    return [round(v, 3) for v in (statistics.median(values), min(values), max(values))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--resolutions", default="12,32")
    parser.add_argument("--student", default="vit_tiny")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    resolutions = [int(r) for r in arguments.resolutions.split(",")]

    if arguments.memory_of:
        step = make_step(arguments.memory_of, arguments.student, resolutions[0], arguments.batch, device)
        for _ in range(3):
            step()
        used = torch.cuda.max_memory_allocated() if device.type == "cuda" else 1024 * _peak_rss_kib()
        print(used / 2**20)
        return

    results = {}
    for resolution in resolutions:
        steps = {v: make_step(v, arguments.student, resolution, arguments.batch, device) for v in VARIANTS}
        repeats = 20 if device.type == "cuda" else 1
        for step in steps.values():
            timed(step, device, 3)  # warm-up
        times: dict[str, list[float]] = {v: [] for v in VARIANTS}
        for _ in range(arguments.rounds):
            for variant, step in steps.items():
                times[variant].append(timed(step, device, repeats))
        ours_over_timm = spread([t / k for t, k in zip(times["timm"], times["kd"], strict=True)])
        saliency_over_kd = spread([s / k for s, k in zip(times["saliency"], times["kd"], strict=True)])
        memory = {v: round(peak_memory(v, arguments, resolution)) for v in VARIANTS}
        rates = {v: round(arguments.batch / statistics.median(t), 1) for v, t in times.items()}
        results[str(resolution)] = {
            "images_per_s": rates,
            "kd_speed_over_timm": ours_over_timm,
            "saliency_time_over_kd": saliency_over_kd,
            "peak_memory_mib": memory,
        }
        print(
            f"{resolution} px: images/s {rates}; our KD is {ours_over_timm[0]:.2f}x timm's "
            f"({ours_over_timm[1]:.2f} to {ours_over_timm[2]:.2f}); saliency takes {saliency_over_kd[0]:.2f}x KD "
            f"({saliency_over_kd[1]:.2f} to {saliency_over_kd[2]:.2f}); peak MiB {memory}"
        )
    where = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    dtype = autocast_dtype("auto", device)
    print(
        json.dumps(
            {
                "benchmark": "step", "device": where, "cpus": os.cpu_count(), "student": arguments.student,
                "teacher": "vit_small", "batch": arguments.batch, "autocast": str(dtype), "rounds": arguments.rounds,
                "torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version(),
                "resolutions": results,
            }
        )
    )  # fmt: skip


def _peak_rss_kib() -> int:
    # not getrusage: its maximum goes over from the parent process
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
