"""Checkpoints: what is whole is read, what is not is named and skipped."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from irkd_dist import checkpoint
from irkd_dist.errors import Passing, UserError, unreadable


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
    writer = checkpoint.Writer()
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
