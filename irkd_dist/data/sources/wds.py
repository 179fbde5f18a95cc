"""WebDataset tars: our own shards and others."""

import functools
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from irkd_dist.data import shards
from irkd_dist.data.sources.base import Raw, Source
from irkd_dist.data.sources.common import IMAGE_SUFFIXES, by_split, fingerprint, numbered, one_line
from irkd_dist.errors import UserError

_Place = tuple[int, int]  # offset, bytes


@dataclass(frozen=True)
class _Tars:
    """Where the samples of one split lie: file number, (offset, bytes) of image and mask; bytes -1: none."""

    files: tuple[Path, ...]
    keys: tuple[str, ...]
    file: np.ndarray
    image: np.ndarray
    mask: np.ndarray


def open_wds(path: Path) -> Source:
    files = [path] if path.is_file() else sorted(path.glob("*.tar"))
    if not files:
        raise UserError(f"--path {path} holds no *.tar; compressed tars must be unpacked to .tar first")
    tars: dict[str, _Tars] = {}
    labels: dict[str, np.ndarray] = {}
    for split, members in by_split(files, path).items():
        samples = [(n, *sample) for n, file in enumerate(members) for sample in _samples(file)]
        numbers, keys, label, image, mask = zip(*samples, strict=True) if samples else ((),) * 5
        labels[split] = np.array(label, dtype=np.int64)
        places = (np.array(p, dtype=np.int64).reshape(-1, 2) for p in (image, mask))
        tars[split] = _Tars(tuple(members), tuple(keys), np.array(numbers, dtype=np.int64), *places)
    return Source(
        kind="wds",
        name=path.resolve().name.split(".")[0],
        classes=_classes(path) or numbered(labels.values()),
        labels=labels,
        masks=all(bool((part.mask[:, 1] >= 0).all()) for part in tars.values()),
        fingerprint=fingerprint("wds", containers=files),
        read=functools.partial(_read, tars),
    )


def _classes(path: Path) -> tuple[str, ...] | None:
    """Class names from our own manifest, when the tars are ours."""
    folder = path if path.is_dir() else path.parent
    found = [f for f in (folder, folder.parent) if (f / shards.MANIFEST).is_file()]
    return shards.load_manifest(found[0]).classes if found else None


def _samples(file: Path) -> Iterator[tuple[str, int, _Place, _Place]]:
    """(key, label, place of image, place of mask) of each sample. Members other than those are refused."""
    samples: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, kind = name.partition(".")
                sample = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
                role = _role(kind.lower()) if member.isreg() else None
                if role is None or role in sample:
                    raise UserError(
                        f"{file}: member {member.name!r} {'comes twice' if role else 'is refused'}; only one "
                        f"image ({', '.join(sorted(IMAGE_SUFFIXES))}, .npy), .cls and .mask.png a sample are read"
                    )
                data = tar.extractfile(member)
                assert data is not None
                sample[role] = int(data.read(32)) if role == "cls" else (member.offset_data, member.size)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"{file} is not a readable tar with number labels: {one_line(error)}") from error
    for key, sample in samples.items():
        if "cls" not in sample or "image" not in sample:
            raise UserError(f"{file}: sample {key!r} has no {'image' if 'cls' in sample else '.cls (label)'}")
        yield key, sample["cls"], sample["image"], sample.get("mask", (0, -1))


def _role(kind: str) -> str | None:
    if kind in ("cls", "mask.png"):
        return kind.removesuffix(".png")
    return "image" if f".{kind}" in IMAGE_SUFFIXES or kind == "npy" else None


def _read(tars: dict[str, _Tars], split: str, indices: Sequence[int]) -> Iterator[Raw]:
    part, wanted = tars[split], np.asarray(indices, dtype=np.int64)
    for number, path in enumerate(part.files):
        here = wanted[part.file[wanted] == number]
        if not here.size:
            continue
        try:
            with open(path, "rb") as file:
                for i in here:
                    image = _read_at(file, part.image[i])
                    mask = _read_at(file, part.mask[i]) if part.mask[i, 1] >= 0 else None
                    yield Raw(f"{path.name} {part.keys[i]}", image, mask)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error


def _read_at(file: BinaryIO, place: np.ndarray) -> bytes:
    return os.pread(file.fileno(), int(place[1]), int(place[0]))
