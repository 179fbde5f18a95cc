"""Images that the package draws itself."""

import functools
from collections.abc import Iterator, Sequence

import numpy as np

from irkd_dist.data import synthetic
from irkd_dist.data.sources.base import Raw, Source
from irkd_dist.data.sources.common import fingerprint, ordered
from irkd_dist.errors import UserError

_MOST_SAMPLES, _LARGEST = 10_000_000, 2048


def open_synthetic(samples: dict[str, int], size: int, seed: int) -> Source:
    if not samples.get("train"):
        raise UserError(f"--samples {samples}: a train split is needed, e.g. train=4000,test=1000")
    if sum(samples.values()) > _MOST_SAMPLES:
        raise UserError(f"--samples {samples}: at most {_MOST_SAMPLES:,} are drawn")
    if not 4 <= size <= _LARGEST:
        word = "small for a shape" if size < 4 else "large to be drawn"
        raise UserError(f"--size {size} is too {word}; use 12 to {_LARGEST}")
    count = len(synthetic.CLASSES)
    return Source(
        kind="synthetic",
        name="synthetic",
        classes=synthetic.CLASSES,
        labels=ordered({split: np.arange(n, dtype=np.int64) % count for split, n in samples.items()}),
        masks=True,
        fingerprint=fingerprint("synthetic", samples, size, seed),
        read=functools.partial(_read, size, seed),
    )


def _read(size: int, seed: int, split: str, indices: Sequence[int]) -> Iterator[Raw]:
    for i in indices:
        image, mask, _ = synthetic.draw(seed, split, int(i), size)
        yield Raw(f"synthetic {split} {i}", image, mask)
