"""A tree of image folders, one for each class."""

from __future__ import annotations

import functools
import itertools
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from irkd_dist.data.sources.base import Raw, Source
from irkd_dist.data.sources.common import SPLITS, fingerprint, is_hidden, kind_of, ordered, refuse, said
from irkd_dist.data.sources.naming import class_name
from irkd_dist.data.sources.suffixes import image_suffixes
from irkd_dist.errors import UserError, reason


def open_folder(path: Path) -> Source:
    if not path.is_dir():
        raise UserError(
            f"--path {path} is a file; source folder needs a folder with one folder for each class"
        )
    notes: list[str] = []
    roots = _roots(path, notes)
    folders = {split: _class_folders(root, path, notes) for split, root in roots.items()}
    names = [folder.name for folder in folders["train"]]
    walk = _Walk([folder for listed in folders.values() for folder in listed])
    files: dict[str, list[str]] = {}
    labels: dict[str, np.ndarray] = {}
    sizes: list[int] = []
    for split, listed in folders.items():
        if split != "train" and not any(folder.name in names for folder in listed):
            left = sum(len(walk.images(folder)) for folder in listed) + _count_images(roots[split])
            name = roots[split].name
            notes.append(f"{name}/ has no folder of a class in train: its {left} images are left out")
            continue
        files[split], numbers = [], []
        for folder in listed:
            if folder.name not in names:
                raise UserError(f"{folder}: class {folder.name!r} has no folder in {roots['train']}")
            images = walk.images(folder)
            if not images and split == "train":
                raise UserError(
                    f"class folder {folder} is empty: no image in it{walk.why()}; fill or remove it"
                )
            files[split] += [os.path.relpath(file, path) for file, _ in images]
            sizes += [size for _, size in images]
            numbers += [names.index(folder.name)] * len(images)
        labels[split] = np.array(numbers, dtype=np.int64)
    classes, renamed = zip(*(class_name(name) for name in names), strict=True) if names else ((), ())
    return Source(
        kind="folder",
        name=class_name(path.resolve().name)[0],
        classes=classes,
        labels=ordered(labels),
        masks=False,
        fingerprint=fingerprint("folder", files, sizes),
        read=functools.partial(_read, path, files),
        notes=(*notes, *_same_folders(folders), *said(walk.left), *filter(None, renamed)),
    )


def _roots(path: Path, notes: list[str]) -> dict[str, Path]:
    """The folders that hold the class folders of each split: `train/`, `val/` ... where there are such, else `path`."""
    top = _subfolders(path)
    if not top:
        raise UserError(
            f"--path {path} has no class folders: it should hold one folder of images for each class"
        )
    splits = [folder for folder in top if folder.name.lower() in SPLITS]
    others = [folder for folder in top if folder not in splits]
    found = {
        split: [f for f in splits if SPLITS[f.name.lower()] == split] for split in ("train", "val", "test")
    }
    classes_in_train = any(_subfolders(folder) for folder in found["train"])
    alone = (
        classes_in_train and not any(map(_count_images, found["train"])) and not any(map(_subfolders, others))
    )
    if others and not (alone or (classes_in_train and len(splits) > 1)):
        notes += [f"{folder.name}/ is taken for a class: beside it is {others[0].name}/" for folder in splits]
        return {"train": path}
    if not found["train"]:
        raise UserError(f"--path {path} has no train folder beside {', '.join(d.name for d in top)}")
    for split, folders in found.items():
        if len(folders) > 1:
            raise UserError(
                f"two folders of {split} images: {' and '.join(map(str, folders))}; remove or join one"
            )
    if not classes_in_train:
        raise UserError(
            f"{found['train'][0]} has no class folders ({_count_images(found['train'][0])} images beside each "
            "other): it should hold one folder of images for each class"
        )
    roots = {SPLITS[folder.name.lower()]: folder for folder in splits}  # in the order of their names
    for folder in others:
        notes.append(f"{folder.name}/ is beside the folders of splits and is left out")
    return roots


def _subfolders(path: Path) -> list[Path]:
    try:
        return sorted(d for d in path.iterdir() if d.is_dir() and not is_hidden(d.name))
    except OSError as error:
        refuse(error)
        raise


