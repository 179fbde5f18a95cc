"""Speed of a training step and its peak memory against timm's distillation task, live, cached and compiled.

    python benchmarks/step.py [--resolutions 12,32] [--student vit_tiny] [--batch 128] [--rounds 7] [--no-compile]

All variants: the same teacher (ViT-Small) and student (patch 4, one head, random weights), the same random batch, bf16
autocast where the device has it, AdamW (fused), forward, backward and optimizer step. `timm` is
timm.task.LogitDistillationTask as its users run it, `kd` our Distiller with our Teacher, `irkd` the same with gradient
maps at the first, second and last block; `plain` a loop as notebooks have it (AdamW not fused), `torchdistill` its
KDLoss, where it is installed; `_cached` takes what the teacher said from memory, `_compiled` compiles
student and teacher. The variants take turns within a round and each ratio of speed to timm's is taken within a round:
the median over the rounds is quoted. Peak memory is that of a process that runs one variant alone (on a GPU: allocated
by torch; elsewhere with what the compiler took). The last line is one JSON object: for each resolution the ratios, and
`peak_mib` of each variant.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.task import LogitDistillationTask
from torch import nn
from torch.nn import functional as F

from irkd_dist.distill import compiling, models, taps
from irkd_dist.distill.module import Distiller, Objective
from irkd_dist.distill.teacher import Teacher, freeze
from irkd_dist.training.engines import autocast_dtype

OURS = ("kd", "kd_compiled", "kd_cached", "irkd", "irkd_compiled", "irkd_cached", "irkd_cached_compiled")
PEERS = ("plain", "torchdistill") if importlib.util.find_spec("torchdistill") else ("plain",)
VARIANTS = ("timm", *PEERS, *OURS)
TEMPERATURE = 4.0


@dataclass(frozen=True)
class Setting:
    """What all variants of a comparison share."""

    batch: int = 128
    student: str = "vit_tiny"
    teacher: str = "vit_small"
    patch: int = 4
    image_size: int = 32  # that the models are made for
    options: dict[str, Any] = field(default_factory=dict)  # more of both models, for timm
    backend: str = "inductor"  # of torch.compile


Step = Callable[[], torch.Tensor]  # takes a training step; returns its loss, on the device


def make_step(variant: str, setting: Setting, resolution: int, device: torch.device) -> Step:
    """One training step of a variant."""
    torch.manual_seed(0)
    autocast = autocast_dtype("auto", device)
    batch = setting.batch
    student, teacher = (
        models.create_model(
            name,
            classes=10,
            patch=setting.patch,
            image_size=setting.image_size,
            options=dict(setting.options),
        ).to(device)
        for name in (setting.student, setting.teacher)
    )
    images = torch.randn(batch, 3, resolution, resolution, device=device)
    labels = torch.randint(0, 10, (batch,), device=device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-4, fused=variant not in PEERS)

    if variant == "timm":
        task = LogitDistillationTask(
            student, teacher, nn.CrossEntropyLoss(), task_loss_weight=1.0, distill_loss_weight=1.0,
            temperature=TEMPERATURE, device=device, verbose=False,
        ).train()  # fmt: skip

        def loss() -> torch.Tensor:
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                return task(images, labels)["loss"]
    elif variant in PEERS:
        teacher.eval().requires_grad_(False)
        student.train()
        criterion = _plain_loss if variant == "plain" else _torchdistill_loss()

        def loss() -> torch.Tensor:
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                with torch.no_grad():
                    told = teacher(images)
                return criterion(student(images), told, labels)
    else:
        gamma = 0.8 if variant.startswith("irkd") else 0.0
        pairs = taps.tap_pairs(student, teacher, ["first", "second", "last"], "gradient")
        if gamma or device.type == "cpu":
            models.without_fused_attention(student)
        objective = Objective(temperature=TEMPERATURE, taps=tuple(s.path for s, _ in pairs))
        module = Distiller(student, objective, autocast).train()
        network = freeze(teacher, autocast, gamma > 0, device)
        frozen = Teacher(network, [t.path for _, t in pairs], "gradient", autocast)
        if "compiled" in variant:
            compiling.compiled(module, setting.backend)
            compiling.compiled_teacher(frozen, setting.backend)
        weight = torch.full((batch,), 1 / batch, device=device)
        aligned = batch if gamma else 0
        kept = frozen(images, labels, aligned) if "cached" in variant else None
        if kept is not None:
            del network, teacher
            frozen.model = nn.Identity()

        def loss() -> torch.Tensor:
            targets = frozen(images, labels, aligned) if kept is None else kept
            return module(images, labels, weight, targets, 1.0, gamma)["total"]

    def step() -> torch.Tensor:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return step


def _plain_loss(said: torch.Tensor, told: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    soft = F.kl_div(
        F.log_softmax(said / TEMPERATURE, 1), F.softmax(told / TEMPERATURE, 1), reduction="batchmean"
    )
    return soft * TEMPERATURE**2 + F.cross_entropy(said, labels)


def _torchdistill_loss() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """torchdistill's KDLoss on the outputs of both models; its weights sum to one."""
    from torchdistill.losses.mid_level import KDLoss  # type: ignore[import-not-found]

    kd = KDLoss(
        student_module_path=".", student_module_io="output", teacher_module_path=".",
        teacher_module_io="output", temperature=TEMPERATURE, alpha=0.5, reduction="batchmean",
    )  # fmt: skip
    return lambda said, told, labels: kd({".": {"output": said}}, {".": {"output": told}}, labels)


