"""Figures in pages written by hand, each held against a summary that a command wrote.

In Markdown a figure is followed by `<!--= NAME/key/key -->`: the value at these keys of `summaries/NAME.json`, rounded
as the figure is. `* 100` or `/ 60` may follow, and `mean(...)` or `sd(...)` go around a list. A figure is a number with
a decimal point, one in a table's body, or a percentage, outside of code. What has no summary stands between
`<!-- not backed: why -->` and `<!-- end of not backed -->`, and says to its reader that it is not backed. Between
`<!-- sources -->` and `<!-- end of sources -->` stands each cited summary's command and digest.
"""

from __future__ import annotations

import hashlib
import re
import statistics
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from irkd_dist import eventlog, files, runfolder, typed
from irkd_dist.errors import UserError

SUMMARIES = "summaries"
OF_START = ("version", "commit", "torch", "threads", "precision", "world", "parameters")
_NUMBER = r"[+-]?\d[\d,]*(?:\.\d+)?"
_CITED = re.compile(rf"(?P<said>{_NUMBER})<!--= *(?P<what>.*?) *-->")
_WHAT = re.compile(
    r"(?:(?P<of>mean|sd)\()?(?P<name>[\w.-]+)/(?P<keys>[^()*]+?)\)?(?: (?P<sign>[*/]) (?P<factor>[\d.]+))?"
)
_SOURCES = re.compile(r"<!-- sources -->(.*?)<!-- end of sources -->", re.S)
_UNBACKED = re.compile(r"<!-- not backed: *(.*?) *-->(.*?)<!-- end of not backed -->", re.S)
_CODE = re.compile(r"```.*?```|`[^`]*`|\]\([^)]*\)|<!--.*?-->", re.S)
_VERSION = re.compile(
    r"(?:Python|torch|timm|webdataset|irkd_dist) \d[\w.+]*|\d+\.\d+\.\d+\S*|\b\d{4}-\d\d-\d\d\b"
)
_FIGURE = re.compile(r"(?<![\w.-])(?:\d[\d,]*\.\d+|\d[\d,]*(?= ?%))")
_IN_TABLE = re.compile(rf"(?<![\w.-]){_NUMBER}(?! px)(?![\w.])")


def problems(page: Path) -> Iterator[str]:
    """What a page says that no summary backs, a line each.

    Raises:
        OSError, ValueError: the page or a summary cannot be read.
    """
    text, folder = files.read(page).decode(), _folder(page)
    for why, block in _UNBACKED.findall(text):
        if not why or "not backed" not in " ".join(re.sub(r"<!--.*?-->", "", block).lower().split()):
            yield f"{page}: a block that is not backed has to give its reason, and to say so to its reader"
    text = _UNBACKED.sub("", text)
    cited = dict[str, None]()
    for match in _CITED.finditer(text):
        said, what = match["said"], match["what"]
        parsed = _WHAT.fullmatch(what)
        if parsed is None:
            yield f"{page}: {said} cites {what!r}, which is not of the form NAME/key/key, mean(...), * 100"
            continue
        cited[parsed["name"]] = None
        try:
            value = _value(folder, parsed)
        except (OSError, ValueError, LookupError, TypeError) as error:
            yield f"{page}: {said} cites {what}, which is not there: {type(error).__name__}: {error}"
            continue
        if (rounded := _as(said, value)) != said:
            yield f"{page} says {said}, {what} is {rounded}"
    yield from _sources(page, text, folder, list(cited))
    yield from (f"{page}: {figure} in {line!r} cites no summary" for figure, line in _uncited(text))


def backed(page: Path) -> bool:
    """Whether a page's figures are to be held against summaries."""
    return _folder(page).is_dir()


