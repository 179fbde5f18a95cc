"""The page of a study, made of plain values alone: Markdown and HTML. `irkd verify` makes it again and compares."""

from __future__ import annotations

import hashlib
import html as markup
import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from irkd_dist import files, typed

# Student's t at 97.5 % by degrees of freedom from 1 on; beyond them 1.96
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
BEGINS, ENDS = (
    "<!-- figures -->",
    "<!-- end of figures -->",
)  # what lies between is made again by `irkd verify`

Table = tuple[list[str], list[list[str]]]  # columns, rows


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of the mean of independent values (Student's t); NaN for one alone."""
    if len(values) < 2:
        return math.nan
    freedom = len(values) - 1
    t = T_975[freedom - 1] if freedom <= len(T_975) else 1.96
    return t * statistics.stdev(values) / math.sqrt(len(values))


def to_json(values: dict[str, Any]) -> str:
    """What a page is made of, as text."""
    return json.dumps(values, indent=1) + "\n"


def markdown(values: dict[str, Any]) -> str:
    """The page as Markdown."""
    first, *others = values["studies"]
    sd = bool(values.get("sd"))  # pages from before have none
    blocks = [f"# {first['title']}", *_of_study(first, values["command"], sd)]
    for study in others:
        blocks += [f"# {study['title']}", *_of_study(study, values["command"], sd)]
    blocks += [f"{values['machine']} Runs: {digest(values)}."]
    return "\n\n".join([*blocks[:1], BEGINS, *blocks[1:], ENDS]) + "\n"


def html(values: dict[str, Any]) -> str:
    """The page as one HTML file without anything from elsewhere."""
    body = []
    for block in markdown(values).split("\n\n"):
        block = block.strip()
        if block.startswith("|"):
            lines = [line.strip("| ").split(" | ") for line in block.splitlines()]
            head = "".join(f"<th scope='col'>{_inline(cell)}</th>" for cell in lines[0])
            rows = ("".join(f"<td>{_inline(cell)}</td>" for cell in line) for line in lines[2:])
            body.append(
                f"<table><thead><tr>{head}</tr></thead><tbody>"
                + "".join(f"<tr>{row}</tr>" for row in rows)
                + "</tbody></table>"
            )
        elif block.startswith("#"):
            level = len(block) - len(block.lstrip("#"))
            body.append(f"<h{level}>{_inline(block.lstrip('# '))}</h{level}>")
        elif not block.startswith("<!--"):
            body.append(f"<p>{_inline(block)}</p>")
    style = (
        ":root{color-scheme:light dark}body{font:16px/1.5 system-ui;max-width:70rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse;display:block;overflow-x:auto}th,td{padding:.25rem .75rem;text-align:right;"
        "border-bottom:1px solid #8886}th:first-child,td:first-child{text-align:left}"
    )
    title = _inline(values["studies"][0]["title"])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{style}</style><main>{''.join(body)}</main></html>\n"
    )


def digest(values: dict[str, Any]) -> str:
    """Of the runs that a page is made of: 16 hexadecimal digits of SHA-256."""
    runs = [study["runs"] for study in values["studies"]]
    return hashlib.sha256(json.dumps(runs, sort_keys=True).encode()).hexdigest()[:16]


def differences(page: Path) -> list[str]:
    """What a page says that the runs beside it (`.json`) do not: a line each; none if it is as it was made.

    Words before and after the figures are the author's.

    Raises:
        OSError, ValueError, KeyError, TypeError: the page or what it was made of cannot be read.
    """
    values = typed.parse(files.read(page.with_suffix(".json")))
    ours, theirs = _figures(markdown(values)), _figures(files.read(page).decode())
    told = set(ours)
    found = [f"{page} says {line!r}, which no run beside it backs" for line in theirs if line not in told]
    missing = [line for line in ours if line not in set(theirs)]
    return found + [f"{page} leaves out {line!r}" for line in missing]


def _figures(text: str) -> list[str]:
    _, begins, rest = text.partition(BEGINS)
    inside, ends, _ = rest.partition(ENDS)
    if not begins or not ends:
        raise ValueError(f"it has no {BEGINS} ... {ENDS}")
    return [line for line in inside.splitlines() if line.strip()]


