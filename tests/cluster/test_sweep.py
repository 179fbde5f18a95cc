"""Sweeps with the real `wandb sweep`, `wandb agent`, SDK and `wandb sync`, against a small server on this machine."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from irkd_dist import config
from irkd_dist.eventlog import read_events
from tests.cluster.slurm import Cluster
from tests.cluster.slurm import wait_for as poll
from tests.cluster.wandb_server import WandbServer
from tests.training.launch import REPOSITORY

pytest.importorskip("wandb")
WANDB = [sys.executable, "-m", "wandb"]
CE = """
data: {{batch: 32, shards: {shards}}}
student: {{options: {{embed_dim: 16, depth: 2, num_heads: 2}}}}
curriculum: {{stages: [{{resolution: 8}}, {{resolution: 16}}], epochs: 1}}
precision: fp32
track: {{backend: wandb, mode: online, log_every: 1, panels: 0}}
out: {out}
"""
TRIAL = ["${env}", "${interpreter}", "${program}"]


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """A failed test leaves no agent and no trial behind."""
    yield
    for pid, _ in left_running(tmp_path):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def ce(shapes: Path, tmp_path: Path) -> Path:
    """A student without a teacher: two stages of one epoch, four steps each."""
    file = tmp_path / "ce.yaml"
    file.write_text(CE.format(shards=shapes, out=tmp_path / "runs"))
    return file


def environment(server: WandbServer, tmp_path: Path, **more: str) -> dict[str, str]:
    """Of the agent and everything it starts; its python is ours, and the mark finds what it leaves behind."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    if not (tmp_path / "bin" / "python").exists():
        (tmp_path / "bin" / "python").symlink_to(sys.executable)
    python = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
    mark = {"IRKD_MARK": str(tmp_path), "OMP_NUM_THREADS": "1", "WANDB_DIR": str(tmp_path)}
    return {**os.environ, **server.env, **python, **mark, **more}


def make_sweep(tmp_path: Path, env: dict[str, str], command: list[str], program: str = "") -> str:
    """`wandb sweep`; returns the id that it prints."""
    sweep = {"program": program or "irkd", "command": command, "method": "grid"}
    sweep["parameters"] = {"seed": {"values": [0]}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    done = subprocess.run(
        [*WANDB, "sweep", str(tmp_path / "sweep.yaml")], env=env, capture_output=True, text=True, timeout=60
    )
    found = re.search(r"wandb agent (\S+)", done.stdout + done.stderr)
    assert found, done.stdout + done.stderr
    return found.group(1)


def agent(sweep: str, tmp_path: Path, env: dict[str, str]) -> subprocess.Popen[str]:
    """`wandb agent --forward-signals`, its output in agent.log."""
    with (tmp_path / "agent.log").open("a") as log:
        command = [*WANDB, "agent", "--forward-signals", sweep]
        return subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=log, stderr=log, text=True)


