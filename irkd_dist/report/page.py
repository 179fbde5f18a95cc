"""The page: reads the runs, gathers words, tables and figures, and writes them as one self-contained file."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from irkd_dist import __version__, files, runfolder
from irkd_dist import config as configuration
from irkd_dist.errors import UserError
from irkd_dist.report import compared, course, curves, figures, maps, mistakes, scores, tables, words
from irkd_dist.report.figures import DARK, LIGHT, STYLES
from irkd_dist.report.reading import Run, read

TEMPLATE = "report.html.j2"
SECTIONS = [
    (name.lower(), name)
    for name in ("Stages", "Accuracy", "Losses", "Teacher", "Saliency", "Evaluation", "Answers", "Cost")
] + [("happened", "What happened"), ("configuration", "Configuration")]
COMPARED = [("runs", "Runs"), ("curves", "Curves"), ("deviations", "Deviations"), ("details", "Each run")]


def write(
    folders: list[Path], out: Path | None = None, *, price: float | None = None, reload_s: float | None = None
) -> Path:
    """Write the report of one run, or the comparison of several, and return the page's path.

    One run: `report.html` (or `out`), and in its folder `figures/` with PNG, SVG and CSV of each figure. Several: one
    page, `report.html` in their common parent folder unless `out` names another file, and `figures/` beside it.
    price: of an hour of all machines of a run. reload_s: the page loads itself again so often, while runs go on.

    Raises:
        UserError: a folder is no run, or nothing can be written.
    """
    unique = list({f.resolve(): f for f in folders}.values())
    if not unique:
        raise UserError("no run to report: give at least one run folder, e.g. irkd report runs/student-seed0")
    found = [read(f) for f in unique]
    if len(found) == 1:
        page = found[0].folder / runfolder.REPORT if out is None else out
        context = _run_page(found[0], price)
    else:
        parent = os.path.commonpath([r.folder.resolve().parent for r in found])
        page = Path(parent) / runfolder.REPORT if out is None else out
        context = _comparison_page(_distinct_names(found), page.parent / runfolder.FIGURES)
    going = any(r.last("summary") is None for r in found)
    common: dict[str, Any] = {
        "reload_s": reload_s if going else None,
        "version": __version__,
        "palettes": {"light": LIGHT, "dark": DARK},
    }
    common |= {"run": None, "comparison": None}
    files.write(page, _template().render(common | context))
    return page


def _run_page(run: Run, price: float | None) -> dict[str, Any]:
    folder = run.folder / runfolder.FIGURES
    plans = {
        "accuracy": curves.accuracy(run),
        "cost": course.cost(run),
        "resolutions": curves.resolutions(run),
        "losses": curves.losses(run),
        "pace": curves.pace(run),
        "gradients": course.gradients(run),
        "cache": course.cache(run),
        "teacher": curves.teacher(run),
        "saliency": maps.saliency(run),
        "agreement": course.agreement(run),
    }
    measured = []
    for n, found in enumerate(run.evaluations):
        file = folder / ("evaluation.png" if n == 0 else f"evaluation-{n + 1}.png")
        plan = curves.evaluation(run, found)
        measured.append((figures.picture(file, plan), tables.evaluation(found)))
    detailed = next((e for e in run.evaluations if e.confusion), None)
    if detailed is not None:
        plans["matrix"] = scores.matrix(run, detailed)
        plans["classes"] = scores.classes(detailed)
        plans["confusion"] = scores.confusion(detailed)
        plans["mistakes"] = mistakes.mistakes(detailed)
    said = {"stages": tables.stages(run), "cost": tables.cost(run, price), "happened": tables.happened(run)}
    for name, table in said.items():
        figures.write_table(folder / f"table-{name}.csv", (table["columns"], table["rows"]))
    said["happened"] = tables.shortened(said["happened"])
    none = dict.fromkeys(("matrix", "classes", "confusion", "mistakes"))
    return {
        "title": run.name,
        "sections": SECTIONS,
        "run": {
            **_text(run),
            "tiles": tables.tiles(run),
            **said,
            "mistaken": tables.mistaken(detailed) if detailed is not None else None,
            "detailed": detailed is not None,
            "pictures": none | {n: figures.picture(folder / f"{n}.png", plan) for n, plan in plans.items()},
            "teacher": tables.teacher(run),
            "has_teacher": run.config.teacher is not None,
            "evaluations": measured,
            "yaml": yaml.safe_dump(configuration.to_dict(run.config), sort_keys=False),
        },
    }


def _comparison_page(found: list[Run], folder: Path) -> dict[str, Any]:
    groups = [compared.group_of(r) for r in found]
    names = list(dict.fromkeys(groups))
    colors = len(LIGHT.cycle)
    keys = [(i % colors, i // colors % len(STYLES)) for i in map(names.index, groups)]
    swatch = {group: (color, list(STYLES)[style]) for group, (color, style) in zip(groups, keys, strict=True)}
    plans = compared.curves(found, keys)
    said = {"groups": compared.groups(found), "deviations": compared.deviations(found)}
    for name, table in said.items():
        if table is not None:
            figures.write_table(folder / f"table-{name}.csv", (table["columns"], table["rows"]))
    return {
        "title": f"{len(found)} runs compared",
        "sections": COMPARED,
        "comparison": {
            "table": tables.comparison(found),
            "swatches": [swatch[g] for g in groups],
            "legend": [(name, *swatch[name], groups.count(name)) for name in names],
            **said,
            "pictures": {
                name: figures.picture(folder / f"over-{name}.png", plan) for name, plan in plans.items()
            },
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


def _template() -> Any:
    text = resources.files("irkd_dist.report").joinpath(TEMPLATE).read_text("utf-8")
    strict = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return strict.from_string(text)


def _distinct_names(found: list[Run]) -> list[Run]:
    """Runs of equal names are told apart by their paths."""
    names = [r.name for r in found]
    return [replace(r, name=str(r.folder)) if names.count(r.name) > 1 else r for r in found]
