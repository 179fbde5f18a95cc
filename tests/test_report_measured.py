"""What an evaluation and the ends of epochs add to a report: figures by hand, axe's judgement, several seeds."""

import csv
import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from irkd_dist import eventlog, report
from irkd_dist.report import curves, reading, tables
from irkd_dist.report.words import status
from tests.test_report import EVENTS, SUMMARY, browse, event, row, text_of, write_panels, write_run

# three classes of 10 test images each: (class, answer, how often)
STUDENT = [[0, 0, 9], [0, 1, 1], [1, 1, 5], [1, 2, 5], [2, 2, 7], [2, 0, 3]]
TEACHER = [[0, 0, 8], [0, 2, 2], [1, 1, 9], [1, 2, 1], [2, 2, 10]]
CLASSES = ["cat", "dog & <b>", "ship"]


def _measured(run: Path) -> None:
    rng = np.random.default_rng(0)
    (run / "evaluation").mkdir()
    told = {
        "split": "test", "samples": 30, "checkpoint": "x/best/stage-01-step-00000120",
        "accuracy": {"12": 0.5, "16": 0.7}, "teacher": {"12": 0.6, "16": 0.9}, "stages": {"0": {"12": 0.55, "16": 0.4}},
        "confusion": {"resolution": 16, "classes": CLASSES, "student": STUDENT, "teacher": TEACHER},
    }  # fmt: skip
    (run / "evaluation" / "test-12-16-best.json").write_text(json.dumps(told))
    arrays = {
        "images": rng.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8), "ids": np.array([4, 7, 9]),
        "labels": np.array([1, 2, 0]), "resolution": np.array(16), "worst": np.array([True, True, False]),
        "student_predicted": np.array([2, 0, 1]), "student_confidence": np.array([0.9, 0.8, 0.95]),
        "student_truth": np.array([0.01, 0.02, 0.04]), "teacher_predicted": np.array([1, 2, 2]),
        "teacher_confidence": np.ones(3), "teacher_truth": np.ones(3),
        "student": rng.random((3, 4, 4), np.float32), "teacher": rng.random((3, 4, 4), np.float32),
    }  # fmt: skip
    np.savez_compressed(run / "evaluation" / "test-12-16-best.npz", allow_pickle=False, **arrays)


def _probe(step: int, stage: int, epoch: int, value: float) -> dict[str, Any]:
    norms = {"ce": 2.0, "kd": 1.0, "saliency": value}
    told = {"images": 64, "correlation": value, "mse": 0.1 * value, "pointing": value, "gradients": norms}
    return event("probe", step, 30 + epoch, stage=stage, resolution=(12, 16)[stage], epoch=epoch, **told)


