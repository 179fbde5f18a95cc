"""slurm/*.sbatch on a real cluster: what ends a job, and what it does then."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from irkd_dist.data import shards
from tests.cluster.conftest import FOREVER, REPOSITORY, Job, Submit
from tests.cluster.slurm import Cluster, wait_for

SCRIPTS = sorted((REPOSITORY / "slurm").iterdir())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_clean(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck") is None and os.environ.get("CI") != "true":
        pytest.skip("no shellcheck")
    subprocess.run(["shellcheck", script], check=True)


def test_two_nodes_train_to_the_end(submit: Submit) -> None:
    job = submit("finished", "--nodes=2", "--ntasks-per-node=2", train=[])
    shown = job.wait("COMPLETED", 90)
    assert shown["Restarts"] == "0"
    assert [(event["event"], event["world"]) for event in job.events("start", "resume")] == [("start", 4)]
    assert json.loads((job.run / "status.json").read_text())["state"] == "finished"
    assert "irkd.sbatch: finished: step 8" in job.text()
    assert re.search(r"^\[node[12] rank 0\] .*epoch +2/2", job.text(), re.MULTILINE)
    logs = {
        f"{file.parents[3].name}/{file.parent.name}"
        for file in job.run.glob(f"logs/job{job.id}.0/**/stdout.log")
    }
    assert logs == {"node1/0", "node1/1", "node2/0", "node2/1"}


def test_the_doctor_examines_every_node_of_an_allocation(cluster: Cluster, folder: Path) -> None:
    doctor = [sys.executable, "-m", "irkd_dist", "doctor", "--slurm", str(folder / "tiny.yaml")]
    said = cluster.run("salloc", "--nodes=2", "--ntasks-per-node=1", *doctor, cwd=REPOSITORY)
    assert "2 processes announced" in said
    assert re.search(r"^ready \(\d+ s\)$", said, re.MULTILINE), said


@pytest.fixture
def running(submit: Submit, cluster: Cluster) -> Job:
    """One job for all faults below, on two nodes; each leaves it running, or the next submits it anew."""
    job = _running.get(cluster.env["SLURM_CONF"])
    if job is None or job.wait(("RUNNING", "FAILED", "COMPLETED"), 60)["JobState"] != "RUNNING":
        job = submit("running", "--nodes=2", "--time=60", train=[FOREVER, f"seed={len(_running)}"])
        job.run = job.run.with_name(f"running-seed{len(_running)}")
    _running[cluster.env["SLURM_CONF"]] = job
    job.wait_training(1)
    return job


_running: dict[str, Job] = {}


def _requeued_by_controller(job: Job) -> None:
    job.cluster.run("scontrol", "requeue", job.id)


def _signalled(job: Job) -> None:
    job.cluster.run("scancel", "--signal=TERM", job.id)


def _out_of_time(job: Job) -> None:
    started = job.cluster.run("squeue", "--noheader", f"--job={job.id}", "--format=%M").strip()
    minutes = int(started.split(":")[0])
    # less than the 120 s of --signal before the limit: sent at the controller's next look at its clocks
    job.cluster.run("scontrol", "update", f"JobId={job.id}", f"TimeLimit={minutes + 2}")


def _preempted(job: Job) -> None:
    job.cluster.run(
        "sbatch", "--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"
    )


def _signalled_as_with_cgroups(job: Job) -> None:
    """A cluster that tracks processes by cgroups signals the step's tasks, and nothing that these have started."""
    tasks = job.tasks()
    assert len(tasks) == 2
    for pid in tasks:
        os.kill(pid, signal.SIGUSR1)


FAULTS = [_requeued_by_controller, _signalled, _signalled_as_with_cgroups, _out_of_time, _preempted]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_stop_is_checkpointed_and_the_job_goes_on_there(running: Job, fault: Callable[[Job], None]) -> None:
    starts, restarts = running.starts(), int(running.wait("RUNNING", 5)["Restarts"])
    fault(running)
    shown = running.wait(("PENDING", "RUNNING"), 70, Restarts=str(restarts + 1))
    if fault is _out_of_time:
        running.cluster.run("scontrol", "update", f"JobId={running.id}", "TimeLimit=60")
    assert shown["Requeue"] == "1"
    resumed = running.wait_training(starts + 1)
    said = re.findall(
        r"irkd.sbatch: requeue: stopped on request, newest checkpoint at step (\d+)", running.text()
    )
    assert resumed["event"] == "resume"
    assert resumed["step"] == int(said[-1])
    assert not resumed["skipped"]


