"""`irkd verify`: whether what lies on disk is whole and can be read. Each kind of folder has a function of its own.

It yields problems: lines that begin with the bad file, and name the sample where there is one.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from irkd_dist import evidence, runfolder, study_page, verify_runs
from irkd_dist.data import index, remote
from irkd_dist.data import shards as format
from irkd_dist.data.index import Index
from irkd_dist.data.remote import Url
from irkd_dist.distill import cache_admin, cache_files
from irkd_dist.errors import Passing, UserError

Progress = Callable[[int, int], None]

_MOST_NAMED = 20  # bad samples of one file that are named


def verify(path: Path | Url, progress: Progress = lambda done, total: None) -> Iterator[str]:
    """The problems of whatever lies at `path`; `progress` is called with (files or checkpoints done, in all).

    Raises:
        UserError: that is nothing known.
    """
    if isinstance(path, Url):
        return shards(path, progress)
    if (path / format.MANIFEST).exists() or (path / format.PARTS).is_dir():
        return shards(path, progress)
    if (path / "export.json").exists():
        from irkd_dist import export

        return iter(export.problems(path))
    if (path / cache_files.CACHE).exists():
        return iter(cache_admin.verify(path))
    if (path / runfolder.STATE).exists():
        return iter(verify_runs.checkpoint_folder(path))
    if (path / runfolder.CONFIG).exists() or (path / runfolder.EVENTS).exists():
        return iter(verify_runs.run(path, progress))
    written = [path] if path.suffix == ".md" else sorted(path.glob("*.md"))
    pages = [p for p in written if p.with_suffix(".json").exists() or evidence.backed(p)]
    if pages or path.suffix == ".md":
        return study_pages(pages or written)
    raise UserError(
        f"{path} is no folder of irkd shards ({format.MANIFEST} in it), no run folder ({runfolder.CONFIG}), no "
        f"checkpoint ({runfolder.STATE}), cache or export, and has no page of a study (.md and .json) or of summaries"
    )


def study_pages(pages: list[Path]) -> Iterator[str]:
    """The figures of pages that are not those of the runs (a study's page) or the summaries beside them."""
    for page in pages:
        of_study = page.with_suffix(".json").exists() or not evidence.backed(page)
        try:
            yield from study_page.differences(page) if of_study else evidence.problems(page)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
            yield f"{page} cannot be compared with {page.with_suffix('.json').name}: {type(error).__name__}: {error}"


def shards(folder: Path | Url, progress: Progress) -> Iterator[str]:
    """The problems of a folder of shards: schema, checksums, index against tar, keys, labels, every image and mask.

    Behind a URL each shard is downloaded, looked at and forgotten: the cache has no say in it.
    """
    try:
        manifest = format.load_manifest(folder)
    except UserError as error:
        yield str(error)
        return
    everything = [
        (resolution, (split, number), shard)
        for split in manifest.splits
        for resolution in manifest.resolutions
        for number, shard in enumerate(manifest.shards[f"r{resolution}"][split])
    ]
    first: dict[tuple[str, int], str] = {}  # of each shard: digest of keys and labels at the first resolution
    for done, (resolution, which, shard) in enumerate(everything):
        progress(done, len(everything))
        place, listed = folder / f"r{resolution}" / shard.name, None
        try:
            with _at_hand(place, shard) as path:
                if found := format.damage(path, shard):
                    yield f"{place} {found}"
                    continue
                listed = format.scan(path, manifest.encoding)
                problems = _one_shard(path, shard, listed, manifest, resolution)
                yield from (f"{place} {problem}" for problem in problems)
        except (ValueError, OSError) as error:
            yield f"{place} is not a shard of this manifest: {error}"
            continue
        except Passing:
            raise
        except UserError as error:  # of a server
            yield str(error)
            continue
        content = "\n".join(listed.keys).encode(errors="replace") + listed.labels.tobytes()
        digest = hashlib.sha256(content).hexdigest()
        if first.setdefault(which, digest) != digest:
            yield f"{place} has other keys or labels than at {manifest.resolutions[0]} px"
    progress(len(everything), len(everything))


@contextlib.contextmanager
def _at_hand(place: Path | Url, shard: format.Shard) -> Iterator[Path]:
    """A shard and its index as files: those that are here, or copies that go again."""
    if isinstance(place, Path):
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="irkd-verify-") as scratch:
        path = Path(scratch, place.name)
        remote.download(place, path, shard.bytes)
        if shard.index is not None:
            name = index.file_name(place.name)
            (path.parent / name).write_bytes(remote.read(place.parent / name))
        yield path


def _one_shard(
    path: Path, shard: format.Shard, listed: Index, manifest: format.Manifest, resolution: int
) -> Iterator[str]:
    """The problems inside a shard whose checksum is right; `listed` is the index that its tar gives."""
    if len(listed) != shard.samples:
        yield f"has {len(listed)} samples, the manifest says {shard.samples}"
    try:
        written = format.written_index(path, shard)
        if shard.index is not None and (written is None or not _same(written, listed)):
            yield "has an index that is not its tar's"
    except (ValueError, OSError) as error:
        yield f"has an index that cannot be read: {error}"
    for i in np.flatnonzero(listed.labels >= len(manifest.classes))[:_MOST_NAMED]:
        yield f"sample {listed.keys[i]}: label {listed.labels[i]}, the manifest has {len(manifest.classes)} classes"
    opened = format.Split([path], [listed])
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda i: _unreadable(opened, i, manifest, resolution), range(len(listed)))
        problems = [problem for problem in found if problem]
    opened.close()
    yield from problems[:_MOST_NAMED]
    if len(problems) > _MOST_NAMED:
        yield f"and {len(problems) - _MOST_NAMED} more samples of it cannot be read"


def _same(one: Index, other: Index) -> bool:
    return one.keys == other.keys and all(
        np.array_equal(getattr(one, column), getattr(other, column)) for column in ("labels", "image", "mask")
    )


def _unreadable(opened: format.Split, i: int, manifest: format.Manifest, resolution: int) -> str | None:
    """What is wrong with the image or the mask of sample i."""
    mask = opened.mask(i)
    if mask is None and manifest.masks:
        return f"sample {opened.keys[i]}: it has no mask, the manifest says that all have one"
    stored: list[tuple[str, bytes, format.Encoding]] = [("image", opened.image(i), manifest.encoding)]
    for what, data, encoding in stored if mask is None else [*stored, ("mask", mask, "png")]:
        try:
            shape = tuple(format.decode(data, encoding).shape)
        except ValueError as error:
            return f"sample {opened.keys[i]}: {what}: {error}"
        if shape != (3, resolution, resolution):
            return f"sample {opened.keys[i]}: {what}: its shape is {shape}, not {(3, resolution, resolution)}"
    return None
