"""Mutations: of bytes, and of what a format is made of, so that a mutant gets past the first check.

A format's own checksums and lengths are made right again where a mutation would else end there.
"""

from __future__ import annotations

import ast
import io
import json
import pickle
import random
import struct
import tarfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import yaml

NESTED: Any = []
for _ in range(400):
    NESTED = [NESTED]

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 12, 0.5, -0.0, 1e308, float("nan"), float("inf"), float("-inf"), 2**31, 2**63, -(2**63),
    2**64, 10**12, 10**30, 10**400, "", "a", "1", "nan", "1e400", "../x", "/dev/null", "a\0b", "\x1b[31m", "[red]x[/b]", "\u00e9",
    "\udcff", "$x^{$", "${oc.env:HOME}", "${seed}", "${", "~", "x" * 10_000, [], {}, [[]], [None], {"a": 1}, {"": None},
    ["a", 1], NESTED, [0] * 100, "1_000", "\uff11", "None", "\u202e", "a\nb", "{}", "[1,", "%s", b"\xff".decode("latin1"),
]  # fmt: skip
TEXTS = (
    "!!binary aGVsbG8=", "!!python/object/apply:pathlib.PosixPath [a]", "!!set {a}", "!!timestamp 2020-01-01", "2020-01-01",
    "2020-13-01", "1:20:30", "0x1F", "0o17", "017", ".inf", "-.inf", ".nan", "&a [*a]", "*a", "<<: *kd", "<<: 1", "? [a]\n: 1", "- 1",
    "---", "...", "%YAML 9.9", "\t", "{", "}", "[", "]", ": ", " #", "|", ">", "!!omap [a: 1]", "@", "`", "'", '"', '"\\x00"',
    '"\\ud800"', "${oc.env:HOME}", "${oc.decode:1}", "${a.b}", "${..x}", "${data}", "${oc.create:{}}", "!<x> 1", "!!float x", "!!int x",
    "!!bool x", "!!null x", "1e999", "9" * 5000, "~", "null", "yes", "a: &b {c: *b}", "\ufeff", "\x85", "\u2028", "\0", "=", "!!value =",
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


def mutants(name: str, seed: bytes, rng: random.Random) -> bytes:
    """One mutant of `seed` for a target: mostly of its format, sometimes of plain bytes, rarely both."""
    data = seed
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        form = FORMS.get(name)
        if form is None or rng.random() < 0.3:
            data = of_bytes(data, rng)
        else:
            try:
                data = form(data, rng)
            except Exception:  # an earlier mutation has left the format
                data = of_bytes(data, rng)
    return data[: 1 << 20]


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
    return _dumped(of_tree(json.loads(data), rng))


def _dumped(tree: Any) -> bytes:
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
    "seed", "name", "out", "data", "data.shards", "data.batch", "data.subset", "data.leave_out", "augment", "augment.padding",
    "augment.flip", "augment.mixup", "student", "student.name", "student.patch", "student.options", "student.options.depth",
    "student.distilled", "teacher", "teacher.run", "teacher.model", "teacher.mean", "loss.kd.alpha", "loss.kd.temperature",
    "loss.saliency.taps", "loss.saliency.taps[0]", "loss.saliency.every", "curriculum", "curriculum.stages",
    "curriculum.stages[0].epochs", "curriculum.stages[0]", "fixed", "fixed.resolution", "optim.lr", "optim.betas", "optim.betas[1]",
    "optim.clip", "optim.schedule.kind", "precision", "engine", "checkpoint.keep", "track.backend", "Seed", "a1", "rank_timeout_s",
)  # fmt: skip


# ---- images


