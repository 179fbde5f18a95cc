"""Inside a SLURM allocation: the command that starts one launcher on each node, and how to end it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from types import FrameType

from irkd_dist.errors import UserError


def torchrun(arguments: list[str], processes: int | None = None) -> list[str]:
    """`srun torchrun ARGUMENTS` over all nodes of the present allocation, one process for each GPU.

    processes: on each node; None: as many as its GPUs, or one for each task, or one.
    """
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES") or os.environ.get("SLURM_NNODES") or 1)
    first = _first_host()
    count = processes or _per_node()
    job = os.environ["SLURM_JOB_ID"]
    # ports of the same job may still be closing, and several agents may share a node
    port = 20000 + (int(job) * 7 + os.getpid()) % 20000
    return [
        "srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1",
        sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={count}",
        "--rdzv-backend=c10d", f"--rdzv-endpoint={first}:{port}", f"--rdzv-id={job}-{os.getpid()}",
        "--max-restarts=0", *arguments,
    ]  # fmt: skip


def run(command: list[str], env: dict[str, str] | None = None) -> int:
    """Run a command in the foreground, passing SIGTERM and SIGUSR1 on; returns its exit code.

    srun answers SIGTERM by killing its tasks, and passes SIGUSR1 on to them: both arrive as SIGUSR1 there.
    """
    child = subprocess.Popen(command, env=env)

    def forward(number: int, _: FrameType | None) -> None:
        child.send_signal(signal.SIGUSR1 if command[0] == "srun" else number)

    earlier = {s: signal.signal(s, forward) for s in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        return child.wait()
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _per_node() -> int:
    for key in ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE", "SLURM_NTASKS_PER_NODE"):
        digits = os.environ.get(key, "").rpartition(":")[2]
        if digits.isdigit() and int(digits) > 0:
            return int(digits)
    return 1


def _first_host() -> str:
    names = os.environ.get("SLURM_JOB_NODELIST", "")
    try:
        shown = subprocess.run(
            ["scontrol", "show", "hostnames", names], capture_output=True, text=True, check=True
        )
        first = shown.stdout.split()[0]
        try:
            socket.getaddrinfo(first, None)
            return first
        except OSError:  # a node's name need not be its host's
            node = subprocess.run(
                ["scontrol", "-o", "show", "node", first], capture_output=True, text=True, check=True
            )
            found = re.search(r"\bNodeAddr=(\S+)", node.stdout)
            return found.group(1) if found else first
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(
            f"scontrol does not tell the hosts of SLURM_JOB_NODELIST={names!r}: {error}"
        ) from error
