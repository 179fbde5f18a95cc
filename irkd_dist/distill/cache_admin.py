"""What a teacher's cache holds: listed, checked, and made smaller. Runs may use it meanwhile."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from irkd_dist.distill import cache_files, cache_shards
from irkd_dist.distill.cache_shards import Damaged

LEFT_OVER_S = 3600.0  # a file that is being written is younger


@dataclass(frozen=True)
class Entry:
    """One key of a cache."""

    folder: Path
    values: dict[str, Any]  # empty if they cannot be read
    draws: dict[int, int]  # samples by draw; one that two runs have written counts once
    bytes: int
    used: float  # seconds since 1970
    runs: list[str]
    damage: list[str]


def entries(folder: Path) -> list[Entry]:
    """Each key of a cache, the latest used first. Raises UserError for a folder that is none of this format."""
    cache_files.check_cache(folder, create=False)
    found = [_entry(f) for f in sorted(folder.iterdir()) if f.is_dir()]
    return sorted(found, key=lambda e: -e.used)


def describe(folder: Path) -> Iterator[str]:
    """Lines: what each key holds, of which teacher and view, for whom; then the whole."""
    known = entries(folder)
    for entry in known:
        values = entry.values
        draws, samples = sorted(entry.draws), sum(entry.draws.values())
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        shown = f"{draws[0]} to {draws[-1]}" if len(draws) > 1 else str(*draws) if draws else "none"
        yield (
            f"{entry.folder.name}  {values.get('answer', 'unknown')}  draws {shown} ({len(draws)})  {samples} samples  "
            f"{entry.bytes / 2**20:.1f} MiB  last used {when}"
        )
        if values:
            model, augment = values.get("model", {}), values.get("view.augment")
            changed = ", ".join(
                f"{k} {v}" for k, v in (augment or {}).items() if v not in (0, 0.0, None, False)
            )
            full = f", teacher at {values['view.full']} px" if values.get("view.full") else ""
            taps = f"; {values['method']} at {values['tap']}" if "method" in values else ""
            yield f"  teacher {model.get('name')} {str(values.get('weights'))[:8]}, {values.get('precision')}{taps}"
            yield (
                f"  data {values.get('data')} at {values.get('view.resolution')} px{full}, seed "
                f"{values.get('view.seed')}; {changed or 'no augmentation'}; {values.get('storage')}"
            )
        for run in entry.runs:
            yield f"  serves {run}"
        for text in entry.damage:
            yield f"  {text}"
    yield f"{folder}: {len(known)} keys, {sum(e.bytes for e in known) / 2**20:.1f} MiB"


def verify(folder: Path) -> list[str]:
    """Read every record; a line for each file or key that is not as it was written."""
    bad = []
    for entry in entries(folder):
        if cache_files.digest(entry.values) != entry.folder.name:
            bad.append(f"{entry.folder / cache_files.KEY} is not what the folder's name says")
        for path in cache_files.shards_of(entry.folder):
            try:
                shard = cache_shards.open_shard(path)
            except Damaged as error:
                bad.append(str(error))
                continue
            step = max(2**24 // (8 * shard.layout.words), 1)
            pieces = np.array_split(np.arange(len(shard.ids)), max(len(shard.ids) // step, 1))
            wrong = sum(int((~shard.read(rows)[1]).sum()) for rows in pieces if len(rows))
            if wrong:
                bad.append(f"{path}: {wrong} of {len(shard.ids)} records do not match their sums")
    return bad


def prune(folder: Path, older_than_days: float | None, keep_gib: float | None) -> Iterator[str]:
    """Remove what killed processes left behind; keys that were last used so long ago; and the longest unused ones.

    A run that uses a removed key computes what it no longer finds. Yields a line for all that is removed.
    """
    known, now = entries(folder), time.time()
    for file in folder.rglob(f"{cache_shards.WRITING}*"):
        with contextlib.suppress(FileNotFoundError):  # it is whole by now
            if now - file.stat().st_mtime > LEFT_OVER_S:
                file.unlink()
                yield f"removed {file}: left by a process that was killed"
    total = sum(e.bytes for e in known)
    for entry in reversed(known):
        old = older_than_days is not None and now - entry.used > 86400 * older_than_days
        if old or (keep_gib is not None and total > keep_gib * 2**30):
            shutil.rmtree(entry.folder, ignore_errors=True)
            total -= entry.bytes
            yield f"removed {entry.folder.name}: {entry.bytes / 2**20:.1f} MiB, {len(entry.draws)} draws"


def _entry(folder: Path) -> Entry:
    values = cache_files.read_json(folder / cache_files.KEY)
    draws: dict[int, set[int]] = {}
    damage = []
    for path in cache_files.shards_of(folder):
        try:
            shard = cache_shards.open_shard(path)
        except Damaged as error:
            damage.append(str(error))
            continue
        draws.setdefault(shard.draw, set()).update(shard.ids.tolist())
    uses = cache_files.uses(folder)
    used = max([u["time"] for u in uses], default=folder.stat().st_mtime)
    counts = {draw: len(ids) for draw, ids in draws.items()}
    size, runs = cache_shards.size_of(folder), [u["run"] for u in uses]
    return Entry(folder, values if isinstance(values, dict) else {}, counts, size, used, runs, damage)
