"""Shards of a teacher cache: records of one size, each file written once by one process.

Magic, length of the header, CRC-32 of header, ids and sums; the header, JSON; ids int64 (n,); sums uint64 (n,); records
uint64 (n, w). A file appears under its name when it is whole. A record is checked against its sum when it is read, so
that damage costs its own samples and no others.
"""

from __future__ import annotations

import json
import os
import struct
import time
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from irkd_dist import faults
from irkd_dist.data import memory

FORMAT = 1
MAGIC, SUFFIX, WRITING = b"irkdtc1\n", ".shard", ".unfinished-"
_PREFIX = struct.Struct("<8sII")  # magic, length of the header, CRC-32 of header, ids and sums
TABLE = 1024  # bytes of a shard besides its samples, at most
_GAP = 2**14  # bytes between two records that are read along with them rather than read apart
_MULTIPLIERS = np.random.default_rng(12).integers(0, 2**63, 2**16, dtype=np.uint64) | np.uint64(1)


class Damaged(Exception):
    """A shard that cannot be used: its name and why."""


class Full(Exception):
    """The cache has reached its limit."""


# ---- records


@dataclass(frozen=True)
class Layout:
    """How a record holds its parts, float32 vectors of `lengths`: as they are, as fp16, or as bytes with a scale.

    exact: all bits. half: fp16. bytes: 0..255 between the vector's least and largest value, which are float32.
    """

    lengths: tuple[int, ...]
    form: str  # exact, half or bytes

    @property
    def words(self) -> int:
        """Of 8 bytes, in a record."""
        size = {"exact": 4, "half": 2, "bytes": 1}[self.form]
        scales = 8 * len(self.lengths) if self.form == "bytes" else 0
        return -(-(scales + size * sum(self.lengths)) // 8)

    def encode(self, parts: list[np.ndarray]) -> np.ndarray:
        """Parts, each float32 (n, length), as records uint64 (n, words)."""
        if self.form == "exact":
            columns = [np.ascontiguousarray(p, np.float32).view(np.uint8) for p in parts]
        elif self.form == "half":
            largest = np.finfo(np.float16).max
            columns = [np.clip(p, -largest, largest).astype(np.float16).view(np.uint8) for p in parts]
        else:
            columns = [c for part in parts for c in _to_bytes(part)]
        rows = np.zeros((len(parts[0]), 8 * self.words), np.uint8)
        packed = np.concatenate(columns, axis=1)
        rows[:, : packed.shape[1]] = packed
        return rows.view(np.uint64)

    def decode(self, rows: np.ndarray) -> list[np.ndarray]:
        """What `encode` was given, as far as the form keeps it."""
        packed = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), 8 * self.words)
        kind = {"exact": np.float32, "half": np.float16, "bytes": np.uint8}[self.form]
        parts, at = [], 0
        for length in self.lengths:
            if self.form == "bytes":
                scale = np.ascontiguousarray(packed[:, at : at + 8]).view(np.float32)
                parts.append(
                    scale[:, :1] + packed[:, at + 8 : at + 8 + length].astype(np.float32) * scale[:, 1:]
                )
                at += 8 + length
                continue
            size = length * np.dtype(kind).itemsize
            parts.append(np.ascontiguousarray(packed[:, at : at + size]).view(kind).astype(np.float32))
            at += size
        return parts


