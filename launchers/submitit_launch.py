"""Train through submitit: `python launchers/submitit_launch.py CONFIG [CONFIG ...] [key=value ...] --nodes 2 ...`.

One submitit task a node starts one torchrun. On submitit's signal (before the time limit, and at a preemption) or on
SIGTERM the ranks write a checkpoint at one step; then `checkpoint()` returns what submitit is to requeue, if the run
folder says that the run is to go on. Several configs or seeds are one job array.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError

from irkd_dist import config
from irkd_dist.errors import UserError
from irkd_dist.training import requeue


@dataclass
class Train:
    """What submitit calls on each node; pickled at submission, and again at each requeue."""

    config: str
    overrides: list[str]
    run: str  # folder
    processes: int  # on each node
    limit: int  # restarts in a row without a new checkpoint
    grace: int  # seconds that the ranks get to write a checkpoint

    launcher: subprocess.Popen[bytes] | None = field(default=None, init=False)  # torchrun, once it runs

    def __call__(self) -> str:
        """Train to the end, or leave by submitit's handler, which calls `checkpoint`."""
        job = submitit.JobEnvironment()
        first = job.global_rank == 0
        if first:
            requeue.own(Path(self.run), _attempt(job))
            # submitit passes over SIGTERM; to us it is the same
            signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(job._usr_sig()))
        self.launcher = self._start(job)
        while self.launcher.poll() is None:
            time.sleep(0.5)
        verdict = requeue.decide(
            Path(self.run), self.limit, count=False, owner=_attempt(job) if first else None
        )
        if first and verdict.action == "requeue":
            signal.raise_signal(job._usr_sig())  # a rank was signalled or killed: off to submitit's handler
        if first and verdict.action == "failed":
            raise FailedJobError(verdict.why)
        # the other nodes never fail: SLURM might end the first one for it before that has requeued the job
        return str(verdict)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission | None:
        """Called by submitit on the first node: stop the ranks, which write a checkpoint, and say what to requeue."""
        for number in (signal.SIGTERM, submitit.JobEnvironment()._usr_sig()):
            signal.signal(number, signal.SIG_IGN)  # SLURM may send both
        if self.launcher is not None and self.launcher.returncode is None:
            os.kill(self.launcher.pid, signal.SIGUSR1)
            # Popen's own methods may wait for a lock that the interrupted poll() holds
            os.waitid(os.P_PID, self.launcher.pid, os.WEXITED | os.WNOWAIT)
            # rank 0 may be on another node, and still be writing
            end = time.monotonic() + 20
            while requeue.state(Path(self.run)) == "running" and time.monotonic() < end:
                time.sleep(0.2)
        verdict = requeue.decide(Path(self.run), self.limit, owner=_attempt(submitit.JobEnvironment()))
        print(f"submitit_launch: {verdict}", flush=True)
        if verdict.action == "finished":
            sys.exit(0)
        if verdict.action == "failed" or _cancelled():
            return None  # submitit then ends the job
        return submitit.helpers.DelayedSubmission(replace(self))

    def _start(self, job: submitit.JobEnvironment) -> subprocess.Popen[bytes]:
        attempt, name = int(os.environ.get("SLURM_RESTART_COUNT", 0)), _attempt(job)
        if job.num_nodes == 1:
            meet = ["--standalone"]
        else:
            port = 10000 + (int(os.environ["SLURM_JOB_ID"]) * 10 + attempt) % 20000
            meet = [
                f"--nnodes={job.num_nodes}", "--rdzv-backend=c10d", f"--rdzv-id={name}",
                f"--rdzv-endpoint={os.environ['SLURM_LAUNCH_NODE_IPADDR']}:{port}",
                f"--rdzv-conf=is_host={int(job.node == 0)}",
            ]  # fmt: skip
        logs = Path(self.run, "logs", name, f"node{job.node}")
        logs.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable, "-m", "torch.distributed.run", *meet, f"--nproc-per-node={self.processes}",
            f"--log-dir={logs}", "--redirects=3", "--tee=3", "-m", "irkd_dist", "train", self.config, *self.overrides,
        ]  # fmt: skip
        environment = {
            "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGUSR1",
            "PET_SHUTDOWN_TIMEOUT": str(self.grace),
            "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": f"[node{job.node} rank ${{rank}}] ",
            "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // self.processes)),
        }
        # a session of its own, since SLURM sends submitit's signal to the task's whole group and it would kill torchrun
        return subprocess.Popen(
            command, env=environment | os.environ, start_new_session=True, preexec_fn=_end_with_parent
        )


def _attempt(job: submitit.JobEnvironment) -> str:
    return f"job{job.job_id}.{os.environ.get('SLURM_RESTART_COUNT', 0)}"


def _cancelled() -> bool:
    """Whether SLURM ends the job for good or requeues it itself; it would start a cancelled job that is requeued."""
    if "SLURM_JOB_ID" not in os.environ:
        return False
    command = ["squeue", "--noheader", f"--job={submitit.JobEnvironment().job_id}", "--format=%T %r"]
    state = ""
    for _ in range(4):  # a controller with much to do does not answer at once
        state = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        if state:
            break
        time.sleep(5)
    return not (state.startswith("RUNNING") or state.endswith("TimeLimit"))


