"""A result of `irkd evaluate` as the report reads it: numbers by resolution, confusion, pictures of wrong answers."""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from irkd_dist import files, typed

Row = tuple[int, float | None, float | None, float | None, float | None]


@dataclass(frozen=True)
class Evaluation:
    """A result; rows of (resolution, accuracy, map error, map correlation, pointing)."""

    split: str
    checkpoint: str  # its folder's name; empty if not recorded
    samples: int | None  # of the split
    rows: list[Row]
    rates: dict[str, float]  # images/s of student and teacher alone, at the largest resolution
    data: str  # other shards than the run's own
    teacher: dict[int, float]  # accuracy by resolution
    stages: dict[int, dict[int, float]]  # of the best checkpoints of other stages
    classes: tuple[str, ...]
    resolution: int  # that what follows is of
    confusion: dict[str, np.ndarray]  # of `student` and `teacher`: rows (label, predicted, how often)
    gallery: dict[str, np.ndarray]  # see `evaluation_answers.gallery`; empty if there is none

    def right_by_class(self, who: str) -> dict[int, tuple[int, int]]:
        """Right answers and images of each class that occurs."""
        found: dict[int, tuple[int, int]] = {}
        for label, predicted, count in self.confusion.get(who, np.zeros((0, 3), int)).tolist():
            right, every = found.get(label, (0, 0))
            found[label] = (right + count * (label == predicted), every + count)
        return found

    def name_of(self, label: int) -> str:
        """A class's name."""
        return self.classes[label] if 0 <= label < len(self.classes) else f"class {label}"


def read_evaluation(file: Path) -> tuple[Evaluation, str]:
    """A result of `irkd evaluate`, and what is wrong with the pictures beside it.

    Raises:
        OSError, ValueError, TypeError, AttributeError, KeyError: it is none.
    """
    values = typed.parse_checked(files.read(file))
    parts = [values.get(key) or {} for key in ("accuracy", "agreement", "pointing")]
    accuracy, agreement, pointing = ({int(k): v for k, v in part.items()} for part in parts)
    rows: list[Row] = []
    for size in sorted({*accuracy, *agreement, *pointing}):
        maps = agreement.get(size) or {}
        row = (accuracy.get(size), maps.get("mse"), maps.get("correlation"), pointing.get(size))
        if not all(v is None or typed.is_real(v) for v in row):
            raise ValueError(f"what it says of {size} px are no numbers")
        a, b, c, d = (None if v is None or v != v else float(v) for v in row)
        rows.append((size, a, b, c, d))
    if not rows:
        raise ValueError("it has no result")
    samples = values.get("samples")
    rates = (values.get("images_per_s") or {}).get(str(rows[-1][0]), {})
    if not all(typed.is_number(v) for v in rates.values()):
        raise ValueError("its images_per_s are no numbers")
    confusion = values.get("confusion") or {}
    classes = confusion.get("classes", [])
    if not typed.list_of(typed.is_text)(classes):
        raise ValueError("its classes are no names")
    gallery, problem = _gallery(file.with_suffix(".npz"))
    found = Evaluation(
        str(values.get("split", "test")), Path(str(values.get("checkpoint", ""))).name,
        samples if typed.is_count(samples) and samples else None, rows, rates,
        str(values.get("shards", "")) if "-data-" in file.stem else "",
        _shares(values.get("teacher") or {}),
        {int(stage): _shares(own) for stage, own in (values.get("stages") or {}).items()},
        tuple(classes), int(confusion.get("resolution", 0)),
        {who: _triples(confusion[who]) for who in ("student", "teacher") if who in confusion}, gallery,
    )  # fmt: skip
    return found, problem


def _shares(values: Any) -> dict[int, float]:
    if not all(typed.is_number(v) for v in values.values()):
        raise ValueError("its accuracies are no numbers")
    return {int(size): float(v) for size, v in values.items()}


def _triples(rows: Any) -> np.ndarray:
    found = np.array(rows).reshape(-1, 3) if rows else np.zeros((0, 3), int)
    if not np.issubdtype(found.dtype, np.integer) or (found[:, [0, 2]] < 0).any() or (found[:, 1] < -1).any():
        raise ValueError("its confusion are no counts of classes")
    return found


def _gallery(file: Path) -> tuple[dict[str, np.ndarray], str]:
    if not file.is_file():
        return {}, ""
    try:
        with np.load(io.BytesIO(files.read(file)), allow_pickle=False) as stored:
            arrays = dict(stored)
        count = len(arrays["images"])
        if arrays["images"].dtype != np.uint8 or arrays["images"].shape[3:] != (3,) or not count:
            raise ValueError("its images are none")
        needed = ("labels", "worst", "student_predicted", "student_confidence", "student_truth")
        if any(len(arrays[k]) != count for k in (*needed, *({"student", "teacher"} & {*arrays}))):
            raise ValueError("it has not a row for each image")
        for maps in (arrays[k] for k in ("student", "teacher") if k in arrays):
            if maps.ndim != 3 or not np.isfinite(maps).all():
                raise ValueError("its maps are none")
    # the zip module raises NotImplementedError for a version or a compression that it does not have
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, NotImplementedError, zlib.error) as error:
        return {}, f"The pictures of wrong answers cannot be read: {file.name}: {error}"
    return arrays, ""
