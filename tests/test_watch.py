"""`irkd watch` and `irkd report --live` as processes: a real terminal, real folders that change under their eyes."""

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from irkd_dist import watch
from irkd_dist.errors import UserError
from tests.test_report import EVENTS, SUMMARY, write_run


def _now(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events as if the last one had just been written."""
    late = time.time() - events[-1]["time"]
    timed = {"seconds": 2.0}  # of the steps of a line
    return [e | {"time": e["time"] + late} | (timed if e["event"] == "train" else {}) for e in events]


def _append(run: Path, event: dict[str, Any]) -> None:
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps(event | {"time": time.time()}) + "\n")


def _read_until(terminal: int, words: str, seconds: float = 60.0) -> str:
    text, end = "", time.monotonic() + seconds
    while words not in text and time.monotonic() < end:
        ready, _, _ = select.select([terminal], [], [], 0.5)
        try:
            text += os.read(terminal, 65536).decode("utf-8", "replace") if ready else ""
        except OSError:  # the other end is closed
            break
    assert words in text, text
    return text


@pytest.mark.parametrize(("key", "code"), [(b"q", 0), (b"\x03", 130)], ids=["q", "Ctrl-C"])
def test_a_terminal_shows_runs_until_a_key_is_pressed(tmp_path: Path, key: bytes, code: int) -> None:
    run = write_run(tmp_path / "irkd-seed0", _now(EVENTS[:8]))
    outer, inner = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120", "LINES": "50"}
    command = [sys.executable, "-m", "irkd_dist", "watch", str(run), "--every", "0.2"]

    def controlling() -> None:
        import fcntl
        import termios

        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        command, stdin=inner, stdout=inner, stderr=inner, env=environment, preexec_fn=controlling
    )
    os.close(inner)
    try:
        shown = _read_until(outer, "evaluated: epoch 2: 40.21% (val)")
        for words in ("irkd-seed0", "running", "step 80 of 160", "1 of 2: 12 px", "ce 1.800", "900 images/s"):
            assert words in shown, words
        os.write(outer, key)
        assert "Traceback" not in _read_until(outer, "irkd watch: 1 of 1 runs go on")
        assert process.wait(20) == code
    finally:
        process.kill()
        os.close(outer)


def test_off_a_terminal_each_change_is_a_line_until_no_run_goes_on(tmp_path: Path) -> None:
    run = write_run(tmp_path / "irkd-seed0", _now(EVENTS[:8]))
    write_run(tmp_path / "done-seed0", [*EVENTS, SUMMARY])
    command = [sys.executable, "-m", "irkd_dist", "watch", str(tmp_path), "--every", "0.2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    first = [process.stdout.readline() for _ in range(2)]
    assert first[0].startswith("done-seed0: finished")
    assert first[1].startswith("irkd-seed0: running, stage 1 of 2, 12 px, step 80 of 160, total 3.200")
    _append(run, EVENTS[9])
    assert "stage 2 of 2, 16 px" in process.stdout.readline()
    _append(run, SUMMARY)
    rest, _ = process.communicate(timeout=30)
    assert "irkd-seed0: finished" in rest
    assert rest.endswith("irkd watch: no run goes on\n")
    assert process.returncode == 0


def test_watching_needs_neither_torch_nor_numpy() -> None:
    code = "import sys; from irkd_dist import watch; assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is no run folder: it has no config\.yaml"):
        watch.watch([tmp_path / "nowhere"], once=True)
    with pytest.raises(UserError, match="no run folder, and none in it"):
        watch.watch([tmp_path], once=True)
    run = write_run(tmp_path / "irkd-seed0", [])
    (run / "events.jsonl").unlink()
    assert "it has no events.jsonl" in watch.line(run)


def test_a_live_report_reloads_itself_until_the_run_is_over(tmp_path: Path) -> None:
    run = write_run(tmp_path / "irkd-seed0", _now(EVENTS[:3]))
    command = [sys.executable, "-m", "irkd_dist", "report", str(run), "--live", "--every", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "report.html" in process.stdout.readline()
    page = run / "report.html"
    assert '<meta http-equiv="refresh" content="1">' in page.read_text()
    _append(run, SUMMARY)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0, rest
    text = page.read_text()
    assert "finished" in text
    assert "http-equiv" not in text
