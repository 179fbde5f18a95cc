"""The shard format, nothing else: manifest, tar index, checksums, decoding.

A folder of shards holds `manifest.json`, `preview.png` and, for each resolution, plain WebDataset tars:
`r12/train-000000.tar` with `000000000.png`, `000000000.cls` (and `000000000.mask.png` where the source
knows the true object). Keys and their order are the same at every resolution.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, get_args

import numpy as np

from irkd_dist import runfolder
from irkd_dist.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to import and only decode() needs it
    import torch

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PARTS = ".parts"  # records of an unfinished (or repairable) render, see render.py

Encoding = Literal["png", "npy", "webp", "jpg"]
Mode = Literal["resize", "crop"]

_BLOCK = 512  # tar's unit: headers are one block, data is padded to whole blocks


@dataclass(frozen=True)
class Shard:
    """One tar file: `name` is inside the folder of its resolution; sha256 is of the whole file."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds.

    mean and std are per pixel on a 0..1 scale, measured on the train split at the largest resolution.
    mode "crop" means that only the full-size image is stored. resolutions ascend. `shards["r12"]["train"]`
    lists the files of a resolution and split in order; a split without samples is absent.
    """

    version: int
    dataset: str
    source: str
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    mode: Mode
    encoding: Encoding
    masks: bool
    val_fraction: float
    seed: int
    resolutions: tuple[int, ...]
    splits: dict[str, int]
    shards: dict[str, dict[str, tuple[Shard, ...]]]
    render: dict[str, Any]


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` whole (written, fsynced, renamed) or not at all.

    Raises UserError when it cannot be written, naming the free space; the temporary file is removed.
    """
    try:
        with runfolder.whole(path, path.with_name(path.name + ".tmp")) as file:
            yield file
    except OSError as error:
        reason = f"{error.strerror or error}{_free_space(path.parent)}"
        raise UserError(f"cannot write {path}: {reason}") from error


def _free_space(folder: Path) -> str:
    try:
        return f"; {shutil.disk_usage(folder).free / 2**20:,.1f} MiB free there"
    except OSError:
        return ""


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `folder/manifest.json` atomically; the same manifest always gives the same bytes."""
    with atomic(folder / MANIFEST) as file:
        file.write((json.dumps(asdict(manifest), indent=1) + "\n").encode())


def load_manifest(folder: Path) -> Manifest:
    """Read and check `folder/manifest.json`.

    Raises UserError: no such folder, no manifest (render unfinished or never run), not JSON, a manifest of
    another version, keys missing or of a wrong type, counts that do not add up.
    """
    path = Path(folder) / MANIFEST
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(_no_manifest(Path(folder))) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); {_repair(Path(folder))}") from error
    if not isinstance(raw, dict) or "version" not in raw:
        raise UserError(f"{path} is no manifest of irkd shards: it has no version; {_repair(Path(folder))}")
    if raw["version"] != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {raw['version']!r}, this irkd reads version {FORMAT_VERSION}; "
            "render again with this irkd (--overwrite) or use the irkd that wrote it"
        )
    try:
        manifest = _manifest(raw)
        _check_counts(manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path} is incomplete: {what}; {_repair(Path(folder))}") from error
    return manifest


def _no_manifest(folder: Path) -> str:
    if not folder.is_dir():
        command = f"irkd render SOURCE --path P --out {folder} --resolutions 12,16"
        return f"no folder of shards at {folder}; make one: {command}"
    if (folder / PARTS).is_dir():
        return f"{folder} has no {MANIFEST}: its rendering is unfinished; {_repair(folder)}"
    return f"{folder} has no {MANIFEST}, so it is no folder of irkd shards; name the --out of irkd render"


def _repair(folder: Path) -> str:
    return (
        f"render again: the same `irkd render ... --out {folder}` command "
        "replaces what is missing or damaged and keeps the rest"
    )


def _manifest(raw: dict[str, Any]) -> Manifest:
    if raw["encoding"] not in get_args(Encoding) or raw["mode"] not in get_args(Mode):
        raise ValueError(f"unknown encoding {raw['encoding']!r} or mode {raw['mode']!r}")
    shards = {
        resolution: {split: tuple(_shard(record) for record in files) for split, files in splits.items()}
        for resolution, splits in raw["shards"].items()
    }
    return Manifest(
        version=raw["version"],
        dataset=str(raw["dataset"]),
        source=str(raw["source"]),
        classes=tuple(str(name) for name in raw["classes"]),
        mean=_triple(raw["mean"]),
        std=_triple(raw["std"]),
        mode=raw["mode"],
        encoding=raw["encoding"],
        masks=bool(raw["masks"]),
        val_fraction=float(raw["val_fraction"]),
        seed=int(raw["seed"]),
        resolutions=tuple(int(r) for r in raw["resolutions"]),
        splits={str(split): int(n) for split, n in raw["splits"].items()},
        shards=shards,
        render=dict(raw["render"]),
    )


def _shard(record: dict[str, Any]) -> Shard:
    return Shard(str(record["name"]), int(record["samples"]), int(record["bytes"]), str(record["sha256"]))


def _triple(values: list[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _check_counts(manifest: Manifest) -> None:
    if not manifest.resolutions or list(manifest.resolutions) != sorted(set(manifest.resolutions)):
        raise ValueError(f"resolutions {list(manifest.resolutions)} are not ascending")
    for resolution in manifest.resolutions:
        for split, expected in manifest.splits.items():
            found = sum(shard.samples for shard in manifest.shards[f"r{resolution}"][split])
            if found != expected:
                raise ValueError(f"r{resolution}/{split} lists {found} samples, splits say {expected}")


class Split:
    """The samples of one split at one resolution, read by index; thread-safe.

    keys: N strings; labels: (N,) int64. Reads are positioned reads on open files, so that a file cut short
    while in use is an error and not a bus error.
    """

    def __init__(self, files: list[Path], index: list[_Entry]) -> None:
        self.keys = [entry.key for entry in index]
        self.labels = np.array([entry.label for entry in index], dtype=np.int64)
        self._paths = files
        self._shard = np.array([entry.shard for entry in index], dtype=np.int64)
        self._image = np.array([entry.image for entry in index], dtype=np.int64).reshape(-1, 2)
        self._mask = np.array([entry.mask for entry in index], dtype=np.int64).reshape(-1, 2)
        self._descriptors: list[int] = []
        _allow_open_files(len(files))
        try:
            for path in files:
                self._descriptors.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            self.close()
            raise UserError(f"cannot open {error.filename}: {error.strerror}") from error

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, i: int) -> bytes:
        """The encoded image of sample i."""
        return self._read(int(self._shard[i]), self._image[i])

    def mask(self, i: int) -> bytes | None:
        """The object mask of sample i as PNG bytes (8-bit, 0 or 255), None where the source has none."""
        if self._mask[i, 1] < 0:
            return None
        return self._read(int(self._shard[i]), self._mask[i])

    def _read(self, shard: int, place: np.ndarray) -> bytes:
        offset, size = int(place[0]), int(place[1])
        data = os.pread(self._descriptors[shard], size, offset)
        if len(data) != size:
            path = self._paths[shard]
            raise UserError(f"{path} was cut short while in use; {_repair(path.parents[1])}")
        return data

    def close(self) -> None:
        """Close the files; reading afterwards is an error."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []


