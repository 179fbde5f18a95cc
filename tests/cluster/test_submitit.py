"""launchers/submitit_launch.py, on a real cluster and by submitit's local executor."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import FOREVER, REPOSITORY, Job
from tests.cluster.slurm import Cluster, processes, wait_for


def launch(
    cluster: Cluster | None, folder: Path, name: str, *options: str, check: bool = True
) -> tuple[list[Job], subprocess.CompletedProcess[str]]:
    """Call the launcher as a user would; returns the jobs that it says it submitted."""
    config = shutil.copy(folder / "tiny.yaml", folder / f"{name}.yaml")
    command = [sys.executable, "launchers/submitit_launch.py", str(config), *options]
    env = {**(cluster.env if cluster else os.environ), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    # to a file: the local executor's controller goes on and holds a pipe open
    with (folder / f"{name}.said").open("w+") as said_to:
        # SIGINT is ignored by whatever a shell starts with `&`, and submitit cancels its local jobs by it
        done = subprocess.run(
            command, cwd=REPOSITORY, env=env, stdout=said_to, stderr=said_to, text=True, timeout=60,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
    done.stdout = (folder / f"{name}.said").read_text()
    assert not check or done.returncode == 0, done.stdout
    said = re.findall(r"^job (\S+): run folder (\S+), follow: tail -F (\S+)$", done.stdout, re.MULTILINE)
    return [
        Job(cluster, id, Path(config), Path(run), Path(log))  # type: ignore[arg-type]
        for id, run, log in said
    ], done


def test_a_time_out_goes_through_submitits_checkpoint(cluster: Cluster, folder: Path) -> None:
    cluster.wait_nodes()
    options = ["--nodes=2", "--partition=low", "--time=60", FOREVER]
    [job], _ = launch(cluster, folder, "timeout", *options)
    try:
        job.wait_training(1)
        ranks = job.ranks()
        # as near to the limit as --signal-delay says: sent at the controller's next look at its clocks
        cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=2")
        job.wait(("PENDING", "RUNNING"), 70, Restarts="1")
        assert not set(ranks) & set(job.ranks())
        cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
        resumed = job.wait_training(2)
    finally:
        cluster.run("scancel", job.id)
    said = re.findall(
        r"submitit_launch: requeue: stopped on request, newest checkpoint at step (\d+)", job.text()
    )
    assert resumed["event"] == "resume"
    assert resumed["step"] == int(said[0])
    assert resumed["world"] == 2
    assert "Requeued job" in job.text()
    wait_for(lambda: not job.ranks(), 30, "end of the ranks")


def test_seeds_are_an_array_and_a_finished_run_is_not_requeued(cluster: Cluster, folder: Path) -> None:
    cluster.wait_nodes()
    jobs, done = launch(cluster, folder, "array", "--seeds=1,2", "--partition=low", "--time=5")
    first, second = jobs
    assert re.search(rf"^state: squeue -j {first.id.split('_')[0]}, end: scancel ", done.stdout, re.MULTILINE)
    assert (first.run.name, second.run.name) == ("array-seed1", "array-seed2")
    for job in jobs:
        assert job.wait("COMPLETED", 90)["Restarts"] == "0"
        assert json.loads((job.run / "status.json").read_text())["state"] == "finished"


def test_local_executor_requeues_and_leaves_no_rank(folder: Path) -> None:
    [job], _ = launch(None, folder, "local", "--local", FOREVER)
    try:
        wait_for(lambda: len(job.events("checkpoint")) > 2, 60, "checkpoint", job.text)
        [task] = [pid for pid, words in processes().items() if "submitit.core._submit" in words]
        os.kill(task, signal.SIGUSR2)
        wait_for(lambda: job.starts() == 2, 60, "second start", job.text)
    finally:
        os.kill(int(job.id), signal.SIGINT)  # how submitit cancels its local jobs
    assert job.events("resume")[0]["step"] > 0
    wait_for(lambda: not job.ranks(), 30, "end of the ranks")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["optim.lrr=1"], "unknown key optim.lrr=1"),
        (["--seeds=1,1"], "several jobs share a run folder"),
        (["--local", "--nodes=2"], "--nodes 2: --local is this machine alone"),
    ],
)
def test_mistakes_are_refused_before_anything_is_submitted(
    folder: Path, options: list[str], message: str
) -> None:
    jobs, done = launch(None, folder, "mistake", *options, check=False)
    assert (done.returncode, jobs) == (2, [])
    assert message in done.stdout