def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(running: Job) -> None:
    starts, saved = running.starts(), running.events("checkpoint")[-1]["step"]
    ranks = running.ranks()
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    resumed = running.wait_training(starts + 1)
    assert resumed["step"] >= saved
    assert "irkd.sbatch: requeue: crashed or was killed, newest checkpoint at step" in running.text()
    assert not set(ranks) & set(running.ranks())


def test_a_lost_node_is_replaced(running: Job, cluster: Cluster) -> None:
    starts, saved = running.starts(), running.events("checkpoint")[-1]["step"]
    assert running.wait("RUNNING", 5)["NodeList"] == "node[1-2]"
    cluster.kill_node("node2")
    try:
        running.wait(("PENDING", "COMPLETING"), 60)
        cluster.run("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=lost")
        resumed = running.wait_training(starts + 1)
        assert resumed["step"] >= saved
        assert running.wait("RUNNING", 5)["NodeList"] == "node[1,3]"
    finally:
        cluster.start_node("node2")
        cluster.run("scontrol", "update", "NodeName=node2", "State=RESUME", check=False)


def test_cancelled_means_cancelled(running: Job) -> None:
    running.cluster.run("scancel", running.id)
    running.wait("CANCELLED", 40)
    assert "not requeued: cancelled" in running.text()
    wait_for(lambda: not running.ranks(), 10, "end of the ranks")


def test_a_second_job_of_the_same_run_takes_it_over_and_the_first_gives_way(
    submit: Submit, cluster: Cluster
) -> None:
    """Each would else requeue itself, and they would take the run from one another for ever."""
    cluster.wait_nodes()
    first = submit("twice", "--nodes=1", train=[FOREVER])
    first.wait_training(1)
    second = submit("twice", "--nodes=1", train=[FOREVER])
    try:
        assert first.wait("FAILED", 60)["Restarts"] == "0"
        assert f"failed: job{second.id}.0 has the run folder now, this is job{first.id}.0" in first.text()
        second.wait_training(2)
        assert second.wait("RUNNING", 5)["Restarts"] == "0"
    finally:
        cluster.run("scancel", second.id)
    second.wait("CANCELLED", 40)


def test_a_crash_loop_ends_at_the_cap(submit: Submit) -> None:
    job = submit("loop", "--nodes=1", train=[], IRKD_FAULT="sigkill@step:2", IRKD_MAX_RESTARTS="1")
    shown = job.wait("FAILED", 90)
    assert shown["Restarts"] == "1"
    assert "failed: crashed or was killed, newest checkpoint none; gave up after 1 restarts" in job.text()
    assert json.loads((job.run / "status.json").read_text())["state"] == "failed"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("optim.lrr=1", "unknown key optim.lrr=1; did you mean lr?"),
        ("data.shards=nowhere", "failed: no folder of shards at nowhere"),
    ],
)
def test_a_users_error_is_not_requeued(submit: Submit, wrong: str, message: str) -> None:
    job = submit(f"wrong-{len(wrong)}", "--nodes=1", train=[wrong])
    assert job.wait("FAILED", 60)["Restarts"] == "0"
    assert message in job.text()


