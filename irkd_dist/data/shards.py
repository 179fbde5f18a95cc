"""The shard format, nothing else: manifest, checksums, which files make up a split.

A folder of shards holds `manifest.json`, `preview.png` and, for each resolution, plain WebDataset tars:
`r12/train-000000.tar` with `000000000.png`, `000000000.cls` (and `000000000.mask.png` where the source
knows the true object), and beside each its index, see index.py. Keys and their order are the same at every resolution.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from irkd_dist import files, typed
from irkd_dist.data import geometry, images, index, remote, streaming
from irkd_dist.data.geometry import Mode
from irkd_dist.data.images import Fit
from irkd_dist.data.index import Index
from irkd_dist.data.pixels import Encoding, decode
from irkd_dist.data.remote import Url
from irkd_dist.data.samples import Split
from irkd_dist.data.store import Wanted
from irkd_dist.errors import UserError, printable, reason, unreadable

__all__ = ["Encoding", "Manifest", "Mode", "Shard", "Split", "decode", "open_split"]

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PARTS = ".parts"  # records of an unfinished (or repairable) render, see render.py

_MOST = 1 << 53  # of counts in a manifest; beyond it JSON's readers differ


@dataclass(frozen=True)
class Shard:
    """One tar file: `name` is inside the folder of its resolution; sha256 is of the whole file, index of its index's.

    index None: rendered before there were indices; the tar is scanned.
    """

    name: str
    samples: int
    bytes: int
    sha256: str
    index: str | None = None


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

    @property
    def fit(self) -> Fit:
        """How images that are not square were made so (`irkd render --fit`)."""
        return self.render.get("fit", "crop")

    @property
    def crop_pct(self) -> float:
        """Part of an image's side that evaluation sees (`irkd render --crop-pct`): 1, or images are stored larger."""
        return float(self.render.get("crop_pct", 1.0))

    @property
    def largest(self) -> int:
        """The largest side in pixels that images are seen at."""
        top = max(self.resolutions)
        return next(r for r in range(top, 0, -1) if self.scaled(r) <= top)

    def scaled(self, resolution: int) -> int:
        """Side in pixels of the whole image whose central crop evaluation sees at a resolution; timm's rule."""
        return geometry.scaled(resolution, self.crop_pct)

    def stored(self, resolution: int) -> int | None:
        """The stored resolution that a resolution is made of, None if there is none.

        With crop_pct the smallest that is large enough; without one only the resolution itself.
        """
        if self.crop_pct == 1:
            return resolution if resolution in self.resolutions else None
        return next((r for r in sorted(self.resolutions) if r >= self.scaled(resolution)), None)


