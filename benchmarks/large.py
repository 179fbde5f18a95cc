"""Large, on one machine: shards in an object store, streamed, killed and resumed on another number of processes.

Photographs of odd shapes are drawn (20 classes), rendered to shards, and served by an S3 server (moto; by HTTP where
that is not installed). Two processes train from there by configs/large/demo.yaml; the same training is killed in the
middle of an epoch and goes on with three. It ends with code 1 unless both saw the same samples at every step.

    python -m benchmarks.large [--out runs/large] [--photos 100]        or: make large
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from irkd_dist.data import render
from irkd_dist.data.sources import open_source
from irkd_dist.eventlog import read_events, read_samples
from tests.data import servers

COLOURS = {"red": (214, 48, 49), "green": (0, 150, 80), "blue": (40, 90, 200), "yellow": (240, 190, 30)}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
CONFIG = "configs/large/demo.yaml"

# trains by a configuration and overrides, on so many processes, with these environment variables; the exit code
Launch = Callable[[int, Sequence[str], dict[str, str]], int]


def photograph(rng: np.random.Generator, shape: str, colour: str) -> Image.Image:
    """A picture of 160 to 400 px a side: one object, anywhere near the middle, before a noisy gradient."""
    width, height = (int(side) for side in rng.integers(160, 401, 2))
    corners = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    ground = np.asarray(corners.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    ground = ground + rng.integers(-12, 13, ground.shape, dtype=np.int16)
    image = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
    draw, fill = ImageDraw.Draw(image), COLOURS[colour]
    r = min(width, height) * rng.uniform(0.2, 0.35)
    x, y = (side / 2 + rng.uniform(-0.1, 0.1) * side for side in (width, height))
    match shape:
        case "circle":
            draw.ellipse((x - r, y - r, x + r, y + r), fill)
        case "square":
            draw.rectangle((x - r, y - r, x + r, y + r), fill)
        case "triangle":
            draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill)
        case "cross":
            draw.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill)
            draw.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill)
        case "ring":
            draw.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=max(int(r / 3), 2))
    return image


def draw_all(folder: Path, each: int) -> None:
    """`each` training photographs of each class, and a fifth as many to test, as folders of JPEGs."""
    rng = np.random.default_rng(0)
    for split, count in (("train", each), ("test", max(each // 5, 1))):
        for shape in SHAPES:
            for colour in COLOURS:
                (own := folder / split / f"{colour}-{shape}").mkdir(parents=True, exist_ok=True)
                for i in range(count):
                    photograph(rng, shape, colour).save(own / f"{i:05d}.jpg", quality=90)


@contextlib.contextmanager
def serve(shards: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The URL of the shards, and the environment that it needs."""
    if importlib.util.find_spec("moto") and importlib.util.find_spec("s3fs"):
        with servers.s3("irkd-large", shards) as environment:
            yield "s3://irkd-large", environment
    else:
        with servers.served(shards) as server:
            yield server.url, {}


def torchrun(world: int, arguments: Sequence[str], environment: dict[str, str]) -> int:
    """`irkd train` in so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    command += ["-m", "irkd_dist", "train", *arguments]
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}).returncode


def demonstrate(
    out: Path,
    launch: Launch = torchrun,
    each: int = 100,
    resolutions: tuple[int, ...] = (64, 96, 128),
    per_shard: int = 100,
    more: Sequence[str] = (),
) -> list[str]:
    """All of it below a new folder; returns what differs between the two runs: nothing."""
    photos, shards = out / "photographs", out / "shards"
    draw_all(photos, each)
    options = render.Options(resolutions, samples_per_shard=per_shard, crop_pct=0.875, shuffle=True)
    manifest = render.render(open_source("folder", photos), shards, options)
    assert manifest is not None
    training, sizes = next(iter(manifest.shards.values()))["train"], ", ".join(map(str, resolutions))
    count = sum(manifest.splits.values())
    print(f"{count:,} photographs in {len(training)} training shards, to be seen at {sizes} px", flush=True)
    with serve(shards) as (url, environment):
        stages = ", ".join(f"{{resolution: {size}}}" for size in resolutions)
        common = [CONFIG, f"data.shards={url}", f"out={out}", f"data.shard_cache.folder={out / 'cache'}"]
        common += [f"curriculum.stages=[{stages}]", *more]
        assert launch(2, [*common, "name=undisturbed"], environment) == 0
        steps = max(read_samples(out / "undisturbed")) + 1
        at = next(s for s in range(steps // 2, steps) if s % 5 not in (0, 4))
        print(f"the same, killed before step {at} of {steps}, and resumed on three processes", flush=True)
        killed = launch(2, [*common, "name=killed"], {**environment, "IRKD_FAULT": f"sigkill@step:{at}:1"})
        assert killed != 0
        assert launch(3, [*common, "name=killed"], environment) == 0
    return differences(out / "undisturbed", out / "killed")


def differences(one: Path, other: Path) -> list[str]:
    """What two runs did not do alike: the samples of each step, and the worlds of the second."""
    mine, theirs = read_samples(one), read_samples(other)
    wrong = [f"samples of step {s}" for s in sorted({*mine, *theirs}) if mine.get(s) != theirs.get(s)]
    worlds = [e["world"] for e in read_events(other) if e["event"] in ("start", "resume")]
    return wrong + ([] if worlds[-1:] == [3] else [f"worlds {worlds}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/large"), help="a folder that is not there yet")
    parser.add_argument("--photos", type=int, default=100, help="of each class, to train on")
    given = parser.parse_args()
    if given.out.exists():
        sys.exit(f"{given.out} is there already: remove it, or name another --out")
    began = time.perf_counter()
    wrong = demonstrate(given.out.absolute(), each=given.photos)
    for name in ("undisturbed", "killed"):
        summary = next(e for e in reversed(read_events(given.out / name)) if e["event"] == "summary")
        print(f"{name}: {summary['test_accuracy']:.2%} test accuracy at {summary['resolution']} px")
    same = f"the same samples at each of {len(read_samples(given.out / 'killed'))} steps"
    print(f"{'; '.join(wrong) or same}; {time.perf_counter() - began:.0f} s in all")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
