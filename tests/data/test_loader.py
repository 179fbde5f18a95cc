"""The loader: pixels as stock webdataset reads them; the same batches for any world, workers and caches."""

import dataclasses
import hashlib
import io
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv1
from PIL import Image
from webdataset.compat import WebDataset
from webdataset.writer import TarWriter

from irkd_dist.data import augment as aug
from irkd_dist.data import shards
from irkd_dist.data.images import Dataset, Work, balanced_subset
from irkd_dist.data.loader import Batch, Loader
from irkd_dist.data.recipe import Augment
from irkd_dist.data.sampler import Share
from irkd_dist.data.views import View
from irkd_dist.errors import UserError

SIZES = {"train": 150, "val": 21}
PER_SHARD = 80
CLASSES = 5
MEAN, STD = (0.5, 0.45, 0.4), (0.25, 0.24, 0.23)
EVERYTHING = Augment(auto_augment=0.5, erase=0.4, mixup=0.2, cutmix=1.0, smoothing=0.1)
CROP_FLIP = Augment()


def write_shards(folder: Path, resolutions: tuple[int, ...], mode: shards.Mode) -> shards.Manifest:
    rng, listed, key = np.random.default_rng(0), {f"r{r}": {} for r in resolutions}, 0
    for split, count in SIZES.items():
        coarse = rng.integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
        for r in resolutions:
            (folder / f"r{r}").mkdir(parents=True, exist_ok=True)
            files = []
            for start in range(0, count, PER_SHARD):
                path = folder / f"r{r}" / f"{split}-{start // PER_SHARD:06d}.tar"
                rows = range(start, min(start + PER_SHARD, count))
                with TarWriter(str(path), mtime=0) as tar:
                    for i in rows:
                        stream = io.BytesIO()
                        Image.fromarray(coarse[i]).resize((r, r), Image.Resampling.BICUBIC).save(
                            stream, "png"
                        )
                        label = str(i * i % CLASSES)
                        tar.write({"__key__": f"{key + i:09d}", "png": stream.getvalue(), "cls": label})
                data = path.read_bytes()
                files.append(shards.Shard(path.name, len(rows), len(data), hashlib.sha256(data).hexdigest()))
            listed[f"r{r}"][split] = tuple(files)
        key += count
    manifest = shards.Manifest(
        version=shards.FORMAT_VERSION,
        dataset="test",
        source="synthetic",
        classes=tuple("abcde"),
        mean=MEAN,
        std=STD,
        mode=mode,
        encoding="png",
        masks=False,
        val_fraction=0.1,
        seed=0,
        resolutions=resolutions,
        splits=SIZES,
        shards=listed,
        render={},
    )
    shards.write_manifest(folder, manifest)
    return shards.load_manifest(folder)


@pytest.fixture(scope="module")
def resized(tmp_path_factory) -> tuple[Path, shards.Manifest]:
    folder = tmp_path_factory.mktemp("resize")
    return folder, write_shards(folder, (12, 16, 32), "resize")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, shards.Manifest]:
    folder = tmp_path_factory.mktemp("crop")
    return folder, write_shards(folder, (32,), "crop")


def opened(data, split="train", resolution=12, *, augment, batch=32, seed=3, **options) -> Loader:
    """A loader; options are those of Dataset, View, Share, Work and Loader by name."""

    def some(*names: str) -> dict:
        return {name: options.pop(name) for name in names if name in options}

    folder, manifest = data
    dataset = Dataset(folder, manifest, split, **some("subset", "verify"))
    view = View(resolution, augment, **some("full", "mode", "centre_crop"))
    share, work = Share(**some("parts", "own")), Work(**some("cache", "device", "workers"))
    return Loader(dataset, view, batch=batch, seed=seed, share=share, work=work, **options)


def epoch_of(data, split="train", resolution=12, *, epoch=0, start_step=0, **options) -> list[Batch]:
    with opened(data, split, resolution, **options) as loader:
        return list(loader.batches(epoch, start_step))


