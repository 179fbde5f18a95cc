"""The report of runs written by hand: its words and numbers, and the page as a real browser shows it."""

import io
import json
import re
import subprocess
from base64 import b64decode
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from irkd_dist import config as configuration
from irkd_dist import report
from irkd_dist.errors import UserError

SECTIONS = ["overview", "stages", "accuracy", "resolutions", "losses", "teacher", "saliency", "evaluation"]
# what a reader's browser knows of the page, appended to a copy of it: the page itself has no script
PROBE = """<script>addEventListener("load", () => {
  const images = [...document.images].map(i => [i.naturalWidth, i.naturalHeight, i.clientWidth, i.alt.length]);
  const overflow = document.documentElement.scrollWidth - innerWidth;
  document.body.dataset.probe = JSON.stringify({images, overflow, width: innerWidth});
})</script>"""


def event(kind: str, step: int, time: float, **values: Any) -> dict[str, Any]:
    return {"event": kind, "step": step, "time": 1_800_000_000 + time, **values}


def _train(step: int, time: float, stage: int, rate: float, wait: float, **terms: float) -> dict[str, Any]:
    rates = {"images_per_s": rate, "data_wait": wait, "lr": 3e-4}
    return event("train", step, time, stage=stage, accuracy=0.3, **terms, **rates)


def _evaluation(
    step: int, time: float, stage: int, epoch: int, accuracy: float, split: str = "val"
) -> dict[str, Any]:
    place = {"stage": stage, "resolution": (12, 16)[stage], "epoch": epoch, "stage_epoch": epoch - 2 * stage}
    values = {"accuracy": accuracy, "train_accuracy": accuracy + 0.05, "split": split, "best": True}
    return event("evaluation", step, time, **place, **values)


def start(kind: str, step: int, time: float) -> dict[str, Any]:
    where = {"world": 2, "device": "cpu", "precision": "bf16", "torch": "2.9.1"}
    return event(kind, step, time, **where, skipped=[], notes=["taps (student | teacher): a | b"])


def _stage(step: int, time: float, stage: int) -> dict[str, Any]:
    weights = {"alpha": 0.9, "gamma": 0.8, "policy": "reset"}
    place = {"stage": stage, "resolution": (12, 16)[stage], "epochs": 2, "steps_per_epoch": 40}
    return event("stage", step, time, **place, **weights)


# two stages of two epochs; stopped for 1000 s in the second, and its third epoch evaluated twice
EVENTS = [
    start("start", 0, 0),
    event("teacher", 0, 5, resolutions=[12, 16], accuracy=[0.61, 0.72], competence=[0.8, 1.0]),
    _stage(0, 6, 0),
    _train(20, 10, 0, 800.0, 0.01, total=4.0, ce=2.2, kd=2.0, saliency=0.05, flat_maps=0.0),
    _train(40, 14, 0, 1000.0, 0.03, total=3.6, ce=2.0, kd=1.8, saliency=0.04, flat_maps=0.5),
    _evaluation(40, 15, 0, 1, 0.31),
    _train(80, 22, 0, 900.0, 0.02, total=3.2, ce=1.8, kd=1.6, saliency=0.03, flat_maps=0.0),
    _evaluation(80, 23, 0, 2, 0.4021),
    event("transition", 80, 23, stage=0, to=1, resolution=16, reason="2 epochs done", policy="reset"),
    _stage(80, 24, 1),
    _train(120, 40, 1, 400.0, 0.01, total=2.8, ce=1.6, kd=1.4, saliency=0.03, flat_maps=0.0),
    _evaluation(120, 41, 1, 3, 0.5),
    start("resume", 120, 1041),
    _stage(120, 1042, 1),
    _evaluation(120, 1043, 1, 3, 0.5213),
    _train(160, 1060, 1, 420.0, 0.01, total=2.6, ce=1.5, kd=1.3, saliency=0.02, flat_maps=0.0),
    _evaluation(160, 1061, 1, 4, 0.5102),
]  # fmt: skip
SUMMARY = event(
    "summary", 160, 1065, resolution=16, test_accuracy=0.5177, test_accuracy_last=0.5099, seconds=61.0,
    val_accuracy=0.5213, steps=160, run="runs/x",
)  # fmt: skip


