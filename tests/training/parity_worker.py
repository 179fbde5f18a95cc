"""Run by every rank of a world: write each case's global batch and gradients at the same weights (see test_worlds).

Arguments: teacher run, shards, output folder. The file `world-N.pt` holds, for each case, the batch in the order of
its global positions, the loss and the gradient of every parameter, averaged over the processes as an optimizer sees it.
"""

import sys
from pathlib import Path

import torch

from irkd_dist import config as configuration
from irkd_dist.training import distributed, setup
from irkd_dist.training.train import forward

CASES = {
    "gradient": {},
    "grad_cam, smoothed, short batch": {"loss.saliency.method": "grad_cam", "augment.smoothing": 0.1},
    "attention, convex": {"loss.saliency.method": "attention", "loss.form": "convex", "loss.kd.alpha": 0.5},
    "hirescam, a fraction": {
        "loss.saliency.method": "hirescam",
        "loss.saliency.fraction": 0.3,
        "loss.saliency.normalization": "l2",  # under min-max one nearly flat map moves the gradient by 8e-5
    },
    "mixup": {
        "augment.mixup": 0.8,
        "augment.auto_augment": 0.5,
        "augment.erase": 0.5,
        "loss.saliency.normalization": "l2",
    },
    "cutmix, teacher sees full": {"augment.cutmix": 1.0, "teacher.view": "full"},
    "batch below the world": {"data.batch": 3},
    "two taps": {"loss.saliency.taps": "[first,[2,1]]", "loss.saliency.normalization": "l2"},
}


def gathered(
    engine: distributed.Engine, tensor: torch.Tensor, positions: torch.Tensor, size: int
) -> torch.Tensor:
    """Place each rank's rows at their global positions and sum over the ranks."""
    whole = torch.zeros(size, *tensor.shape[1:])
    whole[positions] = tensor.float()
    return distributed.total(engine, whole)


def run_case(overrides: dict[str, object], base: list[str], out: Path) -> dict[str, torch.Tensor]:
    config = configuration.load(out / "student.yaml", [*base, *(f"{k}={v}" for k, v in overrides.items())])
    engine = distributed.setup(config.precision)
    job = setup.build(config, engine)
    loader, validation = setup.loaders(job, job.stages[0])
    batches = list(loader.batches(1))
    batch = batches[-1] if "smoothing" in str(overrides) else batches[1]
    terms = forward(job, batch, config.loss.kd.alpha, config.loss.saliency.gamma, step=0)
    distributed.backward(engine, terms["total"])
    real = batch.weight > 0
    target = batch.labels[:, None] if batch.targets is None else batch.targets
    result = {
        "images": gathered(engine, batch.images[real], batch.positions[real], batch.size),
        "targets": gathered(engine, target[real], batch.positions[real], batch.size),
        "ids": gathered(engine, torch.from_numpy(batch.ids)[real], batch.positions[real], batch.size),
        "seen": distributed.total(engine, real.sum()),
    }
    for name in ("total", "ce", "kd", "saliency"):
        # a rank may have no aligned sample, and so no such term
        result[name] = distributed.total(engine, terms.get(name, torch.zeros(())).detach()) / engine.world
    for name, parameter in job.student.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        result[f"grad.{name}"] = parameter.grad.clone()
    loader.close()
    validation.close()
    return result


def main(teacher: str, shards: str, out: Path) -> None:
    base = [f"teacher.run={teacher}", f"data.shards={shards}", f"student.weights={out}/warm"]
    results = {name: run_case(overrides, base, out) for name, overrides in CASES.items()}
    engine = distributed.setup("fp32")
    if engine.main:
        torch.save(results, out / f"world-{engine.world}.pt")
    distributed.finish(engine)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
