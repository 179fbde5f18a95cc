"""What a checkpoint costs the training, and a restart: ours in a thread, against accelerate's save_state.

    python benchmarks/checkpoint.py [--rounds 5] [--model vit_tiny]

The same student with AdamW's moments, in one process. Ours blocks the training for the snapshot (a copy to the CPU)
and writes in a thread, with checksums and fsync; accelerate's `save_state` writes while the training waits, without
either. The two take turns; the ratio is taken within a round. Then a run is stopped and started again, and the time
from the command to the first step is divided. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from irkd_dist import checkpoint
from irkd_dist.data import render
from irkd_dist.data.sources import open_source
from irkd_dist.distill import models
from irkd_dist.distill.module import Distiller, Objective
from irkd_dist.eventlog import read_events
from irkd_dist.training import engines, optim
from irkd_dist.writer import Writer


def costs(model: str, rounds: int, folder: Path) -> dict[str, object]:
    """Seconds that training waits, and seconds of the write beside it."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    student = models.create_model(model, classes=10, patch=4, image_size=32)
    optimizer = torch.optim.AdamW(optim.parameter_groups(student, 1e-4), fused=True)
    engine = engines.Engine(accelerator, None)
    module = engine.prepare(Distiller(student, Objective()), optimizer, None)
    images = torch.randn(8, 3, 32, 32, device=engine.device)
    labels = torch.zeros(8, dtype=torch.long, device=engine.device)
    from irkd_dist.distill.module import Targets

    terms = module(images, labels, torch.full((8,), 1 / 8, device=engine.device), Targets())
    engine.backward(terms["total"])
    engine.step()
    accelerator.prepare(optimizer)
    ours, theirs, writes, target = [], [], [], folder
    for number in range(rounds + 1):
        writer = Writer()
        start = time.perf_counter()
        content = checkpoint.Content(engine.weights(), engine.moments(), {"step": number})
        target = folder / "ours" / checkpoint.name(number)
        writer.submit(target.name, number, [(target, content)], lambda: None)
        blocked = time.perf_counter() - start
        writer.close()
        (written,) = writer.results()
        assert written.error is None, written.error
        start = time.perf_counter()
        accelerator.save_state(str(folder / "theirs" / str(number)))
        waited = time.perf_counter() - start
        if number:  # the first is a warm-up
            ours.append(blocked)
            writes.append(written.seconds)
            theirs.append(waited)
    size = sum(f.stat().st_size for f in target.iterdir()) / 2**20
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    return {
        "model": model, "parameters": models.parameter_count(student), "MiB": round(size, 1),
        "blocked_s": round(statistics.median(ours), 4), "written_beside_s": round(statistics.median(writes), 4),
        "save_state_s": round(statistics.median(theirs), 4),
        "blocked_over_save_state": [round(r, 3) for r in (ratios[0], statistics.median(ratios), ratios[-1])],
    }  # fmt: skip


def restart(folder: Path) -> dict[str, float]:
    """Seconds from the command to the first step of a resumed run, and where they go."""
    source = open_source("synthetic", None, samples={"train": 900, "test": 50}, size=32)
    render.render(
        source, folder / "shards", render.Options((16, 32), samples_per_shard=500, val_fraction=0.1)
    )
    (folder / "run.yaml").write_text(
        f"data: {{shards: {folder / 'shards'}, batch: 64}}\nstudent: {{name: vit_tiny}}\nout: {folder}\nname: run\n"
        "curriculum: {stages: [{resolution: 16}, {resolution: 32}], epochs: 2}\ntrack: {log_every: 1, panels: 0}\n"
    )
    command = [sys.executable, "-m", "irkd_dist", "train", str(folder / "run.yaml")]
    stop = {**os.environ, "IRKD_FAULT": "sigterm@step:5"}
    subprocess.run(command, env=stop, check=False, stdout=subprocess.DEVNULL)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import irkd_dist.training.train"], check=True)
    imports = time.perf_counter() - start
    began = time.time()
    subprocess.run(
        command, env={**os.environ, "IRKD_FAULT": "sigterm@step:8"}, check=False, stdout=subprocess.DEVNULL
    )
    events = read_events(folder / "run")
    at = [i for i, e in enumerate(events) if e["event"] == "resume"][-1]
    resumed = events[at]["time"] - began
    stage = next(e for e in events[at:] if e["event"] == "stage")["time"] - began
    first = next(e for e in events[at:] if e["event"] == "train")["time"] - began
    return {
        "to_first_step_s": round(first, 2), "imports_s": round(imports, 2),
        "models_checks_and_loading_s": round(resumed - imports, 2), "shards_and_agreement_s": round(stage - resumed, 2),
        "first_step_s": round(first - stage, 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="vit_tiny")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        result = costs(arguments.model, arguments.rounds, Path(made))
        result["restart"] = restart(Path(made))
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()}, {os.cpu_count()} cores"
    )
    print(json.dumps({"benchmark": "checkpoint", **result, "device": device, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
