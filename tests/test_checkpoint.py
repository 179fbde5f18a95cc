"""Checkpoints: what is whole is read, what is not is named and skipped."""

import errno
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from irkd_dist import checkpoint
from irkd_dist.errors import Passing, UserError, unreadable
from irkd_dist.writer import Writer


def write(folder: Path, step: int) -> Path:
    path = folder / checkpoint.name(step)
    checkpoint.save(
        path, {"w": torch.full((64,), float(step))}, {"exp_avg.w": torch.ones(64)}, {"step": step}
    )
    return path


def test_round_trip(tmp_path: Path) -> None:
    student, optimizer, state = checkpoint.load(write(tmp_path, 7))
    assert torch.equal(student["w"], torch.full((64,), 7.0))
    assert torch.equal(optimizer["exp_avg.w"], torch.ones(64))
    assert state["step"] == 7
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000007"]  # nothing temporary is left


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "state"])
@pytest.mark.parametrize("file", [checkpoint.STUDENT, checkpoint.OPTIMIZER])
def test_a_damaged_newest_is_skipped_and_named(tmp_path: Path, damage: str, file: str) -> None:
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    target = bad / file
    data = target.read_bytes()
    if damage == "flip":
        target.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "truncate":
        target.write_bytes(data[: len(data) // 2])
    elif damage == "remove":
        target.unlink()
    else:
        (bad / checkpoint.STATE).write_text("{")
    found, skipped = checkpoint.newest(tmp_path)
    assert found == good
    assert len(skipped) == 1
    assert "step-00000002" in skipped[0]


def test_an_unfinished_write_is_never_taken(tmp_path: Path) -> None:
    good = write(tmp_path, 1)
    (tmp_path / ".writing-step-00000009").mkdir()
    assert checkpoint.newest(tmp_path) == (good, [])
    checkpoint.prune(tmp_path, checkpoint.name(1), 1, set())
    assert not (tmp_path / ".writing-step-00000009").exists()


def test_another_version_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    state = path / checkpoint.STATE
    state.write_text(state.read_text().replace('"version": 1', '"version": 99'))
    with pytest.raises(UserError, match="version 99"):
        checkpoint.load_state(path)


def test_prune_keeps_the_newest_and_the_named(tmp_path: Path) -> None:
    for step in range(6):
        write(tmp_path, step)
    checkpoint.prune(tmp_path, checkpoint.name(5), 2, {checkpoint.name(1)})
    assert sorted(p.name for p in tmp_path.iterdir()) == [checkpoint.name(s) for s in (1, 4, 5)]


def test_damaged_later_checkpoints_take_no_whole_ones_place(tmp_path: Path) -> None:
    for step in (1, 2, 8, 9):  # 8 and 9 are damaged: the run went on from 1
        write(tmp_path, step)
    checkpoint.prune(tmp_path, checkpoint.name(2), 1, set())
    assert sorted(p.name for p in tmp_path.iterdir()) == [checkpoint.name(s) for s in (2, 8, 9)]


@pytest.mark.parametrize("text", ["[]", '{"version": 1}'])
def test_an_altered_state_is_named(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, 1)
    (path / checkpoint.STATE).write_text(text)
    with pytest.raises(UserError, match="altered"):
        checkpoint.load(path)


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def test_a_full_disk_leaves_the_last_good_one(tmp_path: Path) -> None:
    write(tmp_path, 1)
    script = (
        "import sys, torch; from pathlib import Path; from irkd_dist import checkpoint as c\n"
        "from irkd_dist.errors import UserError\n"
        "try: c.save(Path(sys.argv[1]) / c.name(2), {'w': torch.ones(9999)}, {}, {})\n"
        "except UserError as e: print('refused:', e)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        preexec_fn=limit_file_size,
        capture_output=True,
        text=True,
    )
    assert "refused: cannot write checkpoint" in done.stdout, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_of_what_could_not_be_written_only_the_newest_of_its_kind_stays_owed(tmp_path: Path) -> None:
    """A disk that is full for a night must not fill the memory with every best of it."""
    best, newest = tmp_path / "best", tmp_path / "checkpoints"
    best.write_text("in the way")
    writer = Writer()
    for step in (1, 2, 3, 4):
        if step == 4:
            best.unlink()
        content = checkpoint.Content({"w": torch.ones(4)}, {}, {"step": step})
        folders = [(best / f"stage-00-{checkpoint.name(step)}", content)] if step < 4 else []
        writer.submit(
            str(step), step, [*folders, (newest / checkpoint.name(step), content)], afterwards=lambda: None
        )
        writer.wait()
    writer.close()
    assert [w.error is None for w in writer.results()] == [False, False, False, True]
    assert [f.name for f in best.iterdir()] == ["stage-00-step-00000003"]
    assert [f.name for f in newest.iterdir()] == ["step-00000004"]


def test_a_file_system_that_is_away_is_not_a_damaged_checkpoint(tmp_path: Path) -> None:
    error = OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    assert isinstance(unreadable(tmp_path / "state.json", error), Passing)
    assert type(unreadable(tmp_path / "state.json", PermissionError(errno.EACCES, "denied"))) is UserError


def test_one_altered_byte_of_state_json_is_found(tmp_path: Path) -> None:
    """Any byte: a digit that became another one would give other weights without a word."""
    file = write(tmp_path, 1) / checkpoint.STATE
    text = file.read_bytes()
    for at in range(len(text)):
        for bit in (1, 4, 16, 128):
            file.write_bytes(text[:at] + bytes([text[at] ^ bit]) + text[at + 1 :])
            with pytest.raises(UserError, match=r"state\.json|version"):
                checkpoint.load_state(file.parent)
    file.write_bytes(text)
    assert checkpoint.load_state(file.parent)["step"] == 1


def unsign(folder: Path, **changes: object) -> None:
    """Make a checkpoint's state one of an earlier release, which had no checksum of its own."""
    state = json.loads((folder / checkpoint.STATE).read_text())
    del state["sha256"][checkpoint.STATE]
    (folder / checkpoint.STATE).write_text(json.dumps({**state, **changes}))


def test_a_state_without_a_checksum_is_read(tmp_path: Path) -> None:
    unsign(write(tmp_path, 3))
    assert checkpoint.newest(tmp_path) == (tmp_path / checkpoint.name(3), [])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", "3"), ("step", True), ("step", 10**30), ("epoch_step", -1), ("curriculum", []), ("sums", ["a"]),
        ("curriculum", {"stage": 1.5}), ("curriculum", {"best_checkpoint": "../../elsewhere"}), ("classes", "abc"),
        ("curriculum", {"best_accuracy": None}), ("mean", [1, 2]), ("stage_bests", ["best"]), ("config", 3),
        ("sha256", []), ("sha256", {"other": "x"}),
    ],
)  # fmt: skip
def test_wrong_types_in_state_json_are_skipped_and_named(tmp_path: Path, key: str, value: object) -> None:
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    unsign(bad, **{key: value})
    found, skipped = checkpoint.newest(tmp_path)
    assert found == good
    assert "step-00000002" in skipped[0]


