"""An export is the student, whoever reads it; predictions with and without torch."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import irkd_dist
from irkd_dist import export, export_card, networks, predict, typed, verify
from irkd_dist.data import shards
from irkd_dist.errors import UserError
from irkd_dist.eventlog import read_events
from tests.training.launch import irkd

YAML = """
data: {{shards: {shards}, batch: 64}}
student: {{name: custom, patch: 4, options: {{embed_dim: 32, depth: 2, num_heads: 2}}}}
teacher: {{run: {out}/teacher}}
loss: {{kd: {{alpha: 1}}}}
curriculum: {{stages: [{{resolution: 8}}, {{resolution: 16}}], epochs: 1}}
track: {{panels: 0}}
precision: fp32
out: {out}
name: student
"""


@pytest.fixture(scope="module")
def run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distilled student of two stages."""
    out = tmp_path_factory.mktemp("export")
    (out / "student.yaml").write_text(YAML.format(shards=shapes, out=out))
    own = ["teacher=null", "loss={}", "name=teacher", "curriculum.stages=[{resolution: 16}]"]
    irkd_dist.train(out / "student.yaml", own)
    irkd_dist.train(out / "student.yaml")
    return out / "student"


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "small"
    irkd("export", str(run), "--out", str(out), "--licence", "apache-2.0")
    return out