def of_png(data: bytes, rng: random.Random) -> bytes:
    """Chunks changed, doubled, removed, exchanged; their lengths and checksums right again."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        size = struct.unpack_from(">I", data, at)[0]
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    i = rng.randrange(len(chunks))
    kind, body = chunks[i]
    match rng.randrange(7):
        case 0:
            chunks[i] = (kind, of_bytes(body, rng))
        case 1:
            chunks.insert(rng.randrange(len(chunks) + 1), chunks[i])
        case 2:
            del chunks[i]
        case 3:
            rng.shuffle(chunks)
        case 4 if kind == b"IDAT":
            pixels = zlib.decompress(body)
            pixels = rng.choice(
                (pixels[: rng.randrange(len(pixels))], pixels * 2, of_bytes(pixels, rng), b"")
            )
            chunks[i] = (kind, zlib.compress(pixels))
        case 5:
            width, height = (rng.choice((0, 1, 7, 8, 9, 1000, 2**31 - 1, 2**32 - 1)) for _ in range(2))
            depth, colour = rng.choice((1, 2, 4, 8, 16, 3)), rng.choice((0, 2, 3, 4, 6, 1, 7))
            head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, rng.choice((0, 0, 1, 2)))
            chunks = [(k, head if k == b"IHDR" else b) for k, b in chunks]
        case _:
            new = rng.choice(
                (
                    b"PLTE",
                    b"tRNS",
                    b"zTXt",
                    b"iCCP",
                    b"gAMA",
                    b"eXIf",
                    b"acTL",
                    b"fcTL",
                    b"sBIT",
                    b"cHRM",
                    b"XXXX",
                )
            )
            chunks.insert(
                rng.randrange(len(chunks) + 1), (new, rng.randbytes(rng.choice((0, 1, 3, 4, 26, 768, 1000))))
            )
    parts = (struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks)
    return data[:8] + b"".join(parts)


def of_npy(data: bytes, rng: random.Random) -> bytes:
    """The header's values changed, its length right again; or the pixels' number."""
    size = int.from_bytes(data[8:10], "little")
    header = ast.literal_eval(data[10 : 10 + size].decode("latin1"))
    pixels = data[10 + size :]
    match rng.randrange(5):
        case 0:
            header["descr"] = rng.choice(
                ("<f4", "|b1", "<u2", "|O", "|S1", "|i1", [("a", "|u1")], "u1", "", 1, None)
            )
        case 1:
            shape = rng.choice(
                (
                    (8, 8),
                    (8, 8, 1),
                    (8, 8, 4),
                    (0, 0, 3),
                    (-8, -8, 3),
                    (8.0, 8, 3),
                    ("8", 8, 3),
                    (True, 64, 3),
                    (2**40, 2**40, 3),
                    (64, 1, 3),
                    5,
                    None,
                    [8, 8, 3],
                )
            )
            header["shape"] = shape
        case 2:
            header["fortran_order"] = rng.choice((True, 1, "", None))
        case 3:
            pixels = pixels[: rng.randrange(len(pixels))]
        case _:
            header = of_tree(header, rng)
    text = rng.choice(
        (repr(header), repr(header) + " " * 100, "(" * 300 + repr(header), "-" * 4000 + "1")
    ).encode("latin1", "replace")
    return (
        rng.choice((b"\x93NUMPY\1\0", b"\x93NUMPY\1\0", b"\x93NUMPY\2\0"))
        + struct.pack("<H", len(text))
        + text
        + pixels
    )


# ---- containers


def of_tar(data: bytes, rng: random.Random) -> bytes:
    """Members renamed, retyped, reordered, lied about; headers' checksums right again."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = [(m, (tar.extractfile(m) or io.BytesIO()).read()) for m in tar]
    i = rng.randrange(len(members))
    member, body = members[i]
    style = rng.choice((tarfile.USTAR_FORMAT, tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))
    match rng.randrange(10):
        case 0:
            member.name = rng.choice(
                (
                    "",
                    "/",
                    "..",
                    "a/../b.png",
                    ".cls",
                    "a.",
                    "a.b.c",
                    "x" * 200 + ".png",
                    "é.png",
                    "\udcff.cls",
                    "._0.png",
                    "0.json",
                    "0.txt",
                    "0.PNG",
                    "0.cls.cls",
                    "a\nb.cls",
                    "./" + member.name,
                )
            )
        case 1:
            member.type = rng.choice(
                (b"1", b"2", b"3", b"5", b"6", b"7", b"L", b"K", b"S", b"x", b"g", b"X", b"D", b"Z")
            )
            member.linkname = rng.choice(("", "a", "/etc/hostname", members[0][0].name))
        case 2:
            body = (
                str(rng.choice(VALUES)).encode(errors="replace")
                if rng.random() < 0.5
                else rng.choice(
                    (
                        b"",
                        b" 3\n",
                        b"-1",
                        b"1.0",
                        b"999999999999",
                        "１".encode(),
                        b"0x1",
                        b"1_0",
                        b"\xff",
                        b"3\0",
                        b"9" * 5000,
                    )
                )
            )
            member.size = len(body)
        case 3:
            members.insert(rng.randrange(len(members)), (member, body))
        case 4:
            del members[i]
        case 5:
            rng.shuffle(members)
        case 6:
            body = of_bytes(body, rng)
            member.size = len(body)
        case 7:
            style = tarfile.PAX_FORMAT
            member.pax_headers = {
                rng.choice(
                    (
                        "path",
                        "size",
                        "GNU.sparse.map",
                        "GNU.sparse.major",
                        "x",
                        "hdrcharset",
                        "mtime",
                        "GNU.sparse.size",
                    )
                ): str(rng.choice((0, -1, 1, 10**12, "a", "", "1,2", 2**63)))
            }
        case _:
            return _header(_tar(members, style), rng)
    if members and i < len(members) and members[i][0] is member:
        members[i] = (member, body)
    return _tar(members, style)


