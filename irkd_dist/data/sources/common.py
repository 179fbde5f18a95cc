"""What several kinds of source need: files and their splits, what is left out, fingerprints, messages."""

import contextlib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from irkd_dist import files
from irkd_dist.errors import UserError, reason

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
_ORDER = ("train", "val", "test")


def ordered(labels: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {split: labels[split] for split in _ORDER if split in labels}


def is_hidden(name: str) -> bool:
    """Names that a system makes for itself: `.cache`, macOS's `._x.png` and `__MACOSX`."""
    return name.startswith(".") or name == "__MACOSX"


def kind_of(name: str) -> str:
    """What to call a file that is left out: its suffix, as the user wrote it."""
    if is_hidden(name):
        return "hidden"
    return os.path.splitext(name)[1] or "without suffix"


def said(left: Counter[str], where: str = "") -> tuple[str, ...]:
    """The note on files that were left out, none if there are none."""
    left = +left
    if not left:
        return ()
    kinds = ", ".join(
        f"{count} {kind}" for kind, count in sorted(left.items(), key=lambda x: (-x[1], x[0]))[:8]
    )
    more = f" and {len(left) - 8} other kinds" if len(left) > 8 else ""
    return (f"left out{where}: {kinds}{more}",)


def containers(path: Path, pattern: str) -> tuple[list[Path], Counter[str]]:
    """The regular files at or below `path` whose name matches, sorted, and a count of the others by kind.

    Raises UserError for a FIFO, a device or a socket of such a name: it would be waited for for ever.
    """
    if path.is_file():
        return [path], Counter()
    found, left = [], Counter[str]()
    for file in sorted(_below(path, left)):
        if is_hidden(file.name) or not re.search(pattern, file.name, re.IGNORECASE):
            left[kind_of(file.name)] += 1
            continue
        with reading(file):
            files.regular(file)
        found.append(file)
    return found, left


def _below(path: Path, left: Counter[str]) -> Iterator[Path]:
    walked: set[str] = set()
    for parent, folders, names in os.walk(path, onerror=refuse, followlinks=True):
        left["hidden"] += sum(map(is_hidden, folders))
        real = os.path.realpath(parent)
        folders[:] = [name for name in folders if not is_hidden(name) and real not in walked]
        yield from (Path(parent, name) for name in names if real not in walked)
        walked.add(real)  # a link may lead here again


def refuse(error: OSError) -> None:
    """For os.walk, which leaves out what it cannot list without a word."""
    raise UserError(f"cannot list {error.filename}: {reason(error)}") from error


@contextlib.contextmanager
def reading(file: Path, *errors: type[Exception], what: str = "") -> Iterator[None]:
    """Errors of the system, and of what parses the file, become one that names it; not for use around a `yield`."""
    try:
        yield
    except UserError:
        raise
    except (OSError, *errors) as error:
        text = f"{file} is {what}" if what else f"cannot read {file}"
        raise UserError(f"{text}: {reason(error)}") from error


def split_of(file: Path, base: Path) -> str | None:
    """The split that a file's name, or else a folder it is in, tells of."""
    for part in reversed(file.relative_to(base).parts if file != base else (file.name,)):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in SPLITS:
                return SPLITS[word]
    return None


def by_split(files: list[Path], base: Path) -> dict[str, list[Path]]:
    """Files of each split by their names; all of them are train when none tells a split."""
    found = [(file, split_of(file, base)) for file in files]
    silent = [file for file, split in found if split is None]
    if silent and len(silent) < len(files):
        raise UserError(
            f"cannot tell the split of {silent[0]}: its name should begin with train, val or test"
        )
    groups: dict[str, list[Path]] = {}
    for file, split in found:
        groups.setdefault(split or "train", []).append(file)
    return {split: groups[split] for split in _ORDER if split in groups}


def fingerprint(*facts: Any, containers: Iterable[Path] = ()) -> str:
    """A digest of facts and of container files: name, size and both ends, to be quick on large ones."""
    digest = hashlib.sha256(json.dumps(facts, default=str).encode())
    for file in containers:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            digest.update(f"\n{file.name} {size}\n".encode(errors="surrogateescape"))
            digest.update(stream.read(1 << 16))
            stream.seek(max(0, size - (1 << 16)))
            digest.update(stream.read())
    return digest.hexdigest()
