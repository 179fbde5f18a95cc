"""A study: several experiments over several seeds, trained one after the other, and their table."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError

from irkd_dist import __version__, eventlog, files, plain
from irkd_dist import config as configuration
from irkd_dist.errors import UserError


@dataclass(frozen=True)
class Study:
    """What a study runs: first the teachers, once; then each experiment with each seed."""

    title: str
    experiments: dict[str, str]  # row of the table -> configuration
    seeds: list[int]
    teachers: list[str] = field(default_factory=list)  # configurations
    overrides: list[str] = field(default_factory=list)  # for every run
    notes: list[str] = field(default_factory=list)  # sentences for the page
    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Result:
    """One finished run."""

    experiment: str
    seed: int
    command: str
    summary: dict[str, Any]


def load(path: Path) -> Study:
    """Read a study's YAML.

    Raises:
        UserError: no such file, or a key is unknown, missing or of the wrong type.
    """
    file = configuration.find(path)
    try:
        return TypeAdapter(Study).validate_python(plain.read(file))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{file}: {key}: {first['msg'].lower()} (a study has {', '.join(Study.__dataclass_fields__)})"
        ) from error


def run(study: Study, overrides: list[str], out: Path | None, command: str) -> str:
    """Train what is not trained yet and return the table as Markdown, also written to `out`.

    A finished run is not trained again and an interrupted one goes on, so the same command takes up where it stopped.

    Raises:
        UserError: a run fails; its own message is printed above.
    """
    common = [*study.overrides, *overrides]
    for teacher in study.teachers:
        _train(teacher, "teacher", None, common)
    teachers = [_result(t, "teacher", None, common) for t in study.teachers]
    results = []
    for seed in study.seeds:  # seed by seed, so that every row has figures early
        for name, path in study.experiments.items():
            _train(path, name, seed, common)
            results.append(_result(path, name, seed, common))
            page = _page(study, teachers, results, command)
            if out is not None:
                files.write(out, page)
    return _page(study, teachers, results, command)


def _train(path: str, name: str, seed: int | None, overrides: list[str]) -> None:
    print(f"== {name}{'' if seed is None else f', seed {seed}'}", flush=True)
    arguments = _arguments(path, seed, overrides)
    done = subprocess.run([sys.executable, "-m", "irkd_dist", *arguments], check=False)
    if done.returncode:
        raise UserError(f"{' '.join(['irkd', *arguments])} ended with {done.returncode}")


def _arguments(path: str, seed: int | None, overrides: list[str]) -> list[str]:
    return ["train", path, *([] if seed is None else [f"seed={seed}"]), *overrides]


def _result(path: str, name: str, seed: int | None, overrides: list[str]) -> Result:
    arguments = _arguments(path, seed, overrides)
    config = configuration.load(path, arguments[2:])
    events = eventlog.read_events(configuration.folder_of(config))
    summary = next(e for e in reversed(events) if e["event"] == "summary")
    if "test_accuracy" not in summary:
        raise UserError(f"{config.data.shards} has no test split, and a study's table needs one")
    return Result(name, config.seed, " ".join(["irkd", *arguments]), summary)


def _page(study: Study, teachers: list[Result], results: list[Result], command: str) -> str:
    lines = [f"# {study.title}", "", *(f"{note}\n" for note in study.notes)]
    lines += [
        f"Test accuracy in %, mean and sample standard deviation over seeds; `best` is the checkpoint with the best "
        f"validation accuracy in the last stage, `last` the weights at the end. One command: `{command}`.",
        "",
        "| experiment | seeds | test, best | test, last | seconds a run |",
        "|---|---|---|---|---|",
    ]
    for name in study.experiments:
        own = [r.summary for r in results if r.experiment == name]
        if own:
            columns = (
                _mean_std([100 * s[key] for s in own]) for key in ("test_accuracy", "test_accuracy_last")
            )
            seconds = _mean_std([s["seconds"] for s in own], digits=0)
            lines.append(f"| {name} | {len(own)} | {' | '.join(columns)} | {seconds} |")
    for teacher in teachers:
        lines.append(f"| teacher | 1 {_figures(teacher)}")
    lines += ["", "## Every run", "", "| command | test, best | test, last | seconds |", "|---|---|---|---|"]
    for r in [*teachers, *results]:
        lines.append(f"| `{r.command}` {_figures(r)}")
    return "\n".join([*lines, "", _machine(), ""])


def _figures(result: Result) -> str:
    s = result.summary
    return f"| {100 * s['test_accuracy']:.2f} | {100 * s['test_accuracy_last']:.2f} | {s['seconds']:.0f} |"


def _mean_std(values: list[float], digits: int = 2) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _machine() -> str:
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
