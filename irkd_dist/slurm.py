"""Inside a SLURM allocation: the step that starts one launcher on each node."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from irkd_dist.errors import UserError

# the job's shape is of one task a process; the step has one launcher a node, with all of its CPUs and GPUs
SHAPE = (
    "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_CPUS_PER_TASK",
    "SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_NTASKS_PER_GPU", "SLURM_GPU_BIND", "SLURM_TRES_BIND",
)  # fmt: skip


def torchrun(arguments: list[str], processes: int | None = None) -> tuple[list[str], dict[str, str]]:
    """The command and environment of `srun torchrun ARGUMENTS` over all nodes of the present allocation.

    processes: on each node; None: one for each GPU, or one for each task where there are none.

    Raises:
        UserError: SLURM does not tell where the first node is.
    """
    nodes = os.environ.get("SLURM_JOB_NUM_NODES") or "1"
    tasks = re.match(r"\d+", os.environ.get("SLURM_TASKS_PER_NODE", ""))
    # salloc does not say how many GPUs a node has, and it may differ from node to node: the step knows
    count = str(processes or "${SLURM_GPUS_ON_NODE:-0}")
    # below the ports that systems hand out by themselves; another one for each step of a job
    port = 10000 + (int(os.environ["SLURM_JOB_ID"]) * 10 + os.getpid()) % 20000
    # the first node is the host: torchrun's own guess, from names and addresses, may differ
    launch = (
        f'count={count}; [ "$count" != 0 ] || count={tasks.group() if tasks else 1}; '
        'exec "$1" -m torch.distributed.run --rdzv-conf="is_host=$((SLURM_NODEID == 0))"'
        f' --rdzv-backend=c10d --rdzv-endpoint={_first_address()}:{port} --rdzv-id="$SLURM_JOB_ID.$SLURM_STEP_ID"'
        f" --nnodes={nodes} --nproc-per-node=$count --max-restarts=0" + ' "${@:2}"'
    )
    command = [
        "srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--cpu-bind=none", "--export=ALL",
        "--wait=60", "--kill-on-bad-exit=0", "bash", "-c", launch, "launch", sys.executable, *arguments,
    ]  # fmt: skip
    return command, {k: v for k, v in os.environ.items() if k not in SHAPE}


def _first_address() -> str:
    """Where the first node is reached: its name need not be a host's."""
    names = os.environ.get("SLURM_JOB_NODELIST", "")
    try:
        hosts = _scontrol("show", "hostnames", names)
        found = re.search(r"\bNodeAddr=(\S+)", _scontrol("-o", "show", "node", hosts.split()[0]))
        assert found is not None
        return found.group(1)
    except (OSError, subprocess.CalledProcessError, IndexError, AssertionError) as error:
        raise UserError(f"scontrol does not say where SLURM_JOB_NODELIST={names!r} is: {error}") from error


def _scontrol(*arguments: str) -> str:
    return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=True).stdout