def _allow_open_files(count: int) -> None:
    # The usual soft limit of 1024 open files is below the shard count of a large data set.
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if count + 256 > soft:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def open_split(
    folder: Path,
    manifest: Manifest,
    split: str,
    resolution: int,
    verify: Literal["checksum", "size"] = "checksum",
) -> Split:
    """Open the shards of one split at one resolution.

    verify "checksum" reads every file once and compares its sha256, "size" compares the size only.
    Raises UserError: split or resolution not in the manifest; a shard missing, truncated, altered, or with
    other samples than the manifest says.
    """
    folder = Path(folder)
    if split not in manifest.splits:
        raise UserError(f"{folder} has no split {split!r}; it has {', '.join(manifest.splits)}")
    if resolution not in manifest.resolutions:
        have = ", ".join(map(str, manifest.resolutions))
        raise UserError(
            f"{folder} has no resolution {resolution}, only {have}; render it too: irkd render --resolutions"
        )
    files, index = [], []
    for number, shard in enumerate(manifest.shards[f"r{resolution}"][split]):
        path = folder / f"r{resolution}" / shard.name
        problem = damage(path, shard, verify)
        if problem:
            raise UserError(f"{path} {problem}; {_repair(folder)}")
        try:
            entries = _scan(path, number, manifest.encoding)
        except (ValueError, OSError) as error:
            raise UserError(f"{path} is not a shard of this manifest: {error}; {_repair(folder)}") from error
        if len(entries) != shard.samples:
            counts = f"{len(entries)} samples, the manifest says {shard.samples}"
            raise UserError(f"{path} has {counts}; {_repair(folder)}")
        files.append(path)
        index += entries
    return Split(files, index)


def damage(path: Path, shard: Shard, verify: Literal["checksum", "size"] = "checksum") -> str | None:
    """What is wrong with a shard's file ("is missing", "is truncated: ...", ...); None when it is whole."""
    try:
        size = path.stat().st_size
        if size != shard.bytes:
            word = "truncated" if size < shard.bytes else "altered"
            return f"is {word}: {size:,} bytes, the manifest says {shard.bytes:,}"
        if verify == "checksum" and _sha256(path) != shard.sha256:
            return "is altered: its sha256 is not the manifest's"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass
class _Entry:
    """Where a sample lies: (offset, size) of its members in the file, size -1 when there is none."""

    key: str
    shard: int
    label: int = -1
    image: tuple[int, int] = (0, -1)
    mask: tuple[int, int] = (0, -1)


