"""Render a source to WebDataset shards at every resolution: parallel, restartable, byte for byte reproducible.

The unit of work is one shard of one split at all resolutions: its images are decoded once. Each leaves a record in
`.parts/`; the manifest is written last, from the records alone, so a folder without manifest is never taken for
whole, and the same command goes on where it was stopped or replaces what was damaged.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from irkd_dist import __version__, files
from irkd_dist.data import geometry, images, preview, shards
from irkd_dist.data.images import Fit
from irkd_dist.data.renderjob import (
    Job,
    Options,
    Record,
    Work,
    check_bad,
    check_white,
    finished,
    render_shard,
)
from irkd_dist.data.sampler import order
from irkd_dist.data.shards import Manifest, Shard
from irkd_dist.data.sources import Source
from irkd_dist.errors import UserError, reason

LARGEST = 8192  # pixels
MOST_WORKERS = 1024


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
    check(options)
    wanted = [geometry.scaled(r, options.crop_pct) for r in options.resolutions]
    resolutions = (max(wanted),) if options.mode == "crop" else tuple(sorted(set(wanted)))
    jobs, counts = _jobs(source, options)
    plan = _plan_digest(source, options, resolutions)
    parts = out / shards.PARTS
    _claim(out, parts, plan, _labels_digest(source), overwrite)

    work = Work(source, out, options, resolutions, plan)
    own = jobs if part is None else jobs[part[0] :: part[1]]
    done = {job.name: record for job in own if (record := finished(work, job))}
    todo = [job for job in own if job.name not in done]
    bad = [name for record in done.values() for name in record.bad]
    check_bad(bad, options.max_bad)
    check_white(done.values())
    progress(len(done), len(own))
    with contextlib.closing(_run(work, todo)) as records:
        for record in records:
            done[record.name] = record
            bad += record.bad
            for name in record.bad:
                warn(f"unreadable, left out: {name}")
            check_bad(bad, options.max_bad)
            check_white(done.values())
            progress(len(done), len(own))
    if part is not None:
        return None
    manifest = _manifest(work, jobs, counts, done)
    for note in [*manifest.render["notes"], *_said(manifest.render["images"], options.fit)]:
        warn(note)
    preview.write(out, manifest)
    shards.write_manifest(out, manifest)
    return manifest


def _said(facts: dict[str, int], fit: Fit) -> list[str]:
    """What was true of some images, for the user."""
    how = {"not_square": f": {images.FITS[fit]} (--fit {fit})"}
    return [
        f"{count:,} image{'s are' if count > 1 else ' is'} {images.FACTS[fact]}{how.get(fact, '')}"
        for fact, count in facts.items()
    ]


def check(options: Options) -> None:
    """Raises UserError for options that make no sense."""
    if not geometry.LEAST <= options.crop_pct <= 1:
        raise UserError(
            f"--crop-pct {options.crop_pct:g} is no part of a side; give 0.01 to 1 (nothing is cropped), e.g. 0.875"
        )
    if options.crop_pct < 1 and options.mode == "crop":
        raise UserError(
            "--crop-pct is for --mode resize; with --mode crop data.centre_crop=true evaluates on the centre"
        )
    if not options.resolutions or min(options.resolutions) < 1 or max(options.resolutions) > LARGEST:
        raise UserError(
            f"--resolutions {','.join(map(str, options.resolutions))}: give sizes in pixels up to {LARGEST}, "
            "e.g. 12,16,20,24,28,32"
        )
    if not 0 <= options.val_fraction < 1:
        raise UserError(
            f"--val-fraction {options.val_fraction} is not a part of the training images; use 0 to 0.5"
        )
    if options.workers > MOST_WORKERS:
        raise UserError(
            f"--workers {options.workers} must be at most {MOST_WORKERS}; try the number of cores"
        )
    for name, least in (("samples_per_shard", 1), ("workers", 1), ("limit", 1), ("max_bad", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least {least}")


def _jobs(source: Source, options: Options) -> tuple[list[Job], dict[str, int]]:
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
        if options.shuffle and split == "train":
            indices = indices[order(options.seed, 1, len(indices))]
        counts[split] = len(indices)
        for number, start in enumerate(range(0, len(indices), options.samples_per_shard)):
            chunk = np.sort(indices[start : start + options.samples_per_shard])  # sources read in their order
            labels = source.labels[source_split][chunk]
            name = f"{split}-{number:06d}.tar"
            jobs.append(Job(split, name, key, source_split, tuple(chunk.tolist()), tuple(labels.tolist())))
            key += len(chunk)
    return jobs, counts


def _plan_digest(source: Source, options: Options, resolutions: tuple[int, ...]) -> str:
    plan = {"source": source.fingerprint, "resolutions": resolutions, "format": shards.FORMAT_VERSION}
    return hashlib.sha256(json.dumps(plan | _semantic(options), sort_keys=True).encode()).hexdigest()


def _labels_digest(source: Source) -> str:
    """Of what a fingerprint by names and sizes does not see: a label that was put right."""
    found = hashlib.sha256()
    for split, labels in sorted(source.labels.items()):
        found.update(f"{split} {len(labels)} ".encode() + np.ascontiguousarray(labels, np.int64).tobytes())
    return found.hexdigest()


def _semantic(options: Options) -> dict[str, Any]:
    left_out = {"workers", "max_bad", "dataset", "resolutions"}
    # as before there was another: such a render goes on
    left_out |= {"fit"} if options.fit == "crop" else set()
    left_out |= {"crop_pct"} if options.crop_pct == 1 else set()
    left_out |= {"white"} if options.white is None else set()
    left_out |= set() if options.shuffle else {"shuffle"}
    return {k: v for k, v in asdict(options).items() if k not in left_out}


def _claim(out: Path, parts: Path, plan: str, labels: str, overwrite: bool) -> None:
    """Make the folder ours, unless another render is in it. Only what a render wrote is ever removed."""
    marker = parts / "plan"
    try:
        before = files.read(marker).decode(errors="replace") if marker.exists() else None
        if before in (plan, f"{plan} {labels}"):  # an earlier release wrote no labels
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
        raise UserError(f"cannot write to --out {out}: {reason(error)}") from error
    files.write(marker, f"{plan} {labels}")


def _remove_shards(out: Path) -> None:
    for folder in out.iterdir():
        if re.fullmatch(r"r\d+", folder.name):
            for file in folder.glob("*-[0-9][0-9][0-9][0-9][0-9][0-9].*"):
                file.unlink()
            with contextlib.suppress(OSError):  # something of the user's is in it
                folder.rmdir()


def _run(work: Work, jobs: list[Job]) -> Generator[Record, None, None]:
    workers = min(work.options.workers, len(jobs))
    if workers < 2:
        yield from (render_shard(work, job, lambda: False) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(work, stop)) as pool:
        try:
            with _interrupts_held():  # what workers inherit: Ctrl-C is for us, we stop them
                records = pool.map(_render_shard_of_worker, jobs)
            yield from records
        except BrokenProcessPool as error:
            raise UserError(
                "a render process died (killed, or out of memory?); "
                "the same command goes on from here, with fewer --workers if memory is short"
            ) from error
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C within comes out at the end; processes started within never get it, not even while they import."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_work: Work | None = None  # in a worker process, set once by _start_worker
_stop: Event | None = None


def _start_worker(work: Work, stop: Event) -> None:
    global _work, _stop
    _work, _stop = work, stop
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A parent that was killed tells nobody, and its workers would wait for the next job for ever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _render_shard_of_worker(job: Job) -> Record:
    assert _work is not None
    assert _stop is not None
    return render_shard(_work, job, _stop.is_set)


def _manifest(work: Work, jobs: list[Job], counts: dict[str, int], done: dict[str, Record]) -> Manifest:
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
            "fit": options.fit,
            "filter": images.FILTER.name.lower(),
            "source": source.fingerprint,
            "unreadable": [name for record in records for name in record.bad],
            "images": _facts(records),
            "notes": _notes(source, records),
            "versions": {"irkd_dist": __version__, "pillow": PIL.__version__},  # the bytes depend on them
        },
    )


def _facts(records: list[Record]) -> dict[str, int]:
    total = sum((Counter(record.facts or {}) for record in records), Counter[str]())
    return {fact: total[fact] for fact in images.FACTS if total[fact]}


def _notes(source: Source, records: list[Record]) -> list[str]:
    uncounted = sum(record.facts is None for record in records)
    older = f"{uncounted} shards are of an older irkd, which did not count what it changed in images"
    return [*source.notes, *([older] if uncounted else [])]
