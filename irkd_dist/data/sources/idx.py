"""IDX files: MNIST and its kin."""

import functools
import gzip
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from irkd_dist.data.sources.base import Raw, Source
from irkd_dist.data.sources.common import fingerprint, numbered, one_line, ordered, split_of
from irkd_dist.errors import UserError


def open_idx(path: Path) -> Source:
    pattern = re.compile(r"images?[-._]idx[34][-._]ubyte(\.gz)?$")
    found = [path] if path.is_file() else sorted(f for f in path.rglob("*") if pattern.search(f.name))
    files: dict[str, tuple[Path, Path]] = {}
    for images in found:
        split = "test" if "t10k" in images.name else split_of(images, images)
        if split is None:
            raise UserError(
                f"cannot tell the split of {images}: its name should have train, val, test or t10k"
            )
        if split in files and not _same_file_plain_or_gz(images, files[split][0]):
            raise UserError(f"two sets of {split} images: {files[split][0]} and {images}; name one by --path")
        files.setdefault(split, (images, _labels_file(images)))
    if not files:
        raise UserError(f"--path {path} holds no IDX images, such as train-images-idx3-ubyte or ....gz")
    labels = {split: _idx(pair[1], 1).astype(np.int64) for split, pair in files.items()}
    for split, pair in files.items():
        if len(_idx(pair[0], 3)) != len(labels[split]):
            counts = f"{len(_idx(pair[0], 3))} images, {pair[1].name} has {len(labels[split])} labels"
            raise UserError(f"{pair[0]} has {counts}")
    return Source(
        kind="idx",
        name=path.resolve().name.split(".")[0],
        classes=numbered(labels.values()),
        labels=ordered(labels),
        masks=False,
        fingerprint=fingerprint("idx", containers=[f for pair in files.values() for f in pair]),
        read=functools.partial(_read, {split: pair[0] for split, pair in files.items()}),
    )


def _same_file_plain_or_gz(a: Path, b: Path) -> bool:
    return a.name.removesuffix(".gz") == b.name.removesuffix(".gz") and a.parent == b.parent


def _labels_file(images: Path) -> Path:
    name = re.sub(r"images?([-._])idx[34]", r"labels\1idx1", images.name).removesuffix(".gz")
    for candidate in (name, name + ".gz"):
        if (images.parent / candidate).is_file():
            return images.parent / candidate
    raise UserError(f"{images} has no labels beside it: {name} or {name}.gz")


def _read(files: dict[str, Path], split: str, indices: Sequence[int]) -> Iterator[Raw]:
    pixels = _idx(files[split], 3)
    for i in indices:
        yield Raw(f"{files[split].name} image {i}", pixels[i])


@functools.lru_cache(maxsize=4)
def _idx(file: Path, dimensions: int) -> np.ndarray:
    """An IDX file of unsigned bytes; 3 dimensions may be 4 for colour. Source: Y. LeCun's MNIST page."""
    try:
        data = file.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError) as error:
        raise UserError(f"cannot read {file}: {one_line(error)}") from error
    count = data[3] if len(data) > 3 else 0
    if data[:3] != b"\0\0\x08" or count not in ({1} if dimensions == 1 else {3, 4}):
        raise UserError(f"{file} is not an IDX file of unsigned bytes with {dimensions} dimensions")
    shape = tuple(np.frombuffer(data, ">u4", count, 4).tolist()) if len(data) >= 4 + 4 * count else ()
    if not shape or len(data) - 4 - 4 * count != int(np.prod(shape)):
        raise UserError(f"{file} is truncated or altered: {len(data):,} bytes do not fit its shape {shape}")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * count).reshape(shape)
