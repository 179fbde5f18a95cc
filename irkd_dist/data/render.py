"""Render a source to WebDataset shards at every resolution: parallel, restartable, byte for byte reproducible.

The unit of work is one shard of one split at all resolutions: its images are decoded once. Each leaves a record in
`.parts/`; the manifest is written last, from the records alone, so a folder without manifest is never taken for
whole, and the same command goes on where it was stopped or replaces what was damaged.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import webdataset as wds
from PIL import Image, ImageOps, UnidentifiedImageError

from irkd_dist import __version__
from irkd_dist.data import shards
from irkd_dist.data.sampler import order
from irkd_dist.data.shards import Encoding, Manifest, Mode, Shard
from irkd_dist.data.sources import Raw, Source
from irkd_dist.errors import UserError

FILTER = Image.Resampling.LANCZOS  # Pillow widens its support when it shrinks: antialiased
PREVIEW = "preview.png"


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


@dataclass(frozen=True)
class _Job:
    """One shard of one split: its file name, the first key's number, and where its samples are in the source."""

    split: str
    name: str
    first: int
    source_split: str
    indices: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class _Work:
    """What every job of a render shares; sent to each worker process once."""

    source: Source
    out: Path
    options: Options
    resolutions: tuple[int, ...]
    plan: str


@dataclass(frozen=True)
class _Record:
    """What is left of a finished job: its files and the exact sums that mean and std are made of."""

    plan: str
    name: str
    shards: dict[str, Shard]
    pixels: int
    sums: list[int]
    squares: list[int]
    bad: list[str]
    upscaled: bool


def render(
    source: Source,
    out: Path,
    options: Options,
    *,
    overwrite: bool = False,
    part: tuple[int, int] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    warn: Callable[[str], None] = lambda text: None,
) -> Manifest | None:
    """Render, or go on rendering, into folder `out`; returns the manifest.

    `part` (i, n) renders the i-th of n parts (0-based) and returns None: run the command once without it when all are
    done. `progress` is called with (shards done, shards in all), `warn` with things worth a line.

    Raises:
        UserError: unreadable images over the limit, a folder with another render in it, no space left.
    """
    _check(options)
    resolutions = (
        (max(options.resolutions),) if options.mode == "crop" else tuple(sorted(set(options.resolutions)))
    )
    jobs, counts = _jobs(source, options)
    plan = _plan_digest(source, options, resolutions)
    parts = out / shards.PARTS
    _claim(out, parts, plan, overwrite)

    work = _Work(source, out, options, resolutions, plan)
    own = jobs if part is None else jobs[part[0] :: part[1]]
    done = {job.name: record for job in own if (record := _finished(out, parts, job, plan))}
    todo = [job for job in own if job.name not in done]
    bad = [name for record in done.values() for name in record.bad]
    _check_bad(bad, options.max_bad)
    progress(len(done), len(own))
    with contextlib.closing(_run(work, todo)) as records:
        for record in records:
            done[record.name] = record
            bad += record.bad
            for name in record.bad:
                warn(f"unreadable, left out: {name}")
            _check_bad(bad, options.max_bad)
            progress(len(done), len(own))
    if part is not None:
        return None
    if any(record.upscaled for record in done.values()):
        warn(f"some images are smaller than {max(resolutions)} px and were enlarged")
    manifest = _manifest(work, jobs, counts, done)
    _preview(out, manifest)
    shards.write_manifest(out, manifest)
    return manifest


def _check_bad(bad: list[str], limit: int) -> None:
    if len(bad) > limit:
        raise UserError(
            f"{len(bad)} unreadable image{'s' if len(bad) > 1 else ''}, over the limit --max-bad {limit}: "
            f"{'; '.join(bad[:5])}; mend or remove them, or raise the limit"
        )


