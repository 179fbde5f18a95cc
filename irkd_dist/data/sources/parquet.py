"""Parquet files in the Hugging Face layout."""

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from irkd_dist import typed
from irkd_dist.data.sources.base import Raw, Source
from irkd_dist.data.sources.common import by_split, containers, fingerprint, reading, said
from irkd_dist.errors import UserError, printable

_File = tuple[Path, int]  # and its rows


def open_parquet(path: Path, image_column: str | None, label_column: str | None) -> Source:
    files, others = containers(path, r"\.parquet$")
    if not files:
        raise UserError(f"--path {path} holds no *.parquet file")
    splits: dict[str, tuple[_File, ...]] = {}
    labels: dict[str, np.ndarray] = {}
    notes, image, label = [*said(others)], image_column or "", label_column or ""
    names: dict[tuple[str, ...], Path] = {}
    for split, members in by_split(files, path).items():
        columns = []
        for file in members:
            with _reading(file):
                table = pq.ParquetFile(file)
                schema = table.schema_arrow
                image = image or _image_column(schema, file)
                label = label or _label_column(schema, file)
                _check_columns(schema, (image, label), file)
                columns.append(_label_values(table, label, file))
            if found := _feature_names(schema, label, file):
                names.setdefault(found, file)
        splits[split] = tuple((file, len(values)) for file, values in zip(members, columns, strict=True))
        labels[split] = np.concatenate(columns)
    for split in [s for s, values in labels.items() if values.size and (values == -1).all() and s != "train"]:
        notes.append(f"split {split} has no labels (all -1): its {len(labels[split])} images are left out")
        del labels[split], splits[split]
    return Source(
        kind="parquet",
        name=path.resolve().stem if path.is_file() else path.resolve().name,
        classes=_only(names),
        labels=labels,
        masks=False,
        fingerprint=fingerprint("parquet", image, label, containers=files),
        read=functools.partial(_read, splits, image),
        notes=tuple(notes),
    )


def _reading(file: Path) -> contextlib.AbstractContextManager[None]:
    return reading(file, pa.ArrowException, ValueError, IndexError)


def _only(names: dict[tuple[str, ...], Path]) -> tuple[str, ...]:
    """The class names that all files agree on, () if none has any."""
    if len(names) > 1:
        (one, first), (other, second) = list(names.items())[:2]
        at = next(i for i, pair in enumerate(itertools.zip_longest(one, other)) if pair[0] != pair[1])
        told = [f"{at} is {own[at]!r}" if at < len(own) else f"there is no {at}" for own in (one, other)]
        raise UserError(f"class names differ: class {told[0]} in {first}, {told[1]} in {second}")
    return next(iter(names), ())


def _features(schema: pa.Schema) -> dict[str, Any]:
    """Hugging Face's description of the columns, {} where there is none."""
    try:
        info = typed.parse((schema.metadata or {}).get(b"huggingface", b"{}"))
        return dict(info["info"]["features"])
    except (ValueError, KeyError, TypeError):
        return {}


def _feature_names(schema: pa.Schema, label: str, file: Path) -> tuple[str, ...] | None:
    feature = _features(schema).get(label)
    names = feature.get("names") if isinstance(feature, dict) else None
    if names and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UserError(
            f"{file}: the class names of column {label!r} are no list of names: {str(names)[:80]}"
        )
    return tuple(map(printable, names)) if names else None


def _image_column(schema: pa.Schema, file: Path) -> str:
    def is_image(field: pa.Field) -> bool:
        return pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0

    return _one_column([f.name for f in schema if is_image(f)], schema, file, "image", "struct{bytes, path}")


def _label_column(schema: pa.Schema, file: Path) -> str:
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
    column = table.read(columns=[label]).column(0)
    if not pa.types.is_integer(column.type):
        raise UserError(f"{file}: label column {label!r} is {column.type}, not integer; see --label-column")
    if column.null_count:
        raise UserError(f"{file}: label column {label!r} has {column.null_count} empty values")
    return column.to_numpy().astype(np.int64)


def _read(
    files: dict[str, tuple[_File, ...]], image: str, split: str, indices: Sequence[int]
) -> Iterator[Raw]:
    wanted, first = np.asarray(indices, dtype=np.int64), 0
    for file, rows in files[split]:
        here = wanted[(wanted >= first) & (wanted < first + rows)] - first
        first += rows
        if here.size:
            yield from _rows(file, image, here)


def _rows(file: Path, image: str, wanted: np.ndarray) -> Iterator[Raw]:
    """The images of ascending rows of one file, a row group at a time."""
    with _reading(file):
        table = pq.ParquetFile(file)
        groups = [table.metadata.row_group(g).num_rows for g in range(table.num_row_groups)]
    first = 0
    for group, rows in enumerate(groups):
        here = wanted[(wanted >= first) & (wanted < first + rows)] - first
        if here.size:
            with _reading(file):
                column = table.read_row_group(group, columns=[image]).column(0)
            for row in here:
                with _reading(file):
                    value = column[int(row)].as_py()
                data = value.get("bytes") if isinstance(value, dict) else value
                yield Raw(f"{file.name} row {first + int(row)}", data if isinstance(data, bytes) else b"")
        first += rows
