"""Tars, IDX and names of classes as other tools and other people make them."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cases.command import Done, irkd, manifest_of, write_config


def encoded(kind: str = "PNG", seed: int = 0) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def tar(file: Path, members: dict[str, bytes | None]) -> None:
    """None: a folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as out:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE if data is None else tarfile.REGTYPE
            member.size = len(data or b"")
            out.addfile(member, io.BytesIO(data or b""))


def render(kind: str, path: Path, out: Path, *more: object) -> Done:
    return irkd("render", kind, "--path", path, "--out", out, "--resolutions", "16", *more)


@pytest.mark.parametrize("beside", [["json"], ["txt"], ["json", "txt", "url"], ["seg.png"]])
def test_members_that_are_not_needed_are_left_alone(tmp_path: Path, beside: list[str]) -> None:
    for split, count in (("train", 8), ("validation", 4)):
        members: dict[str, bytes | None] = {}
        for i in range(count):
            members[f"n{i:04d}.jpeg"] = encoded("JPEG", i)
            members[f"n{i:04d}.cls"] = str(i % 2).encode()
            for suffix in beside:
                data = encoded() if suffix.endswith("png") else json.dumps({"label": i % 2}).encode()
                members[f"n{i:04d}.{suffix}"] = data
        tar(tmp_path / "d" / f"imagenet-{split}-0000.tar", members)
    done = render("wds", tmp_path / "d", tmp_path / "s").well("2 classes", "8 train", "4 val")
    assert manifest_of(tmp_path / "s")["splits"] == {"train": 8, "val": 4}, done.said


def test_tars_of_a_folder_and_of_a_mac(tmp_path: Path) -> None:
    plain: dict[str, bytes | None] = {"./": None}
    mac: dict[str, bytes | None] = {"./": None, "./._.": b"\0\5\26\7", "./.DS_Store": b"Bud1"}
    for i in range(10):
        pair = {f"./{i:03d}.png": encoded(seed=i), f"./{i:03d}.cls": b"%d\n" % (i % 2)}
        plain |= pair
        mac |= {f"./._{i:03d}.png": b"\0\5\26\7\0\2\0\0Mac OS X"} | pair
    tar(tmp_path / "plain" / "train-0.tar", plain)
    tar(tmp_path / "mac" / "train-0.tar", mac)
    for name in ("plain", "mac"):
        render("wds", tmp_path / name, tmp_path / f"{name}-s", "--val-fraction", "0").well(
            "2 classes", "10 train"
        )


@pytest.mark.parametrize(
    ("train", "val"), [("train/00000.tar", "val/00000.tar"), ("data/training/a-0.tar", "data/valid/a-0.tar")]
)
def test_tars_in_folders_of_their_split(tmp_path: Path, train: str, val: str) -> None:
    for name, count in ((train, 9), (val, 3)):
        members: dict[str, bytes | None] = {}
        for i in range(count):
            members |= {f"{i:05d}.png": encoded(seed=i), f"{i:05d}.cls": str(i % 3).encode()}
        tar(tmp_path / "d" / name, members)
    render("wds", tmp_path / "d", tmp_path / "s").well("3 classes", "9 train", "3 val")


@pytest.mark.parametrize("first", [1, 2])
def test_labels_that_do_not_begin_at_0_are_said(tmp_path: Path, first: int) -> None:
    images, labels = np.zeros((12, 8, 8), np.uint8), [first + i % 4 for i in range(12)]
    for split in ("train", "test"):
        head = struct.pack(">4B3I", 0, 0, 8, 3, *images.shape)
        (tmp_path / f"letters-{split}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        head = struct.pack(">4BI", 0, 0, 8, 1, len(labels))
        (tmp_path / f"letters-{split}-labels-idx1-ubyte").write_bytes(head + bytes(labels))
    done = render("idx", tmp_path, tmp_path / "s").well_or_refused()
    if done.code == 0:
        mentioned = any(word in done.said for word in ("without", "no image", "empty", "begin", "start"))
        assert len(manifest_of(tmp_path / "s")["classes"]) == 4 or mentioned, done.said


def images_of(folder: bytes, count: int = 6) -> None:
    os.makedirs(folder)
    for i in range(count):
        with open(folder + b"/%d.png" % i, "wb") as file:
            file.write(encoded(seed=i))


NAMES = {
    "latin1": [b"caf\xe9", b"tea"],
    "money": [b"$1_old_$2", b"$5^$", b"$x^{$", b"100%_{}"],
    "markup": [b"[red]a", b"a[/b]", b"<b>x</b>&amp;", b"\\[bold]"],
    "scripts": ["猫".encode(), "пёс".encode(), "🦊".encode(), "e\u0301".encode()],
    "odd": [b"a b", b"-a", b"'q'\"", b"a;b|c", b"null", b"1"],
    "control": [b"\x1b[31mred", b"bell\x07", b"ok"],
}


@pytest.mark.parametrize("kind", NAMES)
def test_class_names_of_any_kind_go_through_the_whole_job(tmp_path: Path, kind: str) -> None:
    for name in NAMES[kind]:
        images_of(os.fsencode(tmp_path / "d") + b"/" + name)
    done = render("folder", tmp_path / "d", tmp_path / "s", "--val-fraction", "0.34").well_or_refused()
    assert "\x1b[31m" not in done.said
    assert "\x07" not in done.said
    if done.code == 2:
        assert kind in ("latin1", "control"), done.said
        return
    assert "missing from font" not in done.said
    file = write_config(tmp_path / "c.yaml", tmp_path / "s", track={"panels": 2, "log_every": 1}, name="r")
    run = tmp_path / "runs" / "r"
    for arguments in (("train", file), ("evaluate", run, "--split", "val"), ("report", run)):
        done = irkd(*arguments).well()
        assert "missing from" not in done.said
    page = (run / "report.html").read_text()
    assert "<b>x</b>" not in page
    assert "\x1b" not in page


def test_only_a_damaged_files_name_is_not_utf8(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path / "d")
    for name in (b"coffee", b"tea"):
        images_of(folder + b"/" + name, 4)
    os.rename(folder + b"/tea/0.png", folder + b"/tea/\xe9.png")
    with open(folder + b"/tea/bro\xf1.png", "wb"):
        pass
    render("folder", tmp_path / "d", tmp_path / "s", "--max-bad", "1", "--val-fraction", "0").well(
        "8 train", "bro"
    )
    render("folder", tmp_path / "d", tmp_path / "s2").refused("bro", "--max-bad 0")
