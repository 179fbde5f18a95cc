"""Loss terms of a step as a row of sums, and their means over steps and processes."""

from __future__ import annotations

import torch
from torch import Tensor

from irkd_dist.data.loader import Batch, Loader
from irkd_dist.training import distributed
from irkd_dist.training.setup import Job

TERMS = ("total", "ce", "kd", "saliency", "correct", "flat", "samples", "steps", "aligned", "wait_s")


def row(rows: list[dict[str, Tensor]], batch: Batch, loader: Loader, like: Tensor) -> Tensor:
    """One step's terms, summed over its micro-batches, in the order of TERMS."""
    terms: dict[str, Tensor] = {}
    for part in rows:
        for key, value in part.items():
            terms[key] = terms.get(key, like.new_zeros(())) + value.detach()
    one = like.new_ones(())
    values = {
        **terms,
        "samples": (batch.weight > 0).sum(),
        "steps": one,
        "wait_s": like.new_full((), loader.wait_s),
    }
    if "saliency" in terms:
        values["aligned"] = one
    loader.wait_s = 0.0
    return torch.stack([values[k].float() if k in values else like.new_zeros(()) for k in TERMS])


def means(job: Job, sums: Tensor) -> tuple[dict[str, float], int]:
    """Means over steps and processes of each process's summed rows, and the number of images."""
    row = dict(zip(TERMS, distributed.total(job.engine, sums).tolist(), strict=True))
    steps = max(row["steps"], 1.0)  # summed over the processes, as are the terms
    result = {k: row[k] / steps for k in ("total", "ce")}
    if job.config.loss.kd.alpha:
        result["kd"] = row["kd"] / steps
    if job.config.loss.saliency.gamma:
        aligned = max(row["aligned"], 1.0)  # steps at which it was computed
        result |= {"saliency": row["saliency"] / aligned, "flat_maps": row["flat"] / aligned}
    result |= {
        "accuracy": row["correct"] / max(row["samples"], 1.0),
        "wait_s": row["wait_s"] / job.engine.world,
    }
    return result, int(row["samples"])


def bar_text(means: dict[str, float], rate: float, best: float) -> str:
    terms = "  ".join(f"{k} {means[k]:.3f}" for k in ("ce", "kd", "saliency") if k in means)
    return f"{terms}  {rate:.0f} img/s" + (f"  val {best:.2%}" if best >= 0 else "")
