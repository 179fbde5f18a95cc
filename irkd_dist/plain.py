"""YAML text to plain values (mappings, lists, texts, numbers, booleans, null) and back, strictly.

Tags, repeated keys, keys that are no words, values left out, and trees that explode or are too deep are errors.
`1e-4` is a number, a date a text; `010` and `1:30` are texts, where YAML 1.1 would make 8 and 90 of them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.nodes import MappingNode, Node, ScalarNode

from irkd_dist.errors import UserError, one_line, printable, unreadable

MAX_BYTES, MAX_DEPTH, MAX_NODES = 2**20, 50, 100_000
_TAG = "tag:yaml.org,2002:"
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|\.(?:inf|Inf|INF))\Z|\.(?:nan|NaN|NAN)\Z"
)
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)\Z")


class _Loader(yaml.SafeLoader):
    """Refuses while it reads; the message has the line."""

    depth = 0
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [
            (tag, pattern) for tag, pattern in known if tag.removeprefix(_TAG) in ("bool", "null", "merge")
        ]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event: Any = self.peek_event()
        if getattr(event, "tag", None) not in (None, "!"):
            raise ComposerError(
                None, None, f"tags such as {_short_tag(event.tag)} are not taken", event.start_mark
            )
        if self.depth == MAX_DEPTH:
            raise ComposerError(None, None, f"more than {MAX_DEPTH} levels deep", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        node: MappingNode = super().compose_mapping_node(anchor)
        if node.flow_style:
            node.value = [self._with_value(key, value) for key, value in node.value]
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag not in (f"{_TAG}str", f"{_TAG}merge"):
                raise ComposerError(None, None, f"key {_text(key)} is no word; quote it", key.start_mark)
            if key.value in seen:
                raise ComposerError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return node

    def _with_value(self, key: Node, value: Node) -> tuple[Node, Node]:
        """`{depth:3}` means `{depth: 3}`: YAML would make one key `depth:3` of it, without a value."""
        if value.start_mark.index < value.end_mark.index or not isinstance(value, ScalarNode) or value.style:
            return key, value
        name, colon, rest = str(key.value).partition(":")
        if not colon or not rest or not isinstance(key, ScalarNode) or key.style:
            raise ComposerError(None, None, f"key {_text(key)} has no value", key.start_mark)
        written = yaml.compose(rest, Loader=type(self))
        assert written is not None
        return ScalarNode(f"{_TAG}str", name, key.start_mark, key.end_mark), written


_Loader.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+0123456789."))
_Loader.add_implicit_resolver(f"{_TAG}int", _INT, list("-+0123456789"))


class _Dumper(yaml.SafeDumper):
    """Writes a text that our reader, or another one, would take for a number in quotes."""


_Dumper.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+0123456789."))


def read(file: Path) -> Any:
    """The value that a YAML file holds; null if it is empty.

    Raises:
        UserError: not readable, not YAML, or refused by the rules above.
    """
    try:
        with file.open("rb") as handle:
            content = handle.read(MAX_BYTES + 1)
    except OSError as error:
        raise unreadable(file, error) from error
    return parse(content, f"{file} is not YAML")


def parse(text: str | bytes, where: str) -> Any:
    """The value of a text; `where` begins the message of an error."""
    return _parse(text, where)[0]


def parse_whole(text: str, where: str) -> Any:
    """The value of a short text, in which nothing may be a comment."""
    value, end = _parse(text, where)
    if end is not None and (rest := text[end:].strip()):
        raise UserError(f"{where}: {rest!r} would not be read; quote the whole value")
    return value


def dump(value: Any) -> str:
    """A value as YAML that `read` reads back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False)


def _parse(text: str | bytes, where: str) -> tuple[Any, int | None]:
    if len(text) > MAX_BYTES:
        raise UserError(f"{where}: it has more than {MAX_BYTES} bytes")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, None
        _measure(node, {})
        value = json.loads(json.dumps(loader.construct_document(node)))  # what aliases share becomes separate
    except yaml.YAMLError as error:
        raise UserError(f"{where}: {_reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {one_line(error)}") from error
    return value, node.end_mark.index


