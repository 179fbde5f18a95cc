"""`irkd plan`: what a run will take, from some of its own steps; nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from irkd_dist import config as configuration
from irkd_dist import plan, plan_model
from irkd_dist.eventlog import read_events
from tests.training.launch import irkd


@pytest.fixture
def file(shapes: Path, tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(
        f"data: {{shards: {shapes}, batch: 32}}\nstudent: {{options: {{embed_dim: 32, depth: 2, num_heads: 2}}}}\n"
        f"curriculum: {{stages: [{{resolution: 8}}, {{resolution: 16, epochs: 3}}], epochs: 2}}\n"
        f"out: {tmp_path / 'o'}\ntrack: {{panels: 0}}\n"
    )
    return tmp_path / "run.yaml"


def test_the_forecast_counts_what_the_run_will_do(file: Path) -> None:
    """Steps, batches and checkpoints as they come; time to an order of magnitude (benchmarks/plan.py measures it)."""
    forecast = plan.plan(configuration.load(file))
    assert not (file.parent / "o").exists()
    irkd("train", str(file))
    run = file.parent / "o" / "run-seed0"
    events = read_events(run)
    entered = [e for e in events if e["event"] == "stage"]
    assert [s.steps for s in forecast.stages] == [e["epochs"] * e["steps_per_epoch"] for e in entered]
    assert [(s.resolution, s.batch) for s in forecast.stages] == [
        (e["resolution"], e["batch"]) for e in entered
    ]
    written = sum(f.stat().st_size for f in (run / "checkpoints").rglob("*.safetensors"))
    written += sum(f.stat().st_size for f in (run / "best").rglob("*.safetensors"))
    assert written == pytest.approx(forecast.checkpoints_mib * 2**20, rel=0.25)
    (summary,) = [e for e in events if e["event"] == "summary"]
    assert forecast.seconds / 10 < summary["seconds"] < 10 * forecast.seconds
    assert forecast.peak_mib > 100


def test_more_devices_are_the_stated_model() -> None:
    model = plan.Model(gpus=8, bandwidth=1e9, latency=0.0, efficiency=1.0, overlap=0.0)
    assert model.seconds(0.8, 4e6) == pytest.approx(0.1 + 2 * 7 / 8 * 4e-3)
    assert plan.Model(gpus=1).seconds(0.8, 4e6) == 0.8


def test_memory_by_engine_is_what_the_papers_count() -> None:
    """1 GiB of weights on 8 processes: 16 bytes a parameter, divided by stages, and DDP's and DeepSpeed's copies."""
    gib = 1.0
    told = {name: plan_model.states(name, gib, 8, False, 0.1) for name in plan_model.SPREADS}
    expected = {
        "ddp": 5.0,
        "zero1": 2 + 3 / 8,
        "zero2": 1 + 4 / 8,
        "zero3": 5 / 8 + 0.1,
        "fsdp2": 4 / 8 + 0.1,
    }
    assert told == pytest.approx(expected)
    assert plan_model.states("zero2", gib, 8, True, 0.0) == pytest.approx(2.5)
    assert plan_model.states("fsdp2", gib, 8, True, 0.0) == pytest.approx(5 / 8)


def test_a_teacher_that_is_not_trained_yet(file: Path, shapes: Path) -> None:
    """Its network comes from the configuration beside, whose run folder it is."""
    (file.parent / "big.yaml").write_text(
        f"data: {{shards: {shapes}}}\nstudent: {{options: {{embed_dim: 64, depth: 3, num_heads: 2}}}}\n"
        f"fixed: {{resolution: 16, epochs: 1}}\nout: {file.parent / 'o'}\n"
    )
    taught = [
        f"teacher={{run: {file.parent / 'o' / 'big-seed0'}}}",
        "loss.kd.alpha=1",
        "loss.saliency.gamma=0.8",
    ]
    taught.append(f"teacher.cache.folder={file.parent / 'cache'}")
    forecast = plan.plan(configuration.load(file, taught), file=file)
    assert any("big-seed0 is not there yet: its network is taken from" in note for note in forecast.notes)
    assert all(s.teacher_s > 0 for s in forecast.stages)
    # 110 samples, each epoch a draw: 2 of 2 x 2 and 3 of 4 x 4 patches, at 2 taps; 10 logits, id and checksum
    values = 2 * (10 + 2 * 4) + 3 * (10 + 2 * 16)
    assert forecast.cache_mib * 2**20 == 110 * (4 * values + 16 * 5)
    assert 0 < forecast.cache_s < forecast.seconds
    assert 0 < forecast.checkpoint_s < 60
    assert [s.kept_s for s in forecast.stages] == [0, 0]  # each epoch shows another draw, so asks anew
    twice = plan.plan(configuration.load(file, [*taught, "augment.draws=2"]), file=file).stages
    assert twice[0].kept_s == 0  # two epochs, two draws
    late = twice[1]  # the third epoch shows the first one's again
    assert late.kept_s == pytest.approx(late.step_s - late.teacher_s)
    a_third = late.steps / 3
    assert late.seconds == pytest.approx(
        late.start_s + a_third * (2 * late.step_s + late.kept_s) + 3 * late.validation_s, rel=1e-6
    )
    assert not (file.parent / "o").exists()
    assert not (file.parent / "cache").exists()


def test_the_command(file: Path) -> None:
    told = json.loads(
        irkd("plan", str(file), "--gpus", "4", "--nodes", "2", "--json").stdout.splitlines()[-1]
    )
    assert told["gpus"] == 8
    assert [s["resolution"] for s in told["stages"]] == [8, 16]
    shown = irkd("plan", str(file)).stdout
    assert "in all at most" in shown
    assert "checkpoints" in shown
    done = irkd("plan", str(file), "teacher={run: nothing}", "loss.kd.alpha=1", check=False)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "nothing is neither a run folder" in done.stderr
    assert "give GB/s above 0" in irkd("plan", str(file), "--bandwidth", "0", check=False).stderr
