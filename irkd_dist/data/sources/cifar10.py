"""The original CIFAR-10 archive."""

import functools
import io
import lzma
import pickle
import pickletools
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from irkd_dist import files
from irkd_dist.data.sources.base import Raw, Source
from irkd_dist.data.sources.common import fingerprint, reading
from irkd_dist.errors import UserError, one_line, printable

_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
_TEST = ("test_batch",)


def download_cifar10(path: Path) -> None:
    from torchvision.datasets import CIFAR10

    try:
        CIFAR10(str(path), download=True)  # checks the archive's checksum
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot download CIFAR-10 to {path}: {one_line(error)}") from error


def open_cifar10(path: Path) -> Source:
    names = _batch(path, "batches.meta")["label_names"]
    labels = {
        split: np.array([v for b in batches for v in _batch(path, b)["labels"]], dtype=np.int64)
        for split, batches in (("train", _TRAIN), ("test", _TEST))
    }
    return Source(
        kind="cifar10",
        name="cifar10",
        classes=tuple(map(printable, names)),
        labels=labels,
        masks=False,
        fingerprint=fingerprint("cifar10", {s: v.tolist() for s, v in labels.items()}),
        read=functools.partial(_read, path),
    )


def _read(path: Path, split: str, indices: Sequence[int]) -> Iterator[Raw]:
    pixels = _pixels(path, split)
    for i in indices:
        yield Raw(f"cifar10 {split} {i}", pixels[i].reshape(3, 32, 32).transpose(1, 2, 0))


@functools.lru_cache(maxsize=2)
def _pixels(path: Path, split: str) -> np.ndarray:
    batches = _TRAIN if split == "train" else _TEST
    return np.concatenate([np.asarray(_batch(path, b)["data"], dtype=np.uint8) for b in batches])


def _batch(path: Path, name: str) -> dict[str, Any]:
    data = _files(path).get(name)
    if data is None:
        raise UserError(
            f"{path} has no {name}: --path should be cifar-10-python.tar.gz, "
            "its unpacked cifar-10-batches-py, or the folder that holds either"
        )
    try:
        _check_memo(data)
        batch = _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()
        (_check_names if name == "batches.meta" else _check_batch)(batch)
    except Exception as error:  # a damaged pickle may raise anything
        raise UserError(f"{path}: {name} is not a CIFAR-10 batch: {one_line(error)}") from error
    return batch


def _check_memo(data: bytes) -> None:
    """Raises ValueError for places in the unpickler's memory that it would take gigabytes to reach."""
    for op, place, _ in pickletools.genops(data):
        if op.name in ("PUT", "LONG_BINPUT") and int(place) > len(data):  # type: ignore[arg-type]
            raise ValueError(f"it asks for place {place} of the unpickler's memory")


def _check_names(batch: Any) -> None:
    if not batch["label_names"] or not all(type(name) is str for name in batch["label_names"]):
        raise ValueError("its label_names are no names")


def _check_batch(batch: Any) -> None:
    labels, data = batch["labels"], batch["data"]
    if not isinstance(labels, list) or not all(
        type(label) is int and 0 <= label < 1 << 31 for label in labels
    ):
        raise ValueError("its labels are no list of whole numbers")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != (len(labels), 3072):
        raise ValueError(f"its data is not ({len(labels)}, 3072) of uint8, an image for each label")


@functools.lru_cache(maxsize=1)
def _files(path: Path) -> dict[str, bytes]:
    wanted = {"batches.meta", *_TRAIN, *_TEST}
    for folder in (path, path / "cifar-10-batches-py"):
        if (folder / "batches.meta").is_file():
            with reading(folder):
                return {file.name: files.read(file) for file in folder.iterdir() if file.name in wanted}
    archive = path / "cifar-10-python.tar.gz" if path.is_dir() else path
    if not archive.is_file():
        return {}
    errors = (tarfile.TarError, EOFError, ValueError, OverflowError, zlib.error, lzma.LZMAError)
    what = "not a readable archive (fetch it again)"
    with reading(archive, *errors, what=what), tarfile.open(archive, "r:*") as tar:
        members = [m for m in tar if m.isreg() and Path(m.name).name in wanted]
        return {Path(m.name).name: tar.extractfile(m).read() for m in members}  # type: ignore[union-attr]


class _PlainUnpickler(pickle.Unpickler):
    """Arrays, lists and strings only: a pickle can otherwise run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            import codecs

            return codecs.encode
        raise pickle.UnpicklingError(f"refused to load {module}.{name}")