def _rich_events() -> list[dict[str, Any]]:
    flops = [
        event("flops", 0, 5, stage=0, resolution=12, inference=1e6, training=3e6, teacher=10e6),
        event("flops", 0, 5, stage=1, resolution=16, inference=2e6, training=6e6, teacher=20e6),
    ]
    events = []
    for e in EVENTS:
        if e["event"] == "evaluation":
            events.append(e | {"images": 1000, "energy_j": 9000.0})
            events.append(_probe(e["step"], e["stage"], e["epoch"], 0.2 * e["epoch"]))
        elif e["event"] == "train":
            # the first epoch fills the cache, all others find it full
            first = e["step"] <= 40
            events.append(
                e | {"cache_hits": 0 if first else 40, "cache_misses": 40 if first else 0, "cache_wait": 0.01}
            )
        else:
            events.append(e)
    skip = event("skip", 100, 30, ranks=["rank 1 (node-2)"], lr=1e-3, in_a_row=1)
    return [*events[:3], *flops, *events[3:10], skip, *events[10:]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs") / "irkd-seed0", [*_rich_events(), SUMMARY])
    write_panels(folder)
    _measured(folder)
    return folder


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return report.write([run], price=36.0).read_text()


def _csv(run: Path, name: str) -> list[list[str]]:
    with (run / "figures" / f"{name}.csv").open(newline="") as file:
        return [*csv.reader(file)]


def test_epochs_that_were_not_judged_count_and_waits_weigh_by_their_time(tmp_path: Path) -> None:
    own = [e for e in EVENTS if e["event"] != "summary"]
    judged = [e for e in own if e["event"] == "evaluation"]
    last = {e["stage"]: e for e in judged}
    skips = [
        {**e, "event": "epoch", "accuracy": None}
        if e["event"] == "evaluation" and e is not last[e["stage"]]
        else e
        for e in own
    ]
    seen = reading.read(write_run(tmp_path / "every-seed0", skips))
    for i in last:
        count = len([e for e in judged if e["stage"] == i])
        assert tables.stages(seen)["rows"][i][1].startswith(f"{count} / ")
    assert {label: remark for label, _, remark in tables.tiles(seen)}["Time"].startswith(
        f"{len(judged)} epochs"
    )
    assert curves.epoch_spans(seen)[0][0] == judged[0]["epoch"] - 0.5
    steps = [
        {"step": 10, "images_per_s": 1000.0, "data_wait": 0.5, "seconds": 1.0},
        {"step": 20, "images_per_s": 1000.0, "data_wait": 0.0, "seconds": 9.0},  # of nine times the batch
    ]
    assert reading.wait_share(steps) == pytest.approx(0.05)


def test_a_run_that_was_extended_is_not_finished_until_it_ends_again(tmp_path: Path) -> None:
    step = SUMMARY["step"]
    again = [event("resume", step, 500), event("extend", step, 501, changed=["fixed.epochs: 1 -> 2"])]
    rich = [*EVENTS, SUMMARY, *again]
    assert any(e["event"] == "summary" for e in eventlog.settled(rich)), "nothing was trained yet"
    train = {**next(e for e in EVENTS if e["event"] == "train"), "step": step + 1}
    assert not any(e["event"] == "summary" for e in eventlog.settled([*rich, train]))
    done = [
        e for e in eventlog.settled([*rich, train, {**SUMMARY, "step": step + 1}]) if e["event"] == "summary"
    ]
    assert [e["step"] for e in done] == [step + 1]
    seen = reading.read(write_run(tmp_path / "more-seed0", [*rich, train]))
    assert status(seen).startswith("unfinished")


def test_classes_confusion_and_matrix_are_those_of_the_evaluation(run: Path, html: str) -> None:
    found = {name: (float(s), float(t), int(n)) for name, s, t, n in _csv(run, "classes")[1:]}
    assert found == {"cat": (0.9, 0.8, 10), CLASSES[1]: (0.5, 0.9, 10), "ship": (0.7, 1.0, 10)}
    assert [CLASSES[1], "ship", "5"] in _csv(run, "confusion")
    assert _csv(run, "matrix") == [
        ["network", "12 px", "16 px"], ["teacher", "0.6", "0.9"], ["stage 1, 12 px", "0.55", "0.4"],
        ["stage 2, 16 px", "0.5", "0.7"],
    ]  # fmt: skip
    assert row(html, "dog &amp; &lt;b&gt;", "answers") == ["dog &amp; &lt;b&gt;", "ship", "5", "1"]
    text = text_of(html)
    assert "from dog &amp; &lt;b&gt; 50.0% (teacher 90.0%) to cat 90.0% (teacher 80.0%)" in text
    assert "3 images that the student judges wrong, with teacher and student maps" in text


def test_operations_are_those_of_the_images_that_each_stage_saw(run: Path) -> None:
    # 1000 images an epoch; the teacher is asked in the first only
    spent = [n for _, n in reading.spent_flops(reading.read(run))]
    assert spent == [13e9, 16e9, 22e9, 28e9]


def test_cost_is_time_operations_energy_and_money(html: str) -> None:
    assert row(html, "operations", "cost")[1] == "28 gigaFLOPs"
    assert row(html, "energy", "cost")[1] == "0.01 kWh"  # 4 epochs of 9 kJ
    assert row(html, "money", "cost")[1] == "0.61"  # 61 s at 36 an hour


def test_what_happened_is_told_with_its_policy(html: str) -> None:
    told = text_of(html.split('<section id="happened">')[1].split("</section>")[0])
    for words in (
        "transition 2 epochs done; next 16 px; optimizer: moments reset, schedule begun again (reset)",
        "step skipped not finite: rank 1 (node-2); 1 in a row", "resumed 2 processes on cpu", "finished 160 steps",
    ):  # fmt: skip
        assert words in told, words


def test_gradients_are_drawn_with_their_weights_and_agreement_over_epochs(run: Path, html: str) -> None:
    rows = _csv(run, "gradients")
    assert rows[0][2:] == ["ce", "kd", "saliency", "weight of ce", "weight of kd", "weight of saliency"]
    assert [float(v) for v in rows[1][2:]] == pytest.approx([2.0, 1.0, 0.2, 1.0, 0.9, 0.8])
    assert "at the end cross-entropy 2, distillation 0.9, saliency 0.64" in html
    assert [float(r[2]) for r in _csv(run, "agreement")[1:]] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert "80.0% of 240 in all" not in html
    hits = [int(r[1]) for r in _csv(run, "cache")[1:]]
    assert sum(hits) / (sum(hits) + 80) == pytest.approx(0.6)
    assert "60.0% of 200 in all" in text_of(html)


def test_seeds_are_grouped_and_deviations_are_named(tmp_path: Path) -> None:
    values, rates = (0.50, 0.53, 0.56), (1e-3, 1e-3, 1e-3)
    runs = [
        write_run(
            tmp_path / f"a-seed{i}", [*EVENTS, SUMMARY | {"test_accuracy": v}], seed=i, optim={"lr": lr}
        )
        for i, (v, lr) in enumerate(zip(values, rates, strict=True))
    ]
    runs.append(write_run(tmp_path / "b-seed0", [*EVENTS, SUMMARY], optim={"lr": 5e-4}))
    html = report.write(runs).read_text()
    half = 4.302653 * np.std([50, 53, 56], ddof=1) / math.sqrt(3)
    assert row(html, "a", "runs")[:3] == ["a", "0, 1, 2", f"53.00 ± {half:.2f}"]
    assert row(html, "optim.lr", "deviations") == ["optim.lr", "0.001", "0.001", "0.001", "0.0005"]
    rows = html.split('<section id="deviations">')[1].split("</section>")[0]
    assert rows.count("<tr>") == 2  # the head, and what differs; the seed is none
    assert (tmp_path / "figures" / "over-epochs.svg").is_file()
    assert "mean over seeds" in html


def test_a_group_of_more_than_seeds_says_so(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / f"a-seed{i}", EVENTS, seed=i, optim={"lr": 1e-3 * (i + 1)}) for i in range(2)
    ]
    assert row(report.write(runs).read_text(), "a", "runs")[-1] == "optim.lr"