def timed(step: Step, device: torch.device, repeats: int) -> float:
    """Seconds a step."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def peak_memory(variant: str, setting: Setting, resolution: int) -> float:
    """MiB at the peak of a process of its own."""
    command = [
        sys.executable, __file__, "--memory-of", variant, "--resolutions", str(resolution),
        "--student", setting.student, "--teacher", setting.teacher, "--batch", str(setting.batch),
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
    parser.add_argument("--teacher", default="vit_small")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled variants out")
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    resolutions = [int(r) for r in arguments.resolutions.split(",")]
    setting = Setting(arguments.batch, arguments.student, arguments.teacher)

    if arguments.memory_of:
        step = make_step(arguments.memory_of, setting, resolutions[0], device)
        for _ in range(3):
            step()
        used = torch.cuda.max_memory_allocated() if device.type == "cuda" else 1024 * _peak_rss_kib()
        print(used / 2**20)
        return

    variants = [v for v in VARIANTS if not (arguments.no_compile and "compiled" in v)]
    results = {str(r): measure(setting, arguments.rounds, variants, r, device) for r in resolutions}
    where = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    dtype = autocast_dtype("auto", device)
    print(
        json.dumps(
            {
                "benchmark": "step", "device": where, "cpus": os.cpu_count(), "student": arguments.student,
                "teacher": arguments.teacher, "batch": arguments.batch, "autocast": str(dtype),
                "rounds": arguments.rounds,
                "torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version(),
                "resolutions": results,
            }
        )
    )  # fmt: skip


def measure(
    setting: Setting, rounds: int, variants: list[str], resolution: int, device: torch.device
) -> dict[str, Any]:
    """Ratios of speed to timm's (medians), their smallest and largest, images/s and peak memory at a resolution."""
    steps = {v: make_step(v, setting, resolution, device) for v in variants}
    repeats = 20 if device.type == "cuda" else 1
    for step in steps.values():
        timed(step, device, 3)  # warm-up
    times: dict[str, list[float]] = {v: [] for v in variants}
    for _ in range(rounds):
        for variant, step in steps.items():
            times[variant].append(timed(step, device, repeats))
    del steps
    ratios = {
        v: spread([timm / ours for timm, ours in zip(times["timm"], times[v], strict=True)])
        for v in variants
        if v != "timm"
    }
    rates = {v: round(setting.batch / statistics.median(t), 1) for v, t in times.items()}
    memory = {v: round(peak_memory(v, setting, resolution)) for v in variants}
    for variant in variants:
        against = (
            ""
            if variant == "timm"
            else "  {:.2f} of timm's speed ({:.2f} to {:.2f})".format(*ratios[variant])
        )
        print(
            f"{resolution:3d} px  {variant:20s} {rates[variant]:9.1f} images/s, {memory[variant]:6d} MiB{against}",
            flush=True,
        )
    return {
        **{variant: ratio[0] for variant, ratio in ratios.items()},
        "peak_mib": memory,
        "spread": {variant: ratio[1:] for variant, ratio in ratios.items()},
        "images_per_s": rates,
    }


def _peak_rss_kib() -> int:
    # not getrusage: its maximum goes over from the parent process
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