@pytest.mark.parametrize("depth", [10**5, 10**6])
def test_a_deeply_nested_state_json_is_skipped(tmp_path: Path, depth: int) -> None:
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    (bad / checkpoint.STATE).write_text("[" * depth)
    found, (said,) = checkpoint.newest(tmp_path)
    assert found == good
    assert "nested too deeply" in said


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["weight", "moment"])
def test_a_checkpoint_that_is_not_finite_is_skipped_and_named(
    tmp_path: Path, kind: str, value: float
) -> None:
    good, bad = write(tmp_path, 1), tmp_path / checkpoint.name(2)
    weights, moments = torch.ones(64), torch.ones(64)
    (weights if kind == "weight" else moments)[63] = value
    content = checkpoint.Content({"w": weights}, {"exp_avg.w": moments}, {"step": 2})
    name = "w" if kind == "weight" else "exp_avg.w"
    assert checkpoint.unsound(content) == f"{kind} {name} is not finite"
    checkpoint.save(bad, content.student, content.optimizer, content.state)
    found, (said,) = checkpoint.newest(tmp_path)
    assert found == good
    assert f"step-00000002: {kind} {name} is not finite" in said


def test_a_mask_may_be_infinite_but_no_buffer_nan() -> None:
    moments = {"exp_avg.w": torch.ones(2)}
    mask, counter = torch.tensor([0.0, -torch.inf]), torch.tensor(3)
    sound = checkpoint.Content({"w": torch.ones(2), "mask": mask, "n": counter}, moments, {})
    assert checkpoint.unsound(sound) is None
    broken = checkpoint.Content({"w": torch.ones(2), "mean": torch.tensor([torch.nan])}, moments, {})
    assert checkpoint.unsound(broken) == "weight mean is not finite"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_are_as_open_as_the_umask_says(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        folder = write(tmp_path, 1)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(f.stat().st_mode) for f in folder.iterdir()} == {0o666 & ~mask}


def test_bests_that_are_gone_or_damaged_are_named(tmp_path: Path) -> None:
    names = [f"best/stage-{i:02d}-step-{8 * i + 8:08d}" for i in range(3)]
    for i, name in enumerate(names):
        checkpoint.save(tmp_path / name, {"w": torch.ones(8)}, {}, {"step": i})
    state = {"stage_bests": names[:2], "curriculum": {"best_checkpoint": names[2]}}
    assert checkpoint.missing_bests(tmp_path, state) == []
    shutil.rmtree(tmp_path / names[0])
    weights = tmp_path / names[2] / checkpoint.STUDENT
    weights.write_bytes(weights.read_bytes()[:-1])
    gone, damaged = checkpoint.missing_bests(tmp_path, state)
    assert gone.startswith(f"{names[0]}: ")
    assert damaged.startswith(f"{names[2]}: ")
    assert "truncated" in damaged


def test_a_pipe_in_a_checkpoint_is_not_waited_for(tmp_path: Path) -> None:
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    (bad / checkpoint.STUDENT).unlink()
    os.mkfifo(bad / checkpoint.STUDENT)
    found, (said,) = checkpoint.newest(tmp_path)
    assert found == good
    assert "it is a FIFO, not a file" in said
