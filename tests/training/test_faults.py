"""Faults in real runs: killed, stopped, starved of disk, poisoned; and the curriculum on processes that come and go."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from irkd_dist import typed
from irkd_dist.eventlog import read_decisions, read_events, read_samples
from irkd_dist.training import requeue
from tests import chaos
from tests.chaos import Fault, damage_newest, finish, losses_of, start, status, strike
from tests.training.conftest import STUDENT_YAML
from tests.training.launch import irkd


@pytest.fixture(scope="module")
def config(shapes: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("faults")
    (out / "student.yaml").write_text(STUDENT_YAML.format(shards=shapes, teacher=teacher, out=out))
    return out / "student.yaml"


@pytest.fixture(scope="module")
def unbroken(config: Path) -> Path:
    """Two processes to the end, without a fault."""
    done = finish(start(config, "unbroken", 2))
    assert done.code == 0, done.text[-3000:]
    run = config.parent / "unbroken"
    assert losses_of(run, run, set()) == []
    return run


def of(run: Path, kind: str) -> list[dict]:
    return [e for e in read_events(run) if e["event"] == kind]


def test_killed_in_a_step_a_write_a_transition_and_a_reset(config: Path, unbroken: Path) -> None:
    """One run, killed five times; its weights and moments are bitwise the unbroken run's, no sample is lost."""
    for inject in (
        "sigkill@step:2:1", "sigkill@write:6:0", "sigkill@transition:8:1", "sigkill@reset:8:0", "sigkill@step:13:0",
    ):  # fmt: skip
        done = strike(config, "killed", 2, Fault("kill", inject))
        assert done.code != 0
        assert done.orphans == 0
        assert status(config.parent / "killed") == "running"  # nobody was left to say otherwise
    assert finish(start(config, "killed", 2)).code == 0
    assert losses_of(config.parent / "killed", unbroken, set()) == []


def test_a_request_to_one_rank_stops_all_at_one_step(config: Path, unbroken: Path) -> None:
    run = config.parent / "asked"
    done = strike(config, "asked", 2, Fault("term", "sigterm@step:4:1"))
    assert "stopped at step 6 (rank 1" in done.text  # wishes are read a step late
    assert "SIGTERM" in done.text
    assert status(run) == "stopped"
    assert json.loads((run / "status.json").read_text())["step"] == 6
    assert (run / "checkpoints" / "step-00000006").is_dir()
    # twice, the first in the middle of a write, the second to the other rank
    done = strike(config, "asked", 2, Fault("usr1", "sigusr1@write:9:0,sigusr1@step:10:1"))
    assert "SIGUSR1" in done.text
    assert status(run) == "stopped"
    assert finish(start(config, "asked", 2)).code == 0
    assert losses_of(run, unbroken, set()) == []


def test_a_request_ends_a_single_process_with_code_75(config: Path) -> None:
    done = strike(config, "single", 1, Fault("term", "sigterm@step:4:0"))
    assert done.code == 75
    damage_newest(config.parent / "single", "flip")
    done = finish(start(config, "single", 1))
    assert done.code == 0
    assert "skipped checkpoint" in done.text
    assert "step-00000006" in done.text


def test_a_stopped_rank_is_named_in_time_and_a_killed_launcher_leaves_no_orphan(
    config: Path, unbroken: Path
) -> None:
    began = time.monotonic()
    # before its neighbour has heard of it
    done = strike(config, "silent", 2, Fault("stop", "sigstop@step:0:0"))
    assert done.code != 0
    assert done.orphans == 0
    assert re.search(r"rank 0 \(.*\) has been silent for \d+ s \(it was at step 0\)", done.text), done.text
    assert time.monotonic() - began < 60  # torchrun leaves a process that it ends 30 s
    done = strike(config, "silent", 2, Fault("launcher", kill_launcher_after=10))
    assert done.orphans == 0
    damage_newest(config.parent / "silent", "truncate")
    assert finish(start(config, "silent", 2)).code == 0
    assert losses_of(config.parent / "silent", unbroken, set()) == []


def test_a_full_disk_is_an_event_and_training_goes_on(config: Path, unbroken: Path) -> None:
    done = strike(config, "full", 2, Fault("full", "nospace@write:6:0"))
    assert done.code == 0
    assert "training goes on, and the next checkpoint tries again" in done.text
    failed = of(config.parent / "full", "checkpoint_failed")
    assert [e["step"] for e in failed] == [6]
    assert losses_of(config.parent / "full", unbroken, set()) == []


@pytest.mark.parametrize(("kind", "world"), [("nan", 2), ("inf", 3)])
def test_a_loss_that_is_not_finite_on_one_rank_is_taken_by_none(config: Path, kind: str, world: int) -> None:
    assert finish(start(config, f"told-{kind}", world, "data.leave_out=[6]")).code == 0
    done = strike(config, kind, world, Fault(kind, f"{kind}@loss:6:1"))
    assert done.code == 0
    assert "step 6: the loss of rank 1" in done.text
    assert [e["step"] for e in of(config.parent / kind, "skip")] == [6]
    assert losses_of(config.parent / kind, config.parent / f"told-{kind}", {6}) == []


