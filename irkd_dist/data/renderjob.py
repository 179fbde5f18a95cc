"""One shard of one split, at all resolutions: decoded once, written with its index, and its record left behind."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import webdataset as wds
from PIL import Image, UnidentifiedImageError

from irkd_dist import files, typed
from irkd_dist.data import images, index, shards
from irkd_dist.data.images import Fit
from irkd_dist.data.pixels import encode
from irkd_dist.data.shards import Encoding, Mode, Shard
from irkd_dist.data.sources import Source
from irkd_dist.errors import AWAY, Stopped, UserError, printable, reason, unreadable


@dataclass(frozen=True)
class Options:
    """How a source becomes shards; `workers` and `max_bad` are the only ones without influence on the bytes."""

    resolutions: tuple[int, ...]
    mode: Mode = "resize"  # crop: only the largest resolution is stored, training crops from it
    encoding: Encoding = "png"
    samples_per_shard: int = 2000
    val_fraction: float = 0.1  # of train, where the source has no validation split
    seed: int = 42
    limit: int | None = None  # samples of each split at most
    dataset: str | None = None  # name; None: the source's
    workers: int = 1
    max_bad: int = 0  # unreadable images that are skipped before the render stops
    fit: Fit = "crop"  # of images that are not square: their centre, squashed, or whole on black
    crop_pct: float = (
        1.0  # part of a side that evaluation sees: `resolutions` are stored larger by its inverse
    )
    white: int | None = None  # of floats and 32-bit numbers; None: 1, 255 or 65535, as their values are
    shuffle: bool = False  # each training shard has a random part of the split, not the next of the source


@dataclass(frozen=True)
class Job:
    """One shard of one split: its file name, the first key's number, and where its samples are in the source."""

    split: str
    name: str
    first: int
    source_split: str
    indices: tuple[int, ...]
    labels: tuple[int, ...]


