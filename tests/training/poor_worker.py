"""`irkd train` where the second rank believes that it has no memory left (see test_micro)."""

import os
import sys

from irkd_dist import cli
from irkd_dist.data import memory

if __name__ == "__main__":
    if os.environ.get("RANK") == "1":
        memory.left = lambda shared=False: 0
    sys.exit(cli.main(["train", *sys.argv[1:]]))