def data_digest(manifest: Manifest) -> str:
    """16 hexadecimal digits of what the shards hold, whatever folder they are in."""
    files = {
        size: {split: [asdict(s) for s in files] for split, files in splits.items()}
        for size, splits in manifest.shards.items()
    }
    cropped = [manifest.crop_pct] if manifest.crop_pct < 1 else []
    values = [manifest.classes, manifest.splits, manifest.mode, files, *cropped]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `folder/manifest.json` atomically; the same manifest always gives the same bytes."""
    files.write(folder / MANIFEST, json.dumps(asdict(manifest), indent=1) + "\n", mine=True)


def load_manifest(folder: Path | Url) -> Manifest:
    """Read and check `folder/manifest.json`.

    Raises UserError: no such folder, no manifest (render unfinished or never run), not JSON, a manifest of
    another version, keys missing or of a wrong type, counts that do not add up.
    """
    path = folder / MANIFEST
    try:
        raw = typed.parse(files.read(path) if isinstance(path, Path) else _fetched(path))
    except FileNotFoundError:
        raise UserError(_no_manifest(Path(str(folder)))) from None
    except OSError as error:
        raise unreadable(Path(str(path)), error) from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); {_repair(folder)}") from error
    if not isinstance(raw, dict) or "version" not in raw:
        raise UserError(f"{path} is no manifest of irkd shards: it has no version; {_repair(folder)}")
    if raw["version"] != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {raw['version']!r}, this irkd reads version {FORMAT_VERSION}; "
            "render again with this irkd (--overwrite) or use the irkd that wrote it"
        )
    try:
        manifest = _manifest(raw)
        _check_counts(manifest)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path} is incomplete: {what}; {_repair(folder)}") from error
    return manifest


def _no_manifest(folder: Path) -> str:
    if not folder.is_dir():
        command = f"irkd render SOURCE --path P --out {folder} --resolutions 12,16"
        return f"no folder of shards at {folder}; make one: {command}"
    if (folder / PARTS).is_dir():
        return f"{folder} has no {MANIFEST}: its rendering is unfinished; {_repair(folder)}"
    return f"{folder} has no {MANIFEST}, so it is no folder of irkd shards; name the --out of irkd render"


def _fetched(manifest: Url) -> bytes:
    try:
        return remote.read(manifest)
    except UserError as error:
        if "no such file" not in str(error):
            raise
        hint = f"data.shards names the folder that irkd render wrote, with {MANIFEST} in it"
        raise UserError(f"{error}; {hint}") from error


def _repair(folder: Path | Url) -> str:
    if isinstance(folder, Url):
        return "upload again, whole, the folder that irkd render wrote (irkd verify FOLDER checks it)"
    return (
        f"render again: the same `irkd render ... --out {folder}` command "
        "replaces what is missing or damaged and keeps the rest"
    )


def _manifest(raw: dict[str, Any]) -> Manifest:
    if raw["encoding"] not in get_args(Encoding) or raw["mode"] not in get_args(Mode):
        raise ValueError(f"unknown encoding {raw['encoding']!r} or mode {raw['mode']!r}")
    if not isinstance(raw["classes"], list) or not raw["classes"]:
        raise ValueError("classes is no list of names")
    if not all(isinstance(name, str) for name in raw["classes"]):
        raise ValueError(
            f"classes holds what is no name: {next(c for c in raw['classes'] if type(c) is not str)!r}"
        )
    shards = {
        resolution: {split: tuple(_shard(record) for record in listed) for split, listed in splits.items()}
        for resolution, splits in raw["shards"].items()
    }
    _number("render.crop_pct", raw["render"].get("crop_pct", 1.0), geometry.LEAST, 1.0)
    if (fit := raw["render"].get("fit", "crop")) not in images.FITS:
        raise ValueError(f"render.fit is {fit!r}, none of {', '.join(images.FITS)}")
    return Manifest(
        version=raw["version"],
        dataset=printable(str(raw["dataset"])),
        source=printable(str(raw["source"])),
        classes=tuple(printable(name) for name in raw["classes"]),
        mean=_triple(raw, "mean", 0.0, 1.0),
        std=_triple(raw, "std", 1e-9, 1.0),
        mode=raw["mode"],
        encoding=raw["encoding"],
        masks=bool(raw["masks"]),
        val_fraction=_number("val_fraction", raw["val_fraction"], 0.0, 1.0),
        seed=_whole("seed", raw["seed"], -_MOST),
        resolutions=tuple(_whole("resolutions", r, 1, 1 << 16) for r in raw["resolutions"]),
        splits={printable(str(split)): _whole(f"splits.{split}", n) for split, n in raw["splits"].items()},
        shards=shards,
        render=dict(raw["render"]),
    )


def _shard(record: dict[str, Any]) -> Shard:
    name, checksums = str(record["name"]), [str(record["sha256"])]
    if not re.fullmatch(r"[\w.-]+\.tar", name):
        raise ValueError(f"{name!r} is no name of a shard")
    if record.get("index") is not None:
        checksums.append(str(record["index"]))
    if not all(re.fullmatch("[0-9a-f]{64}", checksum) for checksum in checksums):
        raise ValueError(f"shard {name} has a checksum that is none: {max(checksums, key=len)[:80]!r}")
    return Shard(name, _whole("samples", record["samples"]), _whole("bytes", record["bytes"]), *checksums)


def _whole(key: str, value: Any, least: int = 0, most: int = _MOST) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{key} is {str(value)[:40]!r}, not a whole number from {least} to {most}")
    return value


def _number(key: str, value: Any, least: float, most: float) -> float:
    if type(value) not in (int, float) or not least <= value <= most:
        raise ValueError(f"{key} is {str(value)[:40]!r}, not a number from {least} to {most}")
    return float(value)


def _triple(raw: dict[str, Any], key: str, least: float, most: float) -> tuple[float, float, float]:
    red, green, blue = (_number(key, value, least, most) for value in raw[key])
    return red, green, blue


def _check_counts(manifest: Manifest) -> None:
    if not manifest.resolutions or list(manifest.resolutions) != sorted(set(manifest.resolutions)):
        raise ValueError(f"resolutions {list(manifest.resolutions)} are not ascending")
    for resolution in manifest.resolutions:
        for split, expected in manifest.splits.items():
            found = sum(shard.samples for shard in manifest.shards[f"r{resolution}"][split])
            if found != expected:
                raise ValueError(f"r{resolution}/{split} lists {found} samples, splits say {expected}")


def open_split(
    folder: Path | Url,
    manifest: Manifest,
    split: str,
    resolution: int,
    verify: Literal["checksum", "size"] = "checksum",
) -> Split:
    """Open the shards of one split at one resolution.

    verify "checksum" reads every file once and compares its sha256, "size" compares the size only; what comes from a
    URL is compared when it is downloaded.
    Raises UserError: split or resolution not in the manifest; a shard missing, truncated, altered, or with
    other samples than the manifest says.
    """
    if split not in manifest.splits:
        raise UserError(f"{folder} has no split {split!r}; it has {', '.join(manifest.splits)}")
    if resolution not in manifest.resolutions:
        have = ", ".join(map(str, manifest.resolutions))
        raise UserError(
            f"{folder} has no resolution {resolution}, only {have}; render it too: irkd render --resolutions"
        )
    listed = manifest.shards[f"r{resolution}"][split]
    if isinstance(folder, Url):
        return _remote_split(folder / f"r{resolution}", manifest, listed)
    paths, indices = [], []
    for shard in listed:
        path = folder / f"r{resolution}" / shard.name
        problem = damage(path, shard, verify)
        if problem:
            raise UserError(f"{path} {problem}; {_repair(folder)}")
        try:
            part = index_of(path, shard, manifest.encoding)
            _check_index(part, shard, len(manifest.classes))
        except (ValueError, OSError) as error:
            raise UserError(f"{path} is not a shard of this manifest: {error}; {_repair(folder)}") from error
        paths.append(path)
        indices.append(part)
    return Split(paths, indices)


def _remote_split(folder: Url, manifest: Manifest, listed: tuple[Shard, ...]) -> Split:
    wanted = [Wanted(folder / shard.name, shard.sha256, shard.bytes) for shard in listed]
    held = streaming.Remote(wanted)
    try:
        indices = streaming.indices(wanted, [shard.index for shard in listed], manifest.encoding)
        for part, shard in zip(indices, listed, strict=True):
            _check_index(part, shard, len(manifest.classes))
    except ValueError as error:
        raise UserError(
            f"{folder} has shards that are not this manifest's: {error}; {_repair(folder)}"
        ) from error
    return Split(held, indices)


def index_of(path: Path, shard: Shard, encoding: Encoding) -> Index:
    """The index of a shard: read, or scanned where there is none of this very tar. Raises ValueError, OSError."""
    return written_index(path, shard) or scan(path, encoding)


def written_index(path: Path, shard: Shard) -> Index | None:
    """The index that was written beside a shard's tar; None: none, or of another tar. Raises ValueError, OSError."""
    if shard.index is None:
        return None
    return index.decode(files.read(path.with_name(index.file_name(path.name))), shard.bytes, shard.sha256)


