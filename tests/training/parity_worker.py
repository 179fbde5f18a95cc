"""Run by every rank of a world: write each case's global batch and gradients at the same weights (see test_worlds).

Arguments: engine, teacher run, shards, output folder. The file `ENGINE-N.pt` holds, for each case, the batch in the
order of its global positions, the loss and the gradient of every parameter, as the optimizer is to see it.
"""

import os
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from irkd_dist import config as configuration
from irkd_dist.errors import UserError
from irkd_dist.training import build, distributed, engines, step
from irkd_dist.training.engines import fsdp2, zero

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
    "micro-batches": {"optim.accumulate": 3, "loss.saliency.normalization": "l2"},
    "sharded teacher": {"teacher.shard": True},
    "features": {"loss.features.beta": 0.5, "loss.features.taps": "[last,[0,1]]"},
    "features, micro-batches": {
        "loss.features.beta": 0.5,
        "loss.features.kind": "mse",
        "optim.accumulate": 3,
    },
    "no saliency": {"loss.saliency.gamma": 0.0},
    "two taps": {"loss.saliency.taps": "[first,[2,1]]", "loss.saliency.normalization": "l2"},
}


def gathered(
    engine: engines.Engine, tensor: torch.Tensor, positions: torch.Tensor, size: int
) -> torch.Tensor:
    """Place each rank's rows at their global positions and sum over the ranks."""
    whole = torch.zeros(size, *tensor.shape[1:])
    whole[positions] = tensor.float()
    return distributed.total(engine, whole)


def full_gradient(engine: engines.Engine, parameter: torch.nn.Parameter) -> torch.Tensor:
    if isinstance(engine, zero.Zero):
        from deepspeed.utils import safe_get_full_grad

        gradient = safe_get_full_grad(parameter)
    else:
        gradient = parameter.grad
    assert gradient is not None
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()


def run_case(overrides: dict[str, object], base: list[str], out: Path) -> dict[str, torch.Tensor] | None:
    changes = [*base, *(f"{k}={v}" for k, v in overrides.items())]
    try:
        config = configuration.load(out / "student.yaml", changes)
    except UserError:
        return None  # which cases are refused is compared in the test
    engine = engines.setup(config)
    job = build.build(config, engine)
    if config.teacher is not None and config.teacher.shard and engine.world > 1:
        assert job.teacher is not None
        parameters = list(job.teacher.model.parameters())
        held = sum(p.to_local().numel() for p in parameters if isinstance(p, DTensor))
        # rows are dealt out whole: a rank may hold one more row of each parameter than its part
        slack = sum(p[0].numel() for p in parameters)
        assert held <= sum(p.numel() for p in parameters) / engine.world + slack
    loader, validation = build.loaders(job, job.plan.stages[0])
    batches = list(loader.batches(1))
    batch = batches[-1] if "smoothing" in str(overrides) else batches[1]
    loss, count = config.loss, config.optim.accumulate
    sums = dict.fromkeys(("total", "ce", "kd", "saliency"), torch.zeros(()))
    for i, part in enumerate(step.parts(batch, count)):
        with engine.micro_batch(last=i == count - 1):
            told = step.arguments(
                job.teacher, loss.saliency, part, loss.kd.alpha, loss.saliency.gamma, 0, loss.features.beta
            )
            terms = job.module(*told)
            engine.backward(terms["total"])
        sums = {key: value + terms.get(key, torch.zeros(())).detach() for key, value in sums.items()}
    real = batch.weight > 0
    target = batch.labels[:, None] if batch.soft_labels is None else batch.soft_labels
    result = {
        "images": gathered(engine, batch.images[real], batch.positions[real], batch.size),
        "targets": gathered(engine, target[real], batch.positions[real], batch.size),
        "ids": gathered(engine, torch.from_numpy(batch.ids)[real], batch.positions[real], batch.size),
        "seen": distributed.total(engine, real.sum()),
    }
    for name, value in sums.items():
        result[name] = distributed.total(engine, value) / engine.world
    if isinstance(engine, fsdp2.Fsdp2):
        fsdp2.release(job.student)  # gradients are on the sharded parameters
    for name, parameter in job.student.named_parameters():
        result[f"grad.{name}"] = full_gradient(engine, parameter)
    engine.discard()
    loader.close()
    validation.close()
    return result


def main(engine: str, teacher: str, shards: str, out: Path) -> None:
    base = [
        f"engine={engine}",
        f"teacher.run={teacher}",
        f"data.shards={shards}",
        f"student.weights={out}/warm",
    ]
    results = {name: run_case(overrides, base, out) for name, overrides in CASES.items()}
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if rank == 0:
        torch.save(results, out / f"{engine}-{world}.pt")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
    os._exit(0)  # taking the interpreter apart takes a second and a half
