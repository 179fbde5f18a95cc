"""A real SLURM cluster for the session, and tiny jobs on it."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.slurm import Cluster, missing, processes, wait_for

REPOSITORY = Path(__file__).resolve().parents[2]
FOREVER = "fixed.epochs=1000000"

TINY = """
data: {{batch: 32, shards: {shards}}}
student: {{name: custom, patch: 4, options: {{embed_dim: 32, depth: 3, num_heads: 2}}}}
fixed: {{resolution: 16, epochs: 2}}
precision: fp32
track: {{log_every: 20, panels: 0}}
out: {out}
"""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A controller and three node daemons; skipped where SLURM is not installed, but not in CI."""
    if absent := missing():
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must have SLURM and munge: {', '.join(absent)} not found")
        pytest.skip(f"no {', '.join(absent)}: install slurm-wlm and munge")
    with tempfile.TemporaryDirectory(prefix="irkd-slurm-") as folder, Cluster(Path(folder)) as started:
        yield started


@dataclass
class Job:
    """A job in the cluster and the run that it trains."""

    cluster: Cluster
    id: str
    config: Path
    run: Path
    output: Path

    def text(self) -> str:
        """What the job printed so far, in all its attempts."""
        return self.output.read_text() if self.output.is_file() else ""

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """Events of these kinds so far, those that were done twice included."""
        file = self.run / "events.jsonl"
        lines = file.read_text().splitlines() if file.is_file() else []
        every = [json.loads(line) for line in lines if line.endswith("}")]
        return [event for event in every if event["event"] in kinds]

    def starts(self) -> int:
        """How often training has started."""
        return len(self.events("start", "resume"))

    def ranks(self) -> list[int]:
        """Process ids of the ranks."""
        return [
            pid for pid, words in processes().items()
            if str(self.config) in words and "irkd_dist" in words and "torch.distributed.run" not in words
        ]  # fmt: skip

    def tasks(self) -> list[int]:
        """Process ids of the step's tasks, the shells that start torchrun: one on each node."""
        return [
            pid for pid, words in processes().items()
            if words[0].endswith("bash") and "launch" in words and str(self.config) in words
        ]  # fmt: skip

    def wait(self, states: str | tuple[str, ...], seconds: float, **fields: str) -> dict[str, str]:
        """Wait for a state of the job."""
        return self.cluster.wait_job(self.id, states, seconds, **fields)

    def wait_training(self, starts: int, seconds: float = 60) -> dict[str, Any]:
        """Wait until training has started so often and written a checkpoint since; returns the last start."""

        def going() -> bool:
            self.cluster.hurry()
            last = self.events("start", "resume")[-1:]
            saved = self.events("checkpoint")[-1:]
            return self.starts() >= starts and bool(saved) and saved[0]["time"] > last[0]["time"]

        wait_for(
            going,
            seconds,
            f"start {starts} of {self.run}",
            lambda: self.text()[-6000:] + self.cluster.status(),
        )
        return self.events("start", "resume")[-1]


Submit = Callable[..., Job]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    """A folder with the configuration `tiny.yaml` and the site file `site.sh`."""
    out = tmp_path_factory.mktemp("cluster")
    (out / "tiny.yaml").write_text(TINY.format(shards=shapes, out=out / "runs"))
    (out / "site.sh").write_text(f"python=({sys.executable})\nexport OMP_NUM_THREADS=1\n")
    return out


@pytest.fixture(scope="module")
def submit(cluster: Cluster, folder: Path) -> Iterator[Submit]:
    """`submit(name, "--nodes=2", train=["fixed.epochs=2"], IRKD_MIN_NODES="2")`: sbatch slurm/irkd.sbatch."""
    submitted: list[Job] = []

    def sbatch(name: str, *options: str, train: list[str], **env: str) -> Job:
        output = folder / f"{name}.out"
        config = shutil.copy(folder / "tiny.yaml", folder / f"{name}.yaml")
        id = cluster.run(
            "sbatch", "--parsable", f"--output={output}", *options, "slurm/irkd.sbatch", str(config), *train,
            cwd=REPOSITORY, env={"IRKD_SITE": str(folder / "site.sh"), **env},
        ).strip()  # fmt: skip
        submitted.append(Job(cluster, id, Path(config), folder / "runs" / f"{name}-seed0", output))
        return submitted[-1]

    yield sbatch
    for job in submitted:
        cluster.run("scancel", job.id, check=False)
