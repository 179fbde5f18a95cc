"""What people write into a configuration and behind it: taken as meant, or refused by its name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.cases.command import Done, irkd, irkd_alone, write_config


def shown(*arguments: object) -> dict:
    return yaml.safe_load(irkd("train", *arguments, "--print-config").well().out)


def test_numbers_and_nothing_as_people_write_them(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "fixed: {resolution: 16, epochs: 1}\noptim: {lr: 1e-4, weight_decay: 5E-5, clip: null}\n"
        "augment: {flip: off, padding_at: ~}\n"
    )
    tree = shown(
        file, "optim.betas=[0.9, 0.95]", "optim.eps=1e-6", "loss.saliency.taps=[first, [2, 5]]", "augment.flip=yes",
        "optim.clip=None", "--data.subset=null", "--optim.schedule.warmup=.1",
    )  # fmt: skip
    assert tree["optim"]["lr"] == 1e-4
    assert tree["optim"]["weight_decay"] == 5e-5
    assert tree["optim"]["betas"] == [0.9, 0.95]
    assert tree["optim"]["eps"] == 1e-6
    assert tree["optim"]["clip"] is None
    assert tree["optim"]["schedule"]["warmup"] == 0.1
    assert tree["augment"]["flip"] is True
    assert tree["augment"]["padding_at"] is None
    assert tree["data"]["subset"] is None
    assert tree["loss"]["saliency"]["taps"] == ["first", [2, 5]]


@pytest.mark.parametrize(
    ("override", "way", "value"),
    [("student.options={depth:3}", ("student", "options"), {"depth": 3}), ("optim={lr:1}", ("optim", "lr"), 1.0),
     ("name=7", ("name",), "7"), ("name=2024-02-30", ("name",), "2024-02-30")],
)  # fmt: skip
def test_a_mapping_without_a_space_and_a_text_that_looks_like_a_number_are_what_they_say(
    config: Path, override: str, way: tuple[str, ...], value: object
) -> None:
    found = shown(config, override)
    for key in way:
        found = found[key]
    assert found == value


WRONG = [
    "optim.lr=nan", "optim.lr=.inf", "optim.lr=1e999", "optim.lr=1e-4x", 'optim.lr="1e-4"', "optim.lr=",
    "augment.flip=2", "optim={lr:1",
    "student.options={1: 2}", "1=2", "=3", "data.batch=64.5",
    "data=5", "data=", "curriculum.stages=[8,16]",
    "optim.lr=${oc.env:NOT_THERE}", "name=..", "seed=1_000x", "seed=true", "data.batch=1e400",
    "Seed=1", "optim.lr2=1", "optim.LR=1", "student.Depth=1", "data.batch=!!binary aGVsbG8=",
    "curriculum.stages[3].epochs=1", "student.options=!!python/name:os.system",
]  # fmt: skip


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_override_is_refused_and_named(config: Path, override: str) -> None:
    done = irkd("train", config, override, "--print-config").refused()
    key, _, value = override.partition("=")
    last = key.replace("[", ".").split(".")[-1].rstrip("]") or value
    assert last in done.err, done.err
    assert not (config.parent / "runs").exists()


INFINITE = [
    "optim.lr", "optim.eps", "optim.weight_decay", "optim.clip", "augment.mixup", "augment.cutmix", "loss.kd.alpha",
    "loss.kd.temperature", "loss.saliency.gamma", "rank_timeout_s", "checkpoint.every_minutes", "fixed.minutes",
    "fixed.tokens",
]  # fmt: skip


@pytest.mark.parametrize("key", INFINITE)
@pytest.mark.parametrize("value", [".inf", ".nan"])
def test_no_number_is_infinite(config: Path, key: str, value: str) -> None:
    irkd("train", config, f"{key}={value}").refused(key)
    assert not (config.parent / "runs").exists()


WRONG_FILES = {
    "twice": b"seed: 1\nseed: 2\n",
    "latin1": b"# caf\xe9\nseed: 1\n",
    "binary": b"name: !!binary aGVsbG8=\n",
    "path": b"name: !!python/object/apply:pathlib.PosixPath [a]\n",
    "set": b"name: !!set {a, b}\n",
    "tab": b"data:\n\tbatch: 3\n",
    "list": b"- 1\n",
    "number": b"5\n",
    "two": b"seed: 1\n---\nseed: 2\n",
    "loop": b"data: &d {shards: *d}\n",
    "laughs": b"a: &a [x, x, x, x, x, x, x, x, x]\n"
    + b"".join(
        b"%c: &%c [%s]\n" % (c, c, b", ".join([b"*%c" % (c - 1)] * 9)) for c in range(ord("b"), ord("j"))
    ),
    "deep": b"data: " + b"[" * 3000,
    "null": b"data: \0\n",
    "self": b"name: ${name}\n",
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(
        WRONG_FILES[name] + (b"" if name == "number" else b"fixed: {resolution: 16, epochs: 1}\n")
    )
    done = irkd("train", file, "--print-config")
    assert "Traceback" not in done.said
    if not (name == "latin1" and done.code == 0):  # a comment may be anything
        done.refused("c.yaml")


def test_windows_files_are_read(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(b"\xef\xbb\xbfseed: 3\r\nfixed: {resolution: 16, epochs: 1}\r\n")
    assert shown(file)["seed"] == 3


@pytest.mark.parametrize(
    "path",
    ["a #2/x", "a: b", "a=b", "[x]", "{y}", "a,b", "ü é", "%d", "x:y", "#", "a # b", "'a'", "*", "&a", "!x"],
)
@pytest.mark.parametrize("key", ["out", "data.shards"])
def test_a_path_as_override_is_taken_whole_or_refused(
    config: Path, tmp_path: Path, key: str, path: str
) -> None:
    wanted = f"{tmp_path}/{path}"
    done = irkd("train", config, f"{key}={wanted}", "--print-config").well_or_refused()
    if done.code == 0:
        tree = yaml.safe_load(done.out)
        for part in key.split("."):
            tree = tree[part]
        assert tree == wanted


def test_tilde_is_the_home_folder(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    (home / "shards").symlink_to(small)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    file = write_config(here / "c.yaml", Path("~/shards"), out="~/runs", name="r")
    done = irkd("train", file).well_or_refused()
    assert not (here / "~").exists()
    assert done.code == 2 or (home / "runs" / "r" / "events.jsonl").is_file()
    irkd("train", file, f"data.shards={small}", "out=~/others").well_or_refused()
    assert not (here / "~").exists()


def test_a_student_without_patches_is_not_told_of_patches(config: Path, small: Path) -> None:
    write_config(
        config, small, student={"name": "resnet10t", "options": {"channels": [8, 8, 8, 8]}}, name="r"
    )
    irkd("train", config).well()


@pytest.mark.parametrize("name", ["a[/b]c", "[red]x", "[link=x]y", "a]", "\\[z]"])
def test_a_name_that_looks_like_markup_is_printed_whole(config: Path, name: str) -> None:
    irkd("train", config, f"name={json.dumps(name)}", f"out={config.parent / 'o'}").well(f"o/{name}")
    irkd("status", config.parent / "o" / name).well(name)


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../b", "..", "a\0b", "a\nb"])
def test_a_name_does_not_leave_out(config: Path, name: str) -> None:
    name = f"{config.parent}{name}" if name.startswith("/") else name
    irkd("train", config, f"name={json.dumps(name)}").refused("name")
    assert sorted(p.name for p in config.parent.iterdir()) == ["c.yaml"]


def test_secrets_of_the_reader_are_not_in_a_strangers_report(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = finished / "config.yaml"
    text = file.read_text()
    assert "project: irkd" in text
    file.write_text(text.replace("project: irkd", "project: ${oc.env:WANDB_API_KEY}"))
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t")
    for arguments in (("report", finished), ("status", finished), ("evaluate", finished)):
        done = irkd(*arguments).well_or_refused()
        assert "s3cr3t" not in done.said
    left = [f for f in finished.rglob("*") if f.is_file() and b"s3cr3t" in f.read_bytes()]
    assert not left


def test_ones_own_environment_is_read_but_not_written_down(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_PROJECT", "s3cr3t")
    irkd("train", config, "name=r", "track.project=${oc.env:MY_PROJECT}").well()
    run = config.parent / "runs" / "r"
    left = [f for f in run.rglob("*") if f.is_file() and b"s3cr3t" in f.read_bytes()]
    assert not left


def test_pretrained_without_a_network_is_said_soon(config: Path, small: Path) -> None:
    student = {"name": "vit_tiny_patch16_224", "patch": 8, "pretrained": True}
    write_config(config, small, student=student)
    offline = {
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
        "HF_HOME": str(config.parent),
    }
    irkd_alone("train", config, limit=20, env=offline).refused("student.pretrained")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_terminals_that_know_few_characters(config: Path, encoding: str) -> None:
    env: dict[str, str | None] = {"PYTHONIOENCODING": encoding}
    run = config.parent / "runs" / "r"
    for arguments in (("train", config, "name=r"), ("evaluate", run), ("status", run), ("report", run)):
        irkd_alone(*arguments, env=env).well()


def test_any_path_and_any_place(small: Path, tmp_path: Path) -> None:
    """Spaces, quotes and brackets in every path, from another folder; shards and run moved afterwards."""
    home = tmp_path / "a b [x] 'q' ü%d $HOME"
    elsewhere = tmp_path / "else"
    home.mkdir()
    elsewhere.mkdir()
    shards = home / "my shards"
    irkd_alone(
        "render",
        "synthetic",
        "--samples",
        "train=40,test=16",
        "--resolutions",
        "8,16",
        "--out",
        shards,
        cwd=elsewhere,
    ).well()
    track = {"panels": 1, "log_every": 1, "backend": "tensorboard"}
    stages = {"stages": [{"resolution": 8}, {"resolution": 16}], "epochs": 1}
    file = write_config(home / "my run.yaml", shards, track=track, curriculum=stages, fixed=None)
    run = home / "runs" / "my run-seed0"
    for arguments in (("train", file), ("evaluate", run), ("report", run)):
        irkd_alone(*arguments, cwd=elsewhere).well()
    moved, away = Path(shards.rename(home / "moved")), Path(run.rename(elsewhere / "r"))
    irkd_alone("evaluate", "r", "--data", moved, cwd=elsewhere).well()
    changes = (f"data.shards={moved}", f"teacher.run={away}", "loss.kd.alpha=1")
    irkd_alone("train", file, "name=st", *changes, cwd=elsewhere).well()
    assert os.listdir(elsewhere) == ["r"]


def a_user_without_a_name(*arguments: object, cwd: Path, **env: str | None) -> Done:
    site = cwd / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(
        "import pwd\ndef nobody(key):\n    raise KeyError(key)\npwd.getpwuid = pwd.getpwnam = nobody\n"
    )
    repository = str(Path(__file__).resolve().parents[2])
    environment = {
        "PATH": "/usr/bin:/bin", "HOME": "/proc/nohome", "PYTHONPATH": f"{site}:{repository}", "OMP_NUM_THREADS": "1",
        **env,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "irkd_dist", *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=120,
        env={k: v for k, v in environment.items() if v is not None},
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


def test_a_user_without_a_name_and_a_home(config: Path, small: Path) -> None:
    """As a container's arbitrary number: each library that makes folders at home must do without."""
    write_config(config, small, track={"panels": 1, "log_every": 1}, name="r")
    a_user_without_a_name("train", config, cwd=config.parent).well()
    a_user_without_a_name("report", config.parent / "runs" / "r", cwd=config.parent, HOME=None).well()
