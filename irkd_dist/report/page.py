"""The page: reads the runs, gathers words, tables and figures, and writes them as one self-contained file."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from irkd_dist import __version__, files, runfolder
from irkd_dist import config as configuration
from irkd_dist.errors import UserError
from irkd_dist.report import curves, figures, maps, tables, words
from irkd_dist.report.figures import DARK, LIGHT, STYLES
from irkd_dist.report.reading import Run, read

TEMPLATE = "report.html.j2"


def write(folders: list[Path], out: Path | None = None) -> Path:
    """Write the report of one run, or the comparison of several, and return the page's path.

    One run: `report.html` (or `out`) and `figures/*.png` in its folder. Several: one page, `report.html` in their
    common parent folder unless `out` names another file.

    Raises:
        UserError: a folder is no run, or nothing can be written.
    """
    unique = list({f.resolve(): f for f in folders}.values())
    if not unique:
        raise UserError("no run to report: give at least one run folder, e.g. irkd report runs/student-seed0")
    found = [read(f) for f in unique]
    if len(found) == 1:
        page = found[0].folder / runfolder.REPORT if out is None else out
        context = _run_page(found[0])
    else:
        parent = os.path.commonpath([r.folder.resolve().parent for r in found])
        page = Path(parent) / runfolder.REPORT if out is None else out
        context = _comparison_page(_distinct_names(found))
    common = {"version": __version__, "palettes": {"light": LIGHT, "dark": DARK}}
    common |= {"run": None, "comparison": None}
    files.write(page, _template().render(common | context))
    return page


def _run_page(run: Run) -> dict[str, Any]:
    folder = run.folder / runfolder.FIGURES
    plans = {
        "accuracy": curves.accuracy(run),
        "resolutions": curves.resolutions(run),
        "losses": curves.losses(run),
        "pace": curves.pace(run),
        "teacher": curves.teacher(run),
        "saliency": maps.saliency(run),
    }
    measured = []
    for n, found in enumerate(run.evaluations):
        file = folder / ("evaluation.png" if n == 0 else f"evaluation-{n + 1}.png")
        plan = curves.evaluation(run, found)
        measured.append((figures.picture(file, plan), tables.evaluation(found)))
    return {
        "title": run.name,
        "run": {
            **_text(run),
            "tiles": tables.tiles(run),
            "pictures": {n: figures.picture(folder / f"{n}.png", plan) for n, plan in plans.items()},
            "teacher": tables.teacher(run),
            "has_teacher": run.config.teacher is not None,
            "evaluations": measured,
            "yaml": yaml.safe_dump(configuration.to_dict(run.config), sort_keys=False),
        },
    }


def _comparison_page(found: list[Run]) -> dict[str, Any]:
    groups = [_group(r) for r in found]
    names = list(dict.fromkeys(groups))
    colors = len(LIGHT.cycle)
    keys = [(i % colors, i // colors % len(STYLES)) for i in map(names.index, groups)]
    swatch = {group: (color, list(STYLES)[style]) for group, (color, style) in zip(groups, keys, strict=True)}
    plans = curves.comparison(found, keys)
    return {
        "title": f"{len(found)} runs compared",
        "comparison": {
            "table": tables.comparison(found),
            "swatches": [swatch[g] for g in groups],
            "legend": [(name, *swatch[name], groups.count(name)) for name in names],
            "pictures": {name: figures.picture(None, plan) for name, plan in plans.items()},
            "runs": [_text(r) for r in found],
        },
    }


def _text(run: Run) -> dict[str, Any]:
    """What both kinds of page say of a run."""
    return {
        "name": run.name,
        "status": words.status(run),
        "finished": run.last("summary") is not None,
        "notices": words.notices(run),
        "facts": words.facts(run),
        "stages": tables.stages(run),
        "terms": words.terms(run.config),
    }


def _group(run: Run) -> str:
    """What runs that differ in the seed alone have in common."""
    return re.sub(r"[-_]seed\d+", "", run.name)


def _template() -> Any:
    text = resources.files("irkd_dist.report").joinpath(TEMPLATE).read_text("utf-8")
    strict = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return strict.from_string(text)


def _distinct_names(found: list[Run]) -> list[Run]:
    """Runs of equal names are told apart by their paths."""
    names = [r.name for r in found]
    return [replace(r, name=str(r.folder)) if names.count(r.name) > 1 else r for r in found]
