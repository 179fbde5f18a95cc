"""Figures in README and docs/results are those of committed summaries; a figure that none backs is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from irkd_dist import evidence, verify
from irkd_dist.cli import main
from irkd_dist.eventlog import read_events
from tests.training.launch import irkd

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"


def test_every_figure_that_we_publish_is_backed() -> None:
    assert list(verify.verify(RESULTS)) == []
    assert list(verify.verify(ROOT / "README.md")) == []


def test_no_page_names_a_path_of_one_machine() -> None:
    for file in (RESULTS / "summaries").glob("*.json"):
        assert not {
            part for part in file.read_text().split('"') if part.startswith(("/tmp", "/home", "/work"))
        }


@pytest.fixture
def page(tmp_path: Path) -> Path:
    (tmp_path / "summaries").mkdir()
    values = {
        "command": "irkd train a.yaml",
        "accuracy": 0.86714,
        "runs": {"ce": [40.0, 41.0, 45.0]},
        "n": 45000,
    }
    (tmp_path / "summaries" / "a.json").write_text(json.dumps(values))
    (tmp_path / "page.md").write_text(
        "# A page\n\nOn torch 2.14.1 and 32 px:\n86.71<!--= a/accuracy * 100 --> % of 45,000<!--= a/n --> "
        "images, `1.5`.\n\n"
        "| what | mean |\n|---|---|\n| CE 3 | 42.0<!--= mean(a/runs/ce) --> ± 2.65<!--= sd(a/runs/ce) --> |\n\n"
        "<!-- not backed: the output was lost -->\nNot backed: 3.5 times.\n<!-- end of not backed -->\n\n"
        f"<!-- sources -->\n{evidence.source_line(tmp_path / 'summaries', 'a')}\n<!-- end of sources -->\n"
    )
    return tmp_path / "page.md"


def test_a_page_that_is_right(page: Path) -> None:
    assert list(evidence.problems(page)) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("86.71", "86.72", "says 86.72, a/accuracy * 100 is 86.71"),
        ("45,000", "44,000", "says 44,000, a/n is 45,000"),
        ("± 2.65", "± 2.64", "says 2.64, sd(a/runs/ce) is 2.65"),
        ("a/accuracy * 100", "a/acuracy * 100", "which is not there"),
        ("a/accuracy * 100", "b/accuracy", "which is not there"),
        ("a/accuracy * 100", "accuracy", "not of the form"),
        ("`1.5`", "1.5", "1.5 in"),
        ("images, `1.5`", "images, 95 %", "95 in"),
        ("| CE 3 | 42.0", "| CE 3 | 7 and 42.0", "7 in"),
        ("Not backed: 3.5", "It is 3.5", "has to give its reason"),
        ("the output was lost", "", "has to give its reason"),
        ("train a.yaml", "train b.yaml", "lacks in its sources"),
    ],
)
def test_what_is_wrong_is_named(page: Path, old: str, new: str, problem: str) -> None:
    text = page.read_text()
    assert old in text
    page.write_text(text.replace(old, new, 1))
    found = list(verify.verify(page.parent))
    assert any(problem in line for line in found), found
    assert all(line.startswith(str(page)) for line in found)


def test_a_summary_that_was_changed_afterwards(page: Path) -> None:
    file = page.parent / "summaries" / "a.json"
    file.write_text(file.read_text() + "\n")
    missing, foreign = evidence.problems(page)
    assert "lacks in its sources" in missing
    assert "names a source that is none of its" in foreign


def test_a_finished_run_gives_its_summary(student_config: Path, capsys: pytest.CaptureFixture) -> None:
    out = student_config.parent
    assert main(["report", str(out / "none"), "--summary", str(out / "s.json")]) == 2
    irkd("train", str(student_config), "name=run")
    (out / "summaries").mkdir()
    assert main(["report", str(out / "run"), "--summary", str(out / "summaries" / "run.json")]) == 0
    told = json.loads((out / "summaries" / "run.json").read_text())
    (done,) = [e for e in read_events(out / "run") if e["event"] == "summary"]
    assert told["test_accuracy"] == done["test_accuracy"]
    assert told["command"] == "irkd train student.yaml name=run"
    assert (told["epochs"], told["train_images"], told["world"]) == (1, 110, 1)
    assert str(out) not in json.dumps(told)


@pytest.fixture
def student_config(shapes: Path, tmp_path: Path) -> Path:
    file = tmp_path / "student.yaml"
    file.write_text(
        f"data: {{shards: {shapes}, batch: 64}}\nfixed: {{resolution: 8, epochs: 1}}\ntrack: {{panels: 0}}\n"
        f"student: {{options: {{embed_dim: 32, depth: 2, num_heads: 2}}}}\nout: {tmp_path}\n"
    )
    return file
