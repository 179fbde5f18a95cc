"""Class names: those that a source has, the numbers where it has none, or the names and order that the user gives."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from irkd_dist.data.sources.base import Source
from irkd_dist.data.sources.common import fingerprint, reading
from irkd_dist.errors import UserError, printable


def class_name(raw: str) -> tuple[str, str | None]:
    """A class's name as text, and a note if it had to be reinterpreted.

    A folder's name that is not UTF-8 is read as Latin-1; control characters are escaped.
    """
    name = raw
    if raw != raw.encode(errors="replace").decode():  # it holds bytes that are not UTF-8
        name = os.fsencode(raw).decode("latin1")
    name = printable(name)
    return name, None if name == raw else f"class name {os.fsencode(raw)!r} is read as {name!r}"


def given(text: str) -> tuple[str, ...]:
    """The names of --classes: a file with one a line, or names with commas between. Raises UserError."""
    file, names = Path(text), text.split(",")
    if os.path.exists(text) or len(names) == 1:  # not file.exists(): a long list is no name of a file
        with reading(file, ValueError):
            if not os.path.isfile(text):
                raise UserError(f"--classes {text} is no file, and no list of names such as cat,dog")
            names = file.read_text("utf-8-sig").splitlines()
    names = [printable(name.strip()) for name in names]
    while names and not names[-1]:
        names.pop()
    if "" in names or len(set(names)) < len(names) or not names:
        twice = next((name for name in names if names.count(name) > 1), "")
        raise UserError(
            f"--classes {text}: each class needs a name of its own, {twice!r} is there twice or empty"
        )
    return tuple(names)


def named(source: Source, names: tuple[str, ...] | None) -> Source:
    """The source with its classes named, its labels 0 to K - 1, and notes on what that changed. Raises UserError."""
    if not source.classes:
        source = _numbered(source, names)
    elif names is not None:
        source = _in_order(source, source.classes, names)
    if len(set(source.classes)) < len(source.classes):
        twice = next(name for name in source.classes if source.classes.count(name) > 1)
        raise UserError(f"source {source.name}: two classes are called {twice!r}; rename one")
    if names is not None:
        source = replace(source, fingerprint=fingerprint(source.fingerprint, names))
    return replace(source, notes=(*source.notes, *_without_images(source)))


def _numbered(source: Source, names: tuple[str, ...] | None) -> Source:
    """Labels that are numbers only: those that exist become 0 to K - 1, called by their number or by `names`."""
    found = _labels(source)
    if names is None:
        return replace(_renumbered(source, found), classes=tuple(map(str, found)))
    if not found or (found[0] >= 0 and found[-1] < len(names)):
        return replace(source, classes=names)
    if len(found) != len(names):
        raise UserError(
            f"--classes gives {len(names)} names, but the labels of {source.name} are {_span(found)}; "
            f"give {len(found)} names, or {found[-1] + 1} for 0 to {found[-1]}"
        )
    return replace(_renumbered(source, found), classes=names)


def _labels(source: Source) -> list[int]:
    """The labels that exist, ascending; -1, which means that there is none, is left to whom checks labels."""
    found = np.unique(np.concatenate([*source.labels.values(), np.zeros(0, np.int64)]))
    return [int(label) for label in found if label >= 0]


def _renumbered(source: Source, found: list[int]) -> Source:
    if found == list(range(len(found))):
        return source
    order = np.array(found)
    labels = {
        split: np.where(old < 0, old, np.searchsorted(order, old)) for split, old in source.labels.items()
    }
    note = f"labels {_span(found)} became 0 to {len(found) - 1}: no class without an image"
    # another plan: a render from before labels were renumbered must not be mixed with this one
    digest = fingerprint(source.fingerprint, found)
    return replace(source, labels=labels, fingerprint=digest, notes=(*source.notes, note))


def _span(found: list[int]) -> str:
    if len(found) == found[-1] - found[0] + 1:  # they ascend
        return f"{found[0]} to {found[-1]}"
    shown = ", ".join(map(str, found[:6]))
    return f"{shown}, ... {found[-1]} ({len(found)} of them)" if len(found) > 6 else shown


def _in_order(source: Source, own: Sequence[str], names: tuple[str, ...]) -> Source:
    """Classes that have names: the same ones in another order, or as many new ones."""
    missing = [name for name in own if name not in names]
    if not missing:
        place = np.array([names.index(name) for name in own])
        labels = {split: np.where(old < 0, old, place[old]) for split, old in source.labels.items()}
        return replace(source, labels=labels, classes=names)
    if len(missing) == len(own) == len(names):
        pairs = ", ".join(f"{old!r} is {new!r}" for old, new in zip(own[:3], names, strict=False))
        note = f"classes renamed by --classes: {pairs}{', ...' if len(own) > 3 else ''}"
        return replace(source, classes=names, notes=(*source.notes, note))
    raise UserError(
        f"--classes has no {missing[0]!r}, a class of {source.name}; give all {len(own)} in the order you want "
        f"({', '.join(map(repr, own[:5]))}{', ...' if len(own) > 5 else ''}), or {len(own)} other names"
    )


def _without_images(source: Source) -> tuple[str, ...]:
    train = source.labels.get("train", np.zeros(0, np.int64))
    empty = [name for label, name in enumerate(source.classes) if not (train == label).any()]
    if not empty or not train.size:
        return ()
    shown = ", ".join(map(repr, empty[:5])) + (", ..." if len(empty) > 5 else "")
    count = "1 class has" if len(empty) == 1 else f"{len(empty)} classes have"
    return (f"{count} no image in train: {shown}",)
