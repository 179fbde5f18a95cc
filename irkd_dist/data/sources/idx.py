"""IDX files: MNIST and its kin."""

import functools
import gzip
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from irkd_dist import files
from irkd_dist.data.sources.base import Raw, Source
from irkd_dist.data.sources.common import containers, fingerprint, ordered, reading, split_of
from irkd_dist.errors import UserError


def open_idx(path: Path) -> Source:
    found, _ = containers(path, r"images?[-._]idx[34][-._]ubyte(\.gz)?$")
    pairs: dict[str, tuple[Path, Path]] = {}
    for images in found:
        split = "test" if "t10k" in images.name else split_of(images, images)
        if split is None:
            raise UserError(
                f"cannot tell the split of {images}: its name should have train, val, test or t10k"
            )
        if split in pairs and not _same_file_plain_or_gz(images, pairs[split][0]):
            raise UserError(f"two sets of {split} images: {pairs[split][0]} and {images}; name one by --path")
        pairs.setdefault(split, (images, _labels_file(images)))
    if not pairs:
        raise UserError(f"--path {path} holds no IDX images, such as train-images-idx3-ubyte or ....gz")
    labels = {split: _idx(pair[1], 1).astype(np.int64) for split, pair in pairs.items()}
    for split, pair in pairs.items():
        if len(_idx(pair[0], 3)) != len(labels[split]):
            counts = f"{len(_idx(pair[0], 3))} images, {pair[1].name} has {len(labels[split])} labels"
            raise UserError(f"{pair[0]} has {counts}")
    return Source(
        kind="idx",
        name=path.resolve().name.split(".")[0],
        classes=(),
        labels=ordered(labels),
        masks=False,
        fingerprint=fingerprint("idx", containers=[f for pair in pairs.values() for f in pair]),
        read=functools.partial(_read, {split: pair[0] for split, pair in pairs.items()}),
    )


def _same_file_plain_or_gz(a: Path, b: Path) -> bool:
    return a.name.removesuffix(".gz") == b.name.removesuffix(".gz") and a.parent == b.parent


def _labels_file(images: Path) -> Path:
    name = re.sub(r"images?([-._])idx[34]", r"labels\1idx1", images.name).removesuffix(".gz")
    for candidate in (name, name + ".gz"):
        if (images.parent / candidate).is_file():
            return images.parent / candidate
    raise UserError(f"{images} has no labels beside it: {name} or {name}.gz")


def _read(images: dict[str, Path], split: str, indices: Sequence[int]) -> Iterator[Raw]:
    pixels = _idx(images[split], 3)
    for i in indices:
        yield Raw(f"{images[split].name} image {i}", pixels[i])


@functools.lru_cache(maxsize=4)
def _idx(file: Path, dimensions: int) -> np.ndarray:
    """An IDX file of unsigned bytes; 3 dimensions may be 4 for colour. Source: Y. LeCun's MNIST page."""
    with reading(file, EOFError, zlib.error):
        data = files.read(file)
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    count = data[3] if len(data) > 3 else 0
    if data[:3] != b"\0\0\x08" or count not in ({1} if dimensions == 1 else {3, 4}):
        raise UserError(f"{file} is not an IDX file of unsigned bytes with {dimensions} dimensions")
    shape = tuple(np.frombuffer(data, ">u4", count, 4).tolist()) if len(data) >= 4 + 4 * count else ()
    if not shape or len(data) - 4 - 4 * count != math.prod(shape):
        raise UserError(f"{file} is truncated or altered: {len(data):,} bytes do not fit its shape {shape}")
    if (dimensions == 3 and 0 in shape[1:]) or shape[3:] not in ((), (1,), (3,), (4,)):
        raise UserError(f"{file} holds no images: its shape is {shape}; (N, H, W) and (N, H, W, 3) are read")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * count).reshape(shape)