_MACHINE = {*AWAY, errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # the machine's faults, not an image's


@dataclass(frozen=True)
class Work:
    """What every job of a render shares; sent to each worker process once."""

    source: Source
    out: Path
    options: Options
    resolutions: tuple[int, ...]
    plan: str


@dataclass(frozen=True)
class Record:
    """What is left of a finished job: its files, the exact sums that mean and std are made of, and what to say."""

    plan: str
    name: str
    shards: dict[str, Shard]
    pixels: int
    sums: list[int]
    squares: list[int]
    bad: list[str]
    # of how many images each of images.FACTS is true; None: not counted yet then
    facts: dict[str, int] | None = None
    examples: dict[str, str] = field(default_factory=dict)  # of each value of white: the first image


def render_shard(work: Work, job: Job, stop: Callable[[], bool]) -> Record:
    """Decode a shard's images once and write them at every resolution; returns and leaves a record. Raises Stopped."""
    streams = {r: io.BytesIO() for r in work.resolutions}
    sums, squares = np.zeros(3, np.uint64), np.zeros(3, np.uint64)
    bad: list[str] = []
    facts, examples = Counter[str](), dict[str, str]()
    written = 0
    with contextlib.ExitStack() as stack:
        writers = {r: stack.enter_context(_writer(stream)) for r, stream in streams.items()}
        for offset, raw in enumerate(work.source.read(job.source_split, job.indices)):
            if stop():
                raise Stopped
            try:
                loaded = images.load(raw, work.options.white)
            except MemoryError:
                raise
            except Exception as error:  # damaged files make Pillow raise nearly anything
                if isinstance(error, OSError) and error.errno in _MACHINE:  # the same command goes on
                    raise unreadable(Path(raw.name), error) from error
                bad.append(f"{printable(raw.name)} ({_reason(error)})")
                check_bad(bad, work.options.max_bad)
                continue
            written += 1
            facts.update(loaded.facts)
            for fact in loaded.facts:
                if fact.startswith("white_"):
                    examples.setdefault(fact, printable(raw.name))
            side = max(loaded.image.size) if work.options.fit == "pad" else min(loaded.image.size)
            facts["enlarged"] += side < work.resolutions[-1]
            for r, writer in writers.items():
                pixels = np.asarray(images.fit(loaded.image, r, work.options.fit))
                key = f"{job.first + offset:09d}"
                writer.write(_sample(key, pixels, job.labels[offset], loaded.mask, work.options))
                if r == work.resolutions[-1] and job.split == "train":
                    flat = pixels.reshape(-1, 3).astype(np.uint64)
                    sums += flat.sum(0)
                    squares += (flat * flat).sum(0)
    result = {
        f"r{r}": _save(work.out / f"r{r}", job.name, stream, written, work.options.encoding)
        for r, stream in streams.items()
    }
    count = written * work.resolutions[-1] ** 2 if job.split == "train" else 0
    record = Record(
        work.plan, job.name, result, count, sums.tolist(), squares.tolist(), bad, dict(+facts), examples
    )  # fmt: skip
    files.write(work.out / shards.PARTS / f"{job.name}.json", json.dumps(asdict(record)), mine=True)
    return record


def check_bad(bad: list[str], limit: int) -> None:
    if len(bad) > limit:
        raise UserError(
            f"{len(bad)} unreadable image{'s' if len(bad) > 1 else ''}, over the limit --max-bad {limit}: "
            f"{'; '.join(bad[:5])}; mend or remove them, or raise the limit"
        )


def check_white(records: Iterable[Record]) -> None:
    """Refuse images whose values do not say alike what is white: a dark one of a set is no bright one of another."""
    total, examples = Counter[str](), dict[str, str]()
    for record in records:
        total.update(record.facts or {})
        examples = record.examples | examples
    found = [(white, fact) for white in images.WHITES if total[fact := f"white_{white}"]]
    if len(found) > 1:
        told = ", ".join(
            f"{total[fact]} within 0..{white} (such as {examples[fact]})" for white, fact in found
        )
        raise UserError(
            f"float or 32-bit images do not agree on what is white: {told}; --white 1, 255 or 65535 says it for all of "
            "them (and --overwrite, to begin anew)"
        )


def _writer(stream: io.BytesIO) -> wds.TarWriter:  # type: ignore[name-defined]
    # time, user and group fixed: everything else in the headers follows from the samples
    return wds.TarWriter(stream, encoder=False, mtime=0, user="irkd", group="irkd", compress=False)  # type: ignore[arg-type]


def _sample(
    key: str, pixels: np.ndarray, label: int, mask: Image.Image | None, options: Options
) -> dict[str, str | bytes]:
    sample: dict[str, str | bytes] = {
        "__key__": key,
        options.encoding: encode(pixels, options.encoding),
        "cls": str(label).encode(),
    }
    if mask is not None:
        small = np.asarray(images.fit(mask, pixels.shape[0], options.fit))
        sample["mask.png"] = encode(np.where(small >= images.OBJECT, 255, 0).astype(np.uint8), "png")
    return sample


def _save(folder: Path, name: str, stream: io.BytesIO, samples: int, encoding: Encoding) -> Shard:
    data = stream.getbuffer()
    files.write(folder / name, data, mine=True)
    listed = index.scan(lambda count, at: bytes(data[at : at + count]), len(data), encoding)
    digest = hashlib.sha256(data).hexdigest()
    return Shard(name, samples, len(data), digest, _write_index(folder / name, listed, digest))


def _write_index(tar: Path, listed: index.Index, digest: str) -> str:
    """Write the index beside its tar, whose sha256 is `digest`; returns its own."""
    data = index.encode(listed, digest)
    files.write(tar.with_name(index.file_name(tar.name)), data, mine=True)
    return hashlib.sha256(data).hexdigest()


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):  # its text holds a memory address
        return "not an image, or of an unknown format"
    return printable(reason(error))


def finished(work: Work, job: Job) -> Record | None:
    """The job's record, if all its files are there and as it says."""
    try:
        raw = typed.parse(files.read(work.out / shards.PARTS / f"{job.name}.json"))
        raw.pop("upscaled", None)  # of a render before facts were counted
        record = Record(**raw | {"shards": {k: Shard(**v) for k, v in raw["shards"].items()}})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    whole = all(
        shards.damage(work.out / key / shard.name, shard) is None for key, shard in record.shards.items()
    )
    if record.plan != work.plan or not whole:
        return None
    return replace(
        record,
        shards={
            key: _with_index(work.out / key, s, work.options.encoding) for key, s in record.shards.items()
        },
    )


def _with_index(folder: Path, shard: Shard, encoding: Encoding) -> Shard:
    """The shard, with the index that it has not got if it was rendered before there were any."""
    if shard.index is not None:
        return shard
    tar = folder / shard.name
    return replace(shard, index=_write_index(tar, shards.scan(tar, encoding), shard.sha256))
