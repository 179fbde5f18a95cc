"""A real SLURM cluster on this machine: one controller and three node daemons on ports of 127.0.0.1, no systemd."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

NODES = ("node1", "node2", "node3")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # Debian's daemons are not on every user's path

# low: what tests run in by default; high preempts it. Jobs of one may not start on cores of the other.
CONF = """
ClusterName=irkd
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SlurmdParameters=config_overrides
SlurmctldParameters=reboot_from_controller
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdTimeout=6
SlurmctldTimeout=6
KillWait=20
MinJobAge=300
FirstJobId={first_job}
UnkillableStepTimeout=30
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=ALL MaxTime=60 PriorityTier=10 PreemptMode=OFF
"""


def missing() -> list[str]:
    """The programs that this machine lacks."""
    return [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]


class Cluster:
    """Start it with `with Cluster(folder) as cluster`; `folder` must be short: sockets live in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {
            **os.environ,
            "PATH": PATH,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
        }
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        ports = _free_ports(1 + len(NODES))
        host = socket.gethostname().split(".")[0]
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=4000"
            for name, port in zip(NODES, ports[1:], strict=True)
        )
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text(
            CONF.format(
                host=host,
                controller_port=ports[0],
                user=getpass.getuser(),
                folder=self.folder,
                nodes=nodes,
                first_job=1
                + os.getpid() % 10000,  # our ports follow from it: two clusters on one machine differ
            )
        )
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        munge = [
            f"--{what}={self.folder}/munge.{what.split('-')[0]}"
            for what in ("pid-file", "log-file", "seed-file")
        ]
        try:
            self._start("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket",
                        f"--key-file={key}", *munge)  # fmt: skip
            wait_for(lambda: (self.folder / "munge.socket").exists(), 10, "munged's socket")
            self._start("slurmctld", "-D")
            for name in NODES:
                self.start_node(name)
            self.wait_nodes()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if "slurmctld" in self._daemons:
            self.run("scancel", "--state=PENDING", f"--user={getpass.getuser()}", check=False)
            self.run("scancel", "--signal=KILL", "--full", f"--user={getpass.getuser()}", check=False)
        for name in NODES:
            self.kill_node(name)
        for process in self._daemons.values():
            process.terminate()
        for process in self._daemons.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        self._daemons.clear()

    def start_node(self, name: str) -> None:
        """Start a node's daemon, at first or after `kill_node`."""
        self._start("slurmd", "-D", "-N", name)

    def kill_node(self, name: str) -> None:
        """`kill -9` of a node's daemon with all that runs under it, as when the power fails."""
        daemon = self._daemons.pop(f"slurmd {name}", None)
        doomed = _tree({"IRKD_NODE": name, "SLURM_CONF": self.env["SLURM_CONF"]})
        # all halt before one dies, as without power, and children go first: else srun's second process sees the
        # first one gone (the kernel wakes what is halted when its parent dies), and has time to ask the
        # controller to kill the step on the other nodes too
        for sent in (signal.SIGSTOP, signal.SIGKILL):
            for pid in reversed(doomed):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, sent)
        if daemon is not None:
            daemon.wait(10)

    def wait_nodes(self) -> None:
        """Wait until every node is free to take a job."""

        def idle() -> bool:
            states = self.run("sinfo", "--noheader", "-N", "--partition=low", "--format=%T", check=False)
            return states.split() == ["idle"] * len(NODES)

        wait_for(idle, 40, "idle nodes", self.status)

    def run(
        self, *command: str, check: bool = True, cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> str:
        """Run a command against this cluster; returns its stdout."""
        done = subprocess.run(
            command, env={**self.env, **(env or {})}, cwd=cwd, capture_output=True, text=True, timeout=60
        )
        if check:
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        text = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(item.split("=", 1) for item in text.split() if "=" in item)

    def wait_job(
        self, job: str, states: str | tuple[str, ...], seconds: float, **fields: str
    ) -> dict[str, str]:
        """Wait until a job is in one of these states with these fields; returns what scontrol shows then."""
        wanted = (states,) if isinstance(states, str) else states
        shown: dict[str, str] = {}

        def there() -> bool:
            self.hurry()
            shown.update(self.job(job))
            return shown["JobState"] in wanted and all(shown[key] == value for key, value in fields.items())

        def what() -> str:
            output = Path(shown.get("StdOut", "/nonexistent"))
            return f"{shown}\n{self.status()}" + (output.read_text()[-6000:] if output.is_file() else "")

        wait_for(there, seconds, f"job {job} {wanted} {fields or ''}", what)
        return shown

    def hurry(self) -> None:
        """Let requeued jobs start soon: SLURM holds them back for two minutes, so that old credentials are void."""
        for line in self.run("squeue", "--noheader", "--state=PENDING", "--format=%i|%r|%S").splitlines():
            job, reason, start = line.split("|")
            if (
                reason == "BeginTime"
                and start != "N/A"
                and datetime.fromisoformat(start) > datetime.now() + timedelta(seconds=20)
            ):
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now+3", check=False)

    def status(self) -> str:
        """Queue, nodes and the controller's last lines: for messages of failed tests."""
        log = (self.folder / "slurmctld.log").read_text().splitlines()[-25:]
        return "\n".join(
            [self.run("squeue", "-a", check=False), self.run("sinfo", "-N", "-l", check=False), *log]
        )

    def _start(self, program: str, *options: str) -> None:
        path = shutil.which(program, path=PATH)
        assert path is not None, program
        # the name of the node marks its daemon and everything that it starts, for kill_node
        name = f"{program} {options[-1]}" if program == "slurmd" else program
        env = {**self.env, "IRKD_NODE": options[-1] if program == "slurmd" else ""}
        with (self.folder / f"{name.replace(' ', '-')}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                [path, *options],
                env=env,
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )


def wait_for(
    true: Callable[[], bool], seconds: float, what: str, state: Callable[[], str] = lambda: ""
) -> None:
    """Poll until `true()`, and fail with `state()` when it takes longer."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise AssertionError(f"no {what} within {seconds} s\n{state()}")
        time.sleep(0.5)


def processes() -> dict[int, list[str]]:
    """Each process with the words of its command."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile
                found[int(entry.name)] = (entry / "cmdline").read_text().split("\0")
    return found


def _tree(environment: dict[str, str]) -> list[int]:
    """Processes whose environment holds these settings, and all that they started."""
    settings = {f"{key}={value}".encode() for key, value in environment.items()}
    children: dict[int, list[int]] = {}
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it ended meanwhile
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
            if settings <= set((entry / "environ").read_bytes().split(b"\0")):
                found.append(int(entry.name))
    for pid in found:  # grows while it is read
        found += [child for child in children.get(pid, []) if child not in found]
    return found


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


if (
    __name__ == "__main__"
):  # a cluster by hand: prints the SLURM_CONF to export, and runs until it is interrupted
    with Cluster(Path(sys.argv[1])) as started:
        print(f"export SLURM_CONF={started.env['SLURM_CONF']}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