def summary(run: Path) -> dict[str, Any]:
    """What a finished run came to: the values that a page may cite.

    Raises:
        UserError: it is no run, or not finished.
    """
    events = eventlog.read_events(run)
    start = next((e for e in events if e["event"] == "start"), {})
    done = next((e for e in reversed(events) if e["event"] == "summary"), None)
    if done is None:
        raise UserError(f"{run} is not finished: only a finished run has a summary")
    told = [e for e in events if e["event"] == "evaluation"]
    evaluated = [
        {
            "file": file.name,
            **{k: v for k, v in typed.parse(files.read(file)).items() if k in ("accuracy", "samples")},
        }
        for file in runfolder.evaluation_files(run)
    ]
    return {
        "command": _command(start.get("command", "")),
        **{k: start[k] for k in OF_START if k in start},
        "train_images": start.get("images", {}).get("train"), "epochs": len(told),
        "train_s": sum(e["seconds"] for e in events if e["event"] == "train"),
        **{k: v for k, v in done.items() if k not in ("event", "run", "time", "step")},
        "evaluations": evaluated,
        "events_sha256": hashlib.sha256(files.read(run / runfolder.EVENTS)).hexdigest(),
    }  # fmt: skip


def source_line(folder: Path, name: str) -> str:
    """The line of a page's sources for a summary."""
    data = files.read(folder / f"{name}.json")
    command = typed.parse(data).get("command") or "not kept"
    return f"- {name}: `{command}`; SHA-256 of its summary {hashlib.sha256(data).hexdigest()[:16]}"


def _folder(page: Path) -> Path:
    """The summaries beside a page, or of docs/results for a README."""
    beside = page.parent / SUMMARIES
    return beside if beside.is_dir() else page.parent / "docs" / "results" / SUMMARIES


def _sources(page: Path, text: str, folder: Path, cited: list[str]) -> Iterator[str]:
    block = _SOURCES.search(text)
    said = {line for line in (block[1] if block else "").splitlines() if line.strip()}
    expected = [source_line(folder, name) for name in cited if (folder / f"{name}.json").is_file()]
    yield from (f"{page} lacks in its sources: {line}" for line in expected if line not in said)
    yield from (f"{page} names a source that is none of its: {line}" for line in sorted(said - {*expected}))


def _uncited(text: str) -> Iterator[tuple[str, str]]:
    """(figure, its line) of what looks like one and cites nothing."""
    text = _CITED.sub("", _SOURCES.sub("", text))
    bare = _VERSION.sub("", _CODE.sub("", text))
    for line in bare.splitlines():
        cells = line.split("|")
        table = line.startswith("|") and not set(line) <= set("|- :")
        for figure in _FIGURE.findall(line) if not table else _of_table(cells):
            yield figure, line.strip()


def _of_table(cells: list[str]) -> Iterator[str]:
    """Numbers in a row's cells; its first names the row."""
    for cell in cells[2:]:
        yield from (m[0] for m in _IN_TABLE.finditer(cell))


def _value(folder: Path, parsed: re.Match[str]) -> float:
    found = typed.parse(files.read(folder / f"{parsed['name']}.json"))
    for key in parsed["keys"].split("/"):
        found = found[int(key)] if isinstance(found, list) else found[key]
    if parsed["of"] is not None:
        found = {"mean": statistics.mean, "sd": statistics.stdev}[parsed["of"]](found)
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise TypeError(f"{found!r} is no number")
    factor = float(parsed["factor"] or 1)
    return found / factor if parsed["sign"] == "/" else found * factor


def _as(said: str, value: float) -> str:
    """A value with the digits, commas and sign of a figure."""
    digits = len(said.partition(".")[2])
    rounded = round(Decimal(repr(value)), digits)
    comma, sign = "," if "," in said else "", "+" if said.startswith("+") else ""
    return f"{rounded:{sign}{comma}.{digits}f}"


def _command(text: str) -> str:
    """A command with its paths as they are in the repository."""
    words = [re.sub(r"^/\S*?(?=(configs|benchmarks|examples)/)", "", word) for word in text.split()]
    return " ".join(re.sub(r"^(\w[\w.]*=)?/\S*/", r"\1", word) for word in words)
