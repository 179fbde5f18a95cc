"""Run by every rank of a world: a training whose teacher no other process than rank 0 finds on its disk.

Argument: configuration.
"""

import os
import sys

from irkd_dist import config as configuration
from irkd_dist.training.train import train

if __name__ == "__main__":
    elsewhere = [] if os.environ.get("RANK", "0") == "0" else ["teacher.run=/no/such/teacher"]
    train(configuration.load(sys.argv[1], [*elsewhere, *sys.argv[2:]]))
