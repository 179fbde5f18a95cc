"""Mutations of bytes, of trees of plain values, and of the texts that people write."""

from __future__ import annotations

import json
import random
from typing import Any

import yaml

NESTED: Any = []
for _ in range(400):
    NESTED = [NESTED]

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 12, 0.5, -0.0, 1e308, float("nan"), float("inf"), float("-inf"), 2**31,
    2**63, -(2**63),
    2**64, 10**12, 10**30, 10**400, "", "a", "1", "nan", "1e400", "../x", "/dev/null", "a\0b", "\x1b[31m",
    "[red]x[/b]", "\u00e9",
    "\udcff", "$x^{$", "${oc.env:HOME}", "${seed}", "${", "~", "x" * 10_000, [], {}, [[]], [None], {"a": 1}, {"": None},
    ["a", 1], NESTED, [0] * 100, "1_000", "\uff11", "None", "\u202e", "a\nb", "{}", "[1,", "%s",
    b"\xff".decode("latin1"),
]  # fmt: skip
TEXTS = (
    "!!binary aGVsbG8=", "!!python/object/apply:pathlib.PosixPath [a]", "!!set {a}", "!!timestamp 2020-01-01",
    "2020-01-01",
    "2020-13-01", "1:20:30", "0x1F", "0o17", "017", ".inf", "-.inf", ".nan", "&a [*a]", "*a", "<<: *kd", "<<: 1",
    "? [a]\n: 1", "- 1",
    "---", "...", "%YAML 9.9", "\t", "{", "}", "[", "]", ": ", " #", "|", ">", "!!omap [a: 1]", "@", "`", "'", '"',
    '"\\x00"',
    '"\\ud800"', "${oc.env:HOME}", "${oc.decode:1}", "${a.b}", "${..x}", "${data}", "${oc.create:{}}", "!<x> 1",
    "!!float x", "!!int x",
    "!!bool x", "!!null x", "1e999", "9" * 5000, "~", "null", "yes", "a: &b {c: *b}", "\ufeff", "\x85", "\u2028",
    "\0", "=", "!!value =",
)  # fmt: skip
INTERESTING = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    2**63 - 1,
    2**64 - 1,
)