def _scan(path: Path, shard: int, encoding: str) -> list[_Entry]:
    """The samples of one tar in file order. Raises ValueError for anything our writer does not write."""
    entries: list[_Entry] = []
    for name, offset, size, head in _members(path):
        key, _, kind = name.partition(".")
        if not entries or entries[-1].key != key:
            entries.append(_Entry(key, shard))
        if kind == "cls":
            entries[-1].label = int(head[:size])
        elif kind == encoding:
            entries[-1].image = (offset, size)
        elif kind == "mask.png":
            entries[-1].mask = (offset, size)
        else:
            raise ValueError(f"unexpected member {name!r}")
    for entry in entries:
        if entry.label < 0 or entry.image[1] < 0:
            raise ValueError(f"sample {entry.key} has no {'label' if entry.label < 0 else encoding}")
    return entries


def _members(path: Path) -> Iterator[tuple[str, int, int, bytes]]:
    """(name, data offset, size, first data bytes) of each file in a tar, header by header.

    Python's tarfile needs 10 times as long for it, which at 60,000 samples a user would wait for.
    """
    with open(path, "rb", buffering=0) as file:
        descriptor, end = file.fileno(), os.fstat(file.fileno()).st_size
        position, pax = 0, {}
        while position + _BLOCK <= end:
            block = os.pread(descriptor, 2 * _BLOCK, position)  # one read for a label and its header
            header = block[:_BLOCK]
            if not header.strip(b"\0"):
                return
            name, size, kind = _parse_header(header, position)
            offset = position + _BLOCK
            if offset + size > end:
                raise ValueError(f"member {name!r} reaches beyond the end of the file")
            if kind == "x":
                pax = _pax(os.pread(descriptor, size, offset))
            elif kind in "0\0":
                size = int(pax.get("size", size))
                yield pax.get("path", name), offset, size, block[_BLOCK:]
                pax = {}
            elif kind != "g":
                raise ValueError(f"member {name!r} is no plain file")
            position = offset + -(-size // _BLOCK) * _BLOCK
        raise ValueError("the end marker is missing")


def _parse_header(header: bytes, position: int) -> tuple[str, int, str]:
    """(name, size, type) of a ustar header. Raises ValueError when it is not one."""
    if header[257:262] != b"ustar" or _octal(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * 32:
        raise ValueError(f"no valid tar header at byte {position:,}")
    name = header[:100].split(b"\0", 1)[0].decode()
    prefix = header[345:500].split(b"\0", 1)[0].decode() if header[345] else ""
    return f"{prefix}/{name}" if prefix else name, _octal(header[124:136]), chr(header[156])


def _octal(field: bytes) -> int:
    if field[0] & 0x80:  # GNU's binary form for sizes beyond 8 GiB
        return int.from_bytes(field[1:], "big")
    return int(field.rstrip(b" \0") or b"0", 8)


def _pax(data: bytes) -> dict[str, str]:
    records, position = {}, 0
    while position < len(data):
        length = int(data[position : data.index(b" ", position)])
        key, _, value = data[position : position + length - 1].partition(b" ")[2].partition(b"=")
        records[key.decode()] = value.decode()
        position += length
    return records


def decode(data: bytes, encoding: Encoding) -> torch.Tensor:
    """Decode one stored image to a uint8 tensor (3, H, W), RGB. Raises ValueError when it cannot be."""
    import torch
    from torchvision.io import ImageReadMode, decode_image

    if encoding == "npy":
        return _decode_npy(data)
    try:
        # bytearray: a tensor over read-only bytes makes torch warn
        return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"not a readable {encoding} image of {len(data)} bytes: {error}") from error


def _decode_npy(data: bytes) -> torch.Tensor:
    import torch

    start = 10 + int.from_bytes(data[8:10], "little")
    height, width = _npy_shape(data[:start])
    if len(data) - start != height * width * 3:
        raise ValueError(f"npy image of {height}x{width} px has {len(data) - start} bytes of pixels")
    pixels = torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=start)
    return pixels.view(height, width, 3).permute(2, 0, 1).contiguous()


@functools.lru_cache(maxsize=64)  # one header a resolution: parsing it takes longer than copying the pixels
def _npy_shape(head: bytes) -> tuple[int, int]:
    try:
        if head[:8] != b"\x93NUMPY\x01\x00":
            raise ValueError("no npy header of version 1.0")
        header = ast.literal_eval(head[10:].decode("latin1"))
        height, width, channels = header["shape"]
        if header["descr"] != "|u1" or header["fortran_order"] or channels != 3:
            raise ValueError(f"{header['descr']} {header['shape']}")
    except (ValueError, SyntaxError, KeyError, TypeError) as error:
        raise ValueError(f"not an npy image (H, W, 3) of uint8: {error}") from error
    return height, width


def encode_npy(pixels: np.ndarray) -> bytes:
    """An image (H, W, 3) uint8 as .npy bytes, the form that decode() reads."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(pixels), version=(1, 0))
    return stream.getvalue()
