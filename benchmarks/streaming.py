"""Samples per second of shards behind a URL: our loader against stock webdataset, from the same HTTP server.

The same tars of drawn shapes are read by both, shuffled, decoded, in batches of 128, with as many worker threads (ours)
as processes (webdataset's). The server is a process of its own; `--mib-s` throttles each of its connections, as a
distant store would be. Timed are a first epoch, which finds an empty cache, and a second one:

- ours exact, ours shard: `Loader` with data.order exact and shard (blocks of 4), decoded images not kept, shards in the
  node's cache; images are also normalised and made float32.
- stock: `wds.WebDataset(urls, shardshuffle=100).shuffle(1000).decode("torchrgb8")`, through its `curl`.
- stock cached: the same with `cache_dir`, which keeps the shards after the first epoch.

    python -m benchmarks.streaming [--samples 10000] [--size 64] [--workers 2] [--mib-s 20]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

from irkd_dist.data import remote, render, shards
from irkd_dist.data.decoded import Dataset, Work
from irkd_dist.data.loader import Loader
from irkd_dist.data.recipe import Augment
from irkd_dist.data.sources import open_source
from irkd_dist.data.views import View

BATCH, PER_SHARD, BLOCK = 128, 500, 4
SERVE = """
import sys, time, pathlib
from tests.data.servers import Server
server = Server(pathlib.Path(sys.argv[1]))
server.faults.bytes_per_s = float(sys.argv[2]) or None
print(server.url, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def served(folder: Path, bytes_per_s: float) -> Iterator[str]:
    """The folder's URL, from a process of its own."""
    command = [sys.executable, "-c", SERVE, str(folder), str(bytes_per_s)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.kill()


def rate(batches: Iterable[Any], samples: int, count: Callable[[Any], int]) -> float:
    """Samples per second of one pass, from asking for the first batch on."""
    began = time.perf_counter()
    seen = sum(count(batch) for batch in batches)
    seconds = time.perf_counter() - began
    assert seen == samples, (seen, samples)
    return samples / seconds


def ours(url: str, cache: Path, size: int, workers: int, order: Literal["exact", "shard"]) -> list[float]:
    folder = remote.place(url, remote.Settings(str(cache)))
    manifest = shards.load_manifest(folder)
    data = Dataset(folder, manifest, "train", verify="size", order=order, block=BLOCK)
    view, work = View(size, Augment(padding=0)), Work("none", workers=workers)
    with Loader(data, view, batch=BATCH, seed=0, work=work) as loader:
        return [rate(loader.batches(epoch), len(loader), lambda b: len(b.ids)) for epoch in (0, 1)]


def stock(url: str, cache: Path | None, manifest: shards.Manifest, size: int, workers: int) -> list[float]:
    from webdataset.compat import WebDataset, WebLoader

    urls = [f"{url}/r{size}/{shard.name}" for shard in manifest.shards[f"r{size}"]["train"]]
    if cache is not None:
        cache.mkdir()
    dataset = WebDataset(
        urls, shardshuffle=100, cache_dir=None if cache is None else str(cache), empty_check=False
    )
    pipeline = dataset.shuffle(1000).decode("torchrgb8").to_tuple("png", "cls").batched(BATCH)
    loader = cast(Iterable[Any], WebLoader(pipeline, batch_size=None, num_workers=workers))
    return [rate(loader, manifest.splits["train"], lambda b: len(b[1])) for _ in (0, 1)]


def measure(
    folder: Path, samples: int, size: int, workers: int, bytes_per_s: float
) -> dict[str, list[float]]:
    source = open_source("synthetic", None, samples={"train": samples}, size=size)
    options = render.Options((size,), samples_per_shard=PER_SHARD, val_fraction=0.0)
    manifest = render.render(source, folder / "shards", options)
    assert manifest is not None
    rates: dict[str, list[float]] = {}
    with served(folder / "shards", bytes_per_s) as url:
        for name, run in (
            ("ours exact", lambda: ours(url, folder / "exact", size, workers, "exact")),
            ("ours shard", lambda: ours(url, folder / "shard", size, workers, "shard")),
            ("stock", lambda: stock(url, None, manifest, size, workers)),
            ("stock cached", lambda: stock(url, folder / "stock", manifest, size, workers)),
        ):
            rates[name] = run()
            print(
                f"{name:>12}: {rates[name][0]:,.0f}/s first epoch, {rates[name][1]:,.0f}/s second", flush=True
            )
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2, help="threads of ours, processes of webdataset")
    parser.add_argument("--mib-s", type=float, default=20, help="of each connection; 0: as fast as it goes")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rates = measure(Path(folder), given.samples, given.size, given.workers, given.mib_s * 2**20)
    best = [max(rates[name][epoch] for name in ("stock", "stock cached")) for epoch in (0, 1)]
    ratio = {name: [round(r / b, 2) for r, b in zip(rates[name], best, strict=True)] for name in rates}
    told = {
        "benchmark": "streaming", **vars(given), "batch": BATCH, "per_shard": PER_SHARD,
        "samples_per_s": {name: [round(r) for r in own] for name, own in rates.items()},
        "ratio_to_best_stock": {name: own for name, own in ratio.items() if name.startswith("ours")},
        "goal": 1.5, "cpus": len(os.sched_getaffinity(0)), "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "webdataset", "fsspec", "aiohttp")},
    }  # fmt: skip
    print(json.dumps(told))


if __name__ == "__main__":
    main()
