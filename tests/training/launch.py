"""Start real training processes; used by the tests beside it."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from irkd_dist.eventlog import read_events

REPOSITORY = Path(__file__).resolve().parents[2]
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["irkd_dist.training.train", "irkd_dist.evaluation", "deepspeed"])

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
    """Run a module in every rank, without a launcher; one thread a process, so sums are alike.

    The processes are forked from one that has imported torch, timm and DeepSpeed, which saves 4 s of each start.

    Returns:
        What all printed, and the exit code of the first rank that has one.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    if world > 1:
        environment |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
        environment["MASTER_PORT"] = str(_free_port())
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(world):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
            outputs = [Path(folder, f"{rank}.{name}") for name in ("out", "err")]
            ranks.append(
                _SERVER.Process(target=_become, args=(module, arguments, environment | place, outputs))
            )
            ranks[-1].start()
        deadline = time.monotonic() + 300
        for rank in ranks:
            rank.join(deadline - time.monotonic())
        late = [rank for rank in ranks if rank.exitcode is None]
        for rank in late:
            rank.kill()
        out, err = (
            "".join(Path(folder, f"{r}.{n}").read_text() for r in range(world)) for n in ("out", "err")
        )
    assert not late, f"no end after 300 s\n{out[-2000:]}{err[-4000:]}"
    code = next((rank.exitcode for rank in ranks if rank.exitcode), 0)
    assert code == 0 or not check, out[-2000:] + err[-4000:]
    return subprocess.CompletedProcess([module, *arguments], code, out, err)


def _become(module: str, arguments: list[str], environment: dict[str, str], outputs: list[Path]) -> None:
    """Make this process what `python -m module arguments` would be."""
    for stream, path in zip((sys.stdout, sys.stderr), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(REPOSITORY)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def launch_engine(
    engine: str, world: int, *arguments: str, env: dict[str, str] | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run `irkd ...` under `accelerate launch` with the configuration file of an engine."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", f"--config_file=configs/accelerate/{engine}.yaml",
        f"--num_processes={world}", f"--main_process_port={_free_port()}", "-m", "irkd_dist", *arguments,
    ]  # fmt: skip
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
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
