"""Write the gradient of a batch at a student's first weights. Arguments: engine, configuration, file to write."""

import os
import sys
from pathlib import Path

import torch

from irkd_dist import config as configuration
from irkd_dist.training import build, engines, step
from irkd_dist.training.engines import fsdp2
from tests.training.parity_worker import full_gradient


def main(name: str, file: str, out: Path) -> None:
    config = configuration.load(file, [f"engine={name}", "loss.saliency.normalization=l2"])
    engine = engines.setup(config)
    job = build.build(config, engine)
    train, held_out = build.loaders(job, job.plan.stages[0])
    with train, held_out:
        batch = next(iter(train.batches(0)))
        with engine.micro_batch(last=True):
            told = step.arguments(job.teacher, config.loss.saliency, batch, 1.0, 0.8, step=0)
            engine.backward(job.module(*told)["total"])
    if isinstance(engine, fsdp2.Fsdp2):
        fsdp2.release(job.student)  # gradients are on the sharded parameters
    found = {n: full_gradient(engine, p).detach().cpu() for n, p in job.student.named_parameters()}
    torch.save(found, out)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    sys.stdout.flush()
    os._exit(0)  # taking the interpreter apart takes a second and a half
