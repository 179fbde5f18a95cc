"""benchmarks/growth.py runs from end to end: what it writes is plain values and a figure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_how_cost_grows(tmp_path: Path) -> None:
    out, figure = tmp_path / "growth.json", tmp_path / "growth.svg"
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "growth.py"),
        "--quick",
        "--only",
        "cache,checkpoint,loader,batch",
    ]
    done = subprocess.run(
        [*command, "--out", str(out), "--figure", str(figure)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told == json.loads(out.read_text())
    ((point,), (kept,), (stored,), (read,)) = (
        told["step"]["batch"],
        told["cache"],
        told["checkpoint"],
        told["loader"],
    )
    assert point["batch"] == 16
    assert 0 < point["teacher_ms"] < point["step_ms"]
    assert min(*kept.values(), *stored.values(), *read.values(), point["peak_mib"]) > 0
    assert figure.read_text().count("<svg") == 1
