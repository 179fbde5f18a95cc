"""The folder of a teacher cache: which records it has, for which key, and whom they have served.

    <folder>/cache.json                             {"format": 1}
    <folder>/<key>/key.json                         what decides the records' content; <key> is its digest
    <folder>/<key>/used-by/<digest>.json            a run that it served, and when
    <folder>/<key>/draw-00000003/<time>-<unique>.shard

Nobody locks: each process writes files of its own, readers take the union, and of a sample the newest.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from irkd_dist.distill.cache_shards import FORMAT, SUFFIX, WRITING, Damaged, Layout, Shard, open_shard
from irkd_dist.errors import UserError

CACHE, KEY, USED_BY = "cache.json", "key.json", "used-by"


def digest(values: dict[str, Any]) -> str:
    """16 hexadecimal digits of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class _Draw:
    """What is known of a draw: where each sample's record is, and which ones this process has put."""

    places: np.ndarray  # shard << 32 | row of each sample; -1: none
    mine: np.ndarray
    shards: list[Shard] = field(default_factory=list)
    seen: set[Path] = field(default_factory=set)


class Store:
    """The records of one key: what is there, by draw and sample, as far as it has been looked at.

    Threads may read while others look or claim. damage: what was found wrong since it was last taken. again: draws
    come again, so they are remembered, and held in memory where there is room.

    Raises UserError: the key that is written in the folder is another one (a foreign cache).
    """

    def __init__(self, folder: Path, values: dict[str, Any], samples: int, again: bool) -> None:
        self.folder, self.key = folder, digest(values)
        self.layout: Layout | None = None  # known from the first record, read or put
        self.damage: list[str] = []
        self._samples, self._again = samples, again
        self._lock = threading.RLock()
        self._draws: dict[int, _Draw] = {}
        check_key(folder, self.key, values)

    def forget_all_but(self, draw: int) -> None:
        """Let what is known of draws go that do not come again."""
        if not self._again:
            self._draws = {k: v for k, v in self._draws.items() if k == draw}

    def look(self, draw: int) -> None:
        """Take in what has been written for a draw since the last look."""
        with self._lock:
            known = self._draw(draw)
            for path in shards_of(self.folder / self.key, draw):
                if path in known.seen:
                    continue
                known.seen.add(path)
                try:
                    shard = open_shard(path)
                    if self.layout not in (None, shard.layout) or shard.ids.max(initial=-1) >= self._samples:
                        raise Damaged(f"{path} is not like the others: {shard.layout}")
                except Damaged as error:
                    self.damage.append(str(error))
                    continue
                self.layout = shard.layout
                known.shards.append(shard)
                known.places[shard.ids] = (len(known.shards) - 1 << 32) + np.arange(len(shard.ids))

    def has(self, draw: int, ids: np.ndarray) -> np.ndarray:
        """Which samples are on disk, as far as is known."""
        return self._draw(draw).places[ids] >= 0

    def claim(self, draw: int, ids: np.ndarray) -> np.ndarray:
        """Which samples are neither there nor this process's to write; from now on they are. A sample counts once."""
        mine, first = self._draw(draw).mine, np.zeros(len(ids), bool)
        first[np.unique(ids, return_index=True)[1]] = True
        free = first & ~(self.has(draw, ids) | mine[ids])
        mine[ids[free]] = True
        return free

    def read(self, draw: int, ids: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Which samples were found sound, and the parts of those that were, each (found, length) in order."""
        known, found = self._draw(draw), np.zeros(len(ids), bool)
        if self.layout is None:
            return found, []
        places = known.places[ids]
        rows = np.zeros((len(ids), self.layout.words), np.uint64)
        for number in np.unique(places[places >= 0] >> 32).tolist():
            shard = known.shards[number]
            if self._again:
                with self._lock:
                    shard.keep()
            own = np.flatnonzero((places >= 0) & (places >> 32 == number))
            own = own[np.argsort(places[own], kind="stable")]
            rows[own], sound = shard.read(places[own] & 0xFFFFFFFF)
            found[own] = sound
            if not sound.all():
                self._damaged(known, shard, ids[own[~sound]])
        return found, self.layout.decode(rows[found])

    def _draw(self, draw: int) -> _Draw:
        with self._lock:
            if draw not in self._draws:
                self._draws[draw] = _Draw(np.full(self._samples, -1, np.int64), np.zeros(self._samples, bool))
            return self._draws[draw]

    def _damaged(self, known: _Draw, shard: Shard, ids: np.ndarray) -> None:
        with self._lock:
            if (known.places[ids] >= 0).any():
                shown = ", ".join(map(str, ids[:3])) + (", ..." if len(ids) > 3 else "")
                self.damage.append(
                    f"{shard.path}: {len(ids)} records do not match their sums (samples {shown})"
                )
            known.places[ids] = -1
            known.mine[ids] = False


def check_key(folder: Path, key: str, values: dict[str, Any]) -> None:
    """Make sure that a cache and a key's folder in it are what they should be; made if they are not there.

    Raises:
        UserError: it is another format's, or no cache, or the folder holds another key.
    """
    check_cache(folder)
    file = folder / key / KEY
    if not file.is_file():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            _write_json(file, values)
        except OSError:
            return  # read only, or full: writing says so when it is tried
    known = read_json(file)
    if not isinstance(known, dict):
        raise UserError(f"{file} cannot be read: remove {file.parent}, and what it held is computed again")
    wrong = [
        f"{k}: {known.get(k)!r}, not {values.get(k)!r}"
        for k in sorted({*known, *values})
        if known.get(k) != values.get(k)
    ]
    if wrong:
        raise UserError(
            f"{file.parent} is not what its name says: its {KEY} has {'; '.join(wrong[:3])}. It was renamed or "
            "altered; remove it, or give teacher.cache.folder another folder"
        )


def near(folder: Path, values: dict[str, Any], machine: tuple[str, ...]) -> list[str]:
    """What to say of keys that are these values' but for the last bits, where nothing is kept for the values yet."""
    if shards_of(folder / digest(values)):
        return []
    told = []
    for file in sorted(folder.glob(f"*/{KEY}")):
        known = read_json(file)
        if not isinstance(known, dict) or known.keys() != values.keys() or not shards_of(file.parent):
            continue
        differs = [k for k in known if known[k] != values[k]]
        if differs and {*differs} <= {*machine}:
            what = ", ".join(f"{k}={known[k]!r} instead of {values[k]!r}" for k in differs)
            told.append(
                f"answers are kept that were computed with {what}; they differ in their last bits, so not used"
            )
    return told


def check_cache(folder: Path, create: bool = True) -> None:
    """Make sure that a folder is a cache of this format, or may become one.

    Raises:
        UserError: it is another format's, or something else's, or not there though it is not to be created.
    """
    file = folder / CACHE
    if file.is_file():
        known = read_json(file)
        version = known.get("format") if isinstance(known, dict) else None
        if version != FORMAT:
            raise UserError(
                f"{folder} is a teacher cache of format {version}, this release reads and writes format {FORMAT}: give "
                "teacher.cache.folder another folder"
            )
        return
    if not create or (folder.exists() and not _may_become_one(folder)):
        if file.is_file():  # another process has just made it
            return check_cache(folder)
        advice = (
            "name an empty or a new folder" if create else "irkd teach, or training with mode=auto, makes one"
        )
        raise UserError(f"{folder} is no teacher cache: it has no {CACHE}; {advice}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(file, {"format": FORMAT})
    except OSError as error:
        raise UserError(f"teacher.cache.folder={folder} cannot be made: {error.strerror or error}") from error


def _may_become_one(folder: Path) -> bool:
    return folder.is_dir() and all(f.name.startswith(WRITING) for f in folder.iterdir())


def shards_of(key: Path, draw: int | None = None) -> list[Path]:
    """The shards of a key's folder, of one draw or all, the oldest first in each draw."""
    name = "draw-*" if draw is None else f"draw-{draw:08d}"
    return [path for folder in sorted(key.glob(name)) for path in sorted(folder.glob(f"[0-9]*{SUFFIX}"))]


def note_use(folder: Path, key: str, run: str) -> None:
    """Write down that a run uses a key, now; where nothing can be written, nothing is."""
    try:
        place = folder / key / USED_BY
        place.mkdir(exist_ok=True)
        _write_json(place / f"{digest({'run': run})}.json", {"run": run, "time": round(time.time(), 1)})
    except OSError:
        return


def read_json(file: Path) -> Any:
    """Its content; None if it is not there, or not JSON."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def uses(key: Path) -> list[dict[str, Any]]:
    """The runs that a key served, the latest last: `run` and `time`."""
    found = [read_json(file) for file in (key / USED_BY).glob("*.json")]
    return sorted(
        (u for u in found if isinstance(u, dict) and {"run", "time"} <= {*u}), key=lambda u: u["time"]
    )


def _write_json(file: Path, values: dict[str, Any]) -> None:
    temporary = file.with_name(f"{WRITING}{uuid.uuid4().hex[:12]}")
    temporary.write_text(json.dumps(values, indent=1) + "\n")
    temporary.replace(file)