def _measure(node: Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """(nodes, levels) below a node with its aliases written out; each node is looked at once."""
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise ComposerError(None, None, "an alias refers to what it stands in", node.start_mark)
        return size
    known[id(node)] = None
    children = [] if isinstance(node, ScalarNode) else node.value
    if isinstance(node, MappingNode):
        children = [child for pair in node.value for child in pair]
    sizes = [_measure(child, known) for child in children]
    count, depth = 1 + sum(s[0] for s in sizes), 1 + max((s[1] for s in sizes), default=0)
    if count > MAX_NODES or depth > MAX_DEPTH:
        what = f"more than {MAX_NODES} values" if count > MAX_NODES else f"more than {MAX_DEPTH} levels deep"
        raise ComposerError(None, None, f"{what}, with its aliases written out", node.start_mark)
    known[id(node)] = count, depth
    return count, depth


def _reason(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        context = f"{error.context}: " if error.context else ""
        return f"line {error.problem_mark.line + 1}: {context}{error.problem}"
    return one_line(error)


def _text(node: Node) -> str:
    return repr(node.value) if isinstance(node, ScalarNode) else "(a list or mapping)"


def _short_tag(tag: str) -> str:
    return tag.replace(_TAG, "!!")


def keys_of(text: str) -> list[str | int] | None:
    """The parts of `a.b[0].c` or `a.b.0.c`; None if it is no key."""
    if not re.fullmatch(r"[^\s.\[\]=]+(\[\d{1,6}\]|\.[^\s.\[\]=]+)*", text):
        return None
    first, *others = re.findall(r"[^\s.\[\]=]+", text)
    return [first, *(int(part) if re.fullmatch(r"\d{1,6}", part) else part for part in others)]


def put(tree: Any, keys: list[str | int], value: Any) -> None:
    """Put a value into a tree, making the mappings on the way; null counts as an empty one.

    Raises:
        LookupError: a list has no such entry, or there is no list or mapping; with the reason.
    """
    *way, last = keys
    for done, key in enumerate(way):
        below = _at(tree, key, way[:done])
        if below is None:
            below = tree[key] = {}
        tree = below
    _at(tree, last, way)
    tree[last] = value


def _at(tree: Any, key: str | int, way: list[str | int]) -> Any:
    if isinstance(tree, dict) and isinstance(key, str):
        return tree.get(key)
    if isinstance(tree, list) and isinstance(key, int) and key < len(tree):
        return tree[key]
    kind = f"a list of {len(tree)}, numbered from 0" if isinstance(tree, list) else "no list"
    raise LookupError(
        f"{path(way)} is {kind if isinstance(tree, list) or isinstance(key, int) else 'no mapping'}"
    )


def path(keys: list[str | int]) -> str:
    """`a.b[0].c`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".")


def leaves(tree: Any, way: tuple[str | int, ...] = ()) -> Iterator[tuple[list[str | int], Any]]:
    """(keys, value) of everything in a tree that is no mapping or list with something in it."""
    if tree and isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, (*way, str(key)))
    elif tree and isinstance(tree, (list, tuple)):
        for index, value in enumerate(tree):
            yield from leaves(value, (*way, index))
    else:
        yield [*way], tree


def odd(tree: Any) -> tuple[str, str] | None:
    """The first (key, what is wrong with it): a number that is not finite, a control character, or broken UTF-8."""
    for way, value in leaves(tree):
        for text in (*way, value):
            if isinstance(text, str) and printable(text) != text:
                return path(way), f"{path(way)!r}: {text!r} has a control character, or is no UTF-8"
        if isinstance(value, float) and not math.isfinite(value):
            return path(way), f"{path(way)}={value}: input should be a finite number"
    return None
