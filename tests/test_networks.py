"""A network from its folder alone, evaluating without what trained it, and what `verify` finds in a real run folder."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from irkd_dist import checkpoint, evaluation, eventlog, networks, report, runfolder, verify_runs
from irkd_dist import config as configuration
from irkd_dist.data import shards
from irkd_dist.errors import UserError
from irkd_dist.report import reading
from irkd_dist.training import panels, requeue
from irkd_dist.training.tracking import SampleLog
from irkd_dist.training.train import train

YAML = """
data: {{batch: 32, shards: {shards}}}
student: {{name: custom, patch: 4, options: {{embed_dim: 32, depth: 2, num_heads: 2}}}}
{more}
precision: fp32
track: {{log_every: 1, panels: 4}}
out: {out}
"""


@pytest.fixture(scope="module")
def trained(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run folders `teacher` and `student`."""
    out = tmp_path_factory.mktemp("runs")
    teacher, student = out / "teacher.yaml", out / "student.yaml"
    teacher.write_text(YAML.format(shards=shapes, out=out, more="fixed: {resolution: 16, epochs: 1}"))
    train(configuration.load(teacher, ["name=teacher"]))
    more = f"teacher: {{run: {out / 'teacher'}}}\nloss: {{kd: {{alpha: 1}}, saliency: {{gamma: 0.5}}}}\n"
    more += "curriculum: {stages: [{resolution: 8}, {resolution: 16}], epochs: 1}"
    student.write_text(YAML.format(shards=shapes, out=out, more=more))
    train(configuration.load(student, ["name=student"]))
    return out


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """A copy to spoil: its student still names the teacher of the original, which is moved away."""
    shutil.copytree(trained, tmp_path / "runs")
    for file in (tmp_path / "runs" / "student").rglob("state.json"):
        state = json.loads(file.read_text())
        state["config"]["teacher"]["run"] = str(tmp_path / "runs" / "teacher")
        del state["sha256"]["state.json"]  # as an earlier release wrote it
        file.write_text(json.dumps(state))
    return tmp_path / "runs"


def test_a_network_is_what_its_checkpoint_says(trained: Path) -> None:
    network = networks.load(trained / "student")
    state = json.loads((network.folder / "state.json").read_text())
    assert network.folder.parent.name == "best"
    assert network.taps == tuple(state["taps"]) == ("blocks.0", "blocks.1.norm1")
    assert (network.method, network.size, len(network.classes)) == ("gradient", 16, 10)
    kept = checkpoint.load_student(network.folder)
    assert all(torch.equal(v, kept[k]) for k, v in network.model.state_dict().items())
    assert not network.model.training
    assert networks.load(trained / "student", "last").folder.parent.name == "checkpoints"


def test_taps_of_an_earlier_release_are_resolved_as_its_training_did(runs: Path) -> None:
    known = networks.load(runs / "student").taps
    for file in (runs / "student").rglob("state.json"):
        state = json.loads(file.read_text())
        del state["taps"], state["method"]
        file.write_text(json.dumps(state))
    network = networks.load(runs / "student")
    assert network.taps == known
    assert network.method == "gradient"


def test_a_student_is_measured_without_its_teacher(runs: Path) -> None:
    whole = evaluation.evaluate(runs / "student", resolutions=[16])
    assert set(whole["agreement"]) == {"16"}
    assert whole["notes"] == []
    assert set(whole["images_per_s"]["16"]) == {"student", "teacher"}
    shutil.rmtree(runs / "teacher")
    alone = evaluation.evaluate(runs / "student", resolutions=[16])
    assert alone["accuracy"] == whole["accuracy"]
    assert alone["pointing"] == whole["pointing"]
    assert alone["agreement"] == {}
    (note,) = alone["notes"]
    assert note.startswith("the agreement with the teacher's maps is left out: ")


def test_one_result_does_not_replace_another(runs: Path) -> None:
    run = runs / "student"
    for split, which, sizes in (("test", "best", [16]), ("val", "best", [16]), ("test", "last", [16]),
                                ("test", "best", [16, 8])):  # fmt: skip
        evaluation.evaluate(run, which=which, split=split, resolutions=sizes)
    names = {"test-16-best.json", "val-16-best.json", "test-16-last.json", "test-8-16-best.json"}
    pictures = {name.replace(".json", ".npz") for name in names}  # of wrong answers
    assert {f.name for f in (run / "evaluation").iterdir()} == names | pictures
    (run / "evaluation.json").write_text(json.dumps({"split": "val", "accuracy": {"8": 0.25}}))
    text = report.write([run]).read_text()
    for title in ("val split, stage-01-step-", "test split, stage-01-step-", ", 13 images", ", 20 images"):
        assert title in text
    assert "<h3>val split</h3>" in text  # of an earlier release
    assert "25.00%" in text