def test_elastic_goes_on_with_fewer_nodes_and_requeues_without_the_first(
    submit: Submit, cluster: Cluster
) -> None:
    cluster.wait_nodes()
    rendezvous = "last_call_timeout=5,keep_alive_interval=2,keep_alive_max_attempt=5"
    job = submit(
        "elastic", "--nodes=2-3", "--no-kill", train=[FOREVER], IRKD_MIN_NODES="2", IRKD_RDZV=rendezvous
    )
    assert job.wait_training(1)["world"] == 3
    saved = job.events("checkpoint")[-1]["step"]
    try:
        cluster.kill_node("node3")
        smaller = job.wait_training(2, 90)
        assert smaller["world"] == 2
        assert smaller["step"] >= saved
        assert job.wait("RUNNING", 5)["Restarts"] == "0"

        cluster.kill_node("node1")
        word = job.run / f"logs/job{job.id}.0/requeued/why"
        wait_for(
            lambda: word.is_file() and "requeue: crashed" in word.read_text(),
            90,
            "word of it",
            cluster.status,
        )
        assert word.read_text().startswith("irkd.sbatch: node1 is lost, and with it the rendezvous")
    finally:
        cluster.start_node("node1")
        cluster.start_node("node3")
    again = job.wait_training(3, 90)
    assert again["step"] >= smaller["step"]
    assert again["world"] >= 2
    assert job.wait("RUNNING", 5)["Restarts"] == "1"


def test_render_array_with_a_part_that_fails(cluster: Cluster, folder: Path) -> None:
    site = folder / "render-site.sh"
    site.write_text(f'python=({sys.executable})\n[ "$SLURM_ARRAY_TASK_ID" != 2 ] || exit 9\n')
    wanted = [
        "synthetic",
        "--resolutions=8,12",
        "--samples=train=60,test=10",
        "--samples-per-shard=10",
        "--size=12",
    ]
    options = ["--array=1-3", f"--output={folder}/render-%A_%a.out", "slurm/render.sbatch"]

    def render() -> None:
        cluster.run(
            "sbatch", *options, *wanted, f"--out={folder}/parts", cwd=REPOSITORY, env={"IRKD_SITE": str(site)}
        )
        wait_for(
            lambda: not cluster.run("squeue", "--noheader", "--name=irkd-render"), 90, "end", cluster.status
        )

    render()
    whole = [sys.executable, "-m", "irkd_dist", "render", *wanted, f"--out={folder}/whole"]
    subprocess.run(whole, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    assert (
        sum("9:0" in str(cluster.job(job).get("ExitCode")) for job in _jobs_named(cluster, "irkd-render"))
        == 1
    )
    manifest = (folder / "parts" / shards.MANIFEST).read_bytes()
    assert manifest == (folder / "whole" / shards.MANIFEST).read_bytes()


def test_a_study_as_an_array_teachers_first(cluster: Cluster, folder: Path) -> None:
    """A student whose teacher is another task's run: two submissions, one waiting for the other."""
    tiny, runs = (folder / "tiny.yaml").read_text(), folder / "study"
    (folder / "taught.yaml").write_text(
        tiny + f"teacher: {{run: {runs}/tiny-seed0}}\nloss: {{kd: {{alpha: 1.0}}}}\n"
    )
    (folder / "study.yaml").write_text(
        f"title: T\nteachers: [{folder}/tiny.yaml]\nexperiments: {{KD: {folder}/taught.yaml}}\nseeds: [0, 1]\n"
        f"overrides: ['out={runs}']\n"
    )

    def submitted(*options: str) -> str:
        words = ["sbatch", "--parsable", f"--output={folder}/study-%A_%a.out", *options, "slurm/study.sbatch"]
        site = {"IRKD_SITE": str(folder / "site.sh")}
        return cluster.run(*words, f"{folder}/study.yaml", cwd=REPOSITORY, env=site).strip()

    teachers = submitted("--array=1-1")
    submitted("--array=2-3", f"--dependency=afterok:{teachers}")
    told = cluster.status
    wait_for(lambda: not cluster.run("squeue", "--noheader", "--name=irkd-study"), 180, "end", told)
    states = [
        json.loads((runs / name / "status.json").read_text()) for name in ("taught-seed0", "taught-seed1")
    ]
    assert [state["state"] for state in states] == ["finished", "finished"]
    assert "study.sbatch: run 2: irkd train" in "".join(f.read_text() for f in folder.glob("study-*_2.out"))


def _jobs_named(cluster: Cluster, name: str) -> list[str]:
    shown = cluster.run("scontrol", "--oneliner", "show", "job").splitlines()
    return [line.split()[0].removeprefix("JobId=") for line in shown if f"JobName={name}" in line]
