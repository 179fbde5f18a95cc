"""Studies: the table's arithmetic, runs beside one another, and pages whose figures are those of their runs."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

from irkd_dist import gpus, jobs, study, study_page, verify
from irkd_dist.errors import UserError
from tests.training.launch import irkd

MODEL = "student: {options: {embed_dim: 16, depth: 2, num_heads: 2}}\n"


@pytest.fixture
def folder(shapes: Path, tmp_path: Path) -> Path:
    """A teacher, two experiments, and a study of them."""
    common = f"data: {{shards: {shapes}, batch: 64}}\n{MODEL}track: {{panels: 0}}\nout: {tmp_path / 'runs'}\n"
    (tmp_path / "teacher.yaml").write_text(common + "fixed: {resolution: 8, epochs: 1}\n")
    (tmp_path / "ce.yaml").write_text(common + "fixed: {resolution: 8, epochs: 1}\n")
    (tmp_path / "kd.yaml").write_text(
        common
        + f"fixed: {{resolution: 8, epochs: 1}}\nteacher: {{run: {tmp_path / 'runs' / 'teacher-seed0'}}}\n"
        "loss: {kd: {alpha: 1}}\n"
    )
    (tmp_path / "study.yaml").write_text(
        f"title: Small\nteachers: [{tmp_path / 'teacher.yaml'}]\nseeds: [0]\npublished: {{KD: 50}}\n"
        f"experiments: {{CE: {tmp_path / 'ce.yaml'}, KD: {tmp_path / 'kd.yaml'}}}\n"
        "scales: {short: {all: [data.subset=32], KD: [loss.kd.alpha=2]}}\n"
    )
    return tmp_path


def weights(run: Path) -> dict[str, Any]:
    (newest,) = sorted((run / "checkpoints").iterdir())[-1:]
    return load_file(newest / "student.safetensors")


def test_runs_beside_one_another_are_those_of_one_after_the_other(folder: Path) -> None:
    tables = []
    for count in ("1", "3"):
        out = folder / count / "table.md"
        runs = f"out={folder / count}"
        teacher = f"teacher.run={folder / count / 'teacher-seed0'}"
        text = (folder / "study.yaml").read_text() + f"own: {{KD: ['{teacher}']}}\n"
        (folder / f"study-{count}.yaml").write_text(text)
        irkd("study", str(folder / f"study-{count}.yaml"), runs, "--jobs", count, "--out", str(out))
        tables.append(
            [line.split("|")[1:6] for line in out.read_text().splitlines() if line.startswith("| ")][:4]
        )
        assert list(verify.verify(out.parent / "table.md")) == []
        assert "<table>" in out.with_suffix(".html").read_text()
    assert tables[0] == tables[1]
    for name in ("teacher-seed0", "ce-seed0", "kd-seed0"):
        one, other = weights(folder / "1" / name), weights(folder / "3" / name)
        assert all((one[k] == other[k]).all() for k in one), name
    assert (folder / "3" / "ce-seed0.log").read_text().startswith("run ")


def test_a_run_that_fails_is_named_and_the_others_go_on(folder: Path) -> None:
    (folder / "ce.yaml").write_text(
        (folder / "ce.yaml").read_text().replace("batch: 64", "batch: 64, subset: 10000")
    )
    done = irkd(
        "study", str(folder / "study.yaml"), "--jobs", "2", "--out", str(folder / "t.md"), check=False
    )
    assert done.returncode == 2
    assert "1 of 3 runs failed: CE, seed 0: error: data.subset=10000" in done.stderr
    assert "| KD | 1 |" in (folder / "t.md").read_text()
    assert "| CE |" not in (folder / "t.md").read_text().split("## Every run")[0]


def test_a_teacher_that_fails_stops_its_own_students_alone(folder: Path) -> None:
    (folder / "teacher.yaml").write_text(
        (folder / "teacher.yaml").read_text().replace("batch: 64", "batch: 64, subset: 10000")
    )
    done = irkd(
        "study", str(folder / "study.yaml"), "--jobs", "2", "--out", str(folder / "t.md"), check=False
    )
    assert done.returncode == 2
    assert "1 of 3 runs failed" in done.stderr
    teacher = folder / "teacher.yaml"
    assert f"; KD, seed 0 was not started, since its teacher {teacher} failed" in done.stderr
    table = (folder / "t.md").read_text()
    assert "| CE | 1 |" in table
    assert "| KD | 1 |" not in table


SMI = """#!/bin/sh
# stands in for the driver's: 10 GiB are free before the first run has trained, 6 afterwards
free=10240; grep -qs '"train"' {runs}/*/events.jsonl && free=6144
case "$1" in *memory.free*) echo "0, GPU-x, $free";; *) echo 0;; esac
"""


@pytest.fixture
def one_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (folder / "bin").mkdir()
    (folder / "bin" / "nvidia-smi").write_text(SMI.format(runs=folder / "runs"))
    (folder / "bin" / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return folder


def test_a_run_is_held_back_where_a_gpu_has_no_memory_left(one_gpu: Path) -> None:
    """A run takes 4 of 10 GiB there, so that two fit and a third does not: 2 GiB would be left of the 4.8 wanted."""
    devices = gpus.Gpus()
    assert devices.place([]) == ("0", None)
    devices.look([])
    (one_gpu / "runs" / "a").mkdir(parents=True)
    (one_gpu / "runs" / "a" / "events.jsonl").write_text('{"event": "train"}')
    devices.asked_at = -math.inf
    devices.look(["0"])
    assert devices.found[0].largest == 4 * 2**30
    assert devices.place(["0"]) == ("0", None)
    devices.found[0].free = 2 * 2**30
    told = "GPU 0 has 2.0 GiB left, and a run has taken 4.0 GiB"
    assert devices.place(["0", "0"]) == (None, told)
    assert devices.place([]) == ("0", None)  # none is on it: what it takes is not known to be too much


def test_the_gpu_with_the_fewest_runs_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 1")
    devices = gpus.Gpus()
    used: list[str | None] = []
    for _ in range(4):
        used.append(devices.place(used)[0])
    assert used == ["3", "1", "3", "1"]
    devices.found[0].free, devices.found[0].largest = 1, 2
    assert devices.place(used) == ("1", None)


def test_a_run_that_goes_on_has_to_train_again_before_another_starts(tmp_path: Path) -> None:
    """Its memory is known by then: what an earlier start has written says nothing of it."""
    log = tmp_path / "run" / "events.jsonl"
    log.parent.mkdir()
    log.write_text('{"event": "train"}\n')
    job = jobs.Job("run", (), log.parent)
    with subprocess.Popen(["true"]) as process:
        running = jobs._Running(job, process, None, jobs._log_size(job))
    assert not jobs._begun([running])
    with log.open("a") as file:
        file.write('{"event": "train"}\n')
    assert jobs._begun([running])


def test_runs_of_one_name_are_told_apart_and_a_failure_is_this_starts(tmp_path: Path) -> None:
    """Tables of a paper have the same rows in each study."""
    todo = [jobs.Job("KD", arguments, tmp_path / folder) for folder, arguments in
            (("a", ("--version",)), ("b", ("status", "nowhere")), ("c", ("--version",)))]  # fmt: skip
    console = Console(file=io.StringIO(), width=200)
    failed, _ = jobs.run(todo, 3, console)
    assert [*failed] == [tmp_path / "b"]
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    assert said.count("KD: done") == 2
    assert said.count("KD: failed") == 1
    log = todo[1].log
    with subprocess.Popen(["true"]) as process:
        run = jobs._Running(todo[1], process, None, 0, said_before=log.stat().st_size)
    assert "nowhere" in log.read_text()
    assert jobs._why(run, -9, 2) == f"was killed by SIGKILL (log: {log})"


def started_and_asked_to_stop(folder: Path, event: bytes) -> tuple[int, str]:
    """A long study that gets SIGTERM once its first run has written an event: its exit code, and what it said."""
    command = [sys.executable, "-m", "irkd_dist", "study", str(folder / "study.yaml"), "fixed.epochs=4000"]
    begun = subprocess.Popen(
        [*command, "--jobs", "2"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    log, deadline = folder / "runs" / "teacher-seed0" / "events.jsonl", time.monotonic() + 120
    while not (log.exists() and event in log.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    begun.send_signal(signal.SIGTERM)
    _, said = begun.communicate(timeout=120)
    return begun.returncode, said


def test_a_signal_stops_all_runs_and_the_same_command_goes_on(folder: Path) -> None:
    code, said = started_and_asked_to_stop(folder, b'"train"')
    assert code == 75, said
    status = json.loads((folder / "runs" / "teacher-seed0" / "status.json").read_text())
    assert status["state"] == "stopped"
    code, said = started_and_asked_to_stop(folder, b'"resume"')
    assert code == 75, said
    again = json.loads((folder / "runs" / "teacher-seed0" / "status.json").read_text())
    assert again["step"] >= status["step"] > 0


def test_cells_and_scales(folder: Path) -> None:
    loaded = dataclasses.replace(study.load(folder / "study.yaml"), seeds=[0, 1])
    cells = study.cells(loaded, ["optim.lr=1e-3"], "short")
    assert [c.name for c in cells][1:] == ["CE, seed 0", "KD, seed 0", "CE, seed 1", "KD, seed 1"]
    assert cells[2].arguments[2:] == ("seed=0", "data.subset=32", "loss.kd.alpha=2", "optim.lr=1e-3")
    assert cells[2].config.data.subset == 32
    with pytest.raises(UserError, match="--scale long: 'Small' has short"):
        study.cells(loaded, scale="long")
    listed = irkd("study", str(folder / "study.yaml"), "--cells", "--seeds", "2").stdout.splitlines()
    assert len(listed) == 5
    one = irkd("study", str(folder / "study.yaml"), "--cell", "3").stdout.splitlines()
    assert one == ["train", str(folder / "kd.yaml"), "seed=0"]
    assert "has 1 to 3" in irkd("study", str(folder / "study.yaml"), "--cell", "6", check=False).stderr
    (folder / "study.yaml").write_text((folder / "study.yaml").read_text().replace("KD: 50", "KDD: 50"))
    with pytest.raises(UserError, match="published: 'KDD' is no experiment; it has CE, KD"):
        study.load(folder / "study.yaml")


def test_two_runs_that_differ_have_two_folders(folder: Path) -> None:
    """Else one is never trained, and its row shows the other's figures."""
    file, runs = folder / "study.yaml", folder / "runs"
    for arguments in (
        ["--seeds", "2", "name=x"],
        ["--seeds", "2", "name=x", "--cells"],
        ["name=x", "--cell", "2"],
    ):
        done = irkd("study", str(file), *arguments, check=False)
        assert done.returncode == 2
        assert f"differ and have one run folder, {runs / 'x'}: give each its own out" in done.stderr
    twice = dataclasses.replace(
        study.load(file), seeds=[0], experiments=dict.fromkeys(["a", "b"], str(folder / "ce.yaml"))
    )
    study.check_folders(study.cells(twice))  # one run in two rows
    differs = dataclasses.replace(twice, own={"b": ["optim.lr=2e-3"]})
    with pytest.raises(UserError, match="a, seed 0 and b, seed 0 differ and have one run folder"):
        study.check_folders(study.cells(differs))
    study.check_folders(
        study.cells(dataclasses.replace(differs, own={"b": ["optim.lr=2e-3", "out=elsewhere"]}))
    )


def test_the_interval_is_students() -> None:
    """The quantiles against the integral of the density; a sample worked out by hand."""
    for freedom, t in [*enumerate(study_page.T_975, 1)][::7]:
        density = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
        width = t / 20000
        half = sum(
            density * (1 + ((i + 0.5) * width) ** 2 / freedom) ** (-(freedom + 1) / 2) * width
            for i in range(20000)
        )
        assert half == pytest.approx(0.475, abs=1e-4)
    assert study_page.interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3))
    assert math.isnan(study_page.interval([1.0]))


def run_of(name: str, seed: int, accuracy: float, teacher: bool = False) -> dict[str, Any]:
    return {
        "experiment": name, "seed": seed, "teacher": teacher, "command": f"irkd train {name}.yaml seed={seed}",
        "images": 1000, "test_accuracy": accuracy, "test_accuracy_last": accuracy, "seconds": 10.0,
    }  # fmt: skip


def page_of(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    pairs = [(0.50, 0.53), (0.52, 0.56), (0.54, 0.59)]
    runs = [run_of(n, s, pair[i]) for s, pair in enumerate(pairs) for i, n in enumerate(("CE", "KD"))]
    one = {
        "title": "T",
        "notes": [],
        "experiments": ["CE", "KD"],
        "baseline": "CE",
        "published": {"KD": 55.0},
    }
    values = {
        "command": "irkd study x",
        "scale": None,
        "machine": "A machine.",
        "studies": [{**one, "runs": runs}],
    }
    study.write(tmp_path / "page.md", values)
    return tmp_path / "page.md", values


def test_differences_are_paired_over_seeds(tmp_path: Path) -> None:
    """3, 4, 5 points: mean 4, standard deviation 1, though each experiment alone spreads over 4 to 6."""
    page, _ = page_of(tmp_path)
    row = next(line for line in page.read_text().splitlines() if line.startswith("| KD | 3"))
    assert f"+4.00 ± {4.303 / math.sqrt(3):.2f}" in row
    assert "| KD | 56.00 ± 7.45 | 55.00 | +1.00 |" in page.read_text()


def test_the_standard_deviation_stands_beside_the_interval(tmp_path: Path) -> None:
    page, values = page_of(tmp_path)
    study.write(page, {**values, "sd": True})
    row = next(line for line in page.read_text().splitlines() if line.startswith("| KD | 3"))
    assert f"+4.00 ± {4.303 / math.sqrt(3):.2f} (1.00)" in row
    assert "56.00 ± 7.45 (3.00)" in row
    assert list(verify.verify(page)) == []


def test_a_figure_that_no_run_backs_is_found(tmp_path: Path) -> None:
    page, values = page_of(tmp_path)
    assert list(verify.verify(tmp_path)) == []
    text = page.read_text()
    page.write_text(text.replace("# T\n", "# T\n\nWhat it says: nothing. 99 %.\n"))  # the author's own words
    assert list(verify.verify(page)) == []
    page.write_text(text.replace("+1.00", "+1.01"))
    found = list(verify.verify(tmp_path))
    assert any("+1.01" in line and "no run beside it backs" in line for line in found)
    assert any("+1.00" in line and "leaves out" in line for line in found)
    page.write_text(text)
    values["studies"][0]["runs"][0]["test_accuracy"] = 0.51
    page.with_suffix(".json").write_text(json.dumps(values))
    assert list(verify.verify(tmp_path))
    page.with_suffix(".json").write_text("{")
    assert "cannot be compared" in next(iter(verify.verify(tmp_path)))


def test_a_study_counts_operations_and_says_how_far_it_is(folder: Path) -> None:
    out = folder / "t.md"
    said = irkd("study", str(folder / "study.yaml"), "--out", str(out)).stdout
    assert "run 1 of 3: " in said
    assert "run 2 of 3: CE, seed 0; 2 of 3 runs are left" in said
    runs = json.loads(out.with_suffix(".json").read_text())["studies"][0]["runs"]
    width, depth, tokens, hidden = 16, 2, 5, 32  # 2 x 2 patches and the class token
    block = 2 * tokens * (4 * width * width + 2 * width * hidden) + 4 * tokens * tokens * width
    patches, head = 2 * 4 * (3 * 4 * 4) * width, 2 * width * 10
    # by hand: a forward, and a backward of twice as much, but for the patches, whose pixels get no gradient
    ce = 3 * (depth * block + head) + 2 * patches
    assert [r["images"] * ce for r in runs[1:2]] == [r["flops"] for r in runs[1:2]]
    assert "| PFLOP a run |" in out.read_text()
    assert list(verify.verify(out)) == []