def wait_for(true: Callable[[], Any], tmp_path: Path, what: str, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, (
            f"no {what} in {seconds} s\n" + (tmp_path / "agent.log").read_text()[-6000:]
        )
        time.sleep(0.1)


def left_running(tmp_path: Path) -> list[tuple[int, str]]:
    """Ids and command lines of processes that the agent started, however deep."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"IRKD_MARK={tmp_path}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(
                    (int(entry.name), (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
                )
        except OSError:
            continue
    return found


def steps_done(run: Path) -> int:
    """Steps that a run has written down: W&B's own stream comes in pieces of 15 s."""
    return max((e["step"] for e in read_events(run)), default=0) if (run / "events.jsonl").exists() else 0


def metric(server: WandbServer, run: str, name: str) -> list[tuple[int, float]]:
    """(step, value) of a metric as the server has it."""
    return [(line["_step"], line[name]) for line in server.runs[run].history if name in line]


def test_trials_get_their_parameters_and_their_metrics_arrive(
    server: WandbServer, ce: Path, tmp_path: Path
) -> None:
    env = environment(server, tmp_path)
    server.trials = [
        {
            "seed": 3,
            "optim.lr": 1e-05,
            "augment.flip": False,
            "optim.clip": None,
            "optim.betas": [0.9, 0.98],
            "loss.saliency.taps": ["first", "last"],
            "curriculum.stages": [{"resolution": 8, "epochs": None}, {"resolution": 12, "epochs": 2}],
        }
    ]
    sweep = make_sweep(tmp_path, env, ["${env}", "python", "-m", "irkd_dist", "train", str(ce), "${args}"])
    assert agent(sweep, tmp_path, env).wait(120) == 0
    run = tmp_path / "runs" / "ce-seed3-trial0"
    loaded = config.to_dict(config.load(run / "config.yaml"))
    assert loaded["optim"]["lr"] == 1e-5
    assert loaded["optim"]["clip"] is None
    assert loaded["optim"]["betas"] == [0.9, 0.98]
    assert loaded["augment"]["flip"] is False
    assert loaded["loss"]["saliency"]["taps"] == ["first", "last"]
    assert [(s["resolution"], s["epochs"]) for s in loaded["curriculum"]["stages"]] == [(8, None), (12, 2)]

    trial = server.runs["trial0"]
    assert trial.exit_codes == [0]
    assert trial.config["optim"]["value"]["lr"] == 1e-5
    events = read_events(run)
    losses = [(e["step"], pytest.approx(e["total"])) for e in events if e["event"] == "train"]
    assert len(losses) == 12
    assert metric(server, "trial0", "train/total") == losses
    assert len(metric(server, "trial0", "val/accuracy")) == 3
    assert "val_accuracy" in trial.summary
    assert left_running(tmp_path) == []


def test_a_server_that_dies_does_not_stop_training_and_gets_the_run_later(
    server: WandbServer, ce: Path, tmp_path: Path
) -> None:
    env = environment(server, tmp_path, WANDB_FINISH_TIMEOUT="3", WANDB_INIT_TIMEOUT="3")
    (tmp_path / "agent.log").touch()
    command = [sys.executable, "-m", "irkd_dist", "train", str(ce)]
    process = subprocess.Popen(
        [*command, "curriculum.epochs=100"], cwd=REPOSITORY, env=env, stdout=subprocess.PIPE, text=True
    )
    run = tmp_path / "runs" / "ce-seed0"
    wait_for(lambda: steps_done(run) >= 20, tmp_path, "steps")
    assert [r.inits for r in server.runs.values()] == [1]
    server.die()
    assert steps_done(run) < 700
    said, _ = process.communicate(timeout=90)
    assert process.returncode == 0, said
    assert read_events(run)[-1]["event"] == "summary"
    first = re.search(r"send the rest with: (wandb sync .*)$", said, re.M)
    assert first, said

    # and one that was never there
    done = subprocess.run(
        [*command, "name=later"], cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    assert "this run is kept offline" in done.stdout
    told = re.search(r"send it with: (wandb sync .*)$", done.stdout, re.M)
    assert told

    with WandbServer() as later:
        env = environment(later, tmp_path)
        for name, command, count in (("ce-seed0", first.group(1), 800), ("later", told.group(1), 8)):
            sync = command.replace("wandb", f"{sys.executable} -m wandb", 1)
            subprocess.run(["bash", "-c", sync], env=env, check=True, capture_output=True, timeout=60)
            identity = (tmp_path / "runs" / name / "wandb-id.txt").read_text()
            steps = [step for step, _ in metric(later, identity, "train/total")]
            assert steps == list(range(1, count + 1)), name


def test_the_end_of_wandbs_own_process_keeps_no_run_from_its_checkpoint(
    server: WandbServer, ce: Path, tmp_path: Path
) -> None:
    env = environment(server, tmp_path)
    (tmp_path / "agent.log").touch()
    command = [sys.executable, "-m", "irkd_dist", "train", str(ce), "curriculum.epochs=100"]
    process = subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=subprocess.PIPE, text=True)
    run = tmp_path / "runs" / "ce-seed0"
    wait_for(lambda: steps_done(run) >= 20, tmp_path, "steps")
    [core] = [pid for pid, line in left_running(tmp_path) if "wandb-core" in line]
    os.kill(core, signal.SIGKILL)
    process.send_signal(signal.SIGTERM)  # as SLURM does: it signals every process of a job that it takes away
    said, _ = process.communicate(timeout=90)
    assert process.returncode == 75
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    assert said.count("W&B's own process has ended") == 1
    assert f"wandb sync --include-online {run}/wandb/run-" in said
    assert read_events(run)[-1]["event"] == "stop"


def test_a_preempted_trial_of_two_processes_goes_on_under_its_own_id(
    server: WandbServer, ce: Path, tmp_path: Path
) -> None:
    env = environment(server, tmp_path, IRKD_PROCESSES="2")
    server.trials = [{"seed": 5, "curriculum.epochs": 12, "optim.betas": [0.9, 0.98]}]
    sweep = make_sweep(tmp_path, env, [*TRIAL, str(ce), "${args_no_hyphens}"], "launchers/sweep_trial.py")
    run = tmp_path / "runs" / "ce-seed5-trial0"
    first = agent(sweep, tmp_path, env)
    wait_for(lambda: steps_done(run) >= 20, tmp_path, "steps")
    first.send_signal(signal.SIGTERM)  # what a cluster sends to a job that it takes away
    assert first.wait(60) is not None
    assert left_running(tmp_path) == []
    trial = server.runs["trial0"]
    assert (trial.exit_codes, server.again) == ([75], ["trial0"])
    stopped = steps_done(run)
    assert 20 <= stopped < 96

    assert agent(sweep, tmp_path, env).wait(120) == 0
    assert trial.exit_codes == [75, 0]
    assert trial.inits == 2
    assert len(server.runs) == 1
    events = read_events(run)
    assert [e["step"] for e in events if e["event"] == "resume"] == [stopped]
    assert {e["world"] for e in events if "world" in e} == {2}
    assert [step for step, _ in metric(server, "trial0", "train/total")] == list(range(1, 97))
    assert config.load(run / "config.yaml").optim.betas == (0.9, 0.98)
    assert [f.name for f in (tmp_path / "runs").iterdir()] == [run.name]
    assert left_running(tmp_path) == []


def test_a_trial_that_the_server_ends_early_stops_all_processes_and_the_agent_goes_on(
    server: WandbServer, ce: Path, tmp_path: Path
) -> None:
    env = environment(server, tmp_path, IRKD_PROCESSES="2")
    server.trials = [{"curriculum.epochs": 2000}, {"curriculum.epochs": 1}]
    sweep = make_sweep(tmp_path, env, [*TRIAL, str(ce), "${args}"], "launchers/sweep_trial.py")
    running = agent(sweep, tmp_path, env)
    run = tmp_path / "runs" / "ce-seed0-trial0"
    wait_for(lambda: steps_done(run) >= 20, tmp_path, "steps")
    [launcher] = [pid for pid, line in left_running(tmp_path) if "sweep_trial.py" in line]
    os.kill(launcher, signal.SIGKILL)  # as an agent does with one that takes too long
    trial = server.runs["trial0"]
    wait_for(lambda: trial.exit_codes == [75], tmp_path, "checkpoint of a trial without its launcher")

    # the agent has got it again: now the server has seen enough of it
    wait_for(lambda: any(e["event"] == "resume" for e in read_events(run)), tmp_path, "second turn")
    trial.stop = True
    wait_for(lambda: len(trial.exit_codes) == 2, tmp_path, "end of the stopped trial")
    assert trial.exit_codes == [75, 0]  # not preempted: nobody gets it again
    assert server.again == []
    assert running.wait(120) == 0
    assert server.runs["trial1"].exit_codes == [0]
    assert read_events(run)[-1]["event"] == "stop"
    assert steps_done(run) < 16000
    assert "failed" not in (tmp_path / "agent.log").read_text()
    assert left_running(tmp_path) == []


def test_two_agents_on_a_cluster_and_a_trial_that_meets_the_time_limit(
    cluster: Cluster, server: WandbServer, ce: Path, tmp_path: Path
) -> None:
    """An array of two agents, trials of two processes; the one out of time goes on under its own id."""
    cluster.wait_nodes()
    (tmp_path / "agent.log").touch()
    (tmp_path / "site.sh").write_text(f"python=({sys.executable})\n")
    env = environment(server, tmp_path, IRKD_SITE=str(tmp_path / "site.sh"))
    server.trials = [{"seed": 1, "curriculum.epochs": 100_000}, {"seed": 2}, {"seed": 3}]
    sweep = make_sweep(tmp_path, env, [*TRIAL, str(ce), "${args_no_hyphens}"], "launchers/sweep_trial.py")
    options = ["--array=1-2", "--ntasks-per-node=2", f"--output={tmp_path}/agent-%a.log"]
    sbatch = ["sbatch", "--parsable", *options, "slurm/sweep.sbatch", sweep]
    array = cluster.run(*sbatch, cwd=REPOSITORY, env=env).strip()
    long = tmp_path / "runs" / "ce-seed1-trial0"

    def state() -> str:
        return "".join(f.read_text()[-3000:] for f in sorted(tmp_path.glob("agent-*"))) + cluster.status()

    try:
        poll(lambda: steps_done(long) >= 20, 90, "steps of the long trial", state)
        poll(
            lambda: [len(r.exit_codes) for r in server.runs.values()] == [0, 1, 1],
            90,
            "ends of the others",
            state,
        )
        assert len(server.agents) == 2
        # the other agent finds no trial left
        poll(
            lambda: "COMPLETED" in [cluster.job(f"{array}_{i}")["JobState"] for i in (1, 2)],
            60,
            "an end",
            state,
        )
        task = next(t for i in (1, 2) if cluster.job(t := f"{array}_{i}")["JobState"] == "RUNNING")
        ran = cluster.run("squeue", "--noheader", f"--job={task}", "--format=%M").strip()
        limit = int(ran.split(":")[0]) + 3  # less than the 180 s of --signal before the limit
        cluster.run("scontrol", "update", f"JobId={task}", f"TimeLimit={limit}")
        trial = server.runs["trial0"]
        poll(lambda: trial.exit_codes == [75], 90, "checkpoint of the trial out of time", state)
        stopped = steps_done(long)
        cluster.wait_job(task, ("PENDING", "RUNNING"), 40, Restarts="1")
        cluster.run("scontrol", "update", f"JobId={task}", "TimeLimit=60")

        def resumed() -> list[int]:
            cluster.hurry()
            return [e["step"] for e in read_events(long) if e["event"] == "resume"]

        poll(lambda: resumed() == [stopped], 90, "second turn", state)
        trial.stop = True
        cluster.wait_job(task, "COMPLETED", 90)
    finally:
        cluster.run("scancel", array, check=False)
    assert trial.exit_codes == [75, 0]
    assert trial.inits == 2
    assert [r.exit_codes for r in server.runs.values()][1:] == [[0], [0]]
    for folder in (tmp_path / "runs").iterdir():
        assert {e["world"] for e in read_events(folder) if "world" in e} == {2}, folder
    assert left_running(tmp_path) == []


FILES = sorted((REPOSITORY / "configs" / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_sweep_that_ships_is_one_of_our_keys_and_values(file: Path) -> None:
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    sweep = yaml.safe_load(file.read_text())
    assert (REPOSITORY / sweep["program"]).is_file()
    assert sweep["command"][:3] == TRIAL
    experiment, *fixed, form = sweep["command"][3:]
    assert form == "${args_no_hyphens}"
    choices = [
        [(key, value) for value in spec.get("values", [spec.get("min"), spec.get("max")])]
        for key, spec in sweep["parameters"].items()
    ]
    for drawn in itertools.zip_longest(*choices, fillvalue=None):
        chosen = dict(pair or choices[i][0] for i, pair in enumerate(drawn))
        forms = create_sweep_command_args({"args": {k: {"value": v} for k, v in chosen.items()}})
        for arguments in (forms["args"], forms["args_no_hyphens"]):
            loaded = config.to_dict(config.load(REPOSITORY / experiment, [*fixed, *arguments]))
            for key, value in chosen.items():
                got: Any = loaded
                for part in key.split("."):
                    got = got[part]
                if isinstance(value, list) and value and isinstance(value[0], dict):
                    got = [{k: stage[k] for k in given} for stage, given in zip(got, value, strict=True)]
                assert got == value, key


def test_a_sweep_that_ships_is_accepted_by_wandb(server: WandbServer, tmp_path: Path) -> None:
    for file in FILES:
        subprocess.run(
            [*WANDB, "sweep", str(file)],
            env=environment(server, tmp_path),
            check=True,
            capture_output=True,
            timeout=60,
        )
    assert [yaml.safe_load(text)["program"] for text in server.sweeps.values()] == [
        "launchers/sweep_trial.py"
    ] * len(FILES)
