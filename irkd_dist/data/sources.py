"""Where images come from: each kind of source becomes one `Source`, read by (split, indices).

A source knows its labels up front and reads its images later, in the processes that render. Splits are called
train, val and test whatever the source calls them.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import io
import json
import os
import pickle
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, get_args

import numpy as np

from irkd_dist.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

Kind = Literal["parquet", "cifar10", "idx", "folder", "wds", "synthetic"]

_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
_ORDER = ("train", "val", "test")
_IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}


@dataclass(frozen=True)
class Raw:
    """One image as the source has it.

    name: what to call it in a message. image: encoded bytes, a file, or pixels (H, W) or (H, W, 3) uint8.
    mask: the true object, (H, W) uint8, 0 or 255, or PNG bytes of it.
    """

    name: str
    image: bytes | Path | np.ndarray
    mask: np.ndarray | bytes | None = None


@dataclass(frozen=True)
class Source:
    """A set of labelled images; picklable, so that worker processes can read it.

    labels: (N,) int64 for each split, in the source's own order. fingerprint: changes when the source does.
    read(split, indices) yields the images of ascending indices; it raises UserError when a container file
    cannot be read.
    """

    kind: Kind
    name: str
    classes: tuple[str, ...]
    labels: dict[str, np.ndarray]
    masks: bool
    fingerprint: str
    read: Callable[[str, Sequence[int]], Iterator[Raw]]


def open_source(
    kind: Kind,
    path: Path | None,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    download: bool = False,
    samples: dict[str, int] | None = None,
    size: int = 32,
    seed: int = 42,
) -> Source:
    """Open a source of images.

    image_column and label_column are for parquet, download for cifar10, samples (per split), size (px) and
    seed for synthetic. Raises UserError: path missing or without images, labels that make no sense.
    """
    if download and kind != "cifar10":
        raise UserError(f"--download is for source cifar10, not {kind}; fetch the files, name them by --path")
    if kind == "synthetic":
        return _open_synthetic(samples or {"train": 4000, "test": 1000}, size, seed)
    if path is None:
        raise UserError(f"irkd render {kind} needs --path: where its files are")
    path = Path(path)
    if download:
        _download(path)
    if not path.exists():
        raise UserError(f"--path {path} does not exist{_hint(kind)}")
    match kind:
        case "parquet":
            source = _open_parquet(path, image_column, label_column)
        case "cifar10":
            source = _open_cifar10(path)
        case "idx":
            source = _open_idx(path)
        case "folder":
            source = _open_folder(path)
        case "wds":
            source = _open_wds(path)
        case _:
            raise UserError(f"unknown source {kind!r}; one of {', '.join(get_args(Kind))}")
    _check_labels(source, path)
    return source


def _hint(kind: Kind) -> str:
    return "; with --download it is fetched there" if kind == "cifar10" else ""


def _check_labels(source: Source, path: Path) -> None:
    for split, labels in source.labels.items():
        wrong = labels[(labels < 0) | (labels >= len(source.classes))]
        if wrong.size:
            raise UserError(
                f"{path}: split {split} has label {wrong[0]} ({wrong.size:,} such samples), "
                f"outside 0..{len(source.classes) - 1}; unlabelled or mislabelled samples cannot be rendered"
            )
    if not source.labels.get("train", np.empty(0)).size:
        have = ", ".join(source.labels) or "nothing"
        raise UserError(f"{path}: no images of a train split, found {have}; training needs one")


def _ordered(labels: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {split: labels[split] for split in _ORDER if split in labels}


def _numbered(labels: Iterable[np.ndarray]) -> tuple[str, ...]:
    """Class names where the source has none: the numbers."""
    top = max((int(part.max()) for part in labels if part.size), default=-1)
    return tuple(map(str, range(top + 1)))


def _split_of(file: Path, base: Path) -> str | None:
    """The split that a file's name, or else a folder it is in, tells of."""
    for part in reversed(file.relative_to(base).parts if file != base else (file.name,)):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return None


def _by_split(files: list[Path], base: Path) -> dict[str, list[Path]]:
    """Files of each split by their names; all of them are train when none tells a split."""
    found = [(file, _split_of(file, base)) for file in files]
    silent = [file for file, split in found if split is None]
    if silent and len(silent) < len(files):
        raise UserError(
            f"cannot tell the split of {silent[0]}: its name should begin with train, val or test"
        )
    groups: dict[str, list[Path]] = {}
    for file, split in found:
        groups.setdefault(split or "train", []).append(file)
    return {split: groups[split] for split in _ORDER if split in groups}


