"""Views: pixels as stock webdataset and loops with torchvision have them; draws that come again; the view's key."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv1

from irkd_dist.data import augment as aug
from irkd_dist.data.recipe import Augment
from irkd_dist.data.sampler import partners
from irkd_dist.errors import UserError
from tests.data.conftest import (
    CLASSES,
    CROP_FLIP,
    DRAWS,
    EVERYTHING,
    STD,
    by_id,
    epoch_of,
    naive_view,
    normalised,
    opened,
    same,
    stock,
)

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


# ---- draws that come again, and what identifies them


@pytest.mark.parametrize("augment", [DRAWS, dataclasses.replace(CROP_FLIP, draws=2)])
def test_a_sample_looks_the_same_whenever_a_draw_comes_again(resized, augment):
    epochs = [epoch_of(resized, resolution=16, epoch=e, augment=augment, full=32) for e in range(3)]
    assert [{b.draw for b in batches} for batches in epochs] == [{0}, {1}, {0}]
    assert not np.array_equal(epochs[0][0].ids, epochs[2][0].ids)  # in another order
    first, other, again = map(by_id, epochs)
    assert len(first) == 150
    assert all(same(first[i], again[i]) for i in first)
    assert sum(same(first[i], other[i]) for i in first) < 10
    for options in ({"batch": 7}, {"parts": 3, "own": (1,)}, {"start_step": 3, "epoch": 4}):
        some = by_id(epoch_of(resized, resolution=16, augment=augment, full=32, **{"epoch": 6, **options}))
        assert len(some) >= 50
        assert all(same(first[i], some[i]) for i in some)


def test_without_draws_every_epoch_is_a_new_one(resized):
    batches = [epoch_of(resized, epoch=e, augment=EVERYTHING)[0] for e in (0, 9)]
    assert [b.draw for b in batches] == [0, 9]
    repeating = dataclasses.replace(CROP_FLIP, draws=2)
    plain, repeated = (by_id(epoch_of(resized, epoch=1, augment=a)) for a in (CROP_FLIP, repeating))
    assert all(same(plain[i], repeated[i]) for i in plain)  # draw 1 is draw 1


def test_mixing_of_draws_against_a_loop(resized):
    mixing = dataclasses.replace(CROP_FLIP, mixup=0.3, cutmix=1.0, smoothing=0.1, draws=4)
    plain = by_id(epoch_of(resized, resolution=16, epoch=3, augment=CROP_FLIP, full=32))
    mixed = by_id(epoch_of(resized, resolution=16, epoch=7, augment=mixing, full=32))
    partner, kinds = partners(3, 3, 150), set()
    for i, (image, full, label, soft) in mixed.items():
        lam, box = aug.draw_mix(3, 3, np.array([i]), 0.3, 1.0, 16)[0]
        own, other = plain[i], plain[int(partner[i])]
        for ours, a, b, scale in ((image, own[0], other[0], 1), (full, own[1], other[1], 2)):
            expected = lam * a + (1 - lam) * b
            if box is not None:
                top, left, bottom, right = (scale * side for side in box)
                expected = a.clone()
                expected[:, top:bottom, left:right] = b[:, top:bottom, left:right]
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
        target = torch.full((CLASSES,), 0.1 / CLASSES)
        target[own[2]] += 0.9 * lam
        target[other[2]] += 0.9 * (1 - lam)
        torch.testing.assert_close(soft, target)
        assert label == own[2]
        kinds.add(box is None)
    assert kinds == {True, False}


DECIDES = [
    {"resolution": 16},
    {"full": 32},
    {"full": 16},
    {"mode": "crop"},
    {"mode": "crop", "full": 32},
    {"mode": "crop", "full": 16},
    {"seed": 4},
    {"split": "val"},
    {"subset": 100},
    *({"augment": dataclasses.replace(EVERYTHING, **change)} for change in (
        {"padding": 1}, {"padding_at": None}, {"flip": False}, {"auto_augment": 1.0}, {"erase": 0.0},
        {"mixup": 0.0}, {"cutmix": 0.0}, {"smoothing": 0.0}, {"draws": 2},
    )),
    {"batch": 30},  # partners come from the batch
    {"batch": 37, "least": 20},
    {"batch": 37},
    {"augment": None},
    {"augment": None, "resolution": 16},
    {"augment": None, "centre_crop": True},
]  # fmt: skip
DECIDES_NOTHING = [
    ({}, {"cache": "none", "workers": 1}),
    ({}, {"parts": 3, "own": (1,)}),
    ({}, {"augment": dataclasses.replace(EVERYTHING)}),
    ({"augment": CROP_FLIP}, {"augment": dataclasses.replace(CROP_FLIP, draws=3)}),
    ({"augment": CROP_FLIP}, {"augment": CROP_FLIP, "batch": 7}),
    ({"augment": CROP_FLIP}, {"augment": CROP_FLIP, "subset": 100}),
    ({"augment": DRAWS}, {"augment": dataclasses.replace(DRAWS, draws=5), "batch": 7}),
    ({"augment": None}, {"augment": None, "seed": 4, "batch": 7, "mode": "crop"}),
]  # fmt: skip


def keyed(data, options: dict) -> tuple[str, dict[int, tuple[torch.Tensor, ...]]]:
    with opened(data, **{"augment": EVERYTHING, **options}) as loader:
        return json.dumps(loader.view_key(), sort_keys=True), by_id(list(loader.batches(0)))


def test_the_views_key_changes_with_whatever_decides_the_pixels(resized):
    found = [keyed(resized, options) for options in ({}, *DECIDES)]
    assert len({key for key, _ in found}) == len(found)
    reference = found[0][1]
    for options, (_, looks) in zip(DECIDES, found[1:], strict=True):  # each does decide something
        assert any(i not in reference or not same(reference[i], looks[i]) for i in looks), options


def test_the_views_key_stays_with_what_does_not(resized):
    for one, other in DECIDES_NOTHING:
        (key, looks), (other_key, others) = keyed(resized, one), keyed(resized, other)
        assert key == other_key, other
        assert all(same(looks[i], others[i]) for i in others), other


def test_the_views_key_names_the_stored_images_that_are_read(resized, whole):
    with (
        opened(resized, resolution=12, augment=None, full=32) as a,
        opened(whole, resolution=12, augment=None, full=32) as b,
    ):
        assert (a.view_key()["stored"], b.view_key()["stored"]) == ([12, 32], [32, 32])
    resize, crop = (
        keyed(whole, {"augment": None, "resolution": 20, "centre_crop": c}) for c in (False, True)
    )
    assert resize[0] != crop[0]
    assert not same(resize[1][0], crop[1][0])


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
