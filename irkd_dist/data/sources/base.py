"""What every kind of source becomes, and what its images come as."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

Kind = Literal["parquet", "cifar10", "idx", "folder", "wds", "synthetic"]


@dataclass(frozen=True)
class Raw:
    """One image as the source has it.

    name: what to call it in a message. image: encoded bytes, a file, or pixels (H, W) or (H, W, 3) uint8.
    mask: the true object, (H, W) uint8, 0 or 255, or PNG bytes of it.
    """

    name: str
    image: bytes | Path | np.ndarray
    mask: np.ndarray | bytes | None = None


@dataclass(frozen=True)
class Source:
    """A set of labelled images; picklable, so that worker processes can read it.

    labels: (N,) int64 for each split, in the source's own order. classes: names of the labels 0, 1, ...; () in what a
    module returns whose labels are numbers without names, until naming.py. fingerprint: changes when the source does.
    read(split, indices) yields the images of ascending indices; it raises UserError when a container file cannot be
    read. notes: what was left out or reinterpreted, each a line.
    """

    kind: Kind
    name: str
    classes: tuple[str, ...]
    labels: dict[str, np.ndarray]
    masks: bool
    fingerprint: str
    read: Callable[[str, Sequence[int]], Iterator[Raw]]
    notes: tuple[str, ...] = ()