def test_damaged_pictures_of_wrong_answers_are_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "irkd-seed0", [*EVENTS, SUMMARY])
    _measured(folder)
    (folder / "evaluation" / "test-12-16-best.npz").write_bytes(b"PK\x03\x04 cut short")
    text = text_of(report.write([folder]).read_text())
    assert "The pictures of wrong answers cannot be read: test-12-16-best.npz" in text
    assert "50.0% (teacher 90.0%)" in text


def test_a_page_with_as_many_pictures_as_there_may_be_is_under_three_megabytes(tmp_path: Path) -> None:
    folder, rng = write_run(tmp_path / "irkd-seed0", [*EVENTS, SUMMARY]), np.random.default_rng(0)
    (folder / "panels").mkdir()
    noise = {
        "images": rng.integers(0, 256, (8, 112, 112, 3), dtype=np.uint8), "labels": np.arange(8),
        "ids": np.arange(8), "resolution": np.array(112),
        "student": rng.random((8, 28, 28), np.float32), "teacher": rng.random((8, 28, 28), np.float32),
    }  # fmt: skip
    for epoch in range(6):
        for stage in range(2):
            file = folder / "panels" / f"stage-{stage:02d}-epoch-{epoch:03d}.npz"
            np.savez(file, allow_pickle=False, **noise)
    _measured(folder)
    assert 1_000_000 < len(report.write([folder]).read_bytes()) < 3_000_000


AXE = """<script>{source}</script><script>addEventListener("load", () => axe.run({options}).then(found => {
  document.body.dataset.axe = JSON.stringify({bad: found.violations.map(v => [v.id, v.impact,
    v.nodes.slice(0, 3).map(n => n.html.slice(0, 120) + " " + n.failureSummary)]),
    passes: found.passes.map(p => p.id)});
}))</script>"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("several", [False, True], ids=["one run", "several"])
def test_axe_finds_nothing_to_complain_about(
    run: Path, html: str, chromium: str, tmp_path: Path, dark: bool, several: bool
) -> None:
    spec = importlib.util.find_spec("axe_playwright_python")
    if spec is None or spec.origin is None:
        pytest.skip("no axe-core: pip install axe-playwright-python")
    source = (Path(spec.origin).parent / "axe.min.js").read_text()
    if several:
        other = write_run(tmp_path / "other-seed0", [*EVENTS], optim={"lr": 0.5})
        html = report.write([run, other], tmp_path / "both.html").read_text()
    script = AXE.replace("{source}", source).replace("{options}", "{resultTypes: ['violations', 'passes']}")
    options = ["--virtual-time-budget=30000", *(["--blink-settings=preferredColorScheme=0"] if dark else [])]
    width = 500 if dark else 1100
    dom, _ = browse(chromium, html.replace("</body>", script + "</body>"), tmp_path, width, *options)
    found = re.search(r'data-axe="([^"]*)"', dom)
    assert found is not None, "axe has not run"
    told = json.loads(
        found[1].replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    )
    assert told["bad"] == []
    assert {"color-contrast", "image-alt", "heading-order", "region"} <= {*told["passes"]}
    assert len(html) < 3_000_000