def test_other_classes_are_refused(runs: Path, shapes: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(shapes, other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["classes"] = manifest["classes"][::-1]
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="its class 0 is"):
        evaluation.evaluate(runs / "student", data=str(other))


def test_a_best_that_is_gone_is_said(runs: Path) -> None:
    shutil.rmtree(runs / "student" / "best")
    with pytest.raises(UserError, match=r"best/stage-01-step-\d+, the best .* is gone; .*--which last"):
        networks.load(runs / "student")
    assert networks.load(runs / "student", "last").size == 16


def test_panels_show_different_classes_in_every_snapshot(trained: Path, shapes: Path) -> None:
    shots, problems = panels.load(trained / "student")
    assert problems == []
    manifest = shards.load_manifest(shapes)
    labels = shards.open_split(shapes, manifest, "val", 16).labels
    first = [int(np.flatnonzero(labels == c)[0]) for c in np.unique(labels)[:4]]
    assert [shot["ids"].tolist() for *_, shot in shots] == [first] * 2
    assert len(set(shots[0][2]["labels"].tolist())) == 4


def test_panel_rows_take_turns_among_the_classes() -> None:
    labels = np.array([2, 2, 0, 2, 0, 7])
    assert panels.choose(labels, 6).tolist() == [2, 0, 5, 4, 1, 3]
    assert panels.choose(labels, 2).tolist() == [2, 0]


def test_maps_of_unequal_grids_have_an_average() -> None:
    grids = panels.average([torch.rand(2, 4, 4), torch.rand(2, 2, 2), torch.rand(2, 1, 1)])
    assert grids.shape == (2, 4, 4)
    assert np.isfinite(grids).all()


def test_the_start_says_command_sizes_and_images(trained: Path) -> None:
    start = eventlog.read_events(trained / "student")[0]
    assert start["images"] == {"train": 110, "val": 13, "test": 20}
    assert (
        start["teacher_parameters"] == start["parameters"] - 32 - 32 * 10 - 10 - 32
    )  # token, head, position
    assert start["command"].startswith("irkd ")
    text = report.write([trained / "student"]).read_text()
    for words in (
        "110 train, 13 val, 20 test",
        "the teacher&#39;s",
        "1 epochs done",
    ):
        assert words in text


def spoil(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def test_verify_finds_nothing_in_a_whole_run(trained: Path) -> None:
    assert verify_runs.run(trained / "student") == []


@pytest.mark.parametrize(
    "name",
    ["events.jsonl", "checkpoints/*/state.json", "checkpoints/*/student.safetensors",
     "checkpoints/*/optimizer.safetensors", "best/stage-01*/state.json", "panels/stage-01*.npz"],
)  # fmt: skip
def test_verify_names_the_file_with_one_flipped_bit(trained: Path, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained / "student", run)
    file = max(run.glob(name))
    spoil(file)
    found = verify_runs.run(run)
    assert found
    # the newest checkpoint counts on the best, so that one is named for both reasons
    assert all(file.name in line or file.parent.name in line for line in found), found


def test_any_flipped_bit_of_a_small_file_is_found(runs: Path) -> None:
    """Also one that leaves a number a number: each bit of each byte of what a run says of itself."""
    run = runs / "student"
    runfolder.write_status(run, "stopped", 123, 2, "all is well")
    requeue.decide(run, limit=3)
    evaluation.evaluate(run, resolutions=[16])
    (run / "samples").mkdir()
    with SampleLog(run, 0, 12345.5, 7, True) as log:
        log.write(7, [1, 22, 333])
    assert verify_runs.run(run) == []
    (measured,) = (run / "evaluation").iterdir()
    readers: dict[Path, Callable[[Path], object]] = {
        run / "status.json": lambda file: runfolder.read_status(run)[1],
        run / "restarts.json": lambda file: runfolder.read_restarts(run)[1],
        measured: lambda file: _refused(reading.read_evaluation, file),
        run / "samples" / "rank-00000.jsonl": lambda file: any(
            eventlog.parse_samples(line) is None for line in file.read_bytes().splitlines() if line.strip()
        ),
    }
    for file, damaged in readers.items():
        whole = file.read_bytes()
        for at in range(len(whole) - 1):  # the last is the line's end
            for bit in range(8):
                file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :])
                assert damaged(file), (file.name, at, bit)
        file.write_bytes(whole)
    assert verify_runs.run(run) == []


def _refused(read: Callable[[Path], object], file: Path) -> bool:
    try:
        read(file)
    except (ValueError, TypeError, AttributeError):
        return True
    return False


def test_verify_names_every_other_kind(runs: Path) -> None:
    run = runs / "student"
    changes: dict[str, Any] = {
        "status.json": "{", "restarts.json": '{"restarts": "x"}', "config.yaml": "data: 3",
        "evaluation/test-8-best.json": "[]", "samples/rank-00000.jsonl": '{"started": 1}\n',
    }  # fmt: skip
    for name, text in changes.items():
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(text)
    found = "\n".join(verify_runs.run(run))
    for name in changes:
        assert Path(name).name in found, name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": 1.5}, "model: name='1.5'"),
        ({"options": [[1]]}, "model: options="),
        ({"distilled": None}, "model: distilled="),
        ({"name": {"a": 1}}, "model: name="),
        (None, "model='None' is not what belongs there"),
    ],
)
def test_a_model_of_wrong_types_is_one_line(runs: Path, change: dict[str, Any] | None, said: str) -> None:
    """A state.json whose checksum is right, written by something else."""
    folder = checkpoint.find(runs / "student")[0]
    content = checkpoint.read(folder)
    content.state["model"] = None if change is None else content.state["model"] | change
    shutil.rmtree(folder)
    checkpoint.save(folder, content.student, content.optimizer, content.state)
    with pytest.raises(UserError, match=re.escape(said)):
        networks.load(folder)