@pytest.mark.parametrize(("engine", "world"), [("ddp", 2), ("fsdp2", 2), ("zero1", 1), ("ddp", 1)])
def test_one_element_of_one_ranks_gradient_that_is_not_finite_is_taken_by_none(
    config: Path, engine: str, world: int
) -> None:
    """The loss is finite: without a guard of the gradient, the weights would be NaN from here on."""
    name, more = f"gradient-{engine}-{world}", [f"engine={engine}"]
    assert finish(start(config, f"told-{name}", world, *more, "data.leave_out=[6]")).code == 0
    done = strike(config, name, world, Fault("nan", f"nan@gradient:6:{world - 1}"), *more)
    assert done.code == 0, done.text[-3000:]
    assert "step 6: the gradient, not a loss, is not finite" in done.text
    assert [e["step"] for e in of(config.parent / name, "skip")] == [6]
    assert losses_of(config.parent / name, config.parent / f"told-{name}", {6}) == []


def test_over_the_limit_the_run_goes_back_once_and_then_stops(config: Path) -> None:
    told = ["optim.max_skips=2"]
    assert finish(start(config, "told-back", 2, *told, "data.leave_out=[9,10,11]")).code == 0
    poison = ",".join(f"nan@loss:{step}:{step % 2}" for step in (9, 10, 11))
    done = strike(config, "back", 2, Fault("nan", poison), *told)
    assert done.code == 0
    assert "went back from step 11 to step-00000009; the batches of steps 9 to 11 are left out" in done.text
    assert losses_of(config.parent / "back", config.parent / "told-back", {9, 10, 11}) == []
    more = poison + "," + ",".join(f"nan@loss:{step}:0" for step in (12, 13, 14))
    done = strike(config, "back-twice", 2, Fault("nan", more), *told)
    assert done.code != 0
    assert "had already gone back and left out 3 batches: lower optim.lr" in done.text
    assert status(config.parent / "back-twice") == "failed"


def test_a_rank_that_differs_stops_the_run_and_is_named(config: Path) -> None:
    done = strike(config, "differ", 2, Fault("differ", "differ@decision:8:1"))
    assert done.code != 0
    assert "the processes no longer agree: rank 1 (" in done.text
    assert "has lr=0.0006, rank 0 has 0.0003" in done.text
    # it may have been that host's memory or files: the run is not given up
    assert status(config.parent / "differ") == "running"
    assert requeue.decide(config.parent / "differ", limit=3).action == "requeue"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("bug", "RuntimeError: a bug on purpose at step:5:1"),
        ("input", "an image that cannot be read on purpose"),
    ],
)
def test_a_crash_prints_the_failing_ranks_error_and_no_neighbours_noise(
    config: Path, kind: str, said: str
) -> None:
    done = strike(config, f"crash-{kind}", 3, Fault(kind, f"{kind}@step:5:1"))
    assert done.code != 0
    lines = done.text.splitlines()
    host = re.escape(socket.gethostname())
    own = [line for line in lines if re.search(rf"\[rank 1 on {host}\] .*{said}", line)]
    assert len(own) == 1, done.text  # its own error, once, with its place
    for rank in (0, 2):
        told = [line for line in lines if line.startswith(f"irkd: rank {rank} (")]
        assert len(told) == 1, done.text
        assert re.search(rf"rank 1 \({host}, process \d+\) failed: .*{said}", told[0])
    assert "Connection" not in done.text  # what the others met when it was gone
    assert not re.search(r"\[rank [02] on .*Traceback", done.text)
    if kind == "bug":  # the launcher's summary has it too
        assert said in done.text.split("Root Cause")[1]


def test_an_error_of_all_ranks_is_printed_once(config: Path) -> None:
    text = finish(start(config, "alike", 3, "data.shards=/nowhere")).text
    assert text.count("error:") == 1, text
    text = finish(start(config, "alike", 3, "optim.lrr=1")).text  # found before the processes know each other
    assert len(re.findall(r"irkd: \[rank 0 on .*\] error: .*lrr", text)) == 1, text


