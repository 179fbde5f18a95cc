"""What many cases start from: small shards, and a run that was cut off, each made once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cases.command import irkd, write_config

TWO_STAGES = {"stages": [{"resolution": 8}, {"resolution": 16}], "epochs": 2}


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic shards, 58 for training, at 8 and 16 px, 16 a file. Not to be changed."""
    out = tmp_path_factory.mktemp("cases") / "shards"
    irkd(
        "render", "synthetic", "--out", out, "--resolutions", "8,16", "--samples", "train=64,test=32",
        "--samples-per-shard", "16",
    ).well()  # fmt: skip
    return out


@pytest.fixture
def own(small: Path, tmp_path: Path) -> Path:
    """A copy of the small shards, to be changed."""
    return Path(shutil.copytree(small, tmp_path / "own"))


@pytest.fixture
def config(small: Path, tmp_path: Path) -> Path:
    """The smallest job on the small shards."""
    return write_config(tmp_path / "c.yaml", small)


@pytest.fixture(scope="session")
def _finished(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configuration of two stages and its finished run, checkpoints every third step and all kept."""
    folder = tmp_path_factory.mktemp("finished")
    changes = {
        "curriculum": TWO_STAGES,
        "checkpoint": {"keep": 20, "every_steps": 3},
        "fixed": None,
        "name": "r",
    }
    file = write_config(folder / "c.yaml", small, **changes)
    irkd("train", file).well()
    return folder


@pytest.fixture
def finished(_finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run's folder; its configuration is `c.yaml` two above."""
    shutil.copytree(_finished / "runs", tmp_path / "runs")
    text = (_finished / "c.yaml").read_text().replace(str(_finished), str(tmp_path))
    (tmp_path / "c.yaml").write_text(text)
    return tmp_path / "runs" / "r"


@pytest.fixture
def interrupted(finished: Path) -> Path:
    """The same as a kill after its last but one checkpoint leaves it."""
    newest = sorted((finished / "checkpoints").iterdir())
    shutil.rmtree(newest[-1])
    step = int(newest[-2].name.removeprefix("step-"))
    status = {"state": "running", "step": step, "time": 1, "reason": "", "world": 1}
    (finished / "status.json").write_text(json.dumps(status))
    return finished


@pytest.fixture
def trainable(finished: Path) -> Path:
    """The configuration of `finished` and `interrupted`."""
    return finished.parents[1] / "c.yaml"
