"""Several machines: hosts with addresses of their own, their launchers, and cables that are pulled."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from irkd_dist.data import sampler
from irkd_dist.eventlog import read_events, read_samples
from tests.cluster.hosts import Host, Program, hosts, missing
from tests.cluster.slurm import wait_for
from tests.training.launch import irkd

CONFIG = """
data: {{batch: 32, shards: {shards}}}
student: {{name: custom, patch: 4, options: {{embed_dim: 32, depth: 3, num_heads: 2}}}}
curriculum: {{stages: [{{resolution: 12}}, {{resolution: 16}}], epochs: 2}}
precision: fp32
rank_timeout_s: 6
checkpoint: {{every_steps: 1}}
track: {{log_every: 1, panels: 0, samples: true}}
out: {out}
"""
IMAGES, STEPS, PORT = 110, 16, 29400
FOREVER = ["curriculum.epochs=100000"]


@pytest.fixture(scope="module")
def three() -> Iterator[list[Host]]:
    if lack := missing():
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must have hosts of their own: {lack}")
        pytest.skip(lack)
    with hosts() as made:
        yield made


@pytest.fixture
def config(shapes: Path, tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(CONFIG.format(shards=shapes, out=tmp_path))
    return tmp_path / "run.yaml"


def accelerate(three: list[Host], *train: str) -> list[Program]:
    """`accelerate launch` on each host, one process each, as docs/operations.md says."""
    return [
        host.start(
            sys.executable, "-m", "accelerate.commands.launch", "--config_file=configs/accelerate/ddp.yaml",
            f"--num_machines={len(three)}", f"--machine_rank={number}", f"--num_processes={len(three)}",
            f"--main_process_ip={three[0].address}", f"--main_process_port={PORT}",
            "-m", "irkd_dist", "train", *train, PET_SHUTDOWN_TIMEOUT="5",
        )
        for number, host in enumerate(three)
    ]  # fmt: skip


def torchrun(first: Host, host: Host, *train: str, log: str = "log") -> Program:
    """One elastic agent; the first host keeps the rendezvous."""
    return host.start(
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2:3", "--nproc-per-node=1", "--max-restarts=20",
        "--rdzv-backend=c10d", f"--rdzv-endpoint={first.address}:{PORT + 1}", "--rdzv-id=elastic",
        "--rdzv-conf=last_call_timeout=2,join_timeout=120,read_timeout=8,keep_alive_interval=2,keep_alive_max_attempt=5",
        "--monitor-interval=0.2", f"--log-dir={host.logs}/ranks", "--redirects=3", "--tee=3",
        "-m", "irkd_dist", "train", *train,
        log=log, PET_SHUTDOWN_TIMEOUT="5", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
        TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE=f"[{host.name} rank ${{rank}}] ",
    )  # fmt: skip


def events(run: Path, *kinds: str) -> list[dict]:
    """Events so far, those that were done twice included."""
    file = run / "events.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return [e for e in (json.loads(t) for t in lines if t.endswith("}")) if e["event"] in kinds]


def training(run: Path, world: int, seconds: float, *programs: Program) -> None:
    """Wait until a start from now on, in a world of this size, has written two checkpoints."""
    before = len(events(run, "start", "resume"))

    def going() -> bool:
        starts = events(run, "start", "resume")
        since = [e for e in events(run, "checkpoint") if starts and e["time"] > starts[-1]["time"]]
        return len(starts) > before and starts[-1]["world"] == world and len(since) >= 2

    wait_for(
        going,
        seconds,
        f"training of {world} processes",
        lambda: "\n".join(p.text()[-3000:] for p in programs),
    )


def stop(run: Path, *programs: Program) -> int:
    """Ask the launchers to end, and return the step at which all ranks stopped."""
    for program in programs:
        program.process.terminate()
    for program in programs:
        program.wait(60)
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "stopped", status
    return status["step"]


def every_sample_once(run: Path, steps: int) -> None:
    """The sample log is that of an unbroken run."""
    samples = read_samples(run)
    assert list(samples) == list(range(steps))
    for step in range(steps):
        epoch, within = divmod(step, 4)
        assert samples[step] == sorted(sampler.global_batch(0, epoch, within, IMAGES, 32).tolist()), step


def test_accelerate_on_three_machines_trains_what_one_process_does(three: list[Host], config: Path) -> None:
    programs = accelerate(three, str(config), "name=three")
    for program in programs:
        assert program.wait(90) == 0, program.text()
    irkd("train", str(config), "name=one")
    one, other = (
        [e["total"] for e in read_events(config.parent / n) if e["event"] == "train"]
        for n in ("one", "three")
    )
    assert len(one) == len(other) == STEPS
    assert max(abs(a - b) / a for a, b in zip(one, other, strict=True)) < 1e-5
    every_sample_once(config.parent / "three", STEPS)
    assert "3 processes on cpu" in programs[0].text()


def test_a_cable_is_pulled_all_end_in_time_and_the_run_goes_on_after_it(
    three: list[Host], config: Path
) -> None:
    run = config.parent / "cut"
    programs = accelerate(three, str(config), "name=cut", *FOREVER)
    training(run, 3, 60, *programs)
    began = time.monotonic()
    three[2].cut()
    try:
        codes = [program.wait(60) for program in programs]
    finally:
        three[2].mend()
    took = time.monotonic() - began
    assert all(codes), codes
    assert took < 40, took  # rank_timeout_s is 6, and the launchers leave their processes 5 s
    assert not any(host.processes() for host in three)  # no orphan on any of them
    told = programs[0].text() + programs[1].text()
    assert re.search(
        r"rank 2 \(gamma, process \d+\) has been silent for \d+ s \(it was at step \d+\)", told
    ), told
    assert "irkd: rank 2 (gamma" in programs[2].text()
    assert re.search("store on 10.77.0.1 (does not answer|has not answered for)", programs[2].text())
    reached = events(run, "checkpoint")[-1]["step"]
    programs = accelerate(three, str(config), "name=cut", *FOREVER)
    training(run, 3, 60, *programs)
    assert events(run, "resume")[-1]["step"] >= reached
    every_sample_once(run, stop(run, *programs))


def test_torchrun_goes_on_without_the_host_that_is_cut_off_and_with_it_again(
    three: list[Host], config: Path
) -> None:
    run, train = config.parent / "elastic", [str(config), "name=elastic", *FOREVER]
    agents = [torchrun(three[0], three[0], *train)]
    time.sleep(3)  # its store is up
    agents += [torchrun(three[0], host, *train) for host in three[1:]]
    training(run, 3, 60, *agents)
    three[2].cut()
    try:
        training(run, 2, 90, *agents)
        # its rank has ended; each line with node and rank
        said = r"^\[gamma rank 2\] irkd: rank 2 \(gamma, .*store on alpha has not answered for"
        assert re.search(said, agents[2].text(), re.MULTILINE), agents[2].text()
        # its torchrun waits for the cable, and would then close the rendezvous for all: a host that was lost is to be
        # cleared before it comes again, as its reboot or its scheduler does
        three[2].clear()
    finally:
        three[2].mend()
    agents[2] = torchrun(three[0], three[2], *train, log="again")
    training(run, 3, 90, *agents)
    every_sample_once(run, stop(run, *agents))