def stock(data, split="train", resolution=12) -> tuple[torch.Tensor, list[int]]:
    """Pixels (N, 3, r, r) uint8 and labels as stock webdataset reads them."""
    folder, manifest = data
    urls = [str(folder / f"r{resolution}" / s.name) for s in manifest.shards[f"r{resolution}"][split]]
    pairs = list(WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("png", "cls"))  # type: ignore
    return torch.stack([torch.tensor(p).permute(2, 0, 1) for p, _ in pairs]), [label for _, label in pairs]


def normalised(image: torch.Tensor) -> torch.Tensor:
    return tv1.normalize(image.float() / 255, MEAN, STD)


def assert_same(a: Batch, b: Batch) -> None:
    for field in dataclasses.fields(Batch):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, torch.Tensor):
            assert torch.equal(left, right), field.name
        else:
            assert np.array_equal(left, right), field.name


# ---- pixels


@pytest.mark.parametrize("cache", ["none", "ram", "device"])
def test_evaluation_has_the_pixels_of_stock_webdataset_in_order(resized, cache):
    images, labels = stock(resized, "val", 16)
    batches = epoch_of(resized, "val", 16, batch=8, augment=None, cache=cache)
    assert [b.size for b in batches] == [8, 8, 5]
    assert np.concatenate([b.ids for b in batches]).tolist() == list(range(21))
    assert torch.cat([b.labels for b in batches]).tolist() == labels
    expected = torch.stack([normalised(i) for i in images])
    torch.testing.assert_close(torch.cat([b.images for b in batches]), expected, rtol=0, atol=2e-6)
    assert all(b.soft_labels is None and b.full is None and (b.weight == 1).all() for b in batches)


def naive_view(image: torch.Tensor, i: int, padding: int, size: int, epoch: int) -> torch.Tensor:
    """Crop and flip of one sample by torchvision."""
    key = np.array([i])
    y, x = aug.crop_offsets(3, epoch, key, padding, size, image.shape[-1])[0].tolist()
    cropped = tv1.crop(tv1.pad(image, [padding]), y, x, size, size)
    return tv1.hflip(cropped) if aug.flip_mask(3, epoch, key)[0] else cropped


@pytest.mark.parametrize(("resolution", "padding"), [(12, 2), (16, 2), (32, 4)])
def test_training_views_against_a_loop_with_torchvision(resized, resolution, padding):
    small, labels = stock(resized, "train", resolution)
    large, _ = stock(resized, "train", 32)
    seen = []
    for b in epoch_of(resized, resolution=resolution, epoch=5, augment=CROP_FLIP, full=32):
        assert b.full is not None
        assert (b.full is b.images) == (resolution == 32)
        assert b.soft_labels is None
        for i, image, full, label in zip(b.ids.tolist(), b.images, b.full, b.labels.tolist(), strict=True):
            assert label == labels[i]
            view = normalised(naive_view(small[i], i, padding, resolution, 5))
            torch.testing.assert_close(image, view, rtol=0, atol=2e-6)
            view = normalised(naive_view(large[i], i, 4, 32, 5))
            torch.testing.assert_close(full, view, rtol=0, atol=2e-6)
            seen.append(i)
    assert sorted(seen) == list(range(150))


def test_padding_may_stay_the_same_at_every_resolution(resized):
    images, _ = stock(resized, "train", 12)
    (b, *_) = epoch_of(resized, augment=Augment(padding_at=None))
    view = normalised(naive_view(images[b.ids[0]], int(b.ids[0]), 4, 12, 0))
    torch.testing.assert_close(b.images[0], view, rtol=0, atol=2e-6)


def test_random_crops_of_full_size_images(whole):
    images, _ = stock(whole, "train", 32)
    (b, *_) = epoch_of(whole, resolution=20, augment=CROP_FLIP, mode="crop", full=32)
    assert b.full is not None
    for i, image, full in zip(b.ids.tolist(), b.images, b.full, strict=True):
        view = naive_view(images[i], i, 4, 20, 0)
        torch.testing.assert_close(image, normalised(view), rtol=0, atol=2e-6)
        enlarged = tv1.resize(view.float(), [32, 32], antialias=True)
        torch.testing.assert_close(full, normalised(enlarged), rtol=0, atol=1.01 / 255 / min(STD))


