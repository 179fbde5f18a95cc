"""A study: several experiments over several seeds, one after the other or beside one another, and their table.

What the table is made of is kept beside it as JSON, so that `irkd verify` can make the table again and compare.
"""

from __future__ import annotations

import os
import platform
import shlex
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from irkd_dist import __version__, eventlog, files, jobs, plain, study_page
from irkd_dist import config as configuration
from irkd_dist.errors import Stopped, UserError
from irkd_dist.report import reading
from irkd_dist.training import tracking


@dataclass(frozen=True)
class Study:
    """What a study runs: first the teachers, once; then each experiment with each seed."""

    title: str
    experiments: dict[str, str]  # row of the table -> configuration
    seeds: list[int]
    teachers: list[str] = field(default_factory=list)  # configurations
    overrides: list[str] = field(default_factory=list)  # for every run
    own: dict[str, list[str]] = field(default_factory=dict)  # overrides for one experiment or teacher
    # by --scale: overrides of every run (under `all`), and of an experiment or teacher by name
    scales: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    deviations: dict[str, list[str]] = field(default_factory=dict)  # by scale: sentences for the page
    baseline: str | None = None  # the experiment that the others are compared with; null: the first
    published: dict[str, float] = field(default_factory=dict)  # accuracy in % that others report
    notes: list[str] = field(default_factory=list)  # sentences for the page
    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Cell:
    """One training of a study; a teacher has the seed of its configuration."""

    experiment: str
    seed: int | None
    path: str
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        """What it is called in tables."""
        return self.experiment if self.seed is None else f"{self.experiment}, seed {self.seed}"

    @property
    def arguments(self) -> tuple[str, ...]:
        """What `irkd` is given for it."""
        return ("train", self.path, *([] if self.seed is None else [f"seed={self.seed}"]), *self.overrides)

    @property
    def config(self) -> configuration.Config:
        """Its configuration."""
        return configuration.load(self.path, [*self.arguments[2:]])

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return configuration.folder_of(self.config)


def load(path: Path) -> Study:
    """Read a study's YAML.

    Raises:
        UserError: no such file, a key is unknown, missing or of the wrong type, or names no experiment.
    """
    file = configuration.find(path)
    try:
        study = TypeAdapter(Study).validate_python(plain.read(file))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{file}: {key}: {first['msg'].lower()} (a study has {', '.join(Study.__dataclass_fields__)})"
        ) from error
    known = {*study.experiments, *study.teachers}
    named = [("own", study.own), ("published", study.published), ("baseline", [study.baseline])]
    named += [(f"scales.{scale}", own) for scale, own in study.scales.items()]
    for key, names in named:
        for name in names:
            if name not in (None, "all") and name not in known:
                raise UserError(
                    f"{file}: {key}: {name!r} is no experiment; it has {', '.join(study.experiments)}"
                )
    return study


def cells(study: Study, overrides: Sequence[str] = (), scale: str | None = None) -> list[Cell]:
    """Every training of a study, teachers first, then seed by seed, so that each row has figures early.

    Raises:
        UserError: the study has no such scale.
    """
    if scale is not None and scale not in study.scales:
        raise UserError(f"--scale {scale}: {study.title!r} has {', '.join(study.scales) or 'no scales'}")
    scaled = study.scales[scale] if scale else {}

    def cell(name: str, seed: int | None, path: str) -> Cell:
        own = (*study.own.get(name, ()), *scaled.get("all", ()), *scaled.get(name, ()))
        return Cell(name, seed, path, (*study.overrides, *own, *overrides))

    return [
        *(cell(path, None, path) for path in study.teachers),
        *(cell(name, seed, path) for seed in study.seeds for name, path in study.experiments.items()),
    ]


def check_folders(everything: Iterable[Cell]) -> None:
    """Each run has a folder of its own; a teacher that is the same in two studies is one run.

    Raises:
        UserError: two that differ would be written to one folder, where the second would be taken for the first.
    """
    owners: dict[Path, Cell] = {}
    for cell in everything:
        owner = owners.setdefault(cell.folder.absolute(), cell)
        if owner is not cell and owner.config != cell.config:
            raise UserError(
                f"{owner.name} and {cell.name} differ and have one run folder, {cell.folder}: give each its own out, "
                f"e.g. own: {{{cell.experiment!r}: [out=runs/other]}} (a name= holds for all seeds)"
            )