def _to_bytes(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    least, largest = part.min(axis=1, keepdims=True), part.max(axis=1, keepdims=True)
    step = ((largest - least) / np.float32(255)).astype(np.float32)
    codes = np.rint((part - least) / np.where(step > 0, step, np.float32(1))).clip(0, 255).astype(np.uint8)
    return np.concatenate([least, step], axis=1).astype(np.float32).view(np.uint8), codes


def sums(ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """A 64-bit sum of each record, with its sample's id: odd multiples, so that no change of one word is missed."""
    factors = np.resize(_MULTIPLIERS, rows.shape[1])
    with np.errstate(over="ignore"):
        return (rows * factors).sum(axis=1, dtype=np.uint64) + (
            ids.astype(np.uint64) + np.uint64(1)
        ) * _MULTIPLIERS[-1]


# ---- shards


@dataclass
class Shard:
    """An open shard's table; its records are read when they are asked for."""

    path: Path
    draw: int
    layout: Layout
    ids: np.ndarray
    sums: np.ndarray
    start: int  # byte at which the records begin
    kept: np.ndarray | None = field(default=None, repr=False)  # all records, once they are in memory

    @property
    def size(self) -> int:
        """Bytes of its records."""
        return 8 * len(self.ids) * self.layout.words

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Records (n, words) of ascending `rows`, and which of them are sound."""
        if self.kept is not None:
            records = self.kept[rows]
        else:
            records = np.zeros((len(rows), self.layout.words), np.uint64)
            width, done = 8 * self.layout.words, 0
            try:
                with self.path.open("rb", buffering=0) as handle:
                    for first, last in _runs(rows, max(_GAP // width, 1)):
                        begin, end = int(rows[first]), int(rows[last - 1]) + 1
                        data = read_at(handle.fileno(), width * (end - begin), self.start + width * begin)
                        block = np.frombuffer(data[: len(data) // width * width], np.uint64).reshape(
                            -1, self.layout.words
                        )
                        there = rows[first:last] - begin
                        there = there[there < len(block)]
                        records[first : first + len(there)] = block[there]
                        done = last
            except OSError:
                records[done:] = 0  # no sum of zeros is right: these are computed again
        return records, sums(self.ids[rows], records) == self.sums[rows]

    def keep(self) -> None:
        """Read all records into memory, if it has room; the rest of the run reads them there."""
        if self.kept is None and self.size < memory.RAM * memory.left():
            self.kept = self.read(np.arange(len(self.ids)))[0]


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Bytes of a file; fewer where it ends before."""
    return os.pread(descriptor, size, offset)


def _runs(rows: np.ndarray, gap: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of stretches of ascending rows with no more than `gap` rows between neighbours."""
    cuts = np.flatnonzero(np.diff(rows) > gap) + 1
    yield from zip([0, *cuts.tolist()], [*cuts.tolist(), len(rows)], strict=True)


def write_shard(
    folder: Path, key: str, draw: int, layout: Layout, ids: np.ndarray, rows: np.ndarray, number: int = 0,
    limit: int | None = None,
) -> Path:  # fmt: skip
    """Write records beside their place and rename them into it; where that fails, nothing is left.

    number: of this process's shards, for faults on purpose; limit: bytes that the whole cache may take.

    Raises:
        OSError: it cannot be written.
        Full: with it, and with what others write at this moment, the cache would be over its limit.
    """
    place = folder / key / f"draw-{draw:08d}"
    name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:12]}{SUFFIX}"
    header = {"format": FORMAT, "key": key, "draw": draw, "count": len(ids)}
    text = json.dumps({**header, "lengths": layout.lengths, "form": layout.form}).encode()
    text += b" " * (-(len(text) + _PREFIX.size) % 8)
    table = text + ids.astype("<i8").tobytes() + sums(ids, rows).astype("<u8").tobytes()
    temporary = place / f"{WRITING}{name}"
    try:
        place.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as handle:
            handle.write(_PREFIX.pack(MAGIC, len(text), zlib.crc32(table)) + table)
            faults.inject("cache", number)
            handle.write(rows.astype("<u8").tobytes())
            handle.flush()
            os.fsync(handle.fileno())
        if limit is not None and size_of(folder) > limit:
            raise Full
        temporary.rename(place / name)
    except (OSError, Full):
        faults.heal()
        temporary.unlink(missing_ok=True)
        raise
    return place / name


def open_shard(path: Path) -> Shard:
    """Read a shard's table.

    Raises:
        Damaged: it is cut short, altered, or of another format or key than its folder.
    """
    try:
        with path.open("rb", buffering=0) as handle:
            magic, length, check = _PREFIX.unpack(read_at(handle.fileno(), _PREFIX.size, 0))
            if magic != MAGIC or length > 2**16:
                raise Damaged(f"{path} is no shard of a teacher cache of format {FORMAT}")
            text = read_at(handle.fileno(), length, _PREFIX.size)
            header = json.loads(text)
            count = int(header["count"])
            table = read_at(handle.fileno(), 16 * count, _PREFIX.size + length)
            size = os.fstat(handle.fileno()).st_size
    except (OSError, ValueError, LookupError, TypeError, struct.error) as error:
        raise Damaged(f"{path} cannot be read: {error}") from error
    if zlib.crc32(text + table) != check:
        raise Damaged(f"{path} is damaged: its table does not match its checksum")
    if header["key"] != path.parent.parent.name or f"draw-{header['draw']:08d}" != path.parent.name:
        raise Damaged(f"{path} belongs elsewhere: its key is {header['key']}, its draw {header['draw']}")
    layout = Layout(tuple(header["lengths"]), header["form"])
    start = _PREFIX.size + length + 16 * count
    if size != start + 8 * count * layout.words:
        raise Damaged(f"{path} is cut short: {size} bytes instead of {start + 8 * count * layout.words}")
    ids, own = np.frombuffer(table, "<i8", count), np.frombuffer(table, "<u8", count, 8 * count)
    return Shard(path, header["draw"], layout, ids, own, start)


def size_of(folder: Path) -> int:
    """Bytes of all files under a folder; what vanishes meanwhile counts nothing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(place, name)).st_size
            except OSError:
                continue
    return total
