"""Three seconds of damaged input to each reader, and all that was found before; `make fuzz MINUTES=60` goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 3.0


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What one run of the driver over all targets brought; the seed is the same each time."""
    out = tmp_path_factory.mktemp("fuzz") / "results.json"
    minutes = str(SECONDS * len(TARGETS) / 60)
    command = [
        sys.executable,
        "-m",
        "tests.fuzz.driver",
        "--minutes",
        minutes,
        "--seed",
        "7",
        "--json",
        str(out),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert out.exists(), done.stdout[-2000:] + done.stderr[-4000:]
    print(done.stdout)
    return {r["target"]: r for r in json.loads(out.read_text())}


@pytest.mark.parametrize("target", TARGETS)
def test_every_input_ends_well_or_in_a_line(results: dict[str, dict[str, Any]], target: str) -> None:
    result = results[target]
    assert result["inputs"] >= 5
    told = [f"{f['where']}: {f['message']}\n{bytes.fromhex(f['data'])[:200]!r}" for f in result["findings"]]
    assert not told, "\n".join(told)
