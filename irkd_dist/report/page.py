"""The HTML page: template, tables and figures in one self-contained file."""

from __future__ import annotations

from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

from irkd_dist import __version__
from irkd_dist import config as configuration
from irkd_dist.report import curves, figures, maps, words
from irkd_dist.report.figures import Picture
from irkd_dist.report.reading import Run

TEMPLATE = "report.html.j2"


def pictures_of(run: Run) -> dict[str, Picture]:
    """The figures of a run by name, those that it has data for."""
    drawn = {
        "accuracy": curves.accuracy(run),
        "resolutions": curves.resolutions(run),
        "losses": curves.losses(run),
        "pace": curves.pace(run),
        "saliency": maps.panels(run),
        "evaluation": curves.evaluation(run),
    }
    return {name: picture for name, picture in drawn.items() if picture}


def of_run(run: Run, pictures: dict[str, Picture]) -> str:
    """The page of one run."""
    content = {
        "words": words,
        "record": run,
        "yaml": configuration.to_yaml(run.config),
    }
    return _render(run.name, pictures, run=content, comparison=None)


def of_several(found: list[Run]) -> str:
    """The page that compares runs."""
    drawn = curves.comparison(found)
    table = words.comparison_table(found)
    return _render(f"{len(found)} runs compared", {"curves": drawn} if drawn else {}, run=None, comparison=table)


def _render(title: str, pictures: dict[str, Picture], **content: Any) -> str:
    text = resources.files(__package__).joinpath(TEMPLATE).read_text("utf-8")
    strict = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    strict.filters["columns"] = words.columns
    common = {"title": title, "pictures": pictures, "colors": figures.COLORS, "version": __version__}
    return strict.from_string(text).render(common | content)
