"""A configuration file and its overrides, read to plain values by the types of the keys; and how a wrong one is named.

Nothing here knows the configuration itself: `root` is its dataclass.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irkd_dist import keys, plain
from irkd_dist.errors import UserError
from irkd_dist.keys import PATH


@dataclass(frozen=True)
class Origin:
    """Where values came from: a file, and the overrides of some, each (key, how to name it)."""

    file: str
    overrides: tuple[tuple[str, str], ...] = ()

    def of(self, key: str) -> str:
        """The last override of a key, of one above or below it, or else the file."""
        named = [
            s
            for k, s in self.overrides
            if f"{key}.".startswith((f"{k}.", f"{k}[")) or k.startswith(f"{key}.")
        ]
        return named[-1] if named else self.file


def mapping(file: Path) -> dict[str, Any]:
    """The keys and values of a file."""
    tree = plain.read(file)
    if tree is not None and not isinstance(tree, dict):
        raise UserError(f"{file} is not a mapping of keys to values")
    return tree or {}


def apply(tree: dict[str, Any], override: str, root: type) -> tuple[str, str]:
    """Put an override into a tree; returns its key and how to name it."""
    key, separator, text = override.removeprefix("--").partition("=")
    way, shown = plain.keys_of(key), f"override {short(override)}"
    if not separator or way is None:
        raise UserError(f"{shown} is not of the form key=value or --key=value")
    try:
        plain.put(tree, way, value_of(text, keys.find(root, way), shown))
    except LookupError as error:
        raise UserError(f"{shown} does not fit: {error.args[0]}") from error
    return plain.path(way), shown


def value_of(text: str, annotation: Any, shown: str) -> Any:
    """What an override gives its key: where that takes a text, the text as it stands, else what YAML makes of it."""
    if annotation is None or not keys.is_text(annotation):
        return _none_to_null(plain.parse(text, shown))
    if text in ("", "null", "None") or (text == "~" and keys.may_be_null(annotation)):
        return None
    if text[0] in "'\"" and text[-1] == text[0] and len(text) > 1:
        return plain.parse(text, shown)
    return text


def _none_to_null(value: Any) -> Any:
    """Python's None as W&B writes it, `None` in the midst of lists and mappings, is YAML's null."""
    if isinstance(value, dict):
        return {k: _none_to_null(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_none_to_null(v) for v in value]
    return None if value == "None" else value


def resolved(tree: dict[str, Any], root: type, where: Origin) -> tuple[dict[str, Any], dict[str, str]]:
    """A tree with its `${...}` resolved, and those of operational keys and paths as they were written.

    They name places and may hold secrets. What a network is built from is kept as a value: a checkpoint needs it.
    """
    written = {plain.path(way): value for way, value in plain.leaves(tree) if "${" in str(value)}
    if not written:
        return tree, {}
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        values: Any = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except (OmegaConfBaseException, ValueError, TypeError, RecursionError) as error:
        key = str(getattr(error, "full_key", None) or "")
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{where.of(key)}: {key}={short(written.get(key))}: {reason}") from error
    references = {}
    for way, annotation, value in [*keys.walk(values, root)]:
        key = plain.path(way)
        if key not in written:
            continue
        if isinstance(value, dict):
            raise UserError(
                f"{where.of(key)}: {key}={written[key]!r} stands for a mapping; it may stand for one value"
            )
        if isinstance(value, str) and not keys.is_text(annotation):
            plain.put(values, way, plain.parse(value, f"{where.of(key)}: {key}={written[key]!r}"))
        elif keys.marked(annotation, PATH) or keys.is_operational(root, key):
            references[key] = written[key]
    return values, references


def expand_home(values: dict[str, Any], root: type, where: Origin) -> None:
    """Put the home folder in the place of a leading ~ in every path."""
    for way, annotation, value in [*keys.walk(values, root)]:
        if keys.marked(annotation, PATH) and isinstance(value, str) and value.startswith("~"):
            expanded = os.path.expanduser(value)
            if expanded.startswith("~"):
                key = plain.path(way)
                raise UserError(
                    f"{where.of(key)}: {key}={value!r}: there is no such home folder; write it out"
                )
            plain.put(values, way, expanded)


def explain(errors: Sequence[Any], root: type, origin: Origin) -> str:
    """One line for the first three keys; what each branch of a union says of a key is joined."""
    found: dict[str, list[str]] = {}
    for error in errors:
        key, subject, message = _explain_one(error, root)
        found.setdefault(f"{origin.of(key)}: {subject}", []).append(message)
    lines = [subject + (f": {' or '.join(said)}" if any(said) else "") for subject, said in found.items()]
    return "; and ".join(lines[:3]) + (f"; and {len(lines) - 3} more" if len(lines) > 3 else "")


def _explain_one(error: Any, root: type) -> tuple[str, str, str]:
    """The key, it with its value, and what is wrong with that."""
    unknown = error["type"] in ("unexpected_keyword_argument", "extra_forbidden")
    way = _way(error["loc"], unknown, root)
    key, value = plain.path(way), short(error["input"])
    if unknown:
        known = [name for name in keys.of(_owner(way, root)) if name != "references"]
        close = difflib.get_close_matches(str(way[-1]).lower(), known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        return key, f"unknown key {key}={value}; {hint}", ""
    if error["type"] == "missing":
        return key, f"{key} is missing", ""
    message, hint = error["msg"][0].lower() + error["msg"][1:], ""
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        close = difflib.get_close_matches(error["input"], re.findall(r"'([^']+)'", message), n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]}?" if close else ""
    return key, f"{key}={value}", message + hint


def _way(location: tuple[str | int, ...], unknown: bool, root: type) -> list[str | int]:
    """The keys in pydantic's location, where a union's branch, a type's name, stands too."""
    way: list[str | int] = []
    for place, part in enumerate(location):
        last = unknown and place == len(location) - 1
        if isinstance(part, int) or last or keys.find(root, [*way, part]) is not None:
            way.append(part)
    return way


def _owner(way: list[str | int], root: type) -> type:
    above = keys.find(root, way[:-1])
    return root if above is None else keys.below(above) or root


def short(value: object) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"