def _fingerprint(*facts: Any, containers: Iterable[Path] = ()) -> str:
    """A digest of facts and of container files: name, size and both ends, to be quick on large ones."""
    digest = hashlib.sha256(json.dumps(facts, default=str).encode())
    for file in containers:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            digest.update(f"\n{file.name} {size}\n".encode())
            digest.update(stream.read(1 << 16))
            stream.seek(max(0, size - (1 << 16)))
            digest.update(stream.read())
    return digest.hexdigest()


# --- parquet: the Hugging Face layout ---------------------------------------------------------------------


def _open_parquet(path: Path, image_column: str | None, label_column: str | None) -> Source:
    import pyarrow.parquet as pq

    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if not files:
        raise UserError(f"--path {path} holds no *.parquet file")
    splits = _by_split(files, path)
    labels: dict[str, np.ndarray] = {}
    schema, image, label = None, "", ""
    for split, members in splits.items():
        columns = []
        for file in members:
            with _reading(file):
                table = pq.ParquetFile(file)
                if schema is None:
                    schema = table.schema_arrow
                    image = image_column or _image_column(schema, file)
                    label = label_column or _label_column(schema, file)
                _check_columns(table.schema_arrow, (image, label), file)
                columns.append(_label_values(table, label, file))
        labels[split] = np.concatenate(columns)
    for split in [s for s, values in labels.items() if values.size and (values == -1).all() and s != "train"]:
        print(f"irkd: {path}: split {split} has no labels (all -1) and is left out")
        del labels[split], splits[split]
    assert schema is not None
    return Source(
        kind="parquet",
        name=path.resolve().stem if path.is_file() else path.resolve().name,
        classes=_feature_names(schema, label) or _numbered(labels.values()),
        labels=labels,
        masks=False,
        fingerprint=_fingerprint("parquet", image, label, containers=files),
        read=functools.partial(_read_parquet, {s: tuple(m) for s, m in splits.items()}, image),
    )


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Errors of pyarrow and of the system become one that names the file."""
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read {file}: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _features(schema: pa.Schema) -> dict[str, Any]:
    """Hugging Face's description of the columns, {} where there is none."""
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        return dict(info["info"]["features"])
    except (ValueError, KeyError, TypeError):
        return {}


def _feature_names(schema: pa.Schema, label: str) -> tuple[str, ...] | None:
    feature = _features(schema).get(label)
    names = feature.get("names") if isinstance(feature, dict) else None
    return tuple(map(str, names)) if names else None


def _image_column(schema: pa.Schema, file: Path) -> str:
    import pyarrow as pa

    def is_image(field: pa.Field) -> bool:
        return pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0

    return _one_column([f.name for f in schema if is_image(f)], schema, file, "image", "struct{bytes, path}")


def _label_column(schema: pa.Schema, file: Path) -> str:
    import pyarrow as pa

    features = _features(schema)
    named = [n for n, f in features.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"]
    plain = [f.name for f in schema if pa.types.is_integer(f.type) and not f.name.startswith("__")]
    return _one_column(named or plain, schema, file, "label", "integer")


def _one_column(found: list[str], schema: pa.Schema, file: Path, what: str, type_name: str) -> str:
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"{file} has {len(found)} {what} columns: choose with --{what}-column {'|'.join(found)}"
        )
    columns = ", ".join(f"{f.name} ({f.type})" for f in schema)
    raise UserError(f"{file} has no {what} column ({type_name}); its columns: {columns}")


def _check_columns(schema: pa.Schema, columns: tuple[str, str], file: Path) -> None:
    for column, option in zip(columns, ("--image-column", "--label-column"), strict=True):
        if column not in schema.names:
            raise UserError(f"{file} has no column {column!r} ({option}); it has {', '.join(schema.names)}")


def _label_values(table: Any, label: str, file: Path) -> np.ndarray:
    import pyarrow as pa

    column = table.read(columns=[label]).column(0)
    if not pa.types.is_integer(column.type):
        raise UserError(f"{file}: label column {label!r} is {column.type}, not integer; see --label-column")
    if column.null_count:
        raise UserError(f"{file}: label column {label!r} has {column.null_count} empty values")
    return column.to_numpy().astype(np.int64)


