"""A tree of image folders, one for each class."""

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from irkd_dist.data.sources.base import Raw, Source
from irkd_dist.data.sources.common import IMAGE_SUFFIXES, SPLITS, fingerprint, ordered
from irkd_dist.errors import UserError


def open_folder(path: Path) -> Source:
    top = _subfolders(path)
    if not top:
        raise UserError(
            f"--path {path} has no class folders: it should hold one folder of images for each class"
        )
    split_layout = all(d.name.lower() in SPLITS and _subfolders(d) for d in top)
    roots = {SPLITS[d.name.lower()]: d for d in top} if split_layout else {"train": path}
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
        labels=ordered(labels),
        masks=False,
        fingerprint=fingerprint("folder", files, sizes),
        read=functools.partial(_read, path, files),
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
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith("."):
                file = os.path.join(parent, name)
                found.append((file, os.stat(file).st_size if os.path.exists(file) else -1))
    if not found:
        raise UserError(
            f"class folder {folder} is empty: no {', '.join(sorted(IMAGE_SUFFIXES))} in it; fill or remove it"
        )
    return sorted(found)


def _read(path: Path, files: dict[str, list[str]], split: str, indices: Sequence[int]) -> Iterator[Raw]:
    for i in indices:
        yield Raw(str(path / files[split][i]), path / files[split][i])