def _class_folders(root: Path, path: Path, notes: list[str]) -> list[Path]:
    """The class folders of one split; a link that leads above the split, or into another class of it, is no class."""
    folders = _subfolders(root)
    if folders:
        notes += said(_loose(root), f" beside the class folders of {root.name}/")
    taken: dict[str, Path] = {}
    above = {os.path.realpath(base) for base in (root, path)}
    above |= {parent for base in above for parent in _parents(base)}
    real = {folder: os.path.realpath(folder) for folder in folders}
    for folder in sorted(folders, key=lambda folder: (folder.is_symlink(), -len(real[folder]), folder)):
        into = next((taken[at] for at in (real[folder], *_parents(real[folder])) if at in taken), None)
        if folder.is_symlink() and (into or real[folder] in above):
            where = f"{into.name}/" if into else "what holds other classes"
            notes.append(f"{os.path.relpath(folder, path)}/ is a link to {where} and is left out")
            continue
        taken[real[folder]] = folder
        above.update(_parents(real[folder]))
    return sorted(taken.values())


def _parents(path: str) -> Iterator[str]:
    while (parent := os.path.dirname(path)) != path:
        yield (path := parent)


def _loose(folder: Path) -> Counter[str]:
    """Files right in a folder, by kind."""
    return Counter(kind_of(file.name) for file in folder.iterdir() if not file.is_dir())


def _count_images(folder: Path) -> int:
    return sum(count for kind, count in _loose(folder).items() if kind.lower() in image_suffixes())


def _same_folders(folders: dict[str, list[Path]]) -> Iterator[str]:
    """A note on class folders that two splits share by links."""
    real = {split: {os.path.realpath(folder) for folder in listed} for split, listed in folders.items()}
    for one, other in itertools.combinations(real, 2):
        if count := len(real[one] & real[other]):
            yield f"{count} class folders of {one} are those of {other} too: the same images are in both"


@dataclass
class _Walk:
    """Finds the images of class folders, each once and under its own class; `left` counts what it leaves out."""

    classes: list[Path]
    left: Counter[str] = field(default_factory=Counter)
    _here: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._real = {os.path.realpath(folder) for folder in self.classes}
        self._above = {parent for real in self._real for parent in _parents(real)}
        self._seen: set[str] = set()  # folders and linked files outside the class folders

    def images(self, folder: Path) -> list[tuple[str, int]]:
        """(file, bytes) of every image in a class folder, sub-folders included, sorted; -1: a link to nothing."""
        found: list[tuple[str, int]] = []
        self._here = Counter()
        self._walk(str(folder), found)
        self.left += self._here
        return sorted(found)

    def why(self) -> str:
        """What the folder walked last holds instead of images."""
        return "".join(said(self._here)).replace("left out:", ",")

    def _walk(self, start: str, found: list[tuple[str, int]]) -> None:
        folders = [start]
        while folders:
            folder = folders.pop()
            try:
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except OSError as error:
                raise UserError(f"cannot list {folder}: {reason(error)}") from error
            for entry in entries:
                if is_hidden(entry.name):
                    self._here["hidden"] += 1
                elif entry.is_dir():
                    if not entry.is_symlink() or self._is_new(entry.path, True):
                        folders.append(entry.path)
                elif os.path.splitext(entry.name)[1].lower() not in image_suffixes():
                    self._here[kind_of(entry.name)] += 1
                elif not entry.is_symlink() or self._is_new(entry.path, False):
                    self._take(entry, found)

    def _take(self, entry: os.DirEntry[str], found: list[tuple[str, int]]) -> None:
        try:
            status = entry.stat()
        except OSError:  # a link to nothing: an image that cannot be read, named when it is
            found.append((entry.path, -1))
            return
        if stat.S_ISREG(status.st_mode):
            found.append((entry.path, status.st_size))
        else:
            self._here["FIFO, device or socket"] += 1

    def _is_new(self, link: str, is_folder: bool) -> bool:
        """Whether a link leads out of all class folders, to what was not reached before; or to nothing at all."""
        if not os.path.exists(link):
            return True
        real = os.path.realpath(link)
        inside = any(at in self._real for at in (real, *_parents(real)))
        if inside or (is_folder and real in self._above) or real in self._seen:
            self._here["link to a folder or file that is read already"] += 1
            return False
        self._seen.add(real)
        return True


def _read(path: Path, files: dict[str, list[str]], split: str, indices: Sequence[int]) -> Iterator[Raw]:
    for i in indices:
        yield Raw(str(path / files[split][i]), path / files[split][i])