def run(
    studies: Sequence[Study], overrides: Sequence[str], out: Path | None, command: str, *,
    beside: int = 1, scale: str | None = None,
) -> str:  # fmt: skip
    """Train what is not trained yet, `beside` runs at once, and return the table as Markdown.

    With `out` it is written there, what it was made of beside it (`.json`), and a page (`.html`); after each seed too.
    A finished run is not trained again and an interrupted one goes on, so the same command takes up where it stopped.

    Raises:
        UserError: two runs would share a folder; or runs have failed, and the others are trained, but for the students
            of a teacher that failed.
        Stopped: a signal asked for it.
    """
    everything = [cell for study in studies for cell in cells(study, overrides, scale)]
    check_folders(everything)
    failed, left_out, ended = dict[Path, str](), dict[Path, str](), 0
    names = {c.folder: c.name if len(studies) == 1 else f"{c.name} ({c.folder})" for c in everything}
    total = len({cell.folder for cell in everything})
    for seed in dict.fromkeys(cell.seed for cell in everything):  # the teachers have none
        phase = {cell.folder: cell for cell in everything if cell.seed == seed}  # studies may share a teacher
        if seed is not None and failed:
            left_out |= without_teacher(phase.values(), [c for c in everything if c.folder in failed])
        todo = [
            jobs.Job(names[folder], c.arguments, folder)
            for folder, c in phase.items()
            if folder not in left_out
        ]
        problems, stopped = jobs.run(todo, beside, tracking.console(), jobs.Whole(total, ended))
        ended += len(phase)
        failed |= problems
        if stopped:
            raise Stopped
        if out is not None:
            write(out, record(studies, overrides, scale, command))
    if failed:
        named = "; ".join(f"{names[folder]}: {why}" for folder, why in failed.items())
        waiting = "; ".join(f"{names[folder]} was not started, {why}" for folder, why in left_out.items())
        raise UserError(f"{len(failed)} of {total} runs failed: {named}{'; ' if waiting else ''}{waiting}")
    return study_page.markdown(record(studies, overrides, scale, command))


def without_teacher(students: Iterable[Cell], failed: Sequence[Cell]) -> dict[Path, str]:
    """Students that have nothing to learn from, by run folder, and whose teacher's run has failed."""
    folders = {cell.folder.absolute(): cell.name for cell in failed if cell.seed is None}
    found: dict[Path, str] = {}
    for cell in students:
        config = cell.config
        paths = [stage.teacher for stage in configuration.stages(config)]
        paths += [config.teacher.run] if config.teacher is not None else []
        for path in filter(None, paths):
            absolute = Path(path).absolute()
            taught_by = next((folders[f] for f in (absolute, *absolute.parents) if f in folders), None)
            if taught_by is not None:
                found[cell.folder] = f"since its teacher {taught_by} failed"
    return found


def record(
    studies: Sequence[Study], overrides: Sequence[str] = (), scale: str | None = None, command: str = ""
) -> dict[str, Any]:
    """What a page is made of: plain values, with the summary of each run that is finished.

    Raises:
        UserError: shards without a test split, which a table needs.
    """
    told = []
    for study in studies:
        runs = [found for cell in cells(study, overrides, scale) if (found := _result(cell)) is not None]
        told.append(
            {
                "title": study.title, "notes": [*study.notes, *study.deviations.get(scale or "", [])],
                "experiments": [*study.experiments],
                "baseline": study.baseline or next(iter(study.experiments), None), "published": study.published,
                "runs": runs,
            }
        )  # fmt: skip
    return {"command": command, "scale": scale, "studies": told, "machine": _machine(), "sd": True}


def write(out: Path, values: dict[str, Any]) -> None:
    """Write a page as Markdown and HTML, and what it was made of."""
    files.write(out, study_page.markdown(values))
    files.write(out.with_suffix(".html"), study_page.html(values))
    files.write(out.with_suffix(".json"), study_page.to_json(values))


def _result(cell: Cell) -> dict[str, Any] | None:
    """What a finished run came to; None if it is not finished."""
    config = cell.config
    folder = configuration.folder_of(config)
    try:
        events = eventlog.read_events(folder)
    except UserError:  # it has not begun
        return None
    summary = next((e for e in reversed(events) if e["event"] == "summary"), None)
    if summary is None:
        return None
    if "test_accuracy" not in summary:
        raise UserError(f"{configuration.shards_of(config)} has no test split, and a study's table needs one")
    spent = reading.spent_flops(reading.read(folder))
    kept = ("test_accuracy", "test_accuracy_last", "val_accuracy", "seconds", "steps", "resolution")
    epochs = [e for e in events if e["event"] in ("evaluation", "epoch")]
    return {
        "experiment": cell.experiment, "teacher": cell.seed is None, "seed": config.seed,
        "command": shlex.join(["irkd", *cell.arguments]), "images": sum(e.get("images", 0) for e in epochs),
        **({"flops": spent[-1][1]} if spent else {}), **{key: summary[key] for key in kept if key in summary},
    }  # fmt: skip


def _machine() -> str:
    import timm
    import torch

    cpu = f"CPU ({_cpu()}, {os.cpu_count()} cores)"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    return (
        f"Machine: {device}, OMP_NUM_THREADS {threads}. irkd_dist {__version__}, torch {torch.__version__}, "
        f"timm {timm.__version__}, Python {platform.python_version()}. Written {time.strftime('%Y-%m-%d')}."
    )


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