def _read_parquet(
    files: dict[str, tuple[Path, ...]], image: str, split: str, indices: Sequence[int]
) -> Iterator[Raw]:
    import pyarrow.parquet as pq

    wanted, first = np.asarray(indices, dtype=np.int64), 0
    for file in files[split]:
        with _reading(file):
            table = pq.ParquetFile(file)
            groups = [table.metadata.row_group(g).num_rows for g in range(table.num_row_groups)]
        for group, rows in enumerate(groups):
            here = wanted[(wanted >= first) & (wanted < first + rows)] - first
            if here.size:
                with _reading(file):
                    column = table.read_row_group(group, columns=[image]).column(0)
                for row in here:
                    value = column[int(row)].as_py()
                    data = value.get("bytes") if isinstance(value, dict) else value
                    yield Raw(f"{file.name} row {first + int(row)}", data if isinstance(data, bytes) else b"")
            first += rows


# --- the original CIFAR-10 archive ------------------------------------------------------------------------

_CIFAR_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
_CIFAR_TEST = ("test_batch",)


def _download(path: Path) -> None:
    from torchvision.datasets import CIFAR10

    try:
        CIFAR10(str(path), download=True)  # checks the archive's checksum
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot download CIFAR-10 to {path}: {_one_line(error)}") from error


def _open_cifar10(path: Path) -> Source:
    names = _cifar_batch(path, "batches.meta")["label_names"]
    labels = {
        split: np.array([v for b in batches for v in _cifar_batch(path, b)["labels"]], dtype=np.int64)
        for split, batches in (("train", _CIFAR_TRAIN), ("test", _CIFAR_TEST))
    }
    return Source(
        kind="cifar10",
        name="cifar10",
        classes=tuple(map(str, names)),
        labels=labels,
        masks=False,
        fingerprint=_fingerprint("cifar10", {s: v.tolist() for s, v in labels.items()}),
        read=functools.partial(_read_cifar10, path),
    )


def _read_cifar10(path: Path, split: str, indices: Sequence[int]) -> Iterator[Raw]:
    pixels = _cifar_pixels(path, split)
    for i in indices:
        yield Raw(f"cifar10 {split} {i}", pixels[i].reshape(3, 32, 32).transpose(1, 2, 0))


@functools.lru_cache(maxsize=2)
def _cifar_pixels(path: Path, split: str) -> np.ndarray:
    batches = _CIFAR_TRAIN if split == "train" else _CIFAR_TEST
    return np.concatenate([np.asarray(_cifar_batch(path, b)["data"], dtype=np.uint8) for b in batches])


def _cifar_batch(path: Path, name: str) -> dict[str, Any]:
    data = _cifar_files(path).get(name)
    if data is None:
        raise UserError(
            f"{path} has no {name}: --path should be cifar-10-python.tar.gz, "
            "its unpacked cifar-10-batches-py, or the folder that holds either"
        )
    try:
        batch = _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()
        if name != "batches.meta" and len(batch["labels"]) != len(
            np.asarray(batch["data"]).reshape(-1, 3072)
        ):
            raise ValueError("labels and images differ in number")
    except Exception as error:  # a damaged pickle may raise anything
        raise UserError(f"{path}: {name} is not a CIFAR-10 batch: {_one_line(error)}") from error
    return batch


@functools.lru_cache(maxsize=1)
def _cifar_files(path: Path) -> dict[str, bytes]:
    wanted = {"batches.meta", *_CIFAR_TRAIN, *_CIFAR_TEST}
    for folder in (path, path / "cifar-10-batches-py"):
        if (folder / "batches.meta").is_file():
            return {file.name: file.read_bytes() for file in folder.iterdir() if file.name in wanted}
    archive = path / "cifar-10-python.tar.gz" if path.is_dir() else path
    if not archive.is_file():
        return {}
    try:
        with tarfile.open(archive, "r:*") as tar:
            members = [m for m in tar if m.isreg() and Path(m.name).name in wanted]
            return {Path(m.name).name: tar.extractfile(m).read() for m in members}  # type: ignore[union-attr]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{archive} is not a readable archive: {_one_line(error)}; fetch it again") from error


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


# --- IDX: MNIST and its kin -------------------------------------------------------------------------------


def _open_idx(path: Path) -> Source:
    pattern = re.compile(r"images?[-._]idx[34][-._]ubyte(\.gz)?$")
    found = [path] if path.is_file() else sorted(f for f in path.rglob("*") if pattern.search(f.name))
    files: dict[str, tuple[Path, Path]] = {}
    for images in found:
        split = "test" if "t10k" in images.name else _split_of(images, images)
        if split is None:
            raise UserError(
                f"cannot tell the split of {images}: its name should have train, val, test or t10k"
            )
        if split in files and not _same_file_plain_or_gz(images, files[split][0]):
            raise UserError(f"two sets of {split} images: {files[split][0]} and {images}; name one by --path")
        files.setdefault(split, (images, _idx_labels_file(images)))
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
        classes=_numbered(labels.values()),
        labels=_ordered(labels),
        masks=False,
        fingerprint=_fingerprint("idx", containers=[f for pair in files.values() for f in pair]),
        read=functools.partial(_read_idx, {split: pair[0] for split, pair in files.items()}),
    )


