"""One of two processes that keep the same decoded images: python -m tests.data.sharing_worker SHARDS SIZE

Each line of its input tells it what to do, and is answered with a line. MASTER_PORT is of the store they meet in.
"""

import hashlib
import os
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
from torch._C._distributed_c10d import TCPStore

from irkd_dist.data import shards
from irkd_dist.data.decoded import Dataset, Images, Work
from irkd_dist.data.shared import Node


def pss() -> int:
    """KiB of this process, what it shares counted in parts; without libraries, which other programs share too."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def digest(images: Images) -> str:
    """Of all pixels, without a second copy of them."""
    found = hashlib.sha256()
    for row in range(len(images.ids)):
        found.update(images.take(np.array([row])).numpy().tobytes())
    return found.hexdigest()


def main() -> None:
    folder, size = Path(sys.argv[1]), int(sys.argv[2])
    store = TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), timeout=timedelta(seconds=60))
    data = Dataset(folder, shards.load_manifest(folder), "train", verify="size")
    kept = Images(data, size, Work("none"))
    for line in sys.stdin:
        match line.split():
            case ["keep", how]:
                kept.close()
                kept = Images(data, size, Work("ram", node=Node(store) if how == "shared" else None))
                print(kept.kept, kept.note, flush=True)
            case ["fill", part]:
                for rows in np.array_split(np.arange(len(kept.ids)), 2)[int(part)].reshape(-1, 1):
                    kept.take(rows)
                print(kept.unfilled, flush=True)
            case ["digest"]:
                print(digest(kept), flush=True)
            case ["pss"]:
                print(pss(), flush=True)


if __name__ == "__main__":
    main()
