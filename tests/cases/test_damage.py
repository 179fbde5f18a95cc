"""Shards and run folders that were damaged, by chance or on purpose: named, gone around, or refused; never believed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from irkd_dist.eventlog import read_events
from tests.cases.command import Done, Process, irkd, irkd_alone, until, write_config

# ---- shards


def rewrite(shards: Path, change: Callable[[bytes], bytes]) -> None:
    """Change the first training shard at 8 px, and let the manifest vouch for it."""
    manifest = json.loads((shards / "manifest.json").read_text())
    record = manifest["shards"]["r8"]["train"][0]
    file = shards / "r8" / record["name"]
    data = change(file.read_bytes())
    file.write_bytes(data)
    record |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (shards / "manifest.json").write_text(json.dumps(manifest))


def with_member(suffix: str, new: bytes) -> Callable[[bytes], bytes]:
    """The first member of this suffix holds something else."""

    def change(data: bytes) -> bytes:
        with tarfile.open(fileobj=io.BytesIO(data)) as old:
            members = [(m.name, old.extractfile(m).read()) for m in old]  # type: ignore[union-attr]
        at = next(i for i, (name, _) in enumerate(members) if name.endswith(suffix) and "mask" not in name)
        members[at] = (members[at][0], new)
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for name, content in members:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        return out.getvalue()

    return change


def png(
    pixels: bytes, *, size: int = 8, colour: int = 2, more: tuple[tuple[bytes, bytes], ...] = ()
) -> bytes:
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", size, size, 8, colour, 0, 0, 0)),
        *more,
        (b"IDAT", zlib.compress(pixels)),
        (b"IEND", b""),
    )
    parts = (struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


IMAGES = {
    "short": png(b"\0" * 40),
    "empty": png(b""),
    "animated": png(b"\0" * 200, more=((b"fcTL", bytes(26)),)),
    "no palette": png(b"\0" * 72, colour=3),
    "huge": png(b"\0" * 40, size=2**20),
    "another size": png(b"\0" * 400, size=9),
    "text": b"<html>",
}


@pytest.mark.parametrize("kind", IMAGES)
def test_an_image_that_cannot_be_decoded_is_named_whoever_vouches_for_it(
    own: Path, tmp_path: Path, kind: str
) -> None:
    rewrite(own, with_member(".png", IMAGES[kind]))
    file = write_config(tmp_path / "c.yaml", own, fixed={"resolution": 8, "epochs": 1})
    done = irkd_alone("train", file)
    if kind == "animated" and done.code == 0:  # whole but for a chunk that may be passed over
        return
    assert named(done.refused())


def named(done: Done) -> bool:
    """Whether the shard or its first sample is."""
    return "train-000000.tar" in done.err or "000000000" in done.err


LABELS = [b"10", b"1000000000000", b"99999999999999999999", b"-1", b"1.0", b"", b"\xef\xbc\x91"]


@pytest.mark.parametrize("label", LABELS)
def test_a_label_that_is_no_class_is_refused(own: Path, tmp_path: Path, label: bytes) -> None:
    rewrite(own, with_member(".cls", label))
    file = write_config(tmp_path / "c.yaml", own, fixed={"resolution": 8, "epochs": 1})
    assert named(irkd_alone("train", file, limit=30).refused())


def test_classes_missing_from_the_manifest_are_refused(own: Path, tmp_path: Path) -> None:
    manifest = json.loads((own / "manifest.json").read_text())
    (own / "manifest.json").write_text(json.dumps(manifest | {"classes": manifest["classes"][:3]}))
    irkd("train", write_config(tmp_path / "c.yaml", own)).refused("label", "3")


PAX = [b"0 path=x\n", b"-5 path=x\n", b"999 path=x\n", b"x", b"", b"20 size=99999999999\n"]


@pytest.mark.parametrize("record", PAX)
def test_an_extended_header_that_lies_ends_in_a_line(own: Path, tmp_path: Path, record: bytes) -> None:
    member = tarfile.TarInfo("x")
    member.type, member.size = b"x", len(record)
    head = member.tobuf(tarfile.USTAR_FORMAT) + record + bytes(-len(record) % 512)
    rewrite(own, lambda data: head + data)
    done = irkd_alone(
        "train", write_config(tmp_path / "c.yaml", own, fixed={"resolution": 8, "epochs": 1}), limit=20
    )
    assert done.code == 0 if record == b"" else done.refused("train-000000.tar")


NUMBERS = ["mean", "std", "val_fraction", "resolutions", "splits", "classes"]


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -1, None, "x\x1b[31m", 10**400, []],
    ids=["nan", "inf", "negative", "null", "text", "too large", "empty"],
)  # fmt: skip
def test_a_manifests_numbers_are_numbers(own: Path, tmp_path: Path, key: str, value: object) -> None:
    manifest = json.loads((own / "manifest.json").read_text())
    old = manifest[key]
    if isinstance(old, list) and old and value != []:
        manifest[key] = [value, *old[1:]]
    elif isinstance(old, dict):
        manifest[key] = {**old, "train": value}
    else:
        manifest[key] = value
    (own / "manifest.json").write_text(json.dumps(manifest))
    done = irkd("train", write_config(tmp_path / "c.yaml", own))
    if key == "classes" and value != []:
        done.well_or_refused()  # any text may be a name
    else:
        done.refused("manifest.json")
    assert "\x1b" not in done.said


PIPES = ["manifest.json", "r8/train-000000.tar"]


@pytest.mark.parametrize("name", PIPES)
def test_a_pipe_in_a_folder_of_shards_does_not_hang(own: Path, tmp_path: Path, name: str) -> None:
    (own / name).unlink()
    os.mkfifo(own / name)
    file = write_config(tmp_path / "c.yaml", own, fixed={"resolution": 8, "epochs": 1})
    irkd_alone("train", file, limit=15).refused(name)


# ---- run folders

EVENTS: dict[str, Callable[[bytes], bytes]] = {
    "a high bit": lambda data: data[:700] + bytes([data[700] | 0x80]) + data[701:],
    "a first line of bytes": lambda data: b"\xff\xfe\n" + data,
    "zeros at the end": lambda data: data + bytes(512),
    "a list": lambda data: data + b"[1]\n" + b'"text"\n',
    "other types": lambda data: data + b'{"event": "evaluation", "step": "9", "stage": null, "time": []}\n',
    "no time": lambda data: data + b'{"event": "train", "step": 99}\n',
    "deep": lambda data: data + b"[" * 100_000 + b"\n",
    "a number too far": lambda data: data + b'{"event": "train", "step": ' + b"9" * 5000 + b"}\n",
    "two at once": lambda data: data.replace(b"\n", b"", 1),
}  # fmt: skip


@pytest.mark.parametrize("kind", EVENTS)
def test_a_damaged_line_of_the_events_is_gone_around(interrupted: Path, trainable: Path, kind: str) -> None:
    file = interrupted / "events.jsonl"
    file.write_bytes(EVENTS[kind](file.read_bytes()))
    irkd("status", interrupted).well_or_refused()
    irkd("train", trainable).well()
    if kind in ("a high bit", "a list", "other types", "no time"):  # a report takes a second
        irkd("report", interrupted).well_or_refused()


JSON = {
    "list": "[]",
    "null": "null",
    "types": '{"state": [], "step": "x", "time": null, "world": {}, "restarts": [], "without_progress": "x"}',
    "infinite": '{"state": "running", "time": Infinity, "step": NaN, "restarts": Infinity, "without_progress": NaN}',
    "deep": "[" * 100_000,
    "bytes": "\udcff\udcfe",
    "cut": '{"state": "run',
    "large": '{"state": "running", "step": 1, "world": 1, "time": ' + "9" * 400 + "}",
}


@pytest.mark.parametrize("kind", JSON)
@pytest.mark.parametrize("name", ["status.json", "restarts.json", "evaluation.json", "session"])
def test_small_files_of_a_run_may_hold_anything(
    interrupted: Path, trainable: Path, name: str, kind: str
) -> None:
    (interrupted / name).write_bytes(JSON[kind].encode(errors="surrogateescape"))
    irkd("status", interrupted).well_or_refused()
    irkd("requeue", interrupted).well_or_refused()
    if name == "evaluation.json" and kind in ("types", "deep", "bytes"):
        irkd("report", interrupted).well_or_refused()


ALTERED = [
    ('"epoch_step": ', "0"),
    ('"stage_step": ', "1"),
    ('"seconds": ', "9"),
    ('"best_accuracy": ', "0.99"),
]


@pytest.mark.parametrize(("key", "digits"), ALTERED)
def test_an_altered_state_gives_no_other_weights(
    interrupted: Path, trainable: Path, tmp_path: Path, key: str, digits: str
) -> None:
    kept = Path(shutil.copytree(interrupted, tmp_path / "kept"))
    irkd("train", trainable).well()
    wanted = weights(interrupted)
    shutil.rmtree(interrupted)
    kept.rename(interrupted)
    newest = sorted((interrupted / "checkpoints").iterdir())[-1] / "state.json"
    text = newest.read_text()
    at = text.index(key) + len(key)
    end = min(i for i in range(at, len(text)) if text[i] in ",\n")
    assert text[at:end] != digits
    newest.write_text(text[:at] + digits + text[end:])
    done = irkd("train", trainable).well_or_refused(newest.parent.name)
    assert done.code == 2 or weights(interrupted) == wanted


def weights(run: Path) -> str:
    newest = sorted((run / "checkpoints").iterdir())[-1]
    return hashlib.sha256((newest / "student.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", ["list", "types", "deep", "bytes", "cut"])
def test_a_state_of_wrong_types_is_skipped(interrupted: Path, trainable: Path, kind: str) -> None:
    newest = sorted((interrupted / "checkpoints").iterdir())[-1] / "state.json"
    newest.write_bytes(JSON[kind].encode(errors="surrogateescape"))
    irkd("train", trainable).well("skipped", newest.parent.name)


def test_values_of_wrong_types_in_a_state_are_skipped(interrupted: Path, trainable: Path) -> None:
    newest = sorted((interrupted / "checkpoints").iterdir())[-1] / "state.json"
    for key, value in (
        ("step", "x"),
        ("curriculum", []),
        ("model", 3),
        ("sha256", None),
        ("sums", "a"),
        ("config", 1),
    ):
        state = json.loads(newest.read_text())
        (newest).write_text(json.dumps(state | {key: value}))
        irkd("status", interrupted).well_or_refused()
        irkd("evaluate", newest.parent).refused()
        newest.write_text(json.dumps(state))


def test_a_missing_best_is_said_at_once(interrupted: Path, trainable: Path) -> None:
    shutil.rmtree(interrupted / "best")
    irkd_alone("train", trainable, limit=30).well_or_refused("best")


def test_weights_carry_the_umask(small: Path, tmp_path: Path) -> None:
    file = write_config(tmp_path / "c.yaml", small, name="r")
    before = os.umask(0o027)
    try:
        irkd("train", file).well()
    finally:
        os.umask(before)
    for found in (tmp_path / "runs").rglob("*"):
        wanted = 0o750 if found.is_dir() else 0o640
        assert found.stat().st_mode & 0o777 == wanted, found


def test_weights_that_diverge_are_not_called_best(small: Path, tmp_path: Path) -> None:
    file = write_config(tmp_path / "c.yaml", small, fixed={"resolution": 16, "epochs": 3}, name="r")
    done = irkd("train", file, "optim.lr=1e30")
    assert "Traceback" not in done.said
    assert done.code != 0
    for found in (tmp_path / "runs").rglob("student.safetensors"):
        assert all(bool(w.isfinite().all()) for w in load_file(found).values()), found


@pytest.mark.parametrize("name", ["events.jsonl", "status.json", "config.yaml"])
def test_a_pipe_in_a_run_folder_does_not_hang(finished: Path, name: str) -> None:
    (finished / name).unlink()
    os.mkfifo(finished / name)
    irkd_alone("status", finished, limit=15).well_or_refused()


def test_the_learning_rate_after_a_stop_is_the_one_without(small: Path, tmp_path: Path) -> None:
    """Cosine with a warm-up, stopped in the midst of an epoch."""
    schedule = {"lr": 1e-3, "schedule": {"kind": "cosine", "warmup": 0.2}}
    file = write_config(tmp_path / "c.yaml", small, optim=schedule, fixed={"resolution": 16, "epochs": 6})
    irkd("train", file, "name=whole").well()
    broken = tmp_path / "runs" / "broken"
    process = Process("train", file, "name=broken")
    events = broken / "events.jsonl"
    until(lambda: not process.alive() or (events.exists() and events.read_text().count('"train"') >= 3))
    process.signal(signal.SIGTERM)
    assert process.wait().code in (75, 0)
    irkd("train", file, "name=broken").well()
    rates = [
        {e["step"]: e["lr"] for e in read_events(r) if e["event"] == "train"}
        for r in (tmp_path / "runs" / "whole", broken)
    ]
    assert rates[0] == rates[1]


def test_a_teacher_and_student_on_next_to_nothing(tmp_path: Path) -> None:
    """Fewer images than a batch, a validation split of one: every command still ends in order."""
    irkd(
        "render",
        "synthetic",
        "--samples",
        "train=5,test=1",
        "--resolutions",
        "8,16",
        "--val-fraction",
        "0.2",
        "--out",
        tmp_path / "s",
    ).well()
    file = write_config(
        tmp_path / "c.yaml", tmp_path / "s", data={"shards": str(tmp_path / "s"), "batch": 64, "workers": 1}
    )
    run = tmp_path / "runs" / "t"
    irkd("train", file, "name=t", "augment.mixup=0.2", "augment.cutmix=1").well_or_refused()
    irkd("evaluate", run, "--split", "val").well_or_refused()
    irkd("report", run).well_or_refused()
    changes = (
        "loss.kd.alpha=1",
        "loss.kd.follow_teacher=true",
        "loss.saliency.gamma=1",
        "loss.saliency.taps=[first]",
    )
    irkd("train", file, "name=s", f"teacher.run={run}", *changes).well_or_refused()