def write_run(folder: Path, events: list[dict[str, Any]], **changes: Any) -> Path:
    tree: dict[str, Any] = {
        "name": folder.name,
        "data": {"shards": "shards/<none>"},
        "teacher": {"run": "runs/teacher-seed0"},
        "loss": {"kd": {"alpha": 1.0}, "saliency": {"gamma": 0.8}},
        "curriculum": {"stages": [{"resolution": 12}, {"resolution": 16}], "epochs": 2},
    }
    config = configuration.from_dict(tree | changes, "test")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(configuration.to_yaml(config))
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    return folder


def write_panels(run: Path) -> None:
    rng = np.random.default_rng(0)
    (run / "panels").mkdir()
    for stage, size in enumerate((12, 16)):
        for epoch in (1, 2):
            grid = (3, size // 4, size // 4)
            np.savez_compressed(
                run / "panels" / f"stage-{stage:02d}-epoch-{epoch:03d}.npz",
                images=rng.integers(0, 256, (3, size, size, 3), dtype=np.uint8),
                labels=np.array([1, 0, 1]),
                ids=np.arange(3),
                resolution=np.array(size),
                student=rng.random(grid, dtype=np.float32),
                teacher=np.zeros(grid, np.float32),
            )


@dataclass
class Page:
    """A written page, and what a browser made of it."""

    run: Path
    html: str
    text: str


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    run = write_run(tmp_path_factory.mktemp("runs") / "irkd-seed0", [*EVENTS, SUMMARY])
    write_panels(run)
    state = run / "checkpoints" / "step-00000160"
    state.mkdir(parents=True)
    kept = {"version": 1, "classes": ["cat & <b>dog</b>", "$ship_1$"], "package_version": "0.0.9"}
    (state / "state.json").write_text(json.dumps(kept))
    measured = {
        "split": "test",
        "accuracy": {"12": 0.43, "16": 0.5177, "24": 0.47},
        "agreement": {"16": {"mse": 0.0312, "correlation": 0.671}, "12": {"mse": 0.04, "correlation": None}},
        "pointing": {"16": 0.712},
    }
    (run / "evaluation.json").write_text(json.dumps(measured))
    written = report.write([run], None)
    assert written == run / "report.html"
    html = written.read_text()
    return Page(run, html, text_of(html))


def text_of(html: str) -> str:
    """The visible words of a page, and the alternatives of its pictures."""
    html = re.sub(r"(?s)<style>.*?</style>", " ", html)
    alternatives = " ".join(re.findall(r'alt="([^"]*)"', html))
    return " ".join((re.sub(r"<[^>]*>", " ", html) + alternatives).split())


def row(page: str, first: str, section: str) -> list[str]:
    part = page.split(f'<section id="{section}">')[1].split("</section>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", part)
    cells = [[re.sub("<[^>]*>", "", c) for c in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]
    return next(row for row in cells if row[0] == first)


def test_tables_hold_what_the_events_say(page: Page) -> None:
    # waiting, stage 0: (20 x 0.01 / 800 + 20 x 0.03 / 1000 + 40 x 0.02 / 900) / (20/800 + 20/1000 + 40/900) = 1.9 %
    assert row(page.html, "12 px", "stages") == [
        "12 px", "2 / 2", "45.21%", "40.21%", "40.21%", "900", "1.9%", "18 s", "2 epochs done",
    ]  # fmt: skip
    # 24 to 40 s and 1041 to 1061 s: neither the stop nor the evaluation that was done again is counted
    assert row(page.html, "16 px", "stages") == [
        "16 px", "2 / 2", "56.02%", "52.13%", "51.02%", "410", "1.0%", "36 s", "2 epochs done",
    ]  # fmt: skip
    assert row(page.html, "12 px", "teacher") == ["12 px", "61.00%", "−20.79", "0.9", "0.8"]  # noqa: RUF001
    assert row(page.html, "12 px", "evaluation") == ["12 px", "43.00%", "0.0400", "", ""]
    assert row(page.html, "16 px", "evaluation") == ["16 px", "51.77%", "0.0312", "0.671", "71.20%"]


def test_header_says_what_was_run(page: Page) -> None:
    for words in (
        "CE + KD + CL + saliency", "finished", "51.77%", "last 50.99%", "1 min 01 s", "4 epochs, 160 steps",
        "custom, patch 4, distillation token", "runs/teacher-seed0", "CE + 1 KD (soft, T = 4) + 0.8 saliency",
        "gradient maps at taps first, second, last", "12 → 16 px, 2 epochs each", "at a new stage: reset",
        "2 processes on cpu, bf16", "irkd_dist 0.0.9, torch 2.9.1", "2027-01-15 08:00 UTC, resumed 1 time",
        "taps (student | teacher): a | b", "Maps without a shape, which count as zero: up to 0.5 a step",
    ):  # fmt: skip
        assert words in page.text, words
    assert "cat &amp; &lt;b&gt;dog" in page.html  # class names are text, wherever they come from
    assert "<b>dog" not in page.html


def test_page_needs_nothing_from_elsewhere(page: Page) -> None:
    links = re.findall(r'(?:src|srcset|href|action)="([^"]*)"', page.html)
    assert len(links) > 10
    assert all(link.startswith(("data:image/", "#")) for link in links)
    bare = re.sub(r'"data:image/[^"]*"', '""', page.html)
    for forbidden in ("http:", "https:", "//", "<script", "<link", "<iframe", "@import", "url("):
        assert forbidden not in bare, forbidden
    assert len(page.html) < 2_500_000


def test_figures_are_kept_beside_the_page(page: Page) -> None:
    names = {f.name for f in (page.run / "figures").iterdir()}
    drawn = {"accuracy", "cost", "resolutions", "losses", "pace", "teacher", "evaluation"}
    pictures = {f"{name}.{end}" for name in drawn for end in ("png", "svg", "csv")}
    told = {f"table-{name}.csv" for name in ("stages", "cost", "happened")}
    assert names == pictures | told | {"saliency.png"}
    for name in [n for n in names if n.endswith("png")]:
        with Image.open(page.run / "figures" / name) as image:
            assert image.width >= 800
            assert np.asarray(image.convert("L")).std() > 2, f"{name} is blank"


def browse(chromium: str, html: str, folder: Path, width: int, *options: str) -> tuple[str, Image.Image]:
    """The document as the browser has it after loading, and a picture of it."""
    file, shot = folder / "page.html", folder / "shot.png"
    file.write_text(html.replace("</body>", PROBE + "</body>"))
    quiet = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
    quiet += " --disable-component-update --disable-sync --hide-scrollbars"
    command = [chromium, *quiet.split(), f"--user-data-dir={folder / 'profile'}", *options]
    command += [f"--screenshot={shot}", f"--window-size={width},2000", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, Image.open(shot).convert("RGB")


@pytest.mark.parametrize(
    ("width", "options", "page_color", "first_figure"),
    [
        (1100, [], (246, 247, 249), (1820, 680)),
        (500, ["--blink-settings=preferredColorScheme=0"], (13, 17, 23), (700, 580)),
    ],
    ids=["desktop-light", "phone-dark"],
)
def test_a_browser_shows_all_of_it(
    page: Page, chromium: str, tmp_path: Path, width: int, options: list[str],
    page_color: tuple[int, int, int], first_figure: tuple[int, int],
) -> None:  # fmt: skip
    dom, shot = browse(chromium, page.html, tmp_path, width, *options)
    for section in SECTIONS:
        assert f'id="{section}"' in dom
    found = re.search(r'data-probe="([^"]*)"', dom)
    assert found is not None
    probe = json.loads(found[1].replace("&quot;", '"'))
    assert probe["width"] == width
    assert probe["overflow"] <= 0, "the page scrolls sideways"
    assert len(probe["images"]) == 8
    assert all(natural > 0 and shown > 200 and alt > 20 for natural, _, shown, alt in probe["images"])
    assert tuple(probe["images"][0][:2]) == first_figure  # phones get figures of their own
    assert shot.getpixel((2, 2)) == page_color
    colors = shot.getcolors(1 << 24)
    assert colors is not None
    assert len(colors) > 200, "the picture is blank"


def test_a_poor_run_has_a_page_that_says_so(tmp_path: Path) -> None:
    events = [e | {"split": "test"} if e["event"] == "evaluation" else e for e in EVENTS[2:6]]
    events = [
        {k: v for k, v in e.items() if k not in ("kd", "saliency", "flat_maps")} for e in [EVENTS[0], *events]
    ]
    off = {"kd": {"alpha": 0.0}, "saliency": {"gamma": 0.0}}
    run = write_run(tmp_path / "ce-seed1", events, teacher=None, loss=off)
    with (run / "events.jsonl").open("a") as file:
        file.write('{"event": "train", "st')
    (run / "evaluation.json").write_text('{"accuracy": {"12": "high"}}')
    (run / "panels").mkdir()
    (run / "panels" / "stage-00-epoch-001.npz").write_bytes(b"PK\x03\x04 cut short")
    text = text_of(report.write([run], tmp_path / "elsewhere" / "page.html").read_text())
    for words in (
        "unfinished: at step 40, in stage 1 of 2", "This run is not finished", "only one epoch",
        "1 line of events.jsonl cut short", "This run has no teacher.", "The saliency panels cannot be read",
        "evaluation.json is not what irkd evaluate writes", "There is no validation split",
        "all epochs so far were at one resolution", "Not evaluated yet", "not reached", "irkd_dist unknown",
    ):  # fmt: skip
        assert words in text, words
    assert (run / "figures" / "accuracy.png").is_file()
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("count", [0, 1, 3], ids=["no events", "only the start", "before the first step"])
def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path, count: int) -> None:
    run = write_run(tmp_path / "irkd-seed2", EVENTS[:count])
    text = text_of(report.write([run]).read_text())
    assert "No epoch has been completed yet" in text
    assert "No training step has been logged yet" in text
    assert ("not started" in text) == (count == 0)
    assert ("accuracy has not been measured" in text) == (count < 3)


def test_several_runs_share_one_page(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a" / "irkd-seed0", [*EVENTS, SUMMARY])
    second = write_run(tmp_path / "a" / "irkd-seed1", EVENTS)
    same_name = write_run(tmp_path / "b" / "irkd-seed1", [*EVENTS[:8], SUMMARY | {"test_accuracy": 0.9}])
    written = report.write([first, second, same_name, first])
    assert written == tmp_path / "report.html"
    html = written.read_text()
    assert "3 runs compared" in html
    tail = ["CE + KD + CL + saliency", "custom / 4", "12 to 16 px", "2"]
    assert row(html, "irkd-seed0", "runs") == [
        "irkd-seed0", "51.77%", "52.13%", *tail, "4", "160", "1 min 01 s"
    ]  # fmt: skip
    cells = [str(second), "unfinished", "52.13%", *tail, "4", "160", "1 min 00 s"]
    assert row(html, str(second), "runs") == cells
    assert row(html, str(same_name), "runs")[1:3] == ["90.00%", "40.21%"]
    assert '<td class="top">90.00%' in html
    assert html.count("<picture>") == 2  # operations were not counted
    assert "last values: irkd-seed0 51.0%" in text_of(html)
    assert html.count("<details>") == 3


def test_maps_are_laid_over_their_images() -> None:
    image = np.full((16, 16, 3), 128, np.uint8)
    hot = np.zeros((4, 4), np.float32)
    hot[0, 3] = 2.0
    shown = report.overlay(image, hot, side=32).astype(int).sum(-1)
    assert np.unravel_index(shown.argmax(), shown.shape)[0] < 8
    assert np.unravel_index(shown.argmax(), shown.shape)[1] >= 24
    flat = report.overlay(image, np.full((4, 4), 0.3, np.float32), side=32)
    assert (flat == flat[0, 0]).all()


def test_dark_figures_are_drawn_dark(page: Page) -> None:
    source = re.search(
        r'<source media="screen and \(prefers-color-scheme: dark\)" srcset="data:image/png;base64,([^"]*)"',
        page.html,
    )
    assert source is not None
    image = Image.open(io.BytesIO(b64decode(source[1]))).convert("RGB")
    assert image.getpixel((0, 0)) == (0x16, 0x1B, 0x22)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is no run folder: there is no such folder"):
        report.write([tmp_path / "nowhere"])
    with pytest.raises(UserError, match=r"is no run folder: it has no config\.yaml"):
        report.write([tmp_path])
    run = write_run(tmp_path / "irkd-seed3", [])
    (run / "events.jsonl").unlink()
    with pytest.raises(UserError, match=r"irkd-seed3 is no run folder: it has no events\.jsonl"):
        report.write([run])
    with pytest.raises(UserError, match="no run to report"):
        report.write([])
    (run / "events.jsonl").write_text("")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*page\.html"):
        report.write([run], tmp_path / "file" / "page.html")


def test_a_stage_ends_for_the_reason_that_its_decision_gave(tmp_path: Path) -> None:
    def decision(step: int, action: str, reason: str) -> dict[str, Any]:
        return event("decision", step, 0, config="c", state={}, decision={"action": action, "reason": reason})

    moved = [decision(80, "advance", "its 3 minutes are spent"), decision(120, "continue", "")]
    events = [
        *EVENTS[:8],
        moved[0],
        *EVENTS[9:],
        decision(160, "finish", "validation accuracy 0.51 reached"),
        SUMMARY,
    ]
    html = report.write([write_run(tmp_path / "irkd-seed0", events)]).read_text()
    assert row(html, "12 px", "stages")[-1] == "its 3 minutes are spent"
    assert row(html, "16 px", "stages")[-1] == "validation accuracy 0.51 reached"


def test_accuracies_have_intervals_where_the_images_are_counted(tmp_path: Path) -> None:
    start = EVENTS[0] | {"images": {"train": 900, "val": 100, "test": 400}, "parameters": 500_000,
                         "teacher_parameters": 5_000_000, "command": "irkd train x.yaml name='a b'",
                         "commit": "abc123+"}  # fmt: skip
    run = write_run(tmp_path / "irkd-seed0", [start, *EVENTS[1:], SUMMARY])
    (run / "evaluation").mkdir()
    measured = {"split": "test", "checkpoint": "runs/x/best/stage-01-step-00000120", "samples": 400,
                "accuracy": {"16": 0.5}, "images_per_s": {"16": {"student": 1234.0, "teacher": 99.0}}}  # fmt: skip
    (run / "evaluation" / "test-16-best.json").write_text(json.dumps(measured))
    text = text_of(report.write([run]).read_text())
    # Wilson's interval of 200 of 400, and of 0.5177 of 400, from the formula by hand
    assert "50.00% 45.1 to 54.9" in text
    assert "95 %: 46.9 to 56.6" in text
    for words in ("0.5 M; the teacher", "10 times as many", "900 train, 100 val, 400 test", "commit abc123+",
                  "student 1,234 images/s, teacher 99 images/s", "irkd train x.yaml name=",
                  "test split, stage-01-step-00000120, 400 images"):  # fmt: skip
        assert words in text, words


@pytest.mark.filterwarnings("error")
def test_names_that_figures_cannot_draw_stand_in_the_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "$a_1$[red]", [*EVENTS, SUMMARY])
    write_panels(run)
    state = run / "checkpoints" / "step-00000160"
    state.mkdir(parents=True)
    names = ["$5^$ <b>", "\U0001f9ff\udcff" + "\u4e2d" * 40]
    (state / "state.json").write_text(json.dumps({"version": 1, "classes": names}))
    html = report.write([run]).read_text()
    assert "Class 1 is " in html
    assert "\u4e2d" * 40 in html
    assert "$5^$ &lt;b&gt;" in html
    assert "<h1>$a_1$[red]</h1>" in html


def test_panels_of_other_images_are_left_out_and_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "irkd-seed0", [*EVENTS, SUMMARY])
    write_panels(run)
    file = run / "panels" / "stage-00-epoch-001.npz"
    with np.load(file) as arrays:
        changed = dict(arrays) | {"ids": np.array([7, 8, 9]), "labels": np.array([0, 0, 0])}
    np.savez_compressed(file, allow_pickle=False, **changed)
    assert "Left out: 1 of other images" in report.write([run]).read_text()


def test_axes_do_not_fill_themselves_with_noise() -> None:
    from matplotlib.figure import Figure

    from irkd_dist.report import figures

    axes = Figure().subplots()
    axes.plot([0, 1], [97.1, 97.3])
    figures.widen(axes, 10, 0, 100)
    assert axes.get_ylim() == pytest.approx((90, 100), abs=2.9)
    low, high = axes.get_ylim()
    assert high - low == pytest.approx(10)
    assert high <= 100
