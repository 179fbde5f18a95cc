"""What several kinds of source need: splits told by file names, class numbers, fingerprints, messages."""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from irkd_dist.errors import UserError

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
_ORDER = ("train", "val", "test")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}


def ordered(labels: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {split: labels[split] for split in _ORDER if split in labels}


def numbered(labels: Iterable[np.ndarray]) -> tuple[str, ...]:
    """Class names where the source has none: the numbers."""
    top = max((int(part.max()) for part in labels if part.size), default=-1)
    return tuple(map(str, range(top + 1)))


def split_of(file: Path, base: Path) -> str | None:
    """The split that a file's name, or else a folder it is in, tells of."""
    for part in reversed(file.relative_to(base).parts if file != base else (file.name,)):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in SPLITS:
                return SPLITS[word]
    return None


def by_split(files: list[Path], base: Path) -> dict[str, list[Path]]:
    """Files of each split by their names; all of them are train when none tells a split."""
    found = [(file, split_of(file, base)) for file in files]
    silent = [file for file, split in found if split is None]
    if silent and len(silent) < len(files):
        raise UserError(
            f"cannot tell the split of {silent[0]}: its name should begin with train, val or test"
        )
    groups: dict[str, list[Path]] = {}
    for file, split in found:
        groups.setdefault(split or "train", []).append(file)
    return {split: groups[split] for split in _ORDER if split in groups}


def fingerprint(*facts: Any, containers: Iterable[Path] = ()) -> str:
    """A digest of facts and of container files: name, size and both ends, to be quick on large ones."""
    digest = hashlib.sha256(json.dumps(facts, default=str).encode())
    for file in containers:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            digest.update(f"\n{file.name} {size}\n".encode())
            digest.update(stream.read(1 << 16))
            stream.seek(max(0, size - (1 << 16)))
            digest.update(stream.read())
    return digest.hexdigest()


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
