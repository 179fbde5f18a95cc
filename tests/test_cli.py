"""The README's commands, one after the other, on real images; the demo on fewer shapes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from irkd_dist import __version__, config
from tests.training.launch import irkd

SMALL = ["student.options={embed_dim: 32, depth: 2, num_heads: 2}", "data.batch=64", "precision=fp32"]


def test_the_readmes_commands_on_real_cifar10(cifar_parquet: Path, tmp_path: Path) -> None:
    shards, out = tmp_path / "shards", f"out={tmp_path / 'runs'}"
    irkd(
        "render", "parquet", "--path", str(cifar_parquet), "--out", str(shards), "--resolutions", "12,16",
        "--limit", "300", "--workers", "2",
    )  # fmt: skip
    manifest = json.loads((shards / "manifest.json").read_text())
    assert manifest["splits"] == {"train": 300, "val": 300, "test": 300}
    assert manifest["classes"][0] == "airplane"
    assert (shards / "preview.png").stat().st_size > 10_000

    here = [f"data.shards={shards}", out, *SMALL]
    irkd(
        "train",
        "configs/cifar10/cpu/teacher.yaml",
        *here,
        "data.subset=null",
        "fixed={resolution: 16, epochs: 1}",
    )
    student = irkd(
        "train", "configs/cifar10/cpu/irkd.yaml", *here, "data.subset=200",
        f"teacher.run={tmp_path}/runs/teacher-seed0", "curriculum.epochs=1",
        "curriculum.stages=[{resolution: 12},{resolution: 16}]",
    )  # fmt: skip
    assert "teacher's accuracy (val): 12 px" in student.stdout
    assert "test accuracy at 16 px" in student.stdout
    run = tmp_path / "runs" / "irkd-seed0"
    assert "map correlation" in irkd("evaluate", str(run)).stdout
    page = Path(irkd("report", str(run)).stdout.strip())
    assert page.read_text().startswith("<!doctype html>") or "<html" in page.read_text()[:200]


def test_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from irkd_dist import demo

    monkeypatch.setattr(demo, "SAMPLES", {"train": 150, "test": 50})
    demo.demo(tmp_path / "demo")
    said = capsys.readouterr().out
    assert "gain over the same student without a teacher" in said
    assert "pointing game" in said
    assert (tmp_path / "demo" / "student" / "report.html").exists()


def test_a_study_writes_its_table_and_does_not_train_twice(shapes: Path, tmp_path: Path) -> None:
    experiment = tmp_path / "ce.yaml"
    experiment.write_text(
        f"data: {{shards: {shapes}, batch: 64}}\nstudent: {{options: {{embed_dim: 16, depth: 2, num_heads: 2}}}}\n"
        f"fixed: {{resolution: 8, epochs: 1}}\nout: {tmp_path / 'runs'}\n"
    )
    study = tmp_path / "study.yaml"
    study.write_text(f"title: Small\nexperiments: {{CE: {experiment}}}\nseeds: [0, 1]\n")
    table = tmp_path / "results" / "table.md"
    irkd("study", str(study), "--out", str(table))
    lines = table.read_text().splitlines()
    row = next(line for line in lines if line.startswith("| CE |"))
    assert "| 2 |" in row
    assert "±" in row
    assert sum(line.startswith("| `irkd train") for line in lines) == 2
    events = (tmp_path / "runs" / "ce-seed0" / "events.jsonl").read_text()
    irkd("study", str(study), "--out", str(table))
    assert (
        '"event": "train"' not in (tmp_path / "runs" / "ce-seed0" / "events.jsonl").read_text()[len(events) :]
    )


def test_version_help_and_print_config() -> None:
    assert irkd("--version").stdout.strip() == f"irkd_dist {__version__}"
    assert "resumes" in irkd("train", "--help").stdout
    shown = irkd("train", "configs/cifar10/cpu/kd.yaml", "--print-config", "--optim.lr=1e-3").stdout
    assert "lr: 0.001" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nothing.yaml"], "no configuration file 'nothing.yaml'"),
        (["evaluate", "nothing"], "nothing is neither a run folder"),
        (["report", "nothing"], "nothing"),
        (["study", "nothing.yaml"], "no configuration file"),
        (
            ["render", "folder", "--path", "nothing", "--out", "x", "--resolutions", "12"],
            "--path nothing does not exist",
        ),
        (["render", "synthetic", "--out", "x", "--resolutions", "twelve"], "--resolutions 'twelve'"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(arguments: list[str], message: str) -> None:
    done = subprocess.run([sys.executable, "-m", "irkd_dist", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"a: [", "is not YAML: line 1"), (b"- 1", "input should be"), (b"\xff\xfe\x00", "is not YAML")],
)
def test_a_study_that_cannot_be_read_is_one_line(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "study.yaml").write_bytes(text)
    done = irkd("study", str(tmp_path / "study.yaml"), check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_file_in_the_way_is_one_line(student_run: Path) -> None:
    (student_run / "events.jsonl").mkdir(parents=True)
    done = irkd("train", str(student_run.parent / "a.yaml"), "name=a", check=False)
    assert done.returncode == 2
    assert "Is a directory" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    (kept,) = student_run.glob("crash-*.txt")
    assert f"(the traceback is in {kept})" in done.stderr
    assert "IsADirectoryError" in kept.read_text()


def test_a_bug_is_one_line_and_its_traceback_is_kept(student_run: Path) -> None:
    command = [sys.executable, "-m", "irkd_dist", "train", str(student_run.parent / "a.yaml"), "name=a"]
    environment = {**os.environ, "IRKD_FAULT": "bug@step:0:0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    (kept,) = student_run.glob("crash-*.txt")
    assert done.stderr == (
        f"irkd: error: RuntimeError: a bug on purpose at step:0:0 (the traceback is in {kept})\n"
    )
    assert kept.read_text().startswith(
        " ".join([str(Path(config.__file__).parent / "__main__.py"), *command[3:]])
    )
    assert "Traceback" in kept.read_text()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_terminal_shows_any_name(encoding: str, student_run: Path) -> None:
    name = "ü\u2013\U0001f600[red]x[/b]:smile:"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "irkd_dist", "train", str(student_run.parent / "a.yaml"), f"name={name}"]
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    shown = name.encode(encoding, errors="backslashreplace")
    assert shown in done.stdout.replace(b"\n", b"")
    assert (student_run.parent / name / "config.yaml").is_file()


def test_the_last_override_holds_and_none_is_taken_for_an_option(student_run: Path) -> None:
    file = str(student_run.parent / "a.yaml")
    shown = irkd(
        "train", file, "--optim.lr=1e-3", "--print-config", "optim.lr=2e-3", "--optim.lr=3e-3", "seed=5"
    ).stdout
    assert "lr: 0.003" in shown
    assert "seed: 5" in shown
    done = irkd("train", file, "--print-c", check=False)
    assert done.returncode == 2
    assert "unrecognized arguments: --print-c" in done.stderr


def test_what_loads_no_torch(shapes: Path) -> None:
    """Help, the configuration and its errors, files that are not there: a second of imports is not for them."""
    script = "import sys; from irkd_dist.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    train, missing = (
        ["train", "configs/cifar10/cpu/kd.yaml"],
        ["data.shards=/nowhere", "teacher.run=/nowhere"],
    )
    for arguments, said in (
        ([*train, "--print-config"], ""),
        (["train", "nothing.yaml"], "no configuration file 'nothing.yaml'"),
        ([*train, *missing], "no folder of shards at /nowhere"),
        ([*train, f"data.shards={shapes}", missing[1]], "teacher.run=/nowhere is neither a run folder"),
    ):
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
        assert said in done.stderr
        assert done.stdout.splitlines()[-1] == "False", done.stderr


@pytest.fixture
def student_run(shapes: Path, tmp_path: Path) -> Path:
    """The run folder to be of a configuration beside it."""
    (tmp_path / "a.yaml").write_text(
        f"data: {{shards: {shapes}}}\nfixed: {{resolution: 8, epochs: 1}}\nout: {tmp_path}\n"
    )
    return tmp_path / "a"