def _same_file_plain_or_gz(a: Path, b: Path) -> bool:
    return a.name.removesuffix(".gz") == b.name.removesuffix(".gz") and a.parent == b.parent


def _idx_labels_file(images: Path) -> Path:
    name = re.sub(r"images?([-._])idx[34]", r"labels\1idx1", images.name).removesuffix(".gz")
    for candidate in (name, name + ".gz"):
        if (images.parent / candidate).is_file():
            return images.parent / candidate
    raise UserError(f"{images} has no labels beside it: {name} or {name}.gz")


def _read_idx(files: dict[str, Path], split: str, indices: Sequence[int]) -> Iterator[Raw]:
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
        raise UserError(f"cannot read {file}: {_one_line(error)}") from error
    count = data[3] if len(data) > 3 else 0
    if data[:3] != b"\0\0\x08" or count not in ({1} if dimensions == 1 else {3, 4}):
        raise UserError(f"{file} is not an IDX file of unsigned bytes with {dimensions} dimensions")
    shape = tuple(np.frombuffer(data, ">u4", count, 4).tolist()) if len(data) >= 4 + 4 * count else ()
    if not shape or len(data) - 4 - 4 * count != int(np.prod(shape)):
        raise UserError(f"{file} is truncated or altered: {len(data):,} bytes do not fit its shape {shape}")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * count).reshape(shape)


# --- a tree of folders, one for each class ----------------------------------------------------------------


def _open_folder(path: Path) -> Source:
    top = _subfolders(path)
    if not top:
        raise UserError(
            f"--path {path} has no class folders: it should hold one folder of images for each class"
        )
    split_layout = all(d.name.lower() in _SPLITS and _subfolders(d) for d in top)
    roots = {_SPLITS[d.name.lower()]: d for d in top} if split_layout else {"train": path}
    if "train" not in roots:
        raise UserError(f"--path {path} has no train folder beside {', '.join(d.name for d in top)}")
    classes = tuple(d.name for d in _subfolders(roots["train"]))
    files: dict[str, list[str]] = {}
    labels: dict[str, np.ndarray] = {}
    sizes = []
    for split, root in roots.items():
        files[split], numbers = [], []
        for folder in _subfolders(root):
            if folder.name not in classes:
                raise UserError(f"{folder}: class {folder.name!r} has no folder in {roots['train']}")
            images = _images_below(folder)
            files[split] += [str(Path(file).relative_to(path)) for file, _ in images]
            sizes += [size for _, size in images]
            numbers += [classes.index(folder.name)] * len(images)
        labels[split] = np.array(numbers, dtype=np.int64)
    return Source(
        kind="folder",
        name=path.resolve().name,
        classes=classes,
        labels=_ordered(labels),
        masks=False,
        fingerprint=_fingerprint("folder", files, sizes),
        read=functools.partial(_read_folder, path, files),
    )


def _subfolders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise UserError(
            f"--path {path} is a file; source folder needs a folder with one folder for each class"
        )
    return sorted(d for d in path.iterdir() if d.is_dir() and not d.name.startswith("."))


def _images_below(folder: Path) -> list[tuple[str, int]]:
    """(file, bytes) of every image in a class folder, sub-folders included, sorted."""
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if os.path.splitext(name)[1].lower() in _IMAGES and not name.startswith("."):
                file = os.path.join(parent, name)
                found.append((file, os.stat(file).st_size if os.path.exists(file) else -1))
    if not found:
        raise UserError(
            f"class folder {folder} is empty: no {', '.join(sorted(_IMAGES))} in it; fill or remove it"
        )
    return sorted(found)


def _read_folder(
    path: Path, files: dict[str, list[str]], split: str, indices: Sequence[int]
) -> Iterator[Raw]:
    for i in indices:
        yield Raw(str(path / files[split][i]), path / files[split][i])


# --- WebDataset tars --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tars:
    """Where the samples of one split lie: file number, (offset, bytes) of image and mask; bytes -1: none."""

    files: tuple[Path, ...]
    keys: tuple[str, ...]
    file: np.ndarray
    image: np.ndarray
    mask: np.ndarray


