"""What is read as JSON: the values, whether they are as they were written, and of the types that they should be."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable
from typing import Any

Check = Callable[[object], bool]
_SUFFIX = 20  # bytes of `, "crc": "01234567"}`


def parse(data: bytes) -> Any:
    """The value of JSON text.

    Raises:
        ValueError: it is none, not UTF-8, or nested too deeply; the message says which.
    """
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"no JSON: {error}") from None


def checked(values: dict[str, Any]) -> bytes:
    """A mapping as a line of JSON, with a checksum of what stands before it as its last key."""
    text = json.dumps(values).encode()
    return text[:-1] + b', "crc": "%08x"}\n' % zlib.crc32(text)


def parse_checked(data: bytes) -> Any:
    """The value of what `checked` wrote, without the checksum; of any other JSON too: earlier releases wrote none.

    Raises:
        ValueError: it is no JSON, or was altered since.
    """
    data = data.rstrip(b"\n")
    start = len(data) - _SUFFIX
    strange = _strange(data)
    if strange == 0:
        text = data[:start] + b"}"
        if data[start + 10 : start + 18] != b"%08x" % zlib.crc32(text):
            raise ValueError("altered: its checksum differs")
        data = text
    elif strange <= 2:
        raise ValueError("altered: its checksum cannot be read")
    return parse(data)


def is_checked(line: bytes) -> bool:
    """Whether it ends with a checksum, right or wrong."""
    return _strange(line) == 0


def _strange(line: bytes) -> int:
    """How many bytes of its end are not those that go around a checksum; 3 are as good as all."""
    end = line[-_SUFFIX:]
    if len(end) < _SUFFIX:
        return _SUFFIX
    return sum(a != b for a, b in zip(end[:10] + end[18:], b', "crc": ""}', strict=True))


def is_count(value: object) -> bool:
    """A whole number from 0 on that other programs can hold too."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def is_real(value: object) -> bool:
    """A number; NaN and the infinities are some."""
    return isinstance(value, float) or (
        isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
    )


def is_number(value: object) -> bool:
    """A finite number."""
    return is_real(value) and math.isfinite(value)  # type: ignore[arg-type]


def is_text(value: object) -> bool:
    """A string."""
    return isinstance(value, str)


def is_mapping(value: object) -> bool:
    """A mapping."""
    return isinstance(value, dict)


def list_of(of: Check) -> Check:
    """Whether a value is a list of such values."""
    return lambda value: isinstance(value, list) and all(of(v) for v in value)


def optional(of: Check) -> Check:
    """Whether a value is null or such a value."""
    return lambda value: value is None or of(value)


def is_time(value: object) -> bool:
    """Seconds since 1970, and before the year 8300."""
    return is_number(value) and 0 <= value < 2e11  # type: ignore[operator]


def wrong_type(values: dict[str, Any], types: dict[str, Check]) -> str | None:
    """The first key of another type than it should be, as `stage='x'`; keys that are not there are not missed."""
    for key, fits in types.items():
        if key in values and not fits(values[key]):
            return f"{key}={str(values[key])[:40]!r} is not what belongs there"
    return None