@pytest.fixture(scope="module")
def pictures(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten test images as files, one broken, one text."""
    folder = tmp_path_factory.mktemp("pictures")
    stored = shards.open_split(shapes, shards.load_manifest(shapes), "test", 16)
    for i in range(10):
        (folder / f"{i:02d}.png").write_bytes(stored.image(i))
    (folder / "broken.png").write_bytes(b"\x89PNG nothing")
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_everybody_reads_the_same_logits(run: Path, exported: Path) -> None:
    """timm from the folder, torch.export's program, ONNX Runtime: any batch, and resolutions it never saw too."""
    student = irkd_dist.load(run)
    model = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    program = torch.export.load(exported / "model.pt2").module()
    onnx = export.of_onnx(exported / "model.onnx")
    for size, batch in ((8, 1), (8, 5), (16, 3), (20, 2)):
        images = torch.randn(batch, 3, size, size)
        with torch.no_grad():
            expected = student(images)
            torch.testing.assert_close(model(images), expected)
            torch.testing.assert_close(program(images), expected)
        torch.testing.assert_close(torch.from_numpy(onnx(images.numpy())), expected, rtol=1e-4, atol=1e-5)
    told = json.loads((exported / "export.json").read_text())
    assert told["differences"].keys() == {"timm", "torch", "onnx"}
    assert all(
        {*found} == {"8", "16"} and max(found.values()) < 1e-4 for found in told["differences"].values()
    )
    assert "test split" in told["images"]


def test_the_card_says_what_it_is(run: Path, exported: Path) -> None:
    card = (exported / "README.md").read_text()
    (summary,) = irkd_dist.read_run(run, "summary")
    for words in (
        "license: apache-2.0", "local-dir:small", "8 px, 16 px", "run `teacher`", f"{summary['test_accuracy']:.2%}",
        "Two heads read two tokens", "int8: accuracy", irkd_dist.read_run(run, "start")[0]["command"],
    ):  # fmt: skip
        assert words in card, words
    config = json.loads((exported / "config.json").read_text())
    assert config["label_names"] == list(irkd_dist.load(run).classes)
    assert config["irkd"]["resolutions"] == [8, 16]


def test_the_card_takes_no_figure_of_other_weights_or_images(run: Path, tmp_path: Path) -> None:
    """Results that stand first by their names: of the raw weights, and of another data set."""
    copy = tmp_path / "student"
    shutil.copytree(run, copy)
    folder = networks.load(copy).folder
    (copy / "evaluation").mkdir(exist_ok=True)
    for name, value in (("16-best-raw", 0.1), ("16-best-data-0123", 0.2), ("16-best", 0.3)):
        told = {"split": "test", "checkpoint": str(folder), "accuracy": {"16": value}}
        (copy / "evaluation" / f"test-{name}.json").write_bytes(typed.checked(told))
    assert export_card.accuracies(copy, folder) == {"16": 0.3}
    shutil.rmtree(copy / "evaluation")
    (summary,) = irkd_dist.read_run(copy, "summary")
    assert export_card.accuracies(copy, folder) == {"16": summary["test_accuracy"]}
    last = networks.load(copy, "last").folder
    assert export_card.accuracies(copy, last) == {"16": summary["test_accuracy_last"]}


def test_a_flipped_bit_is_named(exported: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    assert list(verify.verify(copy)) == []
    for name in ("model.onnx", "config.json", "README.md"):
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(bytes(data))
        (problem,) = verify.verify(copy)
        assert name in problem
        (copy / name).write_bytes((exported / name).read_bytes())
    (copy / "model.pt2").unlink()
    (problem,) = verify.verify(copy)
    assert "model.pt2 cannot be read" in problem


def test_what_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"--out .*mine is there, and no export of ours"):
        export.export(run, tmp_path / "mine")
    with pytest.raises(UserError, match="--to tflite: it is none of timm, onnx"):
        export.export(run, tmp_path / "new", ["tflite"])
    with pytest.raises(UserError, match="neither a run folder"):
        export.export(tmp_path, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine"]


def test_a_format_that_differs_is_not_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        export, "_of_timm", lambda folder: lambda images: np.zeros((len(images), 10), np.float32)
    )
    with pytest.raises(UserError, match="--to timm: its logits differ"):
        export.export(run, tmp_path / "new", ["timm"])
    assert list(tmp_path.iterdir()) == []


def test_an_export_is_written_over_an_older_one(run: Path, tmp_path: Path) -> None:
    told = export.export(run, tmp_path / "out", ["timm"])
    assert told["differences"].keys() == {"timm"}
    assert not (tmp_path / "out" / "model.onnx").exists()
    export.export(run, tmp_path / "out", ["torch"])
    assert (tmp_path / "out" / "model.pt2").exists()


def test_pushing_without_a_network_is_one_line(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"--push me/small: .*the export is in"):
        export.push(exported, "me/small")


def test_predictions_are_the_students_argmax(run: Path, exported: Path, pictures: Path) -> None:
    files, left_out = predict.find([pictures])
    assert len(files) == 11
    assert left_out == [f"{pictures}: 1 files are no pictures by their names, and left out"]
    student = irkd_dist.load(run)
    seen = torch.stack([student.transform(f) for f in files[:10]])
    with torch.no_grad():
        chances = student(seen).softmax(1)
    for source in (run, exported):
        answers = [*predict.predict(predict.open_model(source), files, top=3)]
        assert isinstance(answers[10], str)
        assert "broken.png" in answers[10]
        for i, answer in enumerate(answers[:10]):
            assert isinstance(answer, predict.Prediction)
            best = chances[i].topk(3)
            assert answer.classes == [student.classes[k] for k in best.indices]
            assert answer.probabilities == pytest.approx(best.values.tolist(), abs=1e-5)


def test_the_command_in_each_form(exported: Path, pictures: Path, tmp_path: Path) -> None:
    one = pictures / "03.png"
    text = irkd("predict", str(exported), str(one)).stdout
    assert text.startswith(str(one))
    assert "%" in text
    lines = irkd("predict", str(exported), str(pictures), "--json", check=False)
    assert lines.returncode == 1
    assert len([json.loads(line) for line in lines.stdout.splitlines()]) == 10
    assert "1 of 11 pictures could not be read" in lines.stderr
    rows = [*csv.reader(irkd("predict", str(exported), str(one), "--csv", "--top", "2").stdout.splitlines())]
    assert rows[0] == ["file", "class", "probability", "class2", "probability2"]
    irkd("predict", str(exported), str(one), str(pictures / "04.png"), "--overlay", str(tmp_path / "maps"))
    shown = Image.open(tmp_path / "maps" / "03.png")
    assert shown.size == (448, 224)
    left, right = np.asarray(shown)[:, :224], np.asarray(shown)[:, 224:]
    assert (left != right).any()
    missing = irkd("predict", str(exported), str(tmp_path / "nothing.png"), check=False)
    assert missing.returncode == 2
    assert "nothing.png: no such file" in missing.stderr


def test_no_overlay_takes_anothers_place(
    run: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures of one name in a folder for each class, in more batches than one."""
    monkeypatch.setattr(predict, "BATCH", 2)
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        shutil.copy(pictures / "00.png", tmp_path / name / "0.png")
    files, _ = predict.find([tmp_path / name for name in "abc"])
    assert (
        len([*predict.predict(predict.open_model(run, overlay=True), files, overlay=tmp_path / "maps")]) == 3
    )
    assert len([*(tmp_path / "maps").iterdir()]) == 3


def test_a_checkpoint_that_nobody_tested_has_no_accuracy(run: Path) -> None:
    first, last = sorted((run / "best").iterdir())
    (final,) = (
        f
        for f in (run / "checkpoints").iterdir()
        if f.name == max(f.name for f in (run / "checkpoints").iterdir())
    )
    (done,) = (e for e in read_events(run) if e["event"] == "summary")
    assert export_card.accuracies(run, last) == {"16": done["test_accuracy"]}
    assert export_card.accuracies(run, final) == {"16": done["test_accuracy_last"]}
    assert export_card.accuracies(run, first) == {}, "the last stage's is of another"
    assert export_card.accuracies(run, run / "checkpoints" / "step-00000001") == {}


def test_an_exported_graph_needs_no_torch(exported: Path, pictures: Path) -> None:
    code = (
        "import sys\n"
        "class Nothing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'torchvision', 'timm', 'deepspeed', 'accelerate'):\n"
        "            raise ImportError(f'no {name} here')\n"
        "sys.meta_path.insert(0, Nothing())\n"
        "from irkd_dist.cli import main\n"
        f"sys.exit(main(['predict', {str(exported)!r}, {str(pictures / '00.png')!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "00.png" in done.stdout