def _end_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when its parent dies, however it dies.

    And be deaf to submitit's signal: SLURM may send it to every process of the job, and it would end torchrun.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    signal.signal(submitit.JobEnvironment()._usr_sig(), signal.SIG_IGN)


def main() -> int:
    """Submit, and say what was submitted and how to follow it."""
    arguments = _parse()
    seeds = [[f"seed={seed}"] for seed in arguments.seeds.split(",")] if arguments.seeds else [[]]
    grace = arguments.signal_delay - 20
    jobs = []
    try:
        for file, seed in product(arguments.configs, seeds):
            overrides = [*arguments.overrides, *seed]
            run = config.folder_of(config.load(file, overrides))
            processes = arguments.processes_per_node or arguments.gpus_per_node or 1
            jobs.append(Train(file, overrides, str(run), processes, arguments.max_restarts, grace))
    except UserError as error:
        print(f"submitit_launch: error: {error}", file=sys.stderr)
        return 2
    if len({job.run for job in jobs}) < len(jobs):
        print(
            f"submitit_launch: error: several jobs share a run folder: {[job.run for job in jobs]}",
            file=sys.stderr,
        )
        return 2

    folder = arguments.folder or Path(jobs[0].run).parent / "submitit"
    executor = _executor(arguments, folder)
    if len(jobs) == 1:
        submitted = [executor.submit(jobs[0])]
    else:
        with executor.batch():
            submitted = [executor.submit(job) for job in jobs]
    for job, handle in zip(jobs, submitted, strict=True):
        print(f"job {handle.job_id}: run folder {job.run}, follow: tail -F {handle.paths.stdout}")
    if not arguments.local:
        numbers = ",".join(sorted({handle.job_id.split("_")[0] for handle in submitted}))
        print(f"state: squeue -j {numbers}, end: scancel {numbers}")
    return 0


def _executor(arguments: argparse.Namespace, folder: Path) -> submitit.Executor:
    """submitit's executor; how often a job times out is not limited, only how often without progress."""
    unlimited = 1_000_000
    common = {"nodes": arguments.nodes, "signal_delay_s": arguments.signal_delay, "stderr_to_stdout": True}
    if arguments.local:
        local = submitit.LocalExecutor(folder, max_num_timeout=unlimited)
        local.update_parameters(**common, timeout_min=arguments.time, gpus_per_node=arguments.gpus_per_node)
        return local
    chosen = {name: getattr(arguments, name) for name in ("partition", "account", "qos", "cpus_per_task")}
    for name, value in chosen.items():
        if value is not None:  # sbatch's variables would win over what the script that submitit writes says
            os.environ.pop(f"SBATCH_{name.upper()}", None)
    more = {name: value or True for name, _, value in (item.partition("=") for item in arguments.sbatch)}
    slurm = submitit.SlurmExecutor(folder, max_num_timeout=unlimited)
    slurm.update_parameters(
        **common, time=arguments.time, ntasks_per_node=1,
        **{name: value for name, value in chosen.items() if value is not None},
        **({"gpus_per_node": arguments.gpus_per_node} if arguments.gpus_per_node else {}),
        job_name="irkd", array_parallelism=arguments.array_parallelism,
        srun_args=["--cpu-bind=none", "--export=ALL"], additional_parameters={"requeue": True, **more},
    )  # fmt: skip
    return slurm


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Submit training through submitit.")
    parser.add_argument(
        "words", nargs="+", metavar="CONFIG | key=value", help="several configs are a job array"
    )
    parser.add_argument("--seeds", metavar="S,S,...", help="one job of the array for each seed")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=0)
    parser.add_argument("--processes-per-node", type=int, help="default: one for each GPU, or one")
    parser.add_argument("--cpus-per-task", type=int, help="CPUs of a node, for all its processes")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--qos")
    parser.add_argument(
        "--time", type=int, default=240, metavar="MINUTES", help="until a requeue (default 240)"
    )
    parser.add_argument(
        "--signal-delay", type=int, default=120, metavar="S", help="before the time limit (default 120)"
    )
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION[=VALUE]", help="any other of sbatch's"
    )
    parser.add_argument("--array-parallelism", type=int, default=256, metavar="N", help="jobs at once")
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=3,
        metavar="N",
        help="in a row without a new checkpoint (default 3)",
    )
    parser.add_argument(
        "--folder", type=Path, help="submitit's files (default: submitit/ beside the run folders)"
    )
    parser.add_argument("--local", action="store_true", help="on this machine, by submitit's local executor")
    arguments = parser.parse_intermixed_args()
    arguments.configs = [word for word in arguments.words if "=" not in word]
    arguments.overrides = [word for word in arguments.words if "=" in word]
    if not arguments.configs:
        parser.error("name at least one CONFIG")
    if arguments.local and arguments.nodes > 1:
        parser.error(f"--nodes {arguments.nodes}: --local is this machine alone; use --processes-per-node")
    if arguments.signal_delay < 30:
        parser.error(
            f"--signal-delay {arguments.signal_delay} leaves no time to write a checkpoint; use 30 or more"
        )
    return arguments


if __name__ == "__main__":
    sys.exit(main())
