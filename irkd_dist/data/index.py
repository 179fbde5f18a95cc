"""The index of a tar: key, label and places of each sample. Written when rendered, read instead of scanning.

It is JSON in columns, beside its tar: `train-000000.index.json`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from irkd_dist import typed

Read = Callable[[int, int], bytes]  # (bytes, offset), as os.pread has them

_BLOCK = 512  # tar's unit: headers are one block, data is padded to whole blocks
_EXTENDED = 1 << 20  # bytes of a PAX or GNU header that is believed
_NO_DATA = "123456"  # links, devices, folders, FIFOs: their size says nothing
_RECORD = 20 * _BLOCK  # what the end of a tar is padded to
_NONE = (0, -1)  # the place of what is not there


@dataclass(frozen=True)
class Index:
    """Where the samples of one tar lie, in file order.

    labels: (N,) int64. image, mask: (N, 2) int64, offset and bytes in the file; bytes -1 where there is no mask.
    """

    keys: list[str]
    labels: np.ndarray
    image: np.ndarray
    mask: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)


class Member(NamedTuple):
    """One entry of a tar. plain: a regular file; head: its first bytes, a block at most."""

    name: str
    plain: bool
    folder: bool
    offset: int
    size: int
    head: bytes


def file_name(tar: str) -> str:
    """The name of a tar's index."""
    return tar.removesuffix(".tar") + ".index.json"


def encode(index: Index, tar: str) -> bytes:
    """The index as a file; tar: the sha256 of the tar that it is of."""
    masks = index.mask.tolist() if (index.mask[:, 1] >= 0).any() else None
    labels, image = index.labels.tolist(), index.image.tolist()
    columns = {"tar": tar, "keys": index.keys, "labels": labels, "image": image, "mask": masks}
    return json.dumps(columns, separators=(",", ":")).encode()


def decode(data: bytes, end: int, tar: str) -> Index | None:
    """The index in `data` of a tar of `end` bytes and this sha256; None if it is of another tar.

    Raises ValueError when it is no index, or points outside the tar.
    """
    try:
        raw = typed.parse(data)
        if raw["tar"] != tar:
            return None
        keys, count = raw["keys"], len(raw["keys"])
        labels, image = _whole(raw["labels"], (count,)), _whole(raw["image"], (count, 2))
        mask = _whole([_NONE] * count if raw["mask"] is None else raw["mask"], (count, 2))
    except (KeyError, TypeError) as error:
        raise ValueError(f"it is no index of a shard: {error!r}") from None
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("it is no index of a shard: its keys are not strings")
    for places, least in ((image, 0), (mask, -1)):
        if ((places[:, 0] < 0) | (places[:, 1] < least) | (places[:, 1] > end - places[:, 0])).any():
            raise ValueError("it points outside its shard")
    return Index(keys, labels, image, mask)


def _whole(values: Any, shape: tuple[int, ...]) -> np.ndarray:
    array = np.array(values)  # no dtype: it would cut 1.5 to 1
    if not array.size and 0 in shape:
        array = np.zeros(shape, np.int64)
    if array.dtype != np.int64 or array.shape != shape:
        raise ValueError(f"its numbers are {array.dtype} {array.shape}, not int64 {shape}")
    return array


def scan(read: Read, end: int, encoding: str) -> Index:
    """The index of a tar of `end` bytes, from its headers. Raises ValueError for what our writer does not write."""
    keys: list[str] = []
    labels: list[int] = []
    image: list[tuple[int, int]] = []
    mask: list[tuple[int, int]] = []
    for member in members(read, end):
        if not member.plain:
            raise ValueError(f"member {member.name!r} is no plain file")
        key, _, kind = member.name.partition(".")
        if not keys or keys[-1] != key:
            keys.append(key)
            labels.append(-1)
            image.append(_NONE)
            mask.append(_NONE)
        if kind == "cls":
            labels[-1] = label(member)
        elif kind == encoding:
            image[-1] = (member.offset, member.size)
        elif kind == "mask.png":
            mask[-1] = (member.offset, member.size)
        else:
            raise ValueError(f"unexpected member {member.name!r}")
    for key, number, place in zip(keys, labels, image, strict=True):
        if number < 0 or place == _NONE:
            raise ValueError(f"sample {key} has no {'label' if number < 0 else encoding}")
    places = (np.array(column, dtype=np.int64).reshape(-1, 2) for column in (image, mask))
    return Index(keys, np.array(labels, dtype=np.int64), *places)