def _of_study(study: dict[str, Any], command: str, sd: bool) -> list[str]:
    runs, published = study["runs"], study["published"]
    says = (
        "Test accuracy in %: mean over seeds ± half the 95 % interval (Student's t); `best` is the checkpoint with the "
        "best validation accuracy in the last stage, `last` the weights at the end. Differences are paired over seeds."
        + (" In brackets the standard deviation over seeds." if sd else "")
    )
    if any("flops" in r for r in runs):
        says += (
            " PFLOP are 10^15 operations of the training steps: matrix products and convolutions of student and "
            "teacher, an addition and a multiplication as two; a teacher that is read from a cache is not counted."
        )
    blocks = [*study["notes"], f"{says} One command: `{command}`.", _lines(*_summary_table(study, sd))]
    if published:
        blocks.append(_lines(*_published_table(study, sd)))
    columns = ["command", "test, best", "test, last", "seconds"]
    rows = [
        [f"`{r['command']}`", _percent(r["test_accuracy"]), _percent(r["test_accuracy_last"]), f"{r['seconds']:.0f}"]
        for r in runs
    ]  # fmt: skip
    return [*blocks, "## Every run", _lines(columns, rows)]


def _summary_table(study: dict[str, Any], sd: bool) -> Table:
    baseline, counted = study["baseline"], any("flops" in r for r in study["runs"])
    columns = [
        "experiment",
        "seeds",
        "test, best",
        "test, last",
        f"best less {baseline}",
        "images",
        *(["PFLOP a run"] if counted else []),
        "seconds a run",
    ]
    rows = []
    for name in study["experiments"]:
        own = _by_seed(study, name)
        if not own:
            continue
        first = _by_seed(study, baseline)
        paired = [
            100 * (own[s]["test_accuracy"] - first[s]["test_accuracy"]) for s in sorted({*own} & {*first})
        ]
        rows.append(
            [
                name, str(len(own)), _mean([100 * r["test_accuracy"] for r in own.values()], sd=sd),
                _mean([100 * r["test_accuracy_last"] for r in own.values()], sd=sd),
                "-" if name == baseline or not paired else _mean(paired, sign="+", sd=sd),
                f"{statistics.mean(r['images'] for r in own.values()):,.0f}",
                *([_petaflop([*own.values()])] if counted else []),
                _mean([r["seconds"] for r in own.values()], digits=0),
            ]
        )  # fmt: skip
    for r in study["runs"]:
        if r["teacher"]:
            accuracies = [_percent(r[key]) for key in ("test_accuracy", "test_accuracy_last")]
            flop = [_petaflop([r])] if counted else []
            rows.append(["teacher", "1", *accuracies, "-", f"{r['images']:,}", *flop, f"{r['seconds']:.0f}"])
    return columns, rows


def _published_table(study: dict[str, Any], sd: bool) -> Table:
    rows = []
    for name, theirs in study["published"].items():
        own = [100 * r["test_accuracy"] for r in _by_seed(study, name).values()]
        own = own or [100 * r["test_accuracy"] for r in study["runs"] if r["experiment"] == name]
        if own:
            rows.append([name, _mean(own, sd=sd), f"{theirs:.2f}", f"{statistics.mean(own) - theirs:+.2f}"])
    return ["experiment", "here", "published", "difference"], rows


def _by_seed(study: dict[str, Any], name: str) -> dict[int, dict[str, Any]]:
    return {r["seed"]: r for r in study["runs"] if r["experiment"] == name and not r["teacher"]}


def _mean(values: Sequence[float], digits: int = 2, sign: str = "", sd: bool = False) -> str:
    spread = f" ± {interval(values):.{digits}f}" if len(values) > 1 else ""
    spread += f" ({statistics.stdev(values):.{digits}f})" if sd and len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.{digits}f}{spread}"


def _petaflop(runs: list[dict[str, Any]]) -> str:
    """In 10^15 operations, the mean; a dash where they could not be counted."""
    known = [r["flops"] / 1e15 for r in runs if "flops" in r]
    return f"{statistics.mean(known):.3g}" if known else "-"


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _lines(columns: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows])


def _inline(text: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", markup.escape(text, quote=False))
