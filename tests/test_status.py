"""`irkd status` on a run that was killed and went on, and its estimate against arithmetic done by hand."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from irkd_dist import status
from irkd_dist.errors import UserError
from tests.training.launch import irkd

CE = """
data: {{batch: 32, shards: {shards}}}
student: {{options: {{embed_dim: 16, depth: 2, num_heads: 2}}}}
curriculum: {{stages: [{{resolution: 8}}, {{resolution: 16}}], epochs: 2}}
precision: fp32
track: {{log_every: 1, panels: 0}}
out: {out}
"""


@pytest.fixture
def synthetic(tmp_path: Path) -> Path:
    """A run folder written by hand: 10 steps an epoch, 2 s a step, in the second of three stages."""
    (tmp_path / "config.yaml").write_text(
        "curriculum: {epochs: 3, stages: [{resolution: 8, epochs: 1}, {resolution: 16, epochs: null}, "
        "{resolution: 32, epochs: 2}]}\nfixed: null\n"
    )
    lines = [{"event": "start", "step": 0, "time": 0.0, "world": 4}]
    lines += [{"event": "stage", "step": 10, "time": 100.0, "stage": 1, "steps_per_epoch": 10}]
    lines += [
        {"event": "train", "step": s, "time": 100.0 + 2 * (s - 10), "stage": 1, "seconds": 1.5, "images_per_s": 99.0,
         "data_wait": 0.25}
        for s in range(11, 18)
    ]  # fmt: skip
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_a_run_that_is_killed_and_goes_on(shapes: Path, tmp_path: Path) -> None:
    file = tmp_path / "ce.yaml"
    file.write_text(CE.format(shards=shapes, out=tmp_path))
    irkd("train", str(file), env={"IRKD_FAULT": "sigkill@step:10"}, check=False)
    run = tmp_path / "ce-seed0"

    said = irkd("status", str(run)).stdout
    assert said.startswith(f"{run}: running, last sign of life")
    assert "2 of 2: 16 px, 0 of 2 epochs done" in said
    assert "10 of 16 at most" in said
    newest = max(
        (run / "checkpoints").glob("step-*")
    ).name  # written in a thread: the kill may be before its end
    assert f"checkpoint  step {int(newest.removeprefix('step-'))}," in said
    assert "restarts    0" in said
    assert "of training at most" in said
    assert status.read(run, now=time.time() + 7200).state == "silent"

    irkd("train", str(file))
    irkd("train", str(file))  # a finished run that is asked for again was not restarted
    said = irkd("status", str(run)).stdout
    assert said.startswith(f"{run}: finished")
    assert "restarts    1" in said
    assert "left" not in said


def test_status_does_not_wait_for_torch(synthetic: Path) -> None:
    code = f"from irkd_dist import cli; import sys; cli.main(['status', {str(synthetic)!r}])\n"
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_estimate_is_the_pace_times_the_pixels(synthetic: Path) -> None:
    read = status.read(synthetic, now=115.0)
    assert (read.state, read.world, read.step, read.steps) == ("running", 4, 17, 60)
    # 2 s a step: 23 steps of 30 left at 16 px, then 20 steps at four times the pixels
    assert read.left == pytest.approx(2.0 * 23 + 2.0 * 4 * 20)
    assert read.step_s == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("told", "state", "shown"),
    [
        (
            {"state": "failed", "reason": "rank 1: no space left"},
            "failed",
            "why         rank 1: no space left",
        ),
        ({"state": "stopped", "reason": "SIGTERM"}, "stopped", "the same command goes on with it"),
        ({"state": "running", "reason": ""}, "silent", "killed, or it hangs"),
    ],
)
def test_what_the_run_said_of_itself(synthetic: Path, told: dict[str, str], state: str, shown: str) -> None:
    (synthetic / "status.json").write_text(json.dumps({"step": 17, "time": 120.0, "world": 4, **told}))
    read = status.read(synthetic, now=5000.0)
    assert read.state == state
    assert shown in status.show(read)
    assert read.age == 5000.0 - 120.0


def test_trouble_is_counted(synthetic: Path) -> None:
    with (synthetic / "events.jsonl").open("a") as file:
        for kind in ("skip", "skip", "rollback"):
            file.write(json.dumps({"event": kind, "step": 17, "time": 114.0}) + "\n")
        file.write('{"event": "tra')  # a kill in the middle of a line
    assert "events      2 skip, 1 rollback" in status.show(status.read(synthetic, now=115.0))


def test_what_is_no_run_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        status.read(tmp_path)
    (tmp_path / "events.jsonl").touch()
    with pytest.raises(UserError, match=r"config\.yaml"):
        status.read(tmp_path)


def test_a_folder_of_runs_is_listed_newest_first(synthetic: Path, tmp_path: Path) -> None:
    runs = tmp_path / "all"
    shutil.copytree(synthetic, runs / "old[red]", ignore=shutil.ignore_patterns("all"))
    shutil.copytree(runs / "old[red]", runs / "new")
    shutil.copytree(runs / "old[red]", runs / "broken")
    (runs / "new" / "status.json").write_text('{"state": "stopped", "time": 140.0, "reason": "SIGTERM"}')
    (runs / "broken" / "config.yaml").write_text("curriculum: 3")
    (runs / "shards").mkdir()  # no run
    new, old, broken = status.overview(runs, now=150.0).splitlines()
    assert new.startswith("new  stopped 10 s ago, stage 2 of 3 (16 px), step 17 of 60")
    assert new.endswith("SIGTERM")
    assert old.startswith("old[red]  running 36 s ago")
    assert broken.startswith("broken  damaged: ")
    with pytest.raises(UserError, match="is no run folder and holds none"):
        status.overview(runs / "shards")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("status.json", '{"state": ["running"], "time": "now"}', "status.json is damaged: state="),
        ("status.json", "[" * 100_000, "status.json is damaged: nested too deeply"),
        (
            "events.jsonl",
            None,
            "1 line of events.jsonl cut short or altered, and left out: line 5: not UTF-8",
        ),
    ],
)
def test_what_is_damaged_is_left_out_and_named(
    synthetic: Path, name: str, text: str | None, said: str
) -> None:
    file = synthetic / name
    if text is None:
        lines = file.read_bytes().split(b"\n")
        lines[4] = lines[4][:9] + bytes([lines[4][9] | 128]) + lines[4][10:]
        file.write_bytes(b"\n".join(lines))
    else:
        file.write_text(text)
    shown = status.overview(synthetic, now=115.0)
    assert f"damaged     {said}" in shown
    assert "step        17 of 60 at most" in shown


def test_events_of_stages_that_there_are_not_are_left_out(synthetic: Path) -> None:
    with (synthetic / "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": "stage", "step": 17, "time": 114.0, "stage": 9}) + "\n")
    assert status.read(synthetic, now=115.0).stage == 1


def test_references_in_its_configuration_are_not_resolved(
    synthetic: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IRKD_SECRET", "3")
    file = synthetic / "config.yaml"
    text = file.read_text()
    file.write_text(text + "name: ${oc.env:IRKD_SECRET}\n")
    assert status.read(synthetic, now=115.0).stages == 3
    file.write_text(text.replace("{epochs: 3", "{epochs: '${oc.env:IRKD_SECRET}'"))
    with pytest.raises(UserError, match="names no stages"):
        status.read(synthetic, now=115.0)