def of_bytes(data: bytes, rng: random.Random) -> bytes:
    """Change, remove, double, insert, or exchange bytes."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(out) + 1)
        end = min(at + rng.choice((1, 2, 4, 16, 64, 512)), len(out))
        match rng.randrange(9):
            case 0 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(out):
                out[at] = rng.choice((0, 0xFF, 0x20, 0x0A, 0x2D, 0x30, 0x39, rng.randrange(256)))
            case 2:
                del out[at:end]
            case 3:
                out[at:at] = out[at:end]
            case 4:
                out[at:at] = rng.randbytes(rng.choice((1, 2, 8, 100)))
            case 5:
                size = rng.choice((1, 2, 4, 8))
                number = rng.choice(INTERESTING) % (1 << 8 * size)
                out[at : at + size] = number.to_bytes(size, rng.choice(("little", "big")))
            case 6:
                del out[at:]
            case 7:
                out[at:end] = bytes(end - at)
            case _:
                digits = [i for i, b in enumerate(out) if 0x30 <= b <= 0x39]
                if digits:
                    out[rng.choice(digits)] = rng.choice(b"0123456789-.")
    return bytes(out)


# ---- trees of plain values


def of_tree(tree: Any, rng: random.Random) -> Any:
    """Replace, remove, double, rename, or exchange something somewhere in a tree; the tree is changed."""
    places = [(None, None), *_places(tree)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        parent, key = rng.choice(places)
        if parent is None:
            if rng.random() < 0.2:
                return _value(rng)
            continue
        try:
            match rng.randrange(8):
                case 0 | 1 | 2:
                    parent[key] = _value(rng)
                case 3:
                    del parent[key]
                case 4 if isinstance(parent, dict):
                    parent[rng.choice(("", "a", "A1", "é", "x" * 300, str(key) + "2", "[red]", "a.b"))] = (
                        parent[key]
                    )
                case 4:
                    parent[key:key] = [parent[key]] * rng.choice((1, 2, 50))
                case 5:
                    parent[key] = rng.choice(([parent[key]], {"a": parent[key]}, str(parent[key])))
                case 6:
                    other, where = rng.choice(places[1:])
                    parent[key] = other[where]
                case _ if isinstance(parent[key], int | float):
                    parent[key] = rng.choice(
                        (-parent[key], parent[key] + 1, parent[key] * 10**6, float(parent[key]))
                    )
                case _:
                    parent[key] = _value(rng)
        except (KeyError, IndexError, OverflowError):
            continue
    return tree


def _value(rng: random.Random) -> Any:
    """One of VALUES, not to be changed by what is done to the tree next."""
    value = rng.choice(VALUES)
    return value.copy() if isinstance(value, dict | list) else value


def _places(tree: Any, depth: int = 0) -> list[tuple[Any, Any]]:
    if depth > 12:
        return []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = []
    for key, value in list(items):
        found.append((tree, key))
        found += _places(value, depth + 1)
    return found


def of_json(data: bytes, rng: random.Random) -> bytes:
    """A JSON document."""
    match rng.randrange(40):
        case 0:
            return b"[" * rng.choice((900, 100_000)) + data
        case 1:
            return data.replace(b"{", b'{"a": ' + b'{"a":' * 5000, 1)
        case 2:
            return rng.choice(
                (b"\xef\xbb\xbf" + data, data.decode().encode("utf-16"), data + data, b"", b"\0" + data)
            )
        case 3:
            return b'{"x": ' + b"9" * 5000 + b"," + data.lstrip()[1:]
    return dumped(of_tree(json.loads(data), rng))


def dumped(tree: Any) -> bytes:
    """As JSON, if it can be."""
    try:
        return json.dumps(tree).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return b"null"


def of_json_lines(data: bytes, rng: random.Random) -> bytes:
    """Lines of JSON: one changed, or their order."""
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    match rng.randrange(8):
        case 0:
            del lines[at]
        case 1:
            lines.insert(at, lines[rng.randrange(len(lines))])
        case 2:
            rng.shuffle(lines)
        case 3:
            del lines[at:]
        case 4:
            lines[at] = of_bytes(lines[at], rng)
        case _:
            lines[at] = of_json(lines[at], rng)
    return b"\n".join(lines) + rng.choice((b"\n", b"\n", b""))


def of_yaml(data: bytes, rng: random.Random) -> bytes:
    """A YAML document, as a tree or as text."""
    if rng.random() < 0.5:
        tree = of_tree(yaml.safe_load(data), rng)
        return yaml.dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")
    text = data.decode()
    places = [i for i, c in enumerate(text) if c in " \n:,[{"]
    at = rng.choice(places) + 1
    end = at if rng.random() < 0.5 else min((i for i in places if i > at), default=at)
    return (text[:at] + rng.choice(TEXTS) + text[end:]).encode()


def of_overrides(data: bytes, rng: random.Random) -> bytes:
    """Lines of key=value."""
    lines = data.decode(errors="surrogateescape").split("\n")
    at = rng.randrange(len(lines))
    key, _, value = lines[at].partition("=")
    match rng.randrange(6):
        case 0:
            value = rng.choice(TEXTS)
        case 1:
            value = json.dumps(rng.choice(VALUES))
        case 2:
            value = str(rng.choice(VALUES))
        case 3:
            key = rng.choice(
                (
                    *KEYS,
                    f"{key}.a",
                    f"{key}[0]",
                    f"{key}[-1]",
                    f"{key}[9]",
                    f"{key}[a]",
                    key.upper(),
                    "",
                    "-",
                    "a..b",
                    "a.",
                )
            )
        case 4:
            key, value = rng.choice(KEYS), rng.choice((value, str(rng.choice(VALUES)), rng.choice(TEXTS)))
        case _:
            value = of_bytes(value.encode(errors="surrogateescape"), rng).decode(errors="surrogateescape")
    lines[at] = f"{key}={value}"
    return "\n".join(lines).encode(errors="surrogatepass")


KEYS = (
    "seed", "name", "out", "data", "data.shards", "data.batch", "data.subset", "data.leave_out", "augment",
    "augment.padding",
    "augment.flip", "augment.mixup", "student", "student.name", "student.patch", "student.options",
    "student.options.depth",
    "student.distilled", "teacher", "teacher.run", "teacher.model", "teacher.mean", "loss.kd.alpha",
    "loss.kd.temperature",
    "loss.saliency.taps", "loss.saliency.taps[0]", "loss.saliency.every", "curriculum", "curriculum.stages",
    "curriculum.stages[0].epochs", "curriculum.stages[0]", "fixed", "fixed.resolution", "optim.lr", "optim.betas",
    "optim.betas[1]",
    "optim.clip", "optim.schedule.kind", "precision", "engine", "checkpoint.keep", "track.backend", "Seed", "a1",
    "rank_timeout_s",
)  # fmt: skip
