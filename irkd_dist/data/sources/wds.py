"""WebDataset tars: our own shards and others."""

import functools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from irkd_dist.data import index, shards
from irkd_dist.data.sources.base import Raw, Source
from irkd_dist.data.sources.common import by_split, containers, fingerprint, is_hidden, reading, said
from irkd_dist.data.sources.suffixes import image_suffixes
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
    if path.is_dir() and (path / shards.MANIFEST).exists():
        largest = shards.load_manifest(path).resolutions[-1]
        raise UserError(
            f"--path {path} holds shards at several resolutions; name one of them: --path {path}/r{largest}"
        )
    files, others = containers(path, r"\.tar$")
    if not files:
        raise UserError(f"--path {path} holds no *.tar; compressed tars must be unpacked to .tar first")
    tars: dict[str, _Tars] = {}
    labels: dict[str, np.ndarray] = {}
    left: Counter[str] = Counter()
    for split, members in by_split(files, path).items():
        samples = [(n, *sample) for n, file in enumerate(members) for sample in _samples(file, left)]
        numbers, keys, label, image, mask = zip(*samples, strict=True) if samples else ((),) * 5
        labels[split] = np.array(label, dtype=np.int64)
        places = (np.array(p, dtype=np.int64).reshape(-1, 2) for p in (image, mask))
        tars[split] = _Tars(tuple(members), tuple(keys), np.array(numbers, dtype=np.int64), *places)
    return Source(
        kind="wds",
        name=path.resolve().name.split(".")[0],
        classes=_classes(path),
        labels=labels,
        masks=all(bool((part.mask[:, 1] >= 0).all()) for part in tars.values()),
        fingerprint=fingerprint("wds", containers=files),
        read=functools.partial(_read, tars),
        notes=(*said(others), *said(left, " of the tars' members")),
    )


def _classes(path: Path) -> tuple[str, ...]:
    """Class names from our own manifest, when the tars are ours, else ()."""
    folder = path if path.is_dir() else path.parent
    found = [f for f in (folder, folder.parent) if (f / shards.MANIFEST).is_file()]
    return shards.load_manifest(found[0]).classes if found else ()


def _samples(file: Path, left: Counter[str]) -> Iterator[tuple[str, int, _Place, _Place]]:
    """(key, label, place of image, place of mask) of each sample; what is none of these is counted in `left`."""
    samples: dict[str, dict[str, Any]] = {}
    with reading(file, ValueError, what="not a readable tar with number labels"), open(file, "rb") as stream:
        end = os.fstat(stream.fileno()).st_size
        for member in index.members(lambda count, offset: os.pread(stream.fileno(), count, offset), end):
            folder, _, name = member.name.removeprefix("./").rpartition("/")
            stem, _, kind = name.partition(".")
            role = _role(kind.lower()) if member.plain and not is_hidden(name) else None
            if role is None:
                left[_kind(member, name, kind)] += not member.folder
                continue
            sample = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
            if role in sample:
                raise UserError(f"{file}: member {member.name!r}: a second {role} of its sample; one is read")
            sample[role] = index.label(member) if role == "label" else (member.offset, member.size)
    for key, sample in samples.items():
        if "label" not in sample or "image" not in sample:
            raise UserError(
                f"{file}: sample {key!r} has no {'image' if 'label' in sample else 'label (.cls)'}; a sample is one "
                "image (.png, .jpg or another that Pillow reads, or .npy), one .cls, and maybe a .mask.png"
            )
        yield key, sample["label"], sample["image"], sample.get("mask", (0, -1))


def _role(kind: str) -> str | None:
    if kind in ("cls", "mask.png"):
        return {"cls": "label", "mask.png": "mask"}[kind]
    return "image" if f".{kind}" in image_suffixes() or kind == "npy" else None


def _kind(member: index.Member, name: str, kind: str) -> str:
    if not member.plain:
        return "link or device"
    return "hidden" if is_hidden(name) else f".{kind}" if kind else "without suffix"


def _read(tars: dict[str, _Tars], split: str, indices: Sequence[int]) -> Iterator[Raw]:
    part, wanted = tars[split], np.asarray(indices, dtype=np.int64)
    for number, path in enumerate(part.files):
        here = wanted[part.file[wanted] == number]
        if not here.size:
            continue
        with reading(path):
            file = open(path, "rb")  # noqa: SIM115
        with file:
            for i in here:
                with reading(path):
                    image = _read_at(file, part.image[i])
                    mask = _read_at(file, part.mask[i]) if part.mask[i, 1] >= 0 else None
                yield Raw(f"{path.name} {part.keys[i]}", image, mask)


def _read_at(file: BinaryIO, place: np.ndarray) -> bytes:
    return os.pread(file.fileno(), int(place[1]), int(place[0]))