def label(member: Member) -> int:
    """The number in a .cls member. Raises ValueError."""
    text = member.head if member.size <= 32 else b"..."
    if not re.fullmatch(rb"\s*-?[0-9]{1,18}\s*", text):
        raise ValueError(f"member {member.name!r} holds no class number: {text[:32]!r}")
    return int(text)


def members(read: Read, end: int) -> Iterator[Member]:
    """Each entry of an uncompressed tar, header by header. Raises ValueError when it is none, or damaged.

    Python's tarfile needs 10 times as long for it, which at 60,000 samples a user would wait for; and it takes a tar
    that was cut short between two entries, or joined to another by `cat`, for whole.
    """
    position, pax, long_name = 0, {}, None
    while position + _BLOCK <= end:
        block = read(2 * _BLOCK, position)  # one read for a label and its header
        header = block[:_BLOCK]
        if not header.strip(b"\0"):
            if read(_RECORD, position).strip(b"\0"):
                raise ValueError("data follows its end marker; tars are joined by tar -A, not by cat")
            return
        name, size, kind = _header(header, position)
        if kind not in "xgLK":
            name = pax.get("path", long_name or name)
            size = 0 if kind in _NO_DATA else _size(pax.get("size", size))
        offset = position + _BLOCK
        if offset + size > end:
            raise ValueError(f"member {name!r} reaches beyond the end of the file")
        position = offset + -(-size // _BLOCK) * _BLOCK
        if kind in "xgLK":
            if size > _EXTENDED:
                raise ValueError(f"the extended header at byte {offset - _BLOCK:,} has {size:,} bytes")
            if kind == "x":
                pax = _pax(read(size, offset))
            elif kind == "L":
                long_name = _text(read(size, offset).rstrip(b"\0"))
            continue
        if kind == "S" or any(key.startswith("GNU.sparse") for key in pax):
            raise ValueError(f"member {name!r} is stored as a sparse file, which is not read")
        folder = kind == "5" or name.endswith("/")
        yield Member(name, kind in "0\0007" and not folder, folder, offset, size, block[_BLOCK:][:size])
        pax, long_name = {}, None
    raise ValueError("the end marker is missing: the file is cut short")


def _header(header: bytes, position: int) -> tuple[str, int, str]:
    """(name, size, type) of a header: ustar, GNU's or the old form. Raises ValueError when it is none."""
    magic = header[257:263]
    checksum = sum(header) - sum(header[148:156]) + 8 * 32  # its own field counts as blanks
    if magic not in (b"ustar\0", b"ustar ", bytes(6)) or _octal(header[148:156]) != checksum:
        raise ValueError(f"no valid tar header at byte {position:,}")
    name = _text(header[:100].split(b"\0", 1)[0])
    if magic == b"ustar\0" and header[345]:
        name = f"{_text(header[345:500].split(bytes(1), 1)[0])}/{name}"
    return name, _octal(header[124:136]), chr(header[156])


def _octal(field: bytes) -> int:
    if field[0] & 0x80:  # GNU's binary form for sizes beyond 8 GiB
        return int.from_bytes(field[1:], "big")
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _size(value: int | str) -> int:
    size = int(value)
    if size < 0:
        raise ValueError(f"a member's size is {size}")
    return size


def _text(name: bytes) -> str:
    return name.decode(errors="surrogateescape")


def _pax(data: bytes) -> dict[str, str]:
    records, position = {}, 0
    while position < len(data.rstrip(b"\0")):
        digits, _, _ = data[position : position + 20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        record = data[position : position + length]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        # a length of 0 would go round for ever
        if not equals or len(record) != length or record[-1:] != b"\n":
            raise ValueError(f"record {data[position : position + 20]!r} of a PAX header is damaged")
        records[_text(key)] = _text(value)
        position += length
    return records
