"""`irkd predict`: classes of pictures, by a run, a checkpoint or an export; exported ONNX runs without torch."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from irkd_dist import files
from irkd_dist.data import images as pictures
from irkd_dist.data.geometry import CENTRAL, Geometry, is_geometry
from irkd_dist.data.sources.base import Raw
from irkd_dist.errors import UserError, one_line

if TYPE_CHECKING:
    from irkd_dist.api import Student

SUFFIXES = {s for s in Image.registered_extensions() if s not in (".pdf", ".mpg", ".mpeg", ".h5", ".hdf")}
BATCH = 64
MANIFEST, ONNX = "export.json", "model.onnx"  # of an export


@dataclass(frozen=True)
class Model:
    """What is asked: an exported graph, or a network of torch (`student`), which has saliency too."""

    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int  # pixels
    geometry: Geometry = CENTRAL  # how pictures are cut, as its evaluation does
    note: str | None = None  # for the user, where that is assumed
    session: Any = None
    student: Student | None = None

    def logits(self, images: np.ndarray) -> np.ndarray:
        """(B, 3, r, r) float32 -> (B, K)."""
        if self.session is not None:
            return np.asarray(self.session.run(None, {"images": images})[0])
        import torch

        assert self.student is not None
        with torch.no_grad():
            return self.student(torch.from_numpy(images)).numpy()


@dataclass(frozen=True)
class Prediction:
    """Classes of one picture, the likeliest first, with their probabilities."""

    file: Path
    classes: list[str]
    probabilities: list[float]


def open_model(path: Path, overlay: bool = False) -> Model:
    """A run, a checkpoint or an export. overlay: saliency is asked for too, which takes torch.

    Raises:
        UserError: it is none, or a package is missing.
    """
    if (path / MANIFEST).is_file() and (path / ONNX).is_file() and not overlay:
        return _of_onnx(path)
    from irkd_dist import api

    student, note = _of_timm(path) if (path / MANIFEST).is_file() else api.load_noted(path)
    own = (student.classes, student.mean, student.std, student.size, student.geometry)
    return Model(*own, note, student=student)


def find(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The pictures among files and folders, in order; and of what is none a line each."""
    found, left_out = list[Path](), list[str]()
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file())
            chosen = [p for p in inside if p.suffix.lower() in SUFFIXES]
            found += chosen
            others = len(inside) - len(chosen)
            left_out += (
                [f"{path}: {others} files are no pictures by their names, and left out"] if others else []
            )
        elif path.exists():
            found.append(path)
        else:
            left_out.append(f"{path}: no such file or folder")
    return found, left_out


def predict(
    model: Model, pictures_: Sequence[Path], top: int = 1, overlay: Path | None = None
) -> Iterator[Prediction | str]:
    """A prediction for each picture, in order, or a line on why it cannot be read.

    overlay: a folder that gets each picture beside its saliency.
    """
    names = dict[str, int]()  # of overlays, and how often each was taken
    for start in range(0, len(pictures_), BATCH):
        read = [(file, _seen(model, file)) for file in pictures_[start : start + BATCH]]
        good = [(file, seen) for file, seen in read if not isinstance(seen, str)]
        said: dict[Path, Prediction] = {}
        if good:
            x = np.stack([_normalised(model, seen) for _, seen in good])
            logits = model.logits(x).astype(np.float64)
            chances = np.exp(logits - logits.max(1, keepdims=True))
            chances /= chances.sum(1, keepdims=True)
            for (file, _), row in zip(good, chances, strict=True):
                best = np.argsort(-row, kind="stable")[:top]
                said[file] = Prediction(file, [model.classes[i] for i in best], [float(row[i]) for i in best])
            if overlay is not None:
                _write_overlays(
                    model, x, [seen for _, seen in good], [file for file, _ in good], overlay, names
                )
        for file, seen in read:
            yield seen if isinstance(seen, str) else said[file]


def table(predictions: Sequence[Prediction]) -> str:
    """Lines of text: file, class, probability, ..."""
    width = max((len(str(p.file)) for p in predictions), default=0)
    return "\n".join(
        f"{p.file!s:{width}}  "
        + "  ".join(f"{c} {v:.2%}" for c, v in zip(p.classes, p.probabilities, strict=True))
        for p in predictions
    )


def as_json(predictions: Sequence[Prediction]) -> str:
    """A JSON object a line."""
    return "\n".join(
        json.dumps({"file": str(p.file), "classes": p.classes, "probabilities": p.probabilities})
        for p in predictions
    )


