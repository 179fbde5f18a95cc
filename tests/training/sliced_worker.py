"""Build a run with a sharded teacher on each rank; write its memory's peak and the teacher's answers (test_sliced).

Arguments: configuration, output file, overrides.
"""

import os
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from irkd_dist import config as configuration
from irkd_dist.data import shards
from irkd_dist.training import build, distributed, engines, sliced
from irkd_dist.training.engines import fsdp2


def memory(key: str) -> float:
    """MiB of this process, as the kernel counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


def loading(config: configuration.Config, engine: engines.Engine) -> float:
    """By how much memory grows at most while the teacher is loaded alone."""
    manifest = shards.load_manifest(Path(config.data.shards))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    found = distributed.on_main(engine, lambda: build._sliced(config, engine, manifest))
    assert found is not None
    sliced.load(found.network.model, found, engine)
    return memory("VmHWM") - before


def loading_whole(config: configuration.Config, engine: engines.Engine) -> float:
    """The same where one process reads it whole, sends it, and all shard what they have."""
    manifest = shards.load_manifest(Path(config.data.shards))
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    model, _ = distributed.network(engine, lambda: build._teacher_network(config, manifest))
    fsdp2.shard(model, engine.device)
    return memory("VmHWM") - before


def main(yaml: str, out: str, *changes: str) -> None:
    config = configuration.load(yaml, [*changes])
    engine = engines.setup(config)
    measured = [how(config, engine) for how in (loading, loading_whole)] if "measure" in out else []
    parts = build.build(config, engine)
    assert parts.teacher is not None
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    said = parts.teacher(images, torch.tensor([1, 2]), aligned=2)
    held = [p.to_local() for p in parts.teacher.model.parameters() if isinstance(p, DTensor)]
    size = sum(p.numel() * 4 / 2**20 for p in held)
    torch.save(
        {"measured": measured, "logits": said.logits, "maps": said.maps, "held": size,
         "digest": parts.identity["teacher_digest"], "notes": parts.notes},
        f"{out}-{engine.rank}.pt",
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)