def _tar(members: list[tuple[tarfile.TarInfo, bytes]], style: int) -> bytes:
    out = io.BytesIO()
    for member, body in members:
        out.write(member.tobuf(style, errors="surrogateescape"))
        out.write(body + bytes(-len(body) % 512))
    return out.getvalue() + bytes(1024)


def _header(data: bytes, rng: random.Random) -> bytes:
    """One field of one header changed, with its checksum; or a PAX record that lies."""
    out = bytearray(data)
    at = rng.choice([i for i in range(0, len(out), 512) if out[i + 257 : i + 262] == b"ustar"])
    if rng.random() < 0.25:
        record = rng.choice(
            (
                b"0 path=x\n",
                b"-5 path=x\n",
                b"9999 path=x\n",
                b"9 size=5\n",
                b"x path=x\n",
                b"",
                b"10 size=-1\n",
                b"12 path=\xff\xffa\n",
                b"22 size=99999999999999\n",
                b"10 size=\n\n",
                b"5 a=\n",
                "１0 path=x\n".encode(),
            )
        )
        member = tarfile.TarInfo("x")
        member.type, member.size = rng.choice((b"x", b"x", b"g", b"L", b"K")), len(record)
        return (
            bytes(out[:at])
            + member.tobuf(tarfile.USTAR_FORMAT)
            + record
            + bytes(-len(record) % 512)
            + bytes(out[at:])
        )
    start, end = rng.choice(
        (
            (0, 100),
            (100, 108),
            (124, 136),
            (124, 136),
            (156, 157),
            (257, 265),
            (345, 500),
            (482, 483),
            (386, 482),
        )
    )
    new = rng.choice(
        (
            b"\xff" * (end - start),
            b"\x80" + b"\0" * 3 + b"\xff" * 20,
            b"-1",
            b"77777777777",
            b"00000000000",
            b"9",
            b"",
            rng.randbytes(end - start),
            b"\x80" + bytes(10) + b"\x05",
        )
    )
    out[at + start : at + end] = new[: end - start].ljust(end - start, b"\0")
    out[at + 148 : at + 156] = b" " * 8
    out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + 512])
    return bytes(out)


