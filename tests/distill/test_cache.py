"""Files of a teacher's cache: records come back as they were, and whatever is wrong with a file is seen."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from irkd_dist import faults
from irkd_dist.distill import cache_admin, cache_files, cache_shards
from irkd_dist.distill.cache_files import Store
from irkd_dist.distill.cache_shards import Damaged, Layout
from irkd_dist.errors import UserError

VALUES = {"format": 1, "answer": "logits", "seed": 0, "weights": "abc"}
LAYOUT = Layout((10, 3), "exact")


def parts(count: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.standard_normal((count, length)).astype(np.float32) for length in LAYOUT.lengths]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A cache with one shard of draw 3: samples 40, 39, ..., 0."""
    cache_files.check_key(tmp_path, cache_files.digest(VALUES), VALUES)
    write(tmp_path, np.arange(41)[::-1])
    return tmp_path


def write(folder: Path, ids: np.ndarray, draw: int = 3, seed: int = 0, limit: int | None = None) -> Path:
    rows = LAYOUT.encode(parts(len(ids), seed))
    return cache_shards.write_shard(folder, cache_files.digest(VALUES), draw, LAYOUT, ids, rows, limit=limit)


def store(folder: Path, draw: int = 3, again: bool = False) -> Store:
    opened = Store(folder, VALUES, 100, again)
    opened.look(draw)
    return opened


@pytest.mark.parametrize("again", [False, True])
def test_records_come_back_in_the_order_that_is_asked_for(folder: Path, again: bool) -> None:
    found, values = store(folder, again=again).read(3, ids := np.array([7, 99, 40, 0, 7, 12]))
    assert found.tolist() == [True, False, True, True, True, True]
    for whole, part in zip(parts(41), values, strict=True):
        np.testing.assert_array_equal(part, whole[40 - ids[found]])


def test_draws_are_apart(folder: Path) -> None:
    opened = store(folder, draw=2)
    assert not opened.read(2, np.arange(41))[0].any()