def as_csv(predictions: Sequence[Prediction]) -> str:
    """CSV with a header: file, class, probability, and of more classes class2, probability2, ..."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    count = max((len(p.classes) for p in predictions), default=1)
    names = [f"{name}{i if i > 1 else ''}" for i in range(1, count + 1) for name in ("class", "probability")]
    writer.writerow(["file", *names])
    for p in predictions:
        cells = (cell for pair in zip(p.classes, p.probabilities, strict=True) for cell in pair)
        writer.writerow([p.file, *cells])
    return out.getvalue().rstrip("\n")


def _of_onnx(folder: Path) -> Model:
    told = _manifest(folder)
    try:
        import onnxruntime
    except ImportError:
        raise UserError(f"{folder / ONNX} needs onnxruntime: pip install 'irkd_dist[export]'") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(folder / ONNX), options, providers=["CPUExecutionProvider"])
    geometry, note = _geometry(folder, told)
    own = (tuple(told["classes"]), tuple(told["mean"]), tuple(told["std"]), int(told["size"]))
    return Model(*own, geometry, note, session)


def _of_timm(folder: Path) -> tuple[Student, str | None]:
    from irkd_dist import api, export

    told = _manifest(folder)
    mean, std = ((v[0], v[1], v[2]) for v in (told["mean"], told["std"]))
    geometry, note = _geometry(folder, told)
    student = api.Student(
        export.load_timm(folder),
        tuple(told["classes"]),
        mean,
        std,
        int(told["size"]),
        tuple(told["taps"]),
        told["method"],
        geometry=geometry,
    )
    return student, note


def _geometry(folder: Path, told: dict[str, Any]) -> tuple[Geometry, str | None]:
    """How an export's pictures are cut, and a line where it does not say."""
    if told.get("geometry") is not None:
        return Geometry.parse(told["geometry"]), None
    return CENTRAL, (
        f"{folder / MANIFEST} does not say how its pictures were cut, as exports of earlier releases; the central "
        "square is assumed, and is wrong for shards of --fit, --crop-pct or data.centre_crop (irkd export says it)"
    )


def _manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    try:
        told = json.loads(files.read(file))
        kinds = {"classes": list, "mean": list, "std": list, "size": int, "taps": list, "method": str}
        wrong = [key for key, kind in kinds.items() if not isinstance(told[key], kind)]
        wrong += [] if told.get("geometry") is None or is_geometry(told["geometry"]) else ["geometry"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read: {one_line(error)}") from error
    if wrong or len(told["mean"]) != 3 or len(told["std"]) != 3:
        raise UserError(f"{file} is altered: {', '.join(wrong) or 'mean, std'}")
    return told


def _seen(model: Model, file: Path) -> np.ndarray | str:
    """What evaluation sees of a picture, (r, r, 3) uint8; a line where it cannot be read."""
    try:
        whole = pictures.load(Raw(str(file), file)).image
        return np.asarray(model.geometry.square(whole, model.size))
    except Exception as error:  # a damaged file makes Pillow raise anything
        return f"{file}: {one_line(error)}"


def _normalised(model: Model, seen: np.ndarray) -> np.ndarray:
    mean, std = (np.asarray(v, np.float32).reshape(3, 1, 1) for v in (model.mean, model.std))
    return ((seen.transpose(2, 0, 1).astype(np.float32) / np.float32(255)) - mean) / std


def _write_overlays(
    model: Model, x: np.ndarray, seen: Sequence[np.ndarray], names: Sequence[Path], folder: Path,
    taken: dict[str, int],
) -> None:  # fmt: skip
    """PNGs, side by side: the picture, and the picture under its saliency (the mean over the taps)."""
    import torch
    from matplotlib import colormaps

    from irkd_dist.distill import saliency

    assert model.student is not None
    maps = saliency.mean_map(model.student.saliency_maps(torch.from_numpy(x)))
    folder.mkdir(parents=True, exist_ok=True)
    large = max(model.size, 224)
    for picture, heat, name in zip(
        seen, saliency.resize_map(maps, (large, large)).numpy(), names, strict=True
    ):
        wide = Image.fromarray(picture).resize((large, large), Image.Resampling.NEAREST)
        colours = Image.fromarray((colormaps["inferno"](heat)[..., :3] * 255).astype(np.uint8))
        both = Image.new("RGB", (2 * large, large))
        both.paste(wide, (0, 0))
        both.paste(Image.blend(wide, colours, 0.6), (large, 0))
        count = taken[name.stem] = taken.get(name.stem, -1) + 1
        target = folder / f"{name.stem}{f'-{count}' if count else ''}.png"
        while count and target.exists():
            count += 1
            target = folder / f"{name.stem}-{count}.png"
        both.save(target)