def of_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The header's tree changed, its length right again; or the values: NaN, infinity, fewer."""
    size = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + size], data[8 + size :]
    match rng.randrange(4):
        case 0:
            value = rng.choice((float("nan"), float("inf"), -float("inf"), 1e38))
            at = rng.randrange(len(body) // 4) * 4
            return data[: 8 + size] + body[:at] + struct.pack("<f", value) + body[at + 4 :]
        case 1:
            tree = json.loads(header)
            entry = tree[rng.choice(list(tree))]
            entry["dtype"] = rng.choice(("F16", "BF16", "I64", "BOOL", "U8", "F64", "F8_E4M3", "X", ""))
            entry["shape"] = rng.choice(
                (entry["shape"][::-1], [], [0], [1, *entry["shape"]], [-1], [2**60], [4, 4])
            )
            header = json.dumps(tree).encode()
        case _:
            header = of_json(header, rng)
    length = rng.choice((len(header),) * 6 + (0, 1, len(header) + 1, 2**40, 2**64 - 1))
    return length.to_bytes(8, "little") + header + body


def of_idx(data: bytes, rng: random.Random) -> bytes:
    """Type, number of dimensions, and dimensions changed; the data of any length."""
    count = data[3]
    shape = [
        rng.choice((0, 1, 2, 4, 5, 8, 2**16, 2**31, 2**32 - 1))
        for _ in range(rng.choice((count, count, 0, 1, 2, 3, 4, 5)))
    ]
    kind = rng.choice((8, 8, 8, 9, 0xB, 0xC, 0xD, 0xE, 0, 255))
    body = data[4 + 4 * count :]
    total = int(np.prod([float(s) for s in shape])) if shape else 1
    if total < 100_000 and rng.random() < 0.7:
        body = rng.randbytes(total)
    return bytes((0, 0, kind, len(shape))) + struct.pack(f">{len(shape)}I", *shape) + body


def of_pickle(data: bytes, rng: random.Random) -> bytes:
    """A pickle of another value at some place: other types, shapes, lengths."""
    tree = pickle.loads(data, encoding="latin1")
    if rng.random() < 0.3:
        tree["data"] = rng.choice((
            np.zeros((2, 3072)), np.zeros((2, 32, 32, 3), np.uint8), np.zeros(6144, np.uint8), np.zeros((0, 3072), np.uint8),
            np.zeros((2, 3071), np.uint8), np.zeros((2, 3072), np.int64) - 1, np.array(None), np.zeros((2, 3072), "S1"),
            np.full((2, 3072), np.nan), np.zeros((1, 2, 3072), np.uint8), np.zeros((2, 3072), bool), b"x" * 6144, np.float64(1),
        ))  # fmt: skip
    else:
        tree = of_tree(tree, rng)
    try:
        return pickle.dumps(tree, protocol=rng.choice((0, 2, 4)))
    except RecursionError:
        return pickle.dumps(None)


def of_parquet(data: bytes, rng: random.Random) -> bytes:
    """Another table: columns of other types, names, lengths, and Hugging Face's description of them changed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(io.BytesIO(data))
    n = table.num_rows
    match rng.randrange(6):
        case 0:
            column = rng.choice((
                pa.array([None] * n, pa.int64()), pa.array([2**62] * n, pa.int64()), pa.array([2**63] * n, pa.uint64()),
                pa.array([-1] * n), pa.array([0.5] * n), pa.array(["a"] * n), pa.array([[1]] * n), pa.array([True] * n),
                pa.array([10**12] * n), pa.array([0] * n, pa.int8()), pa.array([1] * n).dictionary_encode(), pa.nulls(n),
            ))  # fmt: skip
            table = table.set_column(table.schema.get_field_index("label"), "label", column)
        case 1:
            column = rng.choice((
                pa.array([{"bytes": None, "path": None}] * n), pa.array([{"bytes": "text"}] * n), pa.array([{"bytes": 3}] * n),
                pa.array([None] * n, pa.struct([("bytes", pa.binary())])), pa.array([b"x"] * n), pa.array([{"path": "a"}] * n),
                pa.array([{"bytes": b""}] * n), pa.array([{"bytes": [1, 2]}] * n),
            ))  # fmt: skip
            table = table.set_column(table.schema.get_field_index("image"), "image", column)
        case 2:
            info = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
            table = table.replace_schema_metadata({"huggingface": _dumped(of_tree(info, rng))})
        case 3:
            table = rng.choice(
                (
                    table.slice(0, 0),
                    table.rename_columns(["a", "b"]),
                    table.rename_columns(["label", "label"]),
                    table.drop_columns(["label"]),
                    pa.concat_tables([table] * 3),
                )
            )
        case 4:
            table = table.append_column(
                rng.choice(("label2", "", "image", "é", "__index__")), pa.array([0] * n)
            )
        case _:
            # the footer is thrift, where small changes go far
            size = int.from_bytes(data[-8:-4], "little")
            footer = of_bytes(data[-8 - size : -8], rng)
            return data[: -8 - size] + footer + len(footer).to_bytes(4, "little") + b"PAR1"
    out = io.BytesIO()
    pq.write_table(
        table,
        out,
        row_group_size=rng.choice((1, 2, 1000)),
        compression=rng.choice(("snappy", "zstd", "none")),
    )
    return out.getvalue()


def of_npz(data: bytes, rng: random.Random) -> bytes:
    """A saved set of arrays with one of another type or shape."""
    with np.load(io.BytesIO(data)) as saved:
        arrays = dict(saved)
    key = rng.choice(list(arrays))
    match rng.randrange(4):
        case 0:
            del arrays[key]
        case 1:
            arrays[key] = rng.choice(
                (
                    np.zeros(0),
                    np.zeros((1, 2)),
                    np.array("a"),
                    np.full(arrays[key].shape, np.nan),
                    np.array(["a", "b"]),
                    np.zeros((2, 2, 2, 2, 2)),
                )
            )
        case 2:
            arrays[rng.choice(("a", "student_x", "../x"))] = arrays[key]
        case _:
            arrays[key] = arrays[key][:0] if arrays[key].ndim else arrays[key]
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return out.getvalue()


Form = Callable[[bytes, random.Random], bytes]
FORMS: dict[str, Form] = {
    "manifest": of_json, "shard": of_tar, "npy": of_npy, "png": of_png, "idx_images": of_idx, "idx_labels": of_idx,
    "cifar_batch": of_pickle, "cifar_meta": of_pickle, "parquet": of_parquet, "wds_tar": of_tar, "state": of_json,
    "weights": of_safetensors, "moments": of_safetensors, "events": of_json_lines, "status": of_json, "restarts": of_json,
    "run_config": of_yaml, "samples": of_json_lines, "evaluation": of_json, "panels": of_npz, "config": of_yaml,
    "override": of_overrides, "study": of_yaml,
}  # fmt: skip
