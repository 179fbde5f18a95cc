"""What the types of a tree of dataclasses say of its keys: their own type, their marks, the names beside them."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Mark:
    """What is written at a key besides its type, as in `Annotated[str, OPERATIONAL, PATH]`."""

    name: str


OPERATIONAL = Mark("operational")  # this key, or all below it, may change on resume: the numbers stay
PATH = Mark("path")  # a leading ~ is the home folder


@functools.cache
def of(kind: type) -> dict[str, Any]:
    """The keys of a dataclass with their annotations."""
    return get_type_hints(kind, include_extras=True)


def marked(annotation: Any, mark: Mark) -> bool:
    """Whether a mark is written at a key."""
    return mark in getattr(annotation, "__metadata__", ())


def alternatives(annotation: Any) -> list[Any]:
    """The types that a key takes, without what is annotated: `[str, NoneType]`."""
    if get_origin(annotation) is Annotated:
        return alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [each for part in get_args(annotation) for each in alternatives(part)]
    return [annotation]


def is_text(annotation: Any) -> bool:
    """Whether a key takes a text and nothing else (but null)."""
    return {str, types.NoneType} >= set(map(_hashable, alternatives(annotation))) != {types.NoneType}


def may_be_null(annotation: Any) -> bool:
    """Whether a key takes null."""
    return types.NoneType in alternatives(annotation)


def below(annotation: Any) -> type | None:
    """The dataclass that a key's value, or each entry of its list, is."""
    for each in alternatives(annotation):
        if is_dataclass(each):
            return each  # type: ignore[return-value]
        if get_origin(each) is list and (found := below(get_args(each)[0])):
            return found
    return None


def find(root: type, way: list[str | int]) -> Any:
    """The annotation of a key; None if the tree has no such key, or it is within a value of free form."""
    kind: type | None = root
    annotation: Any = None
    for part in way:
        if isinstance(part, int):
            continue
        annotation = of(kind).get(part) if kind is not None else None
        kind = below(annotation) if annotation is not None else None
    return annotation


def operational(root: type, prefix: str = "") -> Iterator[str]:
    """Each operational key, `a.b`; one that stands for all below it is named alone."""
    for name, annotation in of(root).items():
        if marked(annotation, OPERATIONAL):
            yield prefix + name
        elif (kind := below(annotation)) is not None:
            yield from operational(kind, f"{prefix}{name}.")


def is_operational(root: type, key: str) -> bool:
    """Whether a key `a.b`, or one above it, is operational."""
    return any(key == marked or key.startswith(f"{marked}.") for marked in operational(root))


def walk(
    tree: Any, root: type, way: tuple[str | int, ...] = ()
) -> Iterator[tuple[list[str | int], Any, Any]]:
    """(keys, annotation, value) of each key of a tree of plain values that the dataclasses have."""
    if isinstance(tree, list):
        for index, entry in enumerate(tree):
            yield from walk(entry, root, (*way, index))
    elif isinstance(tree, dict):
        for name, annotation in of(root).items():
            if name in tree:
                yield [*way, name], annotation, tree[name]
                if (kind := below(annotation)) is not None:
                    yield from walk(tree[name], kind, (*way, name))


def _hashable(kind: Any) -> Any:
    return kind if isinstance(kind, type) else object