def test_decisions_taken_before_a_restart_are_replayed_on_another_world(config: Path) -> None:
    """Killed between a decision and its checkpoint; the log says something that a new decision would not."""
    plateau = ["curriculum.epochs=4", "curriculum.patience=1", "curriculum.min_epochs=1"]
    run = config.parent / "replay"
    strike(config, "replay", 2, Fault("kill", "sigkill@step:9:0"), *plateau, "checkpoint.every_steps=null")
    events = (run / "events.jsonl").read_text()
    first = next(json.loads(t) for t in events.splitlines() if '"event": "decision"' in t)
    told = first | {"decision": first["decision"] | {"action": "finish", "reason": "the log says so"}}
    lines = events.splitlines()
    lines[lines.index(next(t for t in lines if '"event": "decision"' in t))] = (
        typed.checked({k: v for k, v in told.items() if k != "crc"}).decode().rstrip()
    )
    (run / "events.jsonl").write_text("\n".join(lines) + "\n")
    for folder in (run / "checkpoints").iterdir():
        for file in folder.iterdir():
            file.unlink()  # as if none had been written: everything is done again
        folder.rmdir()
    done = finish(start(config, "replay", 3, *plateau, "checkpoint.every_steps=null"))
    assert done.code == 0, done.text[-2000:]
    replayed = [e for e in of(run, "decision") if e["replayed"]]
    assert replayed[0]["decision"]["reason"] == "the log says so"
    assert of(run, "summary")[0]["steps"] == first["step"] == 4
    assert read_decisions(run, "another configuration") == {}


# without it a newcomer waits for ever for an address that torch 2.15 tells in the first round only
GROWS = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def agent(config: Path, name: str, port: int, nodes: str) -> subprocess.Popen[str]:
    """One host of an elastic job: torchrun with a c10d rendezvous."""
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", "--nproc-per-node=1",
        "--max-restarts=3", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=elastic",
        "--rdzv-conf=last_call_timeout=1,join_timeout=120,keep_alive_interval=1,keep_alive_max_attempt=8",
        "--monitor-interval=0.1", "-m", "irkd_dist", "train", str(config), f"name={name}",
        "track.samples=true", "track.log_every=1", "checkpoint.every_steps=1", "rank_timeout_s=5",
        "curriculum.epochs=120", "curriculum.stages=[{resolution: 12}]",
    ]  # fmt: skip
    return chaos.launch(command, GROWS)


def wait_for(run: Path, world: int, process: subprocess.Popen[str]) -> None:
    """Until the run has trained some steps in a world of this size."""
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        try:
            events = read_events(run)
        except Exception:
            events = []
        starts = [e for e in events if e["event"] in ("start", "resume")]
        if starts and starts[-1]["world"] == world and events[-1]["step"] > starts[-1]["step"] + 2:
            return
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.2)
    raise AssertionError(f"no steps in a world of {world}: {[e['world'] for e in starts]}")


def test_the_world_shrinks_and_grows_under_torchrun_and_no_sample_is_lost(config: Path) -> None:
    port, run = 29600 + os.getpid() % 300, config.parent / "elastic"
    first = agent(config, "elastic", port, "1:2")
    time.sleep(3)  # its store is up: it hosts the rendezvous
    second = agent(config, "elastic", port, "1:2")
    try:
        wait_for(run, 2, first)
        os.killpg(second.pid, signal.SIGKILL)  # a node goes, with everything on it
        for pid in chaos.members(second):
            os.kill(pid, signal.SIGKILL)
        wait_for(run, 1, first)
        second = agent(config, "elastic", port, "1:2")  # and one comes
        wait_for(run, 2, first)
        text, _ = first.communicate(timeout=240)
        assert first.returncode == 0, text[-3000:]
    finally:
        for process in (first, second):
            for pid in chaos.members(process):
                os.kill(pid, signal.SIGKILL)
    assert [e["world"] for e in read_events(run) if e["event"] in ("start", "resume")][-1] == 2
    samples = read_samples(run)
    assert list(samples) == list(range(480))
    for epoch in range(120):
        ids = sorted(i for step in range(4 * epoch, 4 * epoch + 4) for i in samples[step])
        assert ids == list(range(chaos.IMAGES)), epoch


def test_a_second_start_takes_the_folder_over_and_the_first_ends(config: Path) -> None:
    """As when a scheduler starts a job again while the old one lingers."""
    run, slow = config.parent / "twice", ["curriculum.epochs=200"]
    first = start(config, "twice", 1, *slow)
    while chaos.reached(run) < 5:
        time.sleep(0.1)
    second = start(config, "twice", 1, *slow)
    done = finish(first)
    assert done.code == 2
    assert "was taken over by another start of the same run" in done.text
    while "resume" not in (run / "events.jsonl").read_text():
        time.sleep(0.1)
    time.sleep(1)
    second.send_signal(signal.SIGTERM)
    assert finish(second).code == 75
    assert status(run) == "stopped"


def test_a_fault_that_is_not_undone_would_be_seen(unbroken: Path, config: Path) -> None:
    """The comparison itself: another seed's run is not the unbroken one."""
    irkd("train", str(config), "name=seed", "seed=1", *chaos.SETTINGS)
    assert "other weights or moments" in losses_of(config.parent / "seed", unbroken, set())
    assert not any(torch.isnan(v).any() for v in chaos.final(unbroken).values())
