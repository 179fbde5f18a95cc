"""Samples per second from PNG shards at 32 px: our loader against a stock webdataset decode pipeline.

Both read the same tars of the same synthetic images in one process, and deliver batches of 128 decoded images
with their labels; a pass is one whole epoch, timed from asking for the first batch to having the last one.
Passes alternate, so that a busy machine slows both. Timed are:

- stock: `wds.WebDataset(urls).decode(D).to_tuple("png", "cls").batched(128)`: no shuffling, no augmentation,
  no normalisation. D is the fastest of "torchrgb8", "rgb8" and "pil" (PIL objects, not even stacked) in a
  first pass of each on this machine. The files are in the page cache, for both.
- first: the first epoch of `Loader(cache="none")`: shuffled, every image read, looked through for damage and decoded,
  uint8 -> float32, normalised.
- none: later epochs of it, when bytes with the same checksum need not be looked through again.
- none+aug: the same with random crop (padding 4) and flip.
- ram, ram+aug: `Loader(cache="ram")` after a first epoch has filled its cache: what later epochs cost.

Each for every number of `data.workers`, which are the loader's threads. So ours delivers more (shuffled, stacked,
float32, normalised) than what it is compared with. The time of the augmentation alone (crop, flip, normalise of one
128 x 3 x 32 x 32 batch) is measured on one thread.

    python benchmarks/loader.py [--samples 20000] [--repeats 5] [--workers 1,2,4,8,16]
"""

import argparse
import io
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from webdataset.compat import WebDataset
from webdataset.writer import TarWriter

from irkd_dist.data import augment as aug
from irkd_dist.data import pixels, shards
from irkd_dist.data.decoded import Cache, Dataset, Work
from irkd_dist.data.loader import Loader
from irkd_dist.data.recipe import Augment
from irkd_dist.data.views import View

BATCH, SIZE, PER_SHARD = 128, 32, 5000
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
STOCK = ("torchrgb8", "rgb8", "pil")
OFF = Augment(padding=0, flip=False)
CROP_FLIP = Augment(padding=4, flip=True)


def make_shards(folder: Path, samples: int) -> shards.Manifest:
    """Shards of smooth coloured noise with some grain: PNGs of about the size of CIFAR-10's (2.3 kB)."""
    rng, files = np.random.default_rng(0), []
    (folder / f"r{SIZE}").mkdir()
    for start in range(0, samples, PER_SHARD):
        path = folder / f"r{SIZE}" / f"train-{start // PER_SHARD:06d}.tar"
        count = min(PER_SHARD, samples - start)
        with TarWriter(str(path), mtime=0) as tar:
            for i in range(start, start + count):
                tar.write({"__key__": f"{i:09d}", "png": draw(rng), "cls": str(i % 10)})
        files.append(shards.Shard(path.name, count, path.stat().st_size, ""))
    manifest = shards.Manifest(
        version=shards.FORMAT_VERSION,
        dataset="noise",
        source="synthetic",
        classes=tuple("abcdefghij"),
        mean=MEAN,
        std=STD,
        mode="resize",
        encoding="png",
        masks=False,
        val_fraction=0.0,
        seed=0,
        resolutions=(SIZE,),
        splits={"train": samples},
        shards={f"r{SIZE}": {"train": tuple(files)}},
        render={},
    )
    shards.write_manifest(folder, manifest)
    return manifest


def draw(rng: np.random.Generator) -> bytes:
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).astype(int)
    stream = io.BytesIO()
    grainy = (smooth + rng.integers(-6, 7, smooth.shape)).clip(0, 255).astype(np.uint8)
    Image.fromarray(grainy).save(stream, "png")
    return stream.getvalue()


def stock(urls: list[str], decoder: str) -> Iterable:
    pipeline = WebDataset(urls, shardshuffle=False).decode(decoder).to_tuple("png", "cls").batched(BATCH)
    return cast(Iterable, pipeline)


def rate(batches: Iterable, samples: int, labels) -> float:
    """Samples per second of one pass; `labels` gets a batch's labels, to count that nothing is left out."""
    start = time.perf_counter()
    count = sum(len(labels(batch)) for batch in batches)
    seconds = time.perf_counter() - start
    assert count == samples, (count, samples)
    return samples / seconds


def augment_ms(repeats: int = 100) -> float:
    images = torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8)
    ids, times, threads = np.arange(BATCH), [], torch.get_num_threads()
    torch.set_num_threads(1)  # as in the loader's thread
    for epoch in range(repeats):
        start = time.perf_counter()
        cropped = aug.random_crop(images, aug.crop_offsets(0, epoch, ids, 4, SIZE), 4, SIZE)
        aug.normalize(aug.flip(cropped, aug.flip_mask(0, epoch, ids)), MEAN, STD)
        times.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return statistics.median(times) * 1000