@pytest.mark.parametrize("centre", [False, True])
def test_evaluation_of_full_size_images(whole, centre):
    images, _ = stock(whole, "val", 32)
    (b,) = epoch_of(whole, "val", 20, augment=None, centre_crop=centre, full=32)
    assert b.full is not None
    for i, image, full in zip(b.ids.tolist(), b.images, b.full, strict=True):
        cropped = tv1.center_crop(images[i], [20, 20])
        small = cropped if centre else tv1.resize(images[i].float(), [20, 20], antialias=True)
        torch.testing.assert_close(image, normalised(small), rtol=0, atol=1.01 / 255 / min(STD))
        large = tv1.resize(cropped.float(), [32, 32], antialias=True) if centre else images[i]
        torch.testing.assert_close(full, normalised(large), rtol=0, atol=1.01 / 255 / min(STD))


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0)])
def test_mixing_against_a_loop(resized, mixup, cutmix):
    plain = epoch_of(resized, resolution=16, augment=CROP_FLIP, full=32)
    mixing = dataclasses.replace(CROP_FLIP, mixup=mixup, cutmix=cutmix, smoothing=0.1)
    mixed = epoch_of(resized, resolution=16, augment=mixing, full=32)
    for a, b in zip(plain, mixed, strict=True):
        lam, box = aug.draw_mix(3, 0, np.array([b.step]), mixup, cutmix, 16)[0]
        assert torch.equal(a.labels, b.labels)
        assert b.soft_labels is not None
        for own, ours, scale in ((a.images, b.images, 1), (a.full, b.full, 2)):
            assert own is not None
            assert ours is not None
            for i in range(b.size):
                partner = own[b.size - 1 - i]
                expected = lam * own[i] + (1 - lam) * partner
                if box is not None:
                    top, left, bottom, right = (scale * side for side in box)
                    expected = own[i].clone()
                    expected[:, top:bottom, left:right] = partner[:, top:bottom, left:right]
                torch.testing.assert_close(ours[i], expected, rtol=0, atol=1e-6)
        for i in range(b.size):
            target = torch.full((CLASSES,), 0.1 / CLASSES)
            target[a.labels[i]] += 0.9 * lam
            target[a.labels[b.size - 1 - i]] += 0.9 * (1 - lam)
            torch.testing.assert_close(b.soft_labels[i], target)


def test_smoothing_alone_gives_soft_targets(resized):
    (b, *_) = epoch_of(resized, augment=dataclasses.replace(CROP_FLIP, smoothing=0.2))
    assert b.soft_labels is not None
    expected = torch.nn.functional.one_hot(b.labels, CLASSES) * 0.8 + 0.2 / CLASSES
    torch.testing.assert_close(b.soft_labels, expected)


# ---- the same batches, whatever the world, the restart, the workers and the cache


@pytest.mark.parametrize("batch", [32, 3])  # 150 = 4 x 32 + 22; 3 is smaller than a world of 4
@pytest.mark.parametrize("mode", ["resize", "crop"])
@pytest.mark.parametrize("augment", [EVERYTHING, dataclasses.replace(EVERYTHING, draws=2)])
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


def test_modes_that_the_shards_cannot_give_are_refused(whole, resized):
    with pytest.raises(UserError, match="rendered for mode crop"):
        epoch_of(whole, augment=CROP_FLIP)
    with pytest.raises(UserError, match=r"resolution=48 is larger .* can have 40 px at most"):
        epoch_of(whole, resolution=48, augment=CROP_FLIP, mode="crop")
    with pytest.raises(UserError, match="no resolution 20"):
        epoch_of(resized, resolution=20, augment=CROP_FLIP)


def test_random_crops_also_work_on_shards_rendered_at_many_sizes(resized):
    images, _ = stock(resized, "train", 32)
    (b, *_) = epoch_of(resized, resolution=20, augment=CROP_FLIP, mode="crop")
    view = normalised(naive_view(images[b.ids[0]], int(b.ids[0]), 4, 20, 0))
    torch.testing.assert_close(b.images[0], view, rtol=0, atol=2e-6)


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
