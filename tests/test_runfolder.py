"""What is read of a run folder that was cut short or altered: the rest, and what was left out is named. No torch."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import zlib
from pathlib import Path
from typing import Any

import pytest

from irkd_dist import eventlog, files, runfolder, typed
from irkd_dist.errors import UserError

TRAIN = {
    "event": "train",
    "step": 3,
    "time": 5.0,
    "stage": 0,
    "images_per_s": 9.0,
    "data_wait": 0.1,
    "ce": 2.0,
}


def write(run: Path, *lines: bytes) -> Path:
    (run / "events.jsonl").write_bytes(b"".join(lines))
    return run


def event(**values: Any) -> bytes:
    return typed.checked({"event": "start", "step": 0, "time": 1.0, **values})


def test_every_flipped_bit_of_a_line_is_found(tmp_path: Path) -> None:
    whole = [event(), typed.checked(TRAIN), event(event="stop", step=4)]
    expected = eventlog.read_log(write(tmp_path, *whole)).events
    assert expected[1] == TRAIN  # the checksum is no part of what is read
    line = whole[1]
    for bit in range(8 * len(line)):
        altered = bytearray(line)
        altered[bit // 8] ^= 1 << bit % 8
        log = eventlog.read_log(write(tmp_path, whole[0], bytes(altered), whole[2]))
        at_the_end = bit // 8 == len(line) - 1  # the line break: it and the next line are one
        kept = expected[:1] + (expected[2:] if not at_the_end else [])
        assert log.events == kept, bit
        assert log.left_out, bit


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"event": "train", "st', "no JSON"),
        (b'{"event": "\xe9", "step": 1, "time": 1}', "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"7", "no event"),
        (b'{"step": 1, "time": 1}', "no event"),
        (b'{"event": 3, "step": 1, "time": 1}', "event='3'"),
        (b'{"event": "x", "step": -1, "time": 1}', "step='-1'"),
        (b'{"event": "x", "step": true, "time": 1}', "step='True'"),
        (b'{"event": "x", "step": 1, "time": NaN}', "time='nan'"),
        (b'{"event": "x", "step": 1, "time": "now"}', "time='now'"),
        (b'{"event": "x", "step": 1' + b"0" * 5000 + b', "time": 1}', "no JSON"),
        (b'{"event": "train", "step": 1, "time": 1}', "train without stage"),
        (json.dumps(TRAIN | {"images_per_s": "fast"}).encode(), "images_per_s='fast'"),
        (json.dumps(TRAIN | {"stage": None}).encode(), "stage='None'"),
        (b'{"event": "teacher", "step": 1, "time": 1, "resolutions": [8], "accuracy": [null]}', "accuracy"),
        (b'{"event": "decision", "step": 1, "time": 1, "config": "a", "state": [], "decision": {}}', "state"),
    ],
)  # fmt: skip
def test_a_bad_line_is_left_out_and_named(tmp_path: Path, line: bytes, why: str) -> None:
    log = eventlog.read_log(write(tmp_path, event(), line + b"\n", event(step=1)))
    assert [e["step"] for e in log.events] == [0, 1]
    ((number, told),) = log.left_out
    assert number == 2
    assert told.startswith(why)
    assert "1 line of events.jsonl cut short or altered, and left out: line 2" in log.said()[0]


def test_lines_of_earlier_releases_have_no_checksum_and_are_read(tmp_path: Path) -> None:
    log = eventlog.read_log(
        write(tmp_path, json.dumps(TRAIN).encode() + b"\n", event(event="resume", step=3))
    )
    assert [e["event"] for e in log.events] == ["train", "resume"]
    assert not log.left_out
    assert not log.unchecked


def test_a_checksum_is_that_of_the_line_before_it() -> None:
    line = typed.checked({"event": "stop", "step": 1, "time": 2.0})
    assert line == b'{"event": "stop", "step": 1, "time": 2.0, "crc": "%08x"}\n' % zlib.crc32(
        b'{"event": "stop", "step": 1, "time": 2.0}'
    )


def test_what_was_done_again_counts_once(tmp_path: Path) -> None:
    lines = [
        event(event="start"),
        *(event(event="note", step=s) for s in (1, 2, 3)),
        event(event="resume", step=2),
    ]
    events = eventlog.read_events(write(tmp_path, *lines, event(event="note", step=3, again=True)))
    assert [(e["event"], e["step"]) for e in events] == [
        ("start", 0), ("note", 1), ("note", 2), ("resume", 2), ("note", 3)
    ]  # fmt: skip
    assert events[-1]["again"]


def test_an_appended_line_begins_after_one_that_was_cut(tmp_path: Path) -> None:
    write(tmp_path, event(), b'{"event": "sto')
    with eventlog.open_log(tmp_path / "events.jsonl") as file:
        file.write(event(step=7))
    log = eventlog.read_log(tmp_path)
    assert [e["step"] for e in log.events] == [0, 7]
    assert [n for n, _ in log.left_out] == [2]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '{"state": 3}', '{"state": "asleep"}', '{"step": 3}', '{"state": "running", "step": "x"}',
     '{"state": "running", "time": []}', '{"state": "failed", "reason": 7}', '{"a":' * 100_000, "\xff"],
)  # fmt: skip
def test_a_damaged_status_is_none_and_said(tmp_path: Path, text: str) -> None:
    (tmp_path / "status.json").write_bytes(text.encode("latin1"))
    told, damage = runfolder.read_status(tmp_path)
    assert told == {}
    assert damage.startswith("status.json is damaged: ")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("events.jsonl", "status.json", "owner", "config.yaml"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="it is a FIFO, not a file"):
        eventlog.read_log(tmp_path)
    with pytest.raises(UserError, match="it is a FIFO, not a file"):
        runfolder.read_config(tmp_path)
    with pytest.raises(UserError, match="no plain file"):
        eventlog.open_log(tmp_path / "events.jsonl")
    assert runfolder.read_status(tmp_path) == ({}, "status.json cannot be read: it is a FIFO, not a file")
    assert runfolder.read_word(tmp_path / "owner") == ""


def test_a_whole_file_is_there_or_not(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.json"
    files.write(file, "first \udcff")
    assert file.read_text() == "first \\udcff"
    with contextlib.suppress(RuntimeError), files.whole(file) as out:
        out.write(b"half")
        raise RuntimeError
    assert file.read_text() == "first \\udcff"
    assert os.listdir(file.parent) == ["a.json"]
    (file.parent / "b.tmp").write_text("as a kill leaves it")
    files.write(file.parent / "b", b"whole", mine=True)
    assert sorted(os.listdir(file.parent)) == ["a.json", "b"]
    umask = os.umask(0o027)
    os.umask(umask)
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize(
    ("text", "said"),
    [("a: [", "cannot be read"), ("- 1", "no mapping"), ("a: !!binary aGk=", "cannot be read"), ("a: {", "cannot"),
     ("&a [*a]", "cannot be read")],
)  # fmt: skip
def test_a_configuration_that_is_none_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        runfolder.read_config(tmp_path)


def test_references_in_a_run_folder_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IRKD_SECRET", "s3cr3t")
    (tmp_path / "config.yaml").write_text("name: ${oc.env:IRKD_SECRET}\nlr: 1e-3\n")
    assert runfolder.read_config(tmp_path) == {"name": "${oc.env:IRKD_SECRET}", "lr": 1e-3}


def test_names_say_what_they_mean(tmp_path: Path) -> None:
    assert runfolder.is_best_name(runfolder.best_name(3, 120))
    for name in ("best/../../x", "/best/stage-00-step-00000001", "best/stage-00-step-00000001/..", "best"):
        assert not runfolder.is_best_name(name)
    for name in ("step-99999999", "step-100000000", "step-x", "step-00000001.old", ".writing-step-00000009"):
        (tmp_path / name).mkdir()
    assert [f.name for f in runfolder.steps(tmp_path)] == ["step-100000000", "step-99999999"]


def test_a_roll_back_takes_decisions_back_and_a_restart_does_not(tmp_path: Path) -> None:
    told = [("decision", 4), ("decision", 8), ("resume", 2), ("decision", 12), ("rollback", 8)]
    more = {"time": 1.0, "config": "c", "state": {}, "decision": {}}
    lines = [typed.checked({"event": kind, "step": step, **more}) for kind, step in told]
    (tmp_path / runfolder.EVENTS).write_bytes(b"".join(lines))
    assert list(eventlog.read_decisions(tmp_path, "c")) == [4, 8]
