"""What a GPU makes of a training step: speed, share of its peak, memory, launches, waits, kernels. Under 9 minutes.

    python benchmarks/gpu.py [--out runs/gpu.json] [--budget-s 520] [--cells 16:224,4:32,...] [--device cpu --quick]

A cell is a patch size, a resolution and a variant of `benchmarks/step.py`: timm's distillation task, ours with (`irkd`)
and without (`kd`) saliency, compiled, and with the teacher's answers at hand. ViT-Tiny is taught by ViT-Small, in bf16.
Each cell times timm's step and its own in turns: the ratio of speed is the median over the rounds. First all cells that
run as they are, a process for each size, in the order of `--cells`; then the compiled ones, which compile beside one
another and are measured one by one. What does not fit into the budget is said, and what was measured is in the file
after each cell.

For each cell: images/s, and the ratio to timm's; matrix and convolution FLOPs of a step (`torch.utils.flop_counter`;
of a compiled cell those of the same step as it is) as a share of the GPU's dense bf16 peak by NVIDIA's data sheet; peak
memory that torch allocated for it; kernels launched and waits of the host (torch.cuda.set_sync_debug_mode) in a step;
the ten kernels that took longest, with their share of all kernels' time (torch.profiler).
`--quick`: models and batches of toy size, compiled without code generation: a rehearsal, whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import step
from irkd_dist import files

# dense bf16 FLOP/s by a part of the device's name, the first that fits
PEAKS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "GH200": 989e12,
    "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12, "RTX 4090": 165e12,
}  # fmt: skip
EAGER = tuple(v for v in ("timm", *step.OURS) if "compiled" not in v)
COMPILED = ("irkd_compiled", "irkd_cached_compiled", "kd_compiled")
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
PROFILED = 3  # steps


# ---- in a process of its own: some variants of one patch size and resolution


def measure(
    variants: Iterable[str], setting: step.Setting, resolution: int, arguments: Any, gate: Path
) -> None:
    """Print a line of JSON for each variant: ready once all have run, when `gate` is there."""
    device = torch.device(arguments.device)
    steps, told = dict[str, step.Step](), dict[str, dict[str, Any]]()
    for variant in ("timm", *(v for v in variants if v != "timm")):
        try:
            steps[variant], told[variant] = _first(variant, setting, resolution, device)
        except Exception as error:  # of whatever library: the other cells are to be measured
            told[variant] = {"error": _short(error)}
        if device.type == "cuda":
            torch.cuda.empty_cache()  # others are measured meanwhile
    print("ready", flush=True)
    while not gate.exists():
        time.sleep(0.1)
    if "timm" not in steps:
        raise SystemExit(f"timm's step failed: {told['timm']['error']}")
    for variant in variants:
        if variant in steps:
            try:
                told[variant] |= _timed(steps[variant], steps["timm"], setting.batch, device, arguments)
                told[variant] |= _profiled(steps[variant], device)
            except Exception as error:
                told[variant]["error"] = _short(error)
        print(json.dumps({"variant": variant, **told[variant]}), flush=True)


def _first(
    variant: str, setting: step.Setting, resolution: int, device: torch.device
) -> tuple[step.Step, dict[str, Any]]:
    """A variant's step, warm, with what is counted once: FLOPs, peak memory, how it was compiled."""
    before, began = _allocated(device), time.perf_counter()
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        run = step.make_step(variant, setting, resolution, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for attempt in range(4):
            try:
                for _ in range(3):
                    run()
                break
            except torch.OutOfMemoryError:  # of compiled cells several run their first steps at once
                if attempt == 3 or "compiled" not in variant:
                    raise
                torch.cuda.empty_cache()
                time.sleep(3 + 2 * attempt)
        if device.type == "cuda":
            torch.cuda.synchronize()
    told: dict[str, Any] = {"start_s": round(time.perf_counter() - began, 1)}
    if device.type == "cuda":
        told["peak_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20)
    fallen = [line for line in said.getvalue().splitlines() if "cannot compile" in line]
    if fallen:
        told["not_compiled"] = fallen[0]
    sys.stderr.write(said.getvalue())
    if "compiled" not in variant:
        with _Flops() as counted:
            run()
        told["flops"] = counted.total or None
    return run, told


class _Flops(TorchDispatchMode):
    """Adds up FLOPs by the library's formulas; its own counter does not take a gradient inside a forward."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def _timed(
    run: step.Step, timm_step: step.Step, batch: int, device: torch.device, arguments: Any
) -> dict[str, Any]:
    repeats = 1
    if device.type == "cuda":
        step.timed(run, device, 3)
        repeats = max(round(0.2 / step.timed(run, device, 5)), 3)
    ours, theirs = [], []
    for _ in range(arguments.rounds):
        theirs.append(step.timed(timm_step, device, repeats))
        ours.append(step.timed(run, device, repeats))
    ratios = step.spread([a / b for a, b in zip(theirs, ours, strict=True)])
    seconds = statistics.median(ours)
    return {"step_ms": round(1000 * seconds, 3), "images_per_s": round(batch / seconds), "of_timm": ratios}


def _profiled(run: step.Step, device: torch.device) -> dict[str, Any]:
    """Launches and waits in a step, and where its kernels' time went (on a CPU: its operators')."""
    told: dict[str, Any] = {}
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            for _ in range(PROFILED):
                run()
        torch.cuda.set_sync_debug_mode("default")
        told["waits"] = sum("called a synchronizing" in str(w.message) for w in waits) / PROFILED
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as prof:
        for _ in range(PROFILED):
            run()
        if cuda:
            torch.cuda.synchronize()
    events = prof.key_averages()
    if cuda:
        told["launches"] = sum(e.count for e in events if e.key in LAUNCHES) / PROFILED
        # not the ranges that an optimizer and compiled code put around kernels
        kernels = [e for e in events if str(e.device_type) == "DeviceType.CUDA" and not e.is_user_annotation]
        spent = {e.key: e.self_device_time_total for e in kernels}
    else:
        spent = {e.key: e.self_cpu_time_total for e in events}
    total = sum(spent.values()) or 1.0
    if cuda:
        told["kernel_ms"] = round(total / 1000 / PROFILED, 3)
    longest = sorted(spent.items(), key=lambda item: -item[1])[:10]
    return {**told, "kernels": [[name[:120], round(t / total, 4)] for name, t in longest]}


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


# ---- the run


@dataclasses.dataclass
class _Worker:
    """A process that measures some variants of one size."""

    size: str
    variants: tuple[str, ...]
    process: subprocess.Popen[bytes]
    folder: Path

    def lines(self) -> list[str]:
        return (self.folder / "out").read_text().splitlines()

    @property
    def ready(self) -> bool:
        return "ready" in self.lines() or self.process.poll() is not None

    def results(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines() if line.startswith("{") and line.endswith("}")]


class Run:
    """The file of results, and the clock."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.began = arguments, time.monotonic()
        cuda = arguments.device == "cuda"
        name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
        self.peak = next((p for part, p in PEAKS.items() if part in name), None) if cuda else None
        self.values: dict[str, Any] = {
            "benchmark": "gpu", "device": name, "peak_bf16_flops": self.peak, "torch": torch.__version__,
            "timm": timm.__version__, "python": platform.python_version(), "cpus": os.cpu_count(),
            "quick": arguments.quick, "settings": {}, "cells": {}, "left_out": {},
        }  # fmt: skip

    def left(self) -> float:
        return self.arguments.budget_s - (time.monotonic() - self.began)

    def start(self, size: str, variants: tuple[str, ...], folder: Path) -> _Worker:
        folder.mkdir()
        given = ["--worker", str(folder), "--cells", size, "--variants", ",".join(variants)]
        given += ["--device", self.arguments.device, "--rounds", str(self.arguments.rounds)]
        given += ["--quick"] if self.arguments.quick else []
        threads = str(max((os.cpu_count() or 2) // self.arguments.compile_jobs, 1))
        env = {"TORCHINDUCTOR_COMPILE_THREADS": threads, **os.environ}
        with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
            process = subprocess.Popen([sys.executable, __file__, *given], stdout=out, stderr=err, env=env)
        return _Worker(size, variants, process, folder)

    def wait(self, workers: list[_Worker], until: float) -> None:
        """Until all are ready, or only so many seconds are left."""
        while not all(w.ready for w in workers) and self.left() > until:
            time.sleep(0.1)

    def measured(self, worker: _Worker, until: float = 0) -> None:
        """Let a worker measure, and take in what it prints, as it comes."""
        (worker.folder / "go").touch()
        while worker.process.poll() is None and self.left() > until:
            time.sleep(0.1)
            self._take_in(worker)
        over = worker.process.poll() is None
        if over:
            worker.process.kill()
        code = worker.process.wait()
        self._take_in(worker)
        if missing := [v for v in worker.variants if v not in self.values["cells"].get(worker.size, {})]:
            last = (worker.folder / "err").read_text().strip().splitlines()[-1:]
            self.leave_out(
                worker.size, missing, "time is up" if over else f"ended with {code}: {' '.join(last)}"
            )

    def _take_in(self, worker: _Worker) -> None:
        cells = self.values["cells"].setdefault(worker.size, {})
        for told in worker.results():
            variant = told.pop("variant")
            if variant in cells:
                continue
            flops = told.get("flops") or cells.get(variant.removesuffix("_compiled"), {}).get("flops")
            told["flops"] = flops
            if self.peak and flops and "step_ms" in told:
                told["of_peak"] = round(flops / told["step_ms"] * 1000 / self.peak, 4)
            cells[variant] = told
            print(row(worker.size, variant, told), flush=True)
            self.write()

    def leave_out(self, size: str, variants: Iterable[str], why: str) -> None:
        for variant in variants:
            self.values["left_out"][f"{size} {variant}"] = why
            print(f"{size:>7s}  {variant:20s} left out: {why}", flush=True)
        self.write()

    def write(self) -> None:
        self.values["seconds"] = round(time.monotonic() - self.began, 1)
        self.arguments.out.parent.mkdir(parents=True, exist_ok=True)
        files.write(self.arguments.out, json.dumps(self.values, indent=1) + "\n")


def row(size: str, variant: str, told: dict[str, Any]) -> str:
    """A cell's line of the table."""
    if "step_ms" not in told:
        return f"{size:>7s}  {variant:20s} failed: {told.get('error')}"

    def shown(key: str, form: str, scale: float = 1.0) -> str:
        return "-" if told.get(key) is None else format(told[key] * scale, form)

    note = "  NOT COMPILED" if "not_compiled" in told else ""
    return (
        f"{size:>7s}  {variant:20s} {told['images_per_s']:9,d} {told['of_timm'][0]:7.2f} "
        f"{shown('of_peak', '.1f', 100):>7s} {shown('peak_mib', ',d'):>9s} "
        f"{shown('launches', '.0f'):>8s} {shown('waits', '.1f'):>6s}{note}"
    )


def setting_of(patch: int, resolution: int, quick: bool) -> step.Setting:
    """Models and batch of a patch size."""
    if quick:
        tiny = {"embed_dim": 16, "depth": 2, "num_heads": 2}
        return step.Setting(4, "custom", "custom", patch, resolution, tiny, "eager")
    return step.Setting(1024, patch=4) if patch == 4 else step.Setting(256, patch=patch, image_size=224)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.json"))
    parser.add_argument("--budget-s", type=float, default=520.0)
    parser.add_argument("--cells", help="PATCH:RESOLUTION,..., the most important first")
    parser.add_argument("--variants", default=",".join((*EAGER, *COMPILED)))
    parser.add_argument("--rounds", type=int, help="of each cell; 5, with --quick 1")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--compile-jobs", type=int, default=max((os.cpu_count() or 2) * 3 // 4, 1))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (1 if arguments.quick else 5)
    sizes = (arguments.cells or ("4:12" if arguments.quick else "16:224,4:32,4:12,16:96")).split(",")
    variants = arguments.variants.split(",")
    if unknown := [v for v in variants if v not in EAGER + COMPILED]:
        parser.error(f"--variants: {unknown[0]!r} is none of {', '.join(EAGER + COMPILED)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA here; --device cpu --quick rehearses")
    if arguments.worker:
        patch, resolution = (int(n) for n in sizes[0].split(":"))
        setting = setting_of(patch, resolution, arguments.quick)
        measure(variants, setting, resolution, arguments, arguments.worker / "go")
        return

    run = Run(arguments)
    for size in sizes:
        patch, resolution = (int(n) for n in size.split(":"))
        run.values["settings"][size] = dataclasses.asdict(setting_of(patch, resolution, arguments.quick))
    print(f"{run.values['device']}; dense bf16 peak {run.peak or 'not known, so no share of it'}")
    columns = ("patch:px", "images/s", "of timm", "% peak", "peak MiB", "launches", "waits")
    print("{0:>7s}  {7:20s} {1:>9s} {2:>7s} {3:>7s} {4:>9s} {5:>8s} {6:>6s}".format(*columns, "variant"))
    with tempfile.TemporaryDirectory() as scratch:
        _measure_all(run, sizes, variants, Path(scratch))
    for size, cells in run.values["cells"].items():
        for kind in ("", "_compiled"):
            ours, plain = (cells.get(f"{name}{kind}", {}).get("step_ms") for name in ("irkd", "kd"))
            if ours and plain:
                print(f"{size:>7s}  saliency over KD{kind.replace('_', ', ')}: {ours / plain:.2f} in time")
    run.write()
    print(f"{run.values['seconds']:.0f} s; {len(run.values['left_out'])} cells left out; {arguments.out}")


def _measure_all(run: Run, sizes: Sequence[str], variants: Sequence[str], scratch: Path) -> None:
    eager, compiled = (tuple(v for v in variants if v in group) for group in (EAGER, COMPILED))
    for i, size in enumerate(sizes if eager else ()):
        if run.left() < 15:
            run.leave_out(size, eager, "time is up")
            continue
        worker = run.start(size, eager, scratch / f"eager-{i}")
        run.measured(worker)
    waiting = [(size, variant) for variant in compiled for size in sizes]
    while waiting:
        batch, waiting = waiting[: run.arguments.compile_jobs], waiting[run.arguments.compile_jobs :]
        if run.left() < 30:
            for size, variant in batch:
                run.leave_out(size, [variant], "time is up")
            continue
        workers = [run.start(s, (v,), scratch / f"{v}-{s.replace(':', '-')}") for s, v in batch]
        run.wait(workers, until=6 * len(workers))  # seconds that measuring takes
        for worker in workers:
            if worker.ready:
                run.measured(worker)
            else:
                worker.process.kill()
                worker.process.wait()
                run.leave_out(worker.size, worker.variants, "was still compiling")


if __name__ == "__main__":
    main()
