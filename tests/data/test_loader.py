"""The loader: the same batches for any world, slices, workers and caches; threads, files, damage."""

import dataclasses
import os
import threading

import numpy as np
import pytest
import torch

from irkd_dist.data.decoded import balanced_subset
from irkd_dist.data.loader import Batch, _ahead
from irkd_dist.errors import UserError
from tests.data.conftest import (
    CROP_FLIP,
    DRAWS,
    EVERYTHING,
    assert_same,
    epoch_of,
    naive_view,
    normalised,
    opened,
    stock,
    write_shards,
)

# ---- the same batches, whatever the world, the restart, the workers and the cache


@pytest.mark.parametrize("batch", [32, 3])  # 150 = 4 x 32 + 22; 3 is smaller than a world of 4
@pytest.mark.parametrize("mode", ["resize", "crop"])
@pytest.mark.parametrize("augment", [EVERYTHING, DRAWS])
def test_any_world_gives_the_same_global_batches(resized, whole, batch, mode, augment):
    data = resized if mode == "resize" else whole
    options = {"epoch": 2, "batch": batch, "augment": augment, "full": 32, "mode": mode}
    options["start_step"] = max(0, -(-150 // batch) - 12)
    alone = epoch_of(data, **options)
    for world in (2, 3, 4):
        ranks = [epoch_of(data, **options, parts=world, own=(rank,)) for rank in range(world)]
        for whole_batch, *shares in zip(alone, *ranks, strict=True):
            assert_is_split(whole_batch, shares, world)


def assert_is_split(whole_batch: Batch, shares: list[Batch], world: int) -> None:
    n, found, mean = whole_batch.size, [], torch.zeros(())
    for b in shares:
        at = b.positions
        assert (b.size, b.step) == (n, whole_batch.step)
        assert np.array_equal(b.ids, whole_batch.ids[at.numpy()])
        for name in ("images", "labels", "soft_labels", "full"):
            assert torch.equal(getattr(b, name), getattr(whole_batch, name)[at]), (name, world)
        found += at[b.weight > 0].tolist()
        mean = mean + (b.weight * loss(b)).sum() / world
    assert sorted(found) == list(range(n))
    torch.testing.assert_close(mean, loss(whole_batch).mean())


def loss(b: Batch) -> torch.Tensor:
    return b.images.mean((1, 2, 3)) + b.labels


def test_evaluation_counts_every_sample_once_in_any_world(resized):
    for world in (1, 2, 3, 4):
        ranks = [epoch_of(resized, "val", batch=3, augment=None, parts=world, own=(r,)) for r in range(world)]
        assert [len(batches) for batches in ranks] == [7] * world
        counted = [i for batches in ranks for b in batches for i in b.ids[b.weight.numpy() > 0].tolist()]
        assert sorted(counted) == list(range(21))
        assert all(len(b.ids) >= 1 and set(b.weight.tolist()) <= {0.0, 1.0} for bs in ranks for b in bs)


def test_every_sample_once_an_epoch_in_a_new_order(resized):
    first, second = ([b.ids for b in epoch_of(resized, epoch=e, augment=CROP_FLIP)] for e in (0, 1))
    assert sorted(np.concatenate(first)) == sorted(np.concatenate(second)) == list(range(150))
    assert not np.array_equal(first[0], second[0])
    assert len(first[-1]) == 22


@pytest.mark.parametrize("start_step", [1, 3, 4, 5])
def test_resuming_gives_the_batches_of_an_unbroken_pass(resized, start_step):
    unbroken = epoch_of(resized, epoch=7, augment=EVERYTHING)
    resumed = epoch_of(resized, epoch=7, augment=EVERYTHING, start_step=start_step)
    assert [b.step for b in resumed] == list(range(start_step, 5))
    for a, b in zip(unbroken[start_step:], resumed, strict=True):
        assert_same(a, b)


def test_workers_and_caches_change_nothing(resized):
    reference = epoch_of(resized, epoch=1, augment=EVERYTHING, cache="none", workers=1)
    for cache in ("none", "ram", "device"):
        for workers in (1, 3):
            options = {"cache": cache, "workers": workers}
            with opened(resized, "train", 12, batch=32, seed=3, augment=EVERYTHING, **options) as loader:
                list(loader.batches(0))  # fills the cache
                for a, b in zip(reference, loader.batches(1), strict=True):
                    assert_same(a, b)


def test_torchs_global_generator_is_left_alone(resized):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    epoch_of(resized, augment=EVERYTHING)
    assert torch.equal(before, torch.get_rng_state())


# ---- virtual ranks


@pytest.mark.parametrize("batch", [32, 3])
@pytest.mark.parametrize("augment", [EVERYTHING, DRAWS, None])
def test_a_process_gives_each_slice_as_its_own_process_would(resized, batch, augment):
    options = {"batch": batch, "augment": augment, "full": 32}
    alone = [epoch_of(resized, **options, parts=4, own=(v,)) for v in range(4)]
    for own in ((0, 1, 2, 3), (1, 3), (2,)):
        with opened(resized, **options, parts=4, own=own) as loader:
            steps = list(loader.steps(0))
        assert len(steps) == loader.steps_per_epoch
        for step, batches in enumerate(steps):
            for v, b in zip(own, batches, strict=True):
                assert_same(b, alone[v][step])
    if augment is not None:
        whole_batches = epoch_of(resized, **options)
        for step, whole_batch in enumerate(whole_batches):
            assert_is_split(whole_batch, [batches[step] for batches in alone], 4)


def test_a_share_of_several_slices_has_no_single_batch(resized):
    with (
        opened(resized, augment=None, parts=2, own=(0, 1)) as loader,
        pytest.raises(ValueError, match="use steps"),
    ):
        loader.batches(0)


def test_a_small_last_batch_joins_the_one_before_it(resized):
    """150 samples: the last of 4 batches would have 0 or 2 of them, one in each of two slices."""
    loaded = [epoch_of(resized, batch=37, augment=CROP_FLIP, least=4, parts=2, own=(v,)) for v in (0, 1)]
    for batches in loaded:
        assert [b.size for b in batches] == [37, 37, 37, 39]
        assert min(len(b.ids) for b in batches) >= 2
    assert [b.size for b in epoch_of(resized, batch=37, augment=CROP_FLIP)] == [37, 37, 37, 37, 2]
    with pytest.raises(UserError, match=r"a batch of 3 is too small: BatchNorm needs 4 samples"):
        opened(resized, batch=3, augment=CROP_FLIP, least=4)


# ---- threads, files, time


def state() -> tuple[int, int, int]:
    return threading.active_count(), len(os.listdir("/proc/self/fd")), torch.get_num_threads()


def in_new_thread(function):
    got = []
    thread = threading.Thread(target=lambda: got.append(function()))
    thread.start()
    thread.join()
    return got[0]


def test_closing_early_leaves_no_thread_and_no_file(resized):
    before = state()
    for taken in range(4):
        loader = opened(resized, "train", 12, batch=8, seed=0, augment=EVERYTHING, full=32)
        batches = loader.batches(0)
        for _ in range(taken):
            next(batches)
        batches.close()  # type: ignore[attr-defined]
        assert threading.active_count() == before[0]
        assert len(next(loader.batches(0)).ids) == 8  # dropped without being closed, as by `break`
        loader.close()
    assert state() == before
    assert in_new_thread(torch.get_num_threads) == before[2]


def test_a_failing_constructor_closes_what_it_opened(resized, tmp_path):
    before = state()
    with pytest.raises(UserError, match="no resolution 24"):
        opened(resized, "train", 12, batch=8, seed=0, augment=None, full=24)
    assert state() == before


def test_waiting_is_counted(resized):
    with opened(resized, "train", 12, batch=8, seed=0, augment=CROP_FLIP) as loader:
        assert loader.steps_per_epoch == 19
        list(loader.batches(0))
        assert 0 < loader.wait_s < 20
        loader.wait_s = 0.0
        batches = loader.batches(1)
        next(batches)
        waited, loader.wait_s = loader.wait_s, 0.0
        assert waited > 0
        batches.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("workers", "ahead"), [(1, 4), (2, 4), (6, 12)])
def test_batches_made_ahead_grow_with_the_workers(workers, ahead):
    made, enough = [], threading.Event()

    def make(step: int) -> int:
        made.append(step)
        if len(made) == ahead + 1:
            enough.set()
        return step

    batches = _ahead(make, range(40), workers, torch.device("cpu"))
    assert next(batches) == 0  # one is taken, so that one more is begun
    assert enough.wait(20)
    assert sorted(made) == list(range(ahead + 1))
    assert list(batches) == list(range(1, 40))


# ---- bad input


def test_a_shard_cut_short_while_in_use_is_an_error_in_the_consumer(tmp_path):
    manifest = write_shards(tmp_path, (12,), "resize")
    before = threading.active_count()
    with opened((tmp_path, manifest), "train", 12, batch=32, seed=0, augment=CROP_FLIP) as loader:
        os.truncate(tmp_path / "r12" / "train-000001.tar", 5000)
        with pytest.raises(UserError, match=r"train-000001\.tar was cut short"):
            list(loader.batches(0))
    assert threading.active_count() == before
    with pytest.raises(UserError, match="truncated"):
        opened((tmp_path, manifest), "train", 12, batch=32, seed=0, augment=CROP_FLIP)


@pytest.mark.parametrize("cache", ["ram", "device"])
def test_an_image_that_cannot_be_decoded_is_named(tmp_path, cache):
    manifest = write_shards(tmp_path, (12,), "resize")
    path = tmp_path / "r12" / "val-000000.tar"
    data = bytearray(path.read_bytes())
    at = [i for i in range(0, len(data), 512) if data[i : i + 4] == b"\x89PNG"][4]
    data[at : at + 60] = bytes(60)
    path.write_bytes(data)
    with (
        pytest.raises(UserError, match="val at 12 px: sample 000000154 cannot be read"),
        opened(
            (tmp_path, manifest), "val", 12, batch=8, seed=0, augment=None, cache=cache, verify="size"
        ) as loader,
    ):
        list(loader.batches(0))


def test_an_image_of_another_size_is_named(tmp_path):
    manifest = write_shards(tmp_path, (12, 16), "resize")
    wrong = dataclasses.replace(manifest, shards={**manifest.shards, "r12": manifest.shards["r16"]})
    for file in (tmp_path / "r16").iterdir():
        (tmp_path / "r12" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"its shape is \(3, 16, 16\), not \(3, 12, 12\)"):
        epoch_of((tmp_path, wrong), augment=None)


# ---- subsets


def test_a_subset_is_balanced_fixed_and_trained_on_alone(resized):
    labels = np.arange(1000) ** 2 % 7
    subset = balanced_subset(labels, 30)
    assert np.array_equal(subset, np.sort(subset))
    assert len(set(subset.tolist())) == 30
    present = np.bincount(labels[subset])
    assert set(present[present > 0].tolist()) <= {7, 8}
    assert set(subset.tolist()) < set(balanced_subset(labels, 60).tolist())
    assert balanced_subset(labels, 1000).tolist() == list(range(1000))

    for cache in ("none", "ram", "device"):
        batches = epoch_of(resized, resolution=12, augment=CROP_FLIP, subset=40, batch=16, cache=cache)
        ids = np.concatenate([b.ids for b in batches])
        assert sorted(ids.tolist()) == balanced_subset(np.array(stock(resized)[1]), 40).tolist()
        image = normalised(naive_view(stock(resized)[0][ids[0]], int(ids[0]), 2, 12, 0))
        torch.testing.assert_close(batches[0].images[0], image, rtol=0, atol=2e-6)


@pytest.mark.parametrize("count", [0, 151])
def test_an_impossible_subset_is_refused(resized, count):
    with pytest.raises(UserError, match=f"subset={count} .* 1 to 150"):
        epoch_of(resized, augment=None, subset=count)


# ---- steps at several resolutions


def test_each_step_is_at_one_of_several_resolutions_whatever_the_world(resized):
    """Each batch is what a loader of that resolution alone gives; all are drawn, a size named twice more often."""
    options = {"epoch": 2, "batch": 5, "augment": EVERYTHING}
    alone = {size: epoch_of(resized, resolution=size, **options) for size in (12, 16, 32)}
    mixed = epoch_of(resized, resolution=32, scales=(12, 16, 12), **options)
    sizes = [b.images.shape[-1] for b in mixed]
    for b, size in zip(mixed, sizes, strict=True):
        assert_same(b, alone[size][b.step])
    assert sizes.count(12) > sizes.count(16) > 0
    assert sizes.count(32) > 0
    ranks = [
        epoch_of(resized, resolution=32, scales=(12, 16, 12), **options, parts=2, own=(r,)) for r in range(2)
    ]
    for whole_batch, *shares in zip(mixed, *ranks, strict=True):
        for b in shares:
            assert torch.equal(b.images, whole_batch.images[b.positions])
    later = epoch_of(resized, resolution=32, scales=(12, 16, 12), start_step=7, **options)
    assert [b.images.shape[-1] for b in later] == sizes[7:]
