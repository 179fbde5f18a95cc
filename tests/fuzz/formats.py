"""Mutants of the formats that the package reads; checksums and lengths are made right again."""

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

import numpy as np

from tests.fuzz.mutate import VALUES, dumped, of_bytes, of_json, of_json_lines, of_overrides, of_tree, of_yaml

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
                        "\uff11".encode(),
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
                "\uff110 path=x\n".encode(),
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
            np.zeros((2, 3072)), np.zeros((2, 32, 32, 3), np.uint8), np.zeros(6144, np.uint8), np.zeros((0, 3072),
            np.uint8),
            np.zeros((2, 3071), np.uint8), np.zeros((2, 3072), np.int64) - 1, np.array(None), np.zeros((2, 3072), "S1"),
            np.full((2, 3072), np.nan), np.zeros((1, 2, 3072), np.uint8), np.zeros((2, 3072), bool), b"x" * 6144,
            np.float64(1),
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
                pa.array([10**12] * n), pa.array([0] * n, pa.int8()), pa.array([1] * n).dictionary_encode(),
                pa.nulls(n),
            ))  # fmt: skip
            table = table.set_column(table.schema.get_field_index("label"), "label", column)
        case 1:
            column = rng.choice((
                pa.array([{"bytes": None, "path": None}] * n), pa.array([{"bytes": "text"}] * n),
                pa.array([{"bytes": 3}] * n),
                pa.array([None] * n, pa.struct([("bytes", pa.binary())])), pa.array([b"x"] * n),
                pa.array([{"path": "a"}] * n),
                pa.array([{"bytes": b""}] * n), pa.array([{"bytes": [1, 2]}] * n),
            ))  # fmt: skip
            table = table.set_column(table.schema.get_field_index("image"), "image", column)
        case 2:
            info = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
            table = table.replace_schema_metadata({"huggingface": dumped(of_tree(info, rng))})
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
    "weights": of_safetensors, "moments": of_safetensors, "events": of_json_lines, "status": of_json,
    "restarts": of_json,
    "run_config": of_yaml, "samples": of_json_lines, "evaluation": of_json, "panels": of_npz, "config": of_yaml,
    "override": of_overrides, "study": of_yaml,
}  # fmt: skip


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