def decode_us(images: int = 2000) -> dict[str, float]:
    """Processor time of one thread for an image: looked through, decoded by torchvision, and both as `decode` does."""
    rng = np.random.default_rng(0)
    made = [draw(rng) for _ in range(images)]

    def each(call: Callable[[bytes], object]) -> float:
        times = []
        for _ in range(3):
            start = time.thread_time()
            for data in made:
                call(data)
            times.append(time.thread_time() - start)
        return round(min(times) / images * 1e6, 1)

    return {
        "look": each(lambda data: pixels.sound(data, "png")),
        "decode": each(lambda data: pixels.decode(data, "png", is_sound=True)),
        "both": each(lambda data: pixels.decode(data, "png")),
    }


def measure(folder: Path, samples: int, repeats: int, workers: list[int]) -> dict:
    manifest = make_shards(folder, samples)
    urls = [str(folder / f"r{SIZE}" / s.name) for s in manifest.shards[f"r{SIZE}"]["train"]]
    tried = {name: rate(stock(urls, name), samples, lambda b: b[1]) for name in STOCK}
    decoder = max(tried, key=lambda name: tried[name])
    print(
        f"stock decoders: {', '.join(f'{n} {r:,.0f}/s' for n, r in tried.items())}; compared with: {decoder}"
    )

    def loader(cache: Cache, augment: Augment, threads: int) -> Loader:
        data, work = Dataset(folder, manifest, "train", verify="size"), Work(cache, workers=threads)
        return Loader(data, View(SIZE, augment), batch=BATCH, seed=0, work=work)

    def passes(threads: int) -> dict[str, list[float]]:
        ours = {
            "none": loader("none", OFF, threads),
            "none+aug": loader("none", CROP_FLIP, threads),
            "ram": loader("ram", OFF, threads),
            "ram+aug": loader("ram", CROP_FLIP, threads),
        }
        for each in ours.values():  # fills the caches, warms every path
            rate(each.batches(0), samples, lambda b: b.labels)
        rates: dict[str, list[float]] = {name: [] for name in ("stock", "first", *ours)}
        for repeat in range(repeats):
            rates["stock"].append(rate(stock(urls, decoder), samples, lambda b: b[1]))
            with loader("none", OFF, threads) as new:
                rates["first"].append(rate(new.batches(0), samples, lambda b: b.labels))
            for name, each in ours.items():
                rates[name].append(rate(each.batches(repeat + 1), samples, lambda b: b.labels))
        for each in ours.values():
            each.close()
        return rates

    return {"stock_decoder": decoder, "rates": {threads: passes(threads) for threads in workers}}


def summary(measured: dict, samples: int) -> dict:
    result = {
        "benchmark": "loader",
        "command": shlex.join(["python", "benchmarks/loader.py", *sys.argv[1:]]),
        "samples": samples,
        "batch": BATCH,
        "resolution": SIZE,
        "stock_decoder": measured["stock_decoder"],
        "by_workers": {str(n): compared(rates) for n, rates in measured["rates"].items()},
        "goal": {"none": 5, "ram": 40},
        "augment_ms_per_batch": round(augment_ms(), 3),
        "decode_us": decode_us(),
        "cpus": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {n: version(n) for n in ("torch", "torchvision", "webdataset", "pillow", "numpy")},
    }
    print(
        f"{'workers':>7} | " + " | ".join(f"{name:>24}" for name in measured["rates"][min(measured["rates"])])
    )
    for n, row in result["by_workers"].items():
        cells = (
            f"{c['samples_per_s']:>9,}/s {c['median']:>5.1f} ({c['min']:.1f}-{c['max']:.1f})"
            for c in row.values()
        )
        print(f"{n:>7} | " + " | ".join(f"{cell:>24}" for cell in cells))
    print(
        f"crop + flip + normalise of a batch: {result['augment_ms_per_batch']} ms; an image: {result['decode_us']} µs"
    )
    return result


def compared(rates: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Samples per second, and how many times stock's of the same repeat: median, smallest, largest."""
    found = {}
    for name, own in rates.items():
        ratios = [mine / theirs for mine, theirs in zip(own, rates["stock"], strict=True)]
        spread = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
        rounded = {key: round(value, 2) for key, value in spread.items()}
        found[name] = {"samples_per_s": round(statistics.median(own)), **rounded}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", default="1,2,4,8,16", help="threads of the loader (data.workers)")
    args = parser.parse_args()
    workers = [int(n) for n in args.workers.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(Path(folder), args.samples, args.repeats, workers)
    print(json.dumps(summary(measured, args.samples)))


if __name__ == "__main__":
    main()