def _open_wds(path: Path) -> Source:
    files = [path] if path.is_file() else sorted(path.glob("*.tar"))
    if not files:
        raise UserError(f"--path {path} holds no *.tar; compressed tars must be unpacked to .tar first")
    tars: dict[str, _Tars] = {}
    labels: dict[str, np.ndarray] = {}
    for split, members in _by_split(files, path).items():
        samples = [(n, *sample) for n, file in enumerate(members) for sample in _wds_samples(file)]
        numbers, keys, label, image, mask = zip(*samples, strict=True) if samples else ((),) * 5
        labels[split] = np.array(label, dtype=np.int64)
        places = (np.array(p, dtype=np.int64).reshape(-1, 2) for p in (image, mask))
        tars[split] = _Tars(tuple(members), tuple(keys), np.array(numbers, dtype=np.int64), *places)
    return Source(
        kind="wds",
        name=path.resolve().name.split(".")[0],
        classes=_wds_classes(path) or _numbered(labels.values()),
        labels=labels,
        masks=all(bool((part.mask[:, 1] >= 0).all()) for part in tars.values()),
        fingerprint=_fingerprint("wds", containers=files),
        read=functools.partial(_read_wds, tars),
    )


def _wds_classes(path: Path) -> tuple[str, ...] | None:
    """Class names from our own manifest, when the tars are ours."""
    from irkd_dist.data import shards

    folder = path if path.is_dir() else path.parent
    found = [f for f in (folder, folder.parent) if (f / shards.MANIFEST).is_file()]
    return shards.load_manifest(found[0]).classes if found else None


_Place = tuple[int, int]


def _wds_samples(file: Path) -> Iterator[tuple[str, int, _Place, _Place]]:
    """(key, label, place of image, place of mask) of each sample. Members other than those are refused."""
    samples: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, kind = name.partition(".")
                sample = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
                role = _wds_role(kind.lower()) if member.isreg() else None
                if role is None or role in sample:
                    raise UserError(
                        f"{file}: member {member.name!r} {'comes twice' if role else 'is refused'}; only one "
                        f"image ({', '.join(sorted(_IMAGES))}, .npy), .cls and .mask.png a sample are read"
                    )
                data = tar.extractfile(member)
                assert data is not None
                sample[role] = int(data.read(32)) if role == "cls" else (member.offset_data, member.size)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"{file} is not a readable tar with number labels: {_one_line(error)}") from error
    for key, sample in samples.items():
        if "cls" not in sample or "image" not in sample:
            raise UserError(f"{file}: sample {key!r} has no {'image' if 'cls' in sample else '.cls (label)'}")
        yield key, sample["cls"], sample["image"], sample.get("mask", (0, -1))


def _wds_role(kind: str) -> str | None:
    if kind in ("cls", "mask.png"):
        return kind.removesuffix(".png")
    return "image" if f".{kind}" in _IMAGES or kind == "npy" else None


def _read_wds(tars: dict[str, _Tars], split: str, indices: Sequence[int]) -> Iterator[Raw]:
    part, wanted = tars[split], np.asarray(indices, dtype=np.int64)
    for number, path in enumerate(part.files):
        here = wanted[part.file[wanted] == number]
        if not here.size:
            continue
        try:
            with open(path, "rb") as file:
                for i in here:
                    image = _read_at(file, part.image[i])
                    mask = _read_at(file, part.mask[i]) if part.mask[i, 1] >= 0 else None
                    yield Raw(f"{path.name} {part.keys[i]}", image, mask)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error


def _read_at(file: BinaryIO, place: np.ndarray) -> bytes:
    return os.pread(file.fileno(), int(place[1]), int(place[0]))


# --- images that the package draws itself -----------------------------------------------------------------


def _open_synthetic(samples: dict[str, int], size: int, seed: int) -> Source:
    from irkd_dist.data import synthetic

    if not samples.get("train"):
        raise UserError(f"--samples {samples}: a train split is needed, e.g. train=4000,test=1000")
    if size < 4:
        raise UserError(f"--size {size} is too small for a shape; use 12 or more")
    count = len(synthetic.CLASSES)
    return Source(
        kind="synthetic",
        name="synthetic",
        classes=synthetic.CLASSES,
        labels=_ordered({split: np.arange(n, dtype=np.int64) % count for split, n in samples.items()}),
        masks=True,
        fingerprint=_fingerprint("synthetic", samples, size, seed),
        read=functools.partial(_read_synthetic, size, seed),
    )


def _read_synthetic(size: int, seed: int, split: str, indices: Sequence[int]) -> Iterator[Raw]:
    from irkd_dist.data import synthetic

    for i in indices:
        image, mask, _ = synthetic.draw(seed, split, int(i), size)
        yield Raw(f"synthetic {split} {i}", image, mask)
