"""Start real training processes; used by the tests beside it."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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
    """Run `irkd ...` in so many processes."""
    return spawn(world, "irkd_dist", *arguments, env=env, check=check)


def spawn(
    world: int, module: str, *arguments: str, env: dict[str, str] | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a module in every rank, without a launcher: that takes 4 s; one thread a process, so sums are alike.

    Returns:
        What all printed, and the exit code of the first rank that has one.
    """
    command = [sys.executable, "-m", module, *arguments]
    if world == 1:
        return _run(command, env, check)
    place = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    place["MASTER_PORT"] = str(_free_port())
    with ThreadPoolExecutor(world) as pool:
        ranks = [
            pool.submit(_run, command, {**(env or {}), **place, "RANK": str(r), "LOCAL_RANK": str(r)}, check)
            for r in range(world)
        ]
    done = [rank.result() for rank in ranks]
    code = next((d.returncode for d in done if d.returncode), 0)
    return subprocess.CompletedProcess(
        command, code, "".join(d.stdout for d in done), "".join(d.stderr for d in done)
    )


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
