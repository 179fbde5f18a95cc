"""Start commands as a user would, several at once: a process forked from one that has asked for CUDA cannot use it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from tests.training.launch import REPOSITORY

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
TIMEOUT_S = 170


@dataclass(frozen=True)
class Command:
    """Arguments of `python -m`, and what is different in its environment."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


def irkd(*arguments: str, **environment: str) -> Command:
    """`irkd ...`."""
    return Command(("irkd_dist", *arguments), environment)


def run(command: Command) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; one that does not end in time has -1 for its exit code."""
    # TF32 rounds a product's factors to eleven bits, and these runs are compared with a CPU's
    exact = {"OMP_NUM_THREADS": "1", "NVIDIA_TF32_OVERRIDE": "0"}
    environment = {**os.environ, **exact, **command.environment}
    line = [sys.executable, "-m", *command.arguments]
    try:
        return subprocess.run(
            line,
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        said = f"no end after {TIMEOUT_S} s: {late.stderr!r}"
        return subprocess.CompletedProcess(line, -1, "", said)


def beside(commands: Mapping[str, Command]) -> dict[str, subprocess.CompletedProcess[str]]:
    """Run commands beside one another, as many as there are pairs of cores."""
    workers = max(len(os.sched_getaffinity(0)) // 2, 1)
    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(commands, pool.map(run, commands.values()), strict=True))


def succeeded(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """The same, if its exit code is 0."""
    assert done.returncode == 0, f"{done.args}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done
