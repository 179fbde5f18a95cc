"""Loss terms of a step as a row of sums, and their means over steps and processes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from irkd_dist.config import Loss
from irkd_dist.data.loader import Batch, Loader
from irkd_dist.distill import measure
from irkd_dist.errors import UserError
from irkd_dist.training import distributed
from irkd_dist.training.distributed import Place
from irkd_dist.training.engines import Engine
from irkd_dist.training.step import Taken
from irkd_dist.training.tracking import Tracker

# a checkpoint keeps their sums by position: new ones go to the end
TERMS = (
    *("total", "ce", "kd", "saliency", "correct", "flat", "samples", "steps", "aligned", "wait_s"),
    "features",
)


def row(taken: Taken, wait_s: float) -> Tensor:
    """A step's terms, summed over its micro-batches, in the order of TERMS; skipped: zeros but for the wait."""
    one = torch.ones_like(taken.skipped)
    values: dict[str, Tensor] = {"samples": one * taken.samples, "steps": one}
    for part in taken.terms:
        for key, value in part.items():
            values[key] = values.get(key, torch.zeros_like(one)) + value.detach()
    if "saliency" in values:
        values["aligned"] = one
    terms = torch.stack([values[k].float() if k in values else torch.zeros_like(one) for k in TERMS])
    terms = torch.where(taken.skipped > 0, torch.zeros_like(terms), terms)
    terms[TERMS.index("wait_s")] = wait_s
    return terms


def start(sums: Sequence[float], device: torch.device) -> Tensor:
    """The sums of an epoch so far, or zeros; those of an earlier release lack the last terms."""
    return torch.tensor([*sums, *[0.0] * (len(TERMS) - len(sums))], device=device)


def means(place: Place, sums: Tensor, loss: Loss) -> tuple[dict[str, float], int]:
    """Means over steps and processes of each process's summed rows, and the number of images.

    Empty but for `wait_s` where no step was taken: that is no loss of 0.
    """
    row = dict(zip(TERMS, distributed.total(place, sums).tolist(), strict=True))
    waited = {"wait_s": row["wait_s"] / place.world}
    if not row["steps"]:
        return waited, 0
    result = {
        k: row[k] / row["steps"] for k in ("total", "ce")
    }  # summed over the processes, as are the steps
    if loss.kd.alpha:
        result["kd"] = row["kd"] / row["steps"]
    if loss.saliency.gamma:
        aligned = max(row["aligned"], 1.0)  # steps at which it was computed
        result |= {"saliency": row["saliency"] / aligned, "flat_maps": row["flat"] / aligned}
    if loss.features.beta:
        result["features"] = row["features"] / row["steps"]
    return result | {"accuracy": row["correct"] / row["samples"]} | waited, int(row["samples"])


def accuracy(
    engine: Engine, model: nn.Module, loader: Loader, who: str, tracker: Tracker | None = None
) -> float:
    """Top-1 accuracy over all processes, from integer counts: each sample once.

    Raises:
        UserError: on every rank alike: the model, named by `who`, says nothing finite of any image.
    """
    batches: Iterable[Batch] = loader.batches(0)
    if tracker is not None:
        batches = tracker.counted(
            batches, f"measuring {who} at {loader.resolution} px", loader.steps_per_epoch
        )
    counts = measure.correct_and_count(model, batches, engine.autocast)
    right, count, unsound = distributed.total(engine, counts).tolist()
    if unsound == count:
        raise UserError(
            f"the logits of {who} are not finite on any of {count} images at {loader.resolution} px: it has diverged, "
            "or its weights are damaged; lower optim.lr or set optim.clip=1"
        )
    return right / count


def judge(engine: Engine, model: nn.Module, loader: Loader, tracker: Tracker) -> tuple[float, float | None]:
    """The accuracy that counts: of the averaged weights where optim.ema keeps some, and then that of the others."""
    own = accuracy(engine, model, loader, "the student", tracker)
    if engine.average is None:
        return own, None
    with engine.averaged():
        distributed.share_buffers(engine, model)
        return accuracy(engine, model, loader, "the student's averaged weights", tracker), own


def bar_text(means: dict[str, float], rate: float, best: float) -> str:
    """The losses of the last lines beside a progress bar."""
    terms = "  ".join(f"{k} {means[k]:.3f}" for k in ("ce", "kd", "saliency", "features") if k in means)
    return f"{terms}  {rate:.0f} img/s" + (f"  val {best:.2%}" if best >= 0 else "")