def scan(path: Path, encoding: Encoding) -> Index:
    """The index of a shard from its tar alone. Raises ValueError, OSError."""
    with open(path, "rb", buffering=0) as file:
        size = files.regular(path).st_size
        return index.scan(lambda count, offset: os.pread(file.fileno(), count, offset), size, encoding)


def _check_index(part: Index, shard: Shard, classes: int) -> None:
    if len(part) != shard.samples:
        raise ValueError(f"it has {len(part)} samples, the manifest says {shard.samples}")
    wrong = np.flatnonzero((part.labels < 0) | (part.labels >= classes))
    if wrong.size:
        label, key = part.labels[wrong[0]], part.keys[wrong[0]]
        raise ValueError(f"sample {key} has label {label}, the manifest has {classes} classes")


def damage(path: Path, shard: Shard, verify: Literal["checksum", "size"] = "checksum") -> str | None:
    """What is wrong with a shard's files ("is missing", "is truncated: ...", ...); None when they are whole."""
    try:
        size = files.regular(path).st_size
        if size != shard.bytes:
            word = "truncated" if size < shard.bytes else "altered"
            return f"is {word}: {size:,} bytes, the manifest says {shard.bytes:,}"
        if verify == "checksum" and _sha256(path) != shard.sha256:
            return "is altered: its sha256 is not the manifest's"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {reason(error)}"
    return _damaged_index(path, shard)


def _damaged_index(path: Path, shard: Shard) -> str | None:
    name = index.file_name(path.name)
    try:
        if shard.index is not None and _sha256(path.with_name(name)) != shard.index:
            return f"has an altered index: the sha256 of {name} is not the manifest's"
    except OSError as error:
        return f"has no readable index: {name}: {reason(error)}"
    return None


def _sha256(path: Path) -> str:
    files.regular(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
