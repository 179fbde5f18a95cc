"""Run by every rank of a world: one run after the other in the same process, as a notebook or a script would.

Arguments: whether the process group is the caller's own, configuration, then the engine of each run.
"""

import os
import sys

import torch.distributed as dist

from irkd_dist import config as configuration
from irkd_dist.training.train import train


def main(own_group: str, file: str, *engines: str) -> None:
    if own_group == "own":
        dist.init_process_group("gloo")
    for number, engine in enumerate(engines):
        before = dict(os.environ)
        train(configuration.load(file, [f"engine={engine}", f"name=run-{number}", "curriculum.epochs=1"]))
        assert dist.is_initialized() == (own_group == "own")
        assert dict(os.environ) == before


if __name__ == "__main__":
    main(*sys.argv[1:])
