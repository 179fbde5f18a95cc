"""Writes docs/configuration.md from the typed tree of irkd_dist/config.py: `python pages/reference.py`."""

from __future__ import annotations

import ast
import inspect
import io
import json
import tokenize
import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from irkd_dist import keys
from irkd_dist.config import Config
from irkd_dist.keys import OPERATIONAL, PATH

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
HEAD = """\
# Configuration

One YAML file is one experiment. A key is given in the file or as an override (`irkd train CONFIG optim.lr=1e-3`); one
that is not given has its default. `irkd train CONFIG --print-config` shows the whole tree; what values may look like is
in [operations.md](operations.md#configurations). A *semantic* key changes the numbers: it may not differ when a run is
resumed. An *operational* one may. This page is written by `python pages/reference.py` from `irkd_dist/config.py`.
"""
SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
WORDS = {
    int: "integer",
    float: "number",
    str: "text",
    bool: "true or false",
    types.NoneType: "null",
    Any: "anything",
}
SAME = ("teacher.model.", "teacher.ensemble[i].model.")  # the keys of `student` again: told once
HIDDEN = {"references"}  # no key: what `${...}` stood for


def page() -> str:
    """The whole page as Markdown."""
    return HEAD + "".join(chain.from_iterable(_section(Config, "", False)))


def _section(kind: type, prefix: str, operational: bool) -> Iterator[str]:
    """A heading and a table for a mapping of the tree, then for those below it."""
    title = f"{'#' * min(2 + prefix.count('.'), 4)} {prefix.strip('.')}" if prefix else "## At the top"
    yield f"\n{title}\n\n{' '.join(inspect.cleandoc(kind.__doc__ or '').split())}\n\n"
    yield "| key | type | default | | what |\n|---|---|---|---|---|\n"
    said, below = remarks(kind), list[tuple[type, str, bool]]()
    for field in fields(kind):
        if field.name in HIDDEN:
            continue
        annotation = keys.of(kind)[field.name]
        free = operational or keys.marked(annotation, OPERATIONAL)
        key = f"{prefix}{field.name}"
        inner = keys.below(annotation)
        if inner is not None:
            many = "[i]" if any(get_origin(a) is list for a in keys.alternatives(annotation)) else ""
            below.append((inner, f"{key}{many}.", free))
        what = said[field.name] or (" ".join((inner.__doc__ or "").split()) if inner else "")
        if f"{key}." in SAME:
            what += "; its keys are those of `student`"
        mark = "operational" if free else "semantic"
        yield f"| `{key}` | {words(annotation)} | {_default(field)} | {mark} | {_cell(what)} |\n"
    for inner, key, free in below:
        if key not in SAME:
            yield from _section(inner, key, free)


def remarks(kind: type) -> dict[str, str]:
    """What the comments above and behind each key of a dataclass, or of those it inherits from, say."""
    found = dict[str, str]()
    for each in reversed(kind.__mro__):
        if is_dataclass(each):
            found |= _own_remarks(inspect.cleandoc("\n" + inspect.getsource(each)))
    return found


def _own_remarks(source: str) -> dict[str, str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    found, after = dict[str, str](), 0
    for statement in body.body:
        assert statement.end_lineno is not None
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            lines = range(after + 1, statement.end_lineno + 1)
            found[statement.target.id] = " ".join(comments[n] for n in lines if n in comments)
        after = statement.end_lineno
    return found


def words(annotation: Any) -> str:
    """What a key takes, in words: `integer > 0, or null`."""
    parts = [*dict.fromkeys(_words(annotation))]
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} or {parts[-1]}"


def _words(annotation: Any) -> Iterator[str]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        limits = " and ".join(_limits(arguments[1:]))
        whole = "path" if PATH in arguments else None
        for word in _words(arguments[0]):
            yield (
                whole
                if whole and word == "text"
                else f"{word} {limits}"
                if limits and word != "null"
                else word
            )
    elif origin in (Union, types.UnionType):
        for each in arguments:
            yield from _words(each)
    elif origin is Literal:
        yield from (f"`{value}`" for value in arguments)
    elif origin is list:
        yield f"list of ({words(arguments[0])})" if arguments[0] is not Any else "list"
    elif origin is tuple:
        yield f"[{', '.join(words(each) for each in arguments)}]"
    elif origin is dict or is_dataclass(annotation):
        yield "mapping"
    else:
        yield WORDS[annotation]


def _limits(marks: tuple[Any, ...]) -> Iterator[str]:
    for mark in marks:
        for each in mark.metadata if isinstance(mark, FieldInfo) else [mark]:
            for name, sign in SIGNS.items():
                if (limit := getattr(each, name, None)) is not None:
                    yield f"{sign} {_number(limit)}"


def _number(value: float) -> str:
    size = abs(value)
    if isinstance(size, int) and size > 4096 and size.bit_count() == 1:
        return f"{'-' if value < 0 else ''}2^{size.bit_length() - 1}"
    return f"{value:,}"


def _default(field: Field[Any]) -> str:
    value = field.default if field.default_factory is MISSING else field.default_factory()
    if value is MISSING:
        return "to be given"
    if is_dataclass(value) and not isinstance(value, type):
        return "below" if asdict(value) else ""
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
