"""Start real training processes, as a user would; used by the tests beside it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from irkd_dist.training.tracking import read_events

REPOSITORY = Path(__file__).resolve().parents[2]

STUDENT = {
    "name": "custom",
    "patch": 4,
    "options": {"embed_dim": 32, "depth": 3, "num_heads": 2},
}


def irkd(
    *arguments: str, world: int = 1, env: dict[str, str] | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run `irkd ...`, under `accelerate launch` for a world above 1; one thread a process, so sums are alike."""
    if world > 1:
        return launch_engine("ddp", world, *arguments, env=env, check=check)
    return _run([sys.executable, "-m", "irkd_dist", *arguments], env, check)


def launch_engine(
    engine: str, world: int, *arguments: str, env: dict[str, str] | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run `irkd ...` under `accelerate launch` with the configuration file of an engine."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", f"--config_file=configs/accelerate/{engine}.yaml",
        f"--num_processes={world}", f"--main_process_port={_free_port()}", "-m", "irkd_dist", *arguments,
    ]  # fmt: skip
    return _run(command, env, check)


def _run(command: list[str], env: dict[str, str] | None, check: bool) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300
    )
    if check:
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def losses(run: Path) -> list[dict[str, float]]:
    """Every step's mean losses, from a run with track.log_every=1."""
    return [e for e in read_events(run) if e["event"] == "train"]


def _free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
