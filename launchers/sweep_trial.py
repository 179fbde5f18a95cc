"""One trial of a W&B sweep: what `wandb agent` starts. `sweep_trial.py CONFIG [key=value ...]` runs `irkd train` on as
many processes as there are to be, hands on its signals, and leaves nothing running.

Processes: all nodes of a SLURM allocation with one for each GPU; elsewhere IRKD_PROCESSES (default 1) on this machine.
Exit code: that of the training, but 0 for one that was asked to stop: the agent takes anything else for a failed trial
and gives up after a few of them.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from types import FrameType

from irkd_dist import errors, slurm

TRAIN = ["-m", "irkd_dist", "train"]
# a launcher that passes on what asks for a checkpoint, and waits until it is written
LAUNCHER = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGUSR1", "PET_SHUTDOWN_TIMEOUT": "300"}
PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> int:
    """Run the trial; returns the exit code for the agent."""
    try:
        command, environment = _command(arguments)
    except (errors.UserError, ValueError) as error:
        print(f"sweep_trial: error: {error}", file=sys.stderr)
        return 2
    child = subprocess.Popen(command, env={**LAUNCHER, **environment}, preexec_fn=_end_with_parent)
    asked = False

    def hand_on(number: int, _: FrameType | None) -> None:
        nonlocal asked
        asked = True
        # srun kills its tasks on SIGTERM and hands SIGUSR1 on to them
        child.send_signal(signal.SIGUSR1 if command[0] == "srun" else number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, hand_on)
    code = child.wait()
    if code != 0 and (asked or _stopped(arguments)):
        print("sweep_trial: the trial stopped as it was asked to", file=sys.stderr)
        return 0
    return code if code >= 0 else 128 - code


def _command(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    processes, environment = int(os.environ.get("IRKD_PROCESSES") or 0), dict(os.environ)
    if "SLURM_JOB_ID" in os.environ:
        return slurm.torchrun([*TRAIN, *arguments], processes or None)
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        return [sys.executable, *torchrun, *TRAIN, *arguments], environment
    return [sys.executable, *TRAIN, *arguments], environment


def _stopped(arguments: list[str]) -> bool:
    """Whether the run says of itself that it was stopped: W&B's server may have asked it directly."""
    from irkd_dist import config, runfolder

    try:
        folder = config.folder_of(config.load(arguments[0], arguments[1:]))
    except errors.UserError:
        return False
    return runfolder.read_status(folder)[0].get("state") == "stopped"


def _end_with_parent() -> None:
    """Have Linux send SIGTERM to the child when this process is killed: an agent kills only this one."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