def test_every_changed_bit_of_a_record_is_seen(folder: Path) -> None:
    (path,) = cache_files.shards_of(folder / cache_files.digest(VALUES))
    shard, sound = cache_shards.open_shard(path), path.read_bytes()
    width = 8 * LAYOUT.words
    for bit in range(0, 8 * width, 5):
        data = bytearray(sound)
        data[shard.start + 5 * width + bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        fine = shard.read(np.arange(41))[1]
        assert not fine[5], bit
        assert fine.sum() == 40, bit
    path.write_bytes(sound[: shard.start] + bytes(len(sound) - shard.start))
    assert not shard.read(np.arange(41))[1].any()  # what a crash of the machine leaves


def test_records_in_each_others_place_are_seen(folder: Path) -> None:
    (path,) = cache_files.shards_of(folder / cache_files.digest(VALUES))
    shard, width = cache_shards.open_shard(path), 8 * LAYOUT.words
    data = bytearray(path.read_bytes())
    data[shard.start : shard.start + width], data[shard.start + width : shard.start + 2 * width] = (
        data[shard.start + width : shard.start + 2 * width],
        data[shard.start : shard.start + width],
    )
    path.write_bytes(data)
    assert shard.read(np.arange(41))[1].sum() == 39


def test_a_damaged_record_is_named_once_and_a_newer_one_replaces_it(folder: Path) -> None:
    (path,) = cache_files.shards_of(folder / cache_files.digest(VALUES))
    data = bytearray(path.read_bytes())
    data[-1] ^= 4  # of sample 0
    path.write_bytes(data)
    opened = store(folder)
    for _ in range(2):
        assert not opened.read(3, np.array([0]))[0].any()
    (text,) = opened.damage
    assert str(path) in text
    assert "samples 0" in text
    assert opened.claim(3, np.array([0, 0, 1])).tolist() == [True, False, False]
    write(folder, np.array([0]), seed=5)
    opened.look(3)
    found, (logits, _) = opened.read(3, np.array([0]))
    assert found.all()
    np.testing.assert_array_equal(logits, parts(1, 5)[0])
    assert cache_admin.verify(folder) == [f"{path}: 1 of 41 records do not match their sums"]


@pytest.mark.parametrize("size", [0, 3, 20, 200, 900, -8, -1])
def test_a_shard_that_is_cut_short_is_refused_as_a_whole(folder: Path, size: int) -> None:
    (path,) = cache_files.shards_of(folder / cache_files.digest(VALUES))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(Damaged, match=path.name):
        cache_shards.open_shard(path)
    opened = store(folder)
    assert not opened.has(3, np.arange(41)).any()
    assert str(path) in opened.damage[0]


def test_a_shard_that_shrinks_while_it_is_open_costs_its_own_samples(folder: Path) -> None:
    opened = store(folder)
    (path,) = cache_files.shards_of(folder / cache_files.digest(VALUES))
    path.write_bytes(path.read_bytes()[: -10 * 8 * LAYOUT.words - 3])
    assert opened.read(3, np.arange(41))[0].tolist() == [False] * 11 + [True] * 30
    path.unlink()
    assert not opened.read(3, np.arange(20, 41))[0].any()


def test_a_shard_in_another_keys_or_draws_folder_is_refused(folder: Path) -> None:
    (path,) = cache_files.shards_of(folder / cache_files.digest(VALUES))
    moved = path.parent.with_name("draw-00000004") / path.name
    moved.parent.mkdir()
    path.rename(moved)
    with pytest.raises(Damaged, match="its draw 3"):
        cache_shards.open_shard(moved)


def test_a_foreign_key_is_refused_with_what_differs(folder: Path) -> None:
    key = folder / cache_files.digest(VALUES) / cache_files.KEY
    key.write_text(json.dumps({**VALUES, "seed": 7}))
    with pytest.raises(UserError, match="seed: 7, not 0"):
        store(folder)
    key.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        store(folder)


def test_another_format_and_other_folders_are_refused(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (folder / cache_files.CACHE).write_text('{"format": 2}')
    with pytest.raises(UserError, match="format 2"):
        store(folder)
    with pytest.raises(UserError, match="format 2"):
        cache_admin.entries(folder)
    other = tmp_path_factory.mktemp("other")
    (other / "photos").mkdir()
    with pytest.raises(UserError, match="is no teacher cache"):
        store(other)
    assert [f.name for f in other.iterdir()] == ["photos"]
    with pytest.raises(UserError, match="is no teacher cache"):
        cache_admin.entries(other / "absent")


def test_many_may_begin_a_cache_at_once(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def begin() -> None:
        try:
            store(tmp_path / "new")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=begin) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


@pytest.mark.parametrize("form", ["half", "bytes"])
def test_compact_records(form: str) -> None:
    layout = Layout(LAYOUT.lengths, form)
    exact = [*parts(200)]
    exact[1][3] = 2.5  # a map without a shape
    read = layout.decode(layout.encode(exact))
    assert layout.words < LAYOUT.words
    for whole, part in zip(exact, read, strict=True):
        span = whole.max(axis=1, keepdims=True) - whole.min(axis=1, keepdims=True)
        bound = span * (0.5 / 255 if form == "bytes" else 0) + np.abs(whole) * (
            2.0**-11 if form == "half" else 1e-6
        )
        assert (np.abs(whole - part) <= bound * 1.01 + 1e-7).all()
    again = [np.asarray([[1e6] * 10], np.float32), np.zeros((1, 3), np.float32)]
    assert np.isfinite(layout.decode(layout.encode(again))[0]).all()


def test_nothing_is_left_of_a_shard_that_cannot_be_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(folder.rglob("*"))
    monkeypatch.setenv("IRKD_FAULT", "nospace@cache:0")
    monkeypatch.setattr(faults, "_done", set())
    with pytest.raises(OSError, match=r"."):
        write(folder, np.arange(90))
    assert sorted(folder.rglob("*")) == before
    write(folder, np.arange(90))  # the fault has healed


def test_the_limit_counts_what_others_write(folder: Path) -> None:
    used = cache_shards.size_of(folder)
    with pytest.raises(cache_shards.Full):
        write(folder, np.arange(50), limit=used + 50 * 16)
    assert cache_shards.size_of(folder) == used
    write(folder, np.arange(50), limit=used + 50 * 200)


def test_list_and_prune(folder: Path) -> None:
    key = cache_files.digest(VALUES)
    cache_files.note_use(folder, key, "runs/a")
    write(folder, np.arange(10), draw=4)
    write(folder, np.arange(10), draw=4)  # by two runs at once: counts once
    (left := folder / key / "draw-00000004" / f"{cache_shards.WRITING}x").write_bytes(b"1")
    (entry,) = cache_admin.entries(folder)
    assert entry.draws == {3: 41, 4: 10}
    assert entry.runs == ["runs/a"]
    text = "\n".join(cache_admin.describe(folder))
    assert "draws 3 to 4 (2)  51 samples" in text
    assert not [*cache_admin.prune(folder, 1.0, 1.0)]
    assert left.exists()  # it may be being written
    (removed,) = cache_admin.prune(folder, None, 0.0)
    assert key in removed
    assert cache_admin.entries(folder) == []