def _check(options: Options) -> None:
    if not options.resolutions or min(options.resolutions) < 1:
        raise UserError(f"--resolutions {options.resolutions}: give sizes in pixels, e.g. 12,16,20,24,28,32")
    if not 0 <= options.val_fraction < 1:
        raise UserError(
            f"--val-fraction {options.val_fraction} is not a part of the training images; use 0 to 0.5"
        )
    for name, least in (("samples_per_shard", 1), ("workers", 1), ("limit", 1), ("max_bad", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least {least}")


def _jobs(source: Source, options: Options) -> tuple[list[_Job], dict[str, int]]:
    """Split the samples, number them through, and cut each split into shards."""
    places = {split: (split, np.arange(len(labels))) for split, labels in source.labels.items()}
    if "val" not in places and "train" in places and options.val_fraction > 0:
        total = len(source.labels["train"])
        shuffled, held = order(options.seed, 0, total), round(total * options.val_fraction)
        places["val"] = ("train", np.sort(shuffled[:held]))
        places["train"] = ("train", np.sort(shuffled[held:]))
    jobs, counts, key = [], {}, 0
    for split in ("train", "val", "test"):
        if split not in places or not len(places[split][1]):
            continue
        source_split, indices = places[split]
        if options.limit is not None:
            indices = np.sort(indices[order(options.seed, 0, len(indices))][: options.limit])
        counts[split] = len(indices)
        for number, start in enumerate(range(0, len(indices), options.samples_per_shard)):
            chunk = indices[start : start + options.samples_per_shard]
            labels = source.labels[source_split][chunk]
            name = f"{split}-{number:06d}.tar"
            jobs.append(_Job(split, name, key, source_split, tuple(chunk.tolist()), tuple(labels.tolist())))
            key += len(chunk)
    return jobs, counts


def _plan_digest(source: Source, options: Options, resolutions: tuple[int, ...]) -> str:
    plan = {"source": source.fingerprint, "resolutions": resolutions, "format": shards.FORMAT_VERSION}
    return hashlib.sha256(json.dumps(plan | _semantic(options), sort_keys=True).encode()).hexdigest()


def _semantic(options: Options) -> dict[str, Any]:
    return {
        k: v for k, v in asdict(options).items() if k not in ("workers", "max_bad", "dataset", "resolutions")
    }


def _claim(out: Path, parts: Path, plan: str, overwrite: bool) -> None:
    """Make the folder ours, unless another render is in it. Only what a render wrote is ever removed."""
    marker = parts / "plan"
    try:
        before = marker.read_text() if marker.exists() else None
        if before == plan:
            return
        if before is not None or (out / shards.MANIFEST).exists():
            if not overwrite:
                raise UserError(
                    f"--out {out} holds shards of another source or other options; "
                    "give another folder, or --overwrite"
                )
            (out / shards.MANIFEST).unlink(missing_ok=True)  # first: what is left is not whole any more
            _remove_shards(out)
            shutil.rmtree(parts, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write to --out {out}: {error.strerror}") from error
    with shards.atomic(marker) as file:
        file.write(plan.encode())


def _remove_shards(out: Path) -> None:
    for folder in out.iterdir():
        if re.fullmatch(r"r\d+", folder.name):
            for file in folder.glob("*-[0-9][0-9][0-9][0-9][0-9][0-9].tar*"):
                file.unlink()
            with contextlib.suppress(OSError):  # something of the user's is in it
                folder.rmdir()


def _finished(out: Path, parts: Path, job: _Job, plan: str) -> _Record | None:
    """The job's record, if all its files are there and as it says."""
    try:
        raw = json.loads((parts / f"{job.name}.json").read_text())
        record = _Record(**raw | {"shards": {k: Shard(**v) for k, v in raw["shards"].items()}})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    whole = all(shards.damage(out / key / shard.name, shard) is None for key, shard in record.shards.items())
    return record if record.plan == plan and whole else None


def _run(work: _Work, jobs: list[_Job]) -> Generator[_Record, None, None]:
    workers = min(work.options.workers, len(jobs))
    if workers < 2:
        yield from (_render_shard(work, job) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(work,)) as pool:
        try:
            yield from pool.map(_render_shard_of_worker, jobs)
        except BrokenProcessPool as error:
            raise UserError(
                "a render process died (killed, or out of memory?); "
                "the same command goes on from here, with fewer --workers if memory is short"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_work: _Work | None = None  # in a worker process, set once by _start_worker


def _start_worker(work: _Work) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops us; no traceback of our own
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A parent that was killed tells nobody, and its workers would wait for the next job for ever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _render_shard_of_worker(job: _Job) -> _Record:
    assert _work is not None
    return _render_shard(_work, job)


def _render_shard(work: _Work, job: _Job) -> _Record:
    """Decode a shard's images once and write them at every resolution; returns and leaves the record."""
    files = {r: io.BytesIO() for r in work.resolutions}
    sums, squares = np.zeros(3, np.uint64), np.zeros(3, np.uint64)
    bad, written, upscaled = [], 0, False
    with contextlib.ExitStack() as stack:
        writers = {r: stack.enter_context(_writer(file)) for r, file in files.items()}
        for offset, raw in enumerate(work.source.read(job.source_split, job.indices)):
            try:
                image, mask = _load(raw)
            except Exception as error:  # damaged files make Pillow raise nearly anything
                bad.append(f"{raw.name} ({_reason(error)})")
                _check_bad(bad, work.options.max_bad)
                continue
            upscaled |= min(image.size) < work.resolutions[-1]
            written += 1
            for r, writer in writers.items():
                pixels = np.asarray(_fit(image, r))
                key = f"{job.first + offset:09d}"
                writer.write(_sample(key, pixels, job.labels[offset], mask, work.options.encoding))
                if r == work.resolutions[-1] and job.split == "train":
                    flat = pixels.reshape(-1, 3).astype(np.uint64)
                    sums += flat.sum(0)
                    squares += (flat * flat).sum(0)
    result = {f"r{r}": _save(work.out / f"r{r}", job.name, file, written) for r, file in files.items()}
    count = written * work.resolutions[-1] ** 2 if job.split == "train" else 0
    record = _Record(work.plan, job.name, result, count, sums.tolist(), squares.tolist(), bad, upscaled)
    with shards.atomic(work.out / shards.PARTS / f"{job.name}.json") as file:
        file.write(json.dumps(asdict(record)).encode())
    return record


def _writer(file: io.BytesIO) -> wds.TarWriter:  # type: ignore[name-defined]
    # time, user and group fixed: everything else in the headers follows from the samples
    return wds.TarWriter(file, encoder=False, mtime=0, user="irkd", group="irkd", compress=False)  # type: ignore[arg-type]


def _sample(
    key: str, pixels: np.ndarray, label: int, mask: Image.Image | None, encoding: Encoding
) -> dict[str, str | bytes]:
    sample: dict[str, str | bytes] = {
        "__key__": key,
        encoding: _encode(pixels, encoding),
        "cls": str(label).encode(),
    }
    if mask is not None:
        small = np.asarray(_fit(mask, pixels.shape[0]))
        sample["mask.png"] = _encode(np.where(small >= 128, 255, 0).astype(np.uint8), "png")
    return sample


def _save(folder: Path, name: str, data: io.BytesIO, samples: int) -> Shard:
    with shards.atomic(folder / name) as file:
        file.write(data.getbuffer())
    return Shard(name, samples, data.getbuffer().nbytes, hashlib.sha256(data.getbuffer()).hexdigest())


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):  # its text holds a memory address
        return "not an image, or of an unknown format"
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def _load(raw: Raw) -> tuple[Image.Image, Image.Image | None]:
    """Decode to 8-bit RGB, whatever the file's mode; orientation tags are applied."""
    if isinstance(raw.image, np.ndarray):
        image = Image.fromarray(raw.image)
    elif isinstance(raw.image, bytes) and raw.image.startswith(b"\x93NUMPY"):
        image = Image.fromarray(np.load(io.BytesIO(raw.image), allow_pickle=False))
    else:
        image = Image.open(io.BytesIO(raw.image) if isinstance(raw.image, bytes) else raw.image)
        image.load()
        image = ImageOps.exif_transpose(image)
    if raw.mask is None:
        return _rgb(image), None
    if isinstance(raw.mask, np.ndarray):
        return _rgb(image), Image.fromarray(raw.mask)
    return _rgb(image), Image.open(io.BytesIO(raw.mask)).convert("L")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):  # 16 bits a pixel: Pillow's own conversion clips at 255
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _fit(image: Image.Image, size: int) -> Image.Image:
    """Cut the largest central square and resize it, antialiased."""
    width, height = image.size
    if width != height:
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    return image if image.size == (size, size) else image.resize((size, size), FILTER)


def _encode(pixels: np.ndarray, encoding: Encoding) -> bytes:
    if encoding == "npy":
        return shards.encode_npy(pixels)
    buffer = io.BytesIO()
    settings: dict[str, dict[str, Any]] = {
        "png": {"format": "PNG", "compress_level": 6},
        "webp": {"format": "WEBP", "lossless": True, "method": 4},
        "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    }
    Image.fromarray(pixels).save(buffer, **settings[encoding])
    return buffer.getvalue()


def _manifest(work: _Work, jobs: list[_Job], counts: dict[str, int], done: dict[str, _Record]) -> Manifest:
    source, options, resolutions = work.source, work.options, work.resolutions
    records = [done[job.name] for job in jobs]
    pixels = sum(r.pixels for r in records)
    if not pixels:
        raise UserError(f"{source.name} has no training images: shards need a train split")
    mean = [sum(r.sums[c] for r in records) / pixels for c in range(3)]
    second = [sum(r.squares[c] for r in records) / pixels for c in range(3)]
    std = [max(s - m * m, 1e-12) ** 0.5 for s, m in zip(second, mean, strict=True)]
    listing: dict[str, dict[str, tuple[Shard, ...]]] = {}
    for r in resolutions:
        listing[f"r{r}"] = {
            split: tuple(done[j.name].shards[f"r{r}"] for j in jobs if j.split == split) for split in counts
        }
    written = {split: sum(s.samples for s in listing[f"r{resolutions[0]}"][split]) for split in counts}
    return Manifest(
        version=shards.FORMAT_VERSION,
        dataset=options.dataset or source.name,
        source=source.kind,
        classes=source.classes,
        mean=(mean[0] / 255, mean[1] / 255, mean[2] / 255),
        std=(std[0] / 255, std[1] / 255, std[2] / 255),
        mode=options.mode,
        encoding=options.encoding,
        masks=source.masks,
        val_fraction=0.0 if "val" in source.labels else options.val_fraction,
        seed=options.seed,
        resolutions=resolutions,
        splits=written,
        shards=listing,
        render={
            **_semantic(options),
            "filter": FILTER.name.lower(),
            "source": source.fingerprint,
            "unreadable": [name for record in records for name in record.bad],
            "versions": {"irkd_dist": __version__, "pillow": PIL.__version__},  # the bytes depend on them
        },
    )


def _preview(out: Path, manifest: Manifest, count: int = 8) -> None:
    """Write preview.png: the same images at every resolution, as in the paper's Figure 1."""
    from matplotlib.figure import Figure

    split = "test" if "test" in manifest.splits else "train"
    width, height = 0.7 + 1.1 * count, 0.3 + 1.1 * len(manifest.resolutions)  # inches
    figure = Figure(figsize=(width, height), dpi=130)
    axes = figure.subplots(len(manifest.resolutions), count, squeeze=False)
    for row, resolution in zip(axes, manifest.resolutions, strict=True):
        first = resolution == manifest.resolutions[0]
        opened = shards.open_split(out, manifest, split, resolution, verify="size")
        picked = _one_of_each_class(opened.labels, count)
        for column, axis in enumerate(row):
            axis.set_axis_off()
            if column < len(picked):
                i = picked[column]
                pixels = shards.decode(opened.image(i), manifest.encoding)
                axis.imshow(pixels.permute(1, 2, 0).numpy(), interpolation="nearest")
                if first:
                    axis.set_title(manifest.classes[opened.labels[i]][:12], fontsize=8)
        row[0].text(
            -0.12, 0.5, f"{resolution} px", transform=row[0].transAxes, ha="right", va="center", fontsize=9
        )
        opened.close()
    margins = {"left": 0.68 / width, "right": 0.995, "top": 1 - 0.28 / height, "bottom": 0.02 / height}
    figure.subplots_adjust(**margins, wspace=0.06, hspace=0.06)
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    with shards.atomic(out / PREVIEW) as file:
        file.write(image.getbuffer())


def _one_of_each_class(labels: np.ndarray, count: int) -> list[int]:
    """Sample numbers that show as many classes as fit, in class order."""
    firsts = [int(np.flatnonzero(labels == c)[0]) for c in np.unique(labels)][:count]
    rest = [i for i in range(len(labels)) if i not in firsts]
    return firsts + rest[: count - len(firsts)]
