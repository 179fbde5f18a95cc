"""Batched augmentations against torchvision, timm and naive loops; every draw a function of the sample id."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv1
from timm.data.mixup import cutmix_bbox_and_lam, mixup_target
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from irkd_dist.data import augment as aug
from irkd_dist.data import policies
from irkd_dist.data.recipe import Augment
from irkd_dist.data.sampler import uniform

IDS = np.arange(64) * 31 + 5


def pictures(n: int, size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (n, 3, 5, 5), generator=generator, dtype=torch.uint8)
    return tvf.resize(coarse, [size, size], antialias=True)


@pytest.mark.parametrize(("stored", "size", "padding"), [(32, 32, 4), (12, 12, 2), (32, 20, 4), (16, 16, 0)])
def test_crop_against_torchvision(stored, size, padding):
    images = pictures(len(IDS), stored)
    offsets = aug.crop_offsets(3, 1, IDS, padding, size, stored)
    places = stored + 2 * padding - size + 1
    assert offsets.min() >= 0
    assert offsets.max() < places
    if padding:
        assert {tuple(o) for o in offsets.tolist()} - {tuple(offsets[0].tolist())}
    cropped = aug.random_crop(images, offsets, padding, size)
    for image, (y, x), ours in zip(images, offsets.tolist(), cropped, strict=True):
        assert torch.equal(ours, tv1.crop(tv1.pad(image, [padding]), y, x, size, size))


def test_crop_offsets_reach_every_place_equally():
    offsets = aug.crop_offsets(0, 0, np.arange(81_000), 4, 32)
    counts = np.bincount(offsets[:, 0] * 9 + offsets[:, 1], minlength=81)
    assert ((counts - 1000) ** 2 / 1000).sum() < 140  # chi squared, 80 degrees of freedom


def test_crop_at_another_resolution_is_the_same_in_proportion():
    small = aug.crop_offsets(0, 0, IDS, 2, 16) / 5
    large = aug.crop_offsets(0, 0, IDS, 4, 32) / 9
    assert np.abs(small - large).max() < 1 / 5


def test_a_crop_larger_than_the_padded_image_is_refused():
    with pytest.raises(ValueError, match="40 px crop does not fit an image of 32 px padded by 3 px"):
        aug.crop_offsets(0, 0, IDS, 3, 40, 32)


def test_flip_against_torchvision():
    images, mask = pictures(len(IDS), 12), aug.flip_mask(0, 0, IDS)
    assert 0 < mask.sum() < len(IDS)
    for image, flipped, ours in zip(images, mask, aug.flip(images, mask), strict=True):
        assert torch.equal(ours, tv1.hflip(image) if flipped else image)


def test_normalize_against_torchvision():
    images, mean, std = pictures(4, 16), (0.49, 0.48, 0.45), (0.2, 0.24, 0.26)
    expected = tv1.normalize(images.float() / 255, mean, std)
    torch.testing.assert_close(aug.normalize(images, mean, std), expected, rtol=0, atol=2e-6)
    assert aug.normalize(images, mean, std, torch.bfloat16).dtype == torch.bfloat16


def test_centre_crop_and_resize_against_torchvision():
    images = pictures(3, 32)
    assert torch.equal(
        aug.centre_crop(images, 13), torch.stack([tv1.center_crop(i, [13, 13]) for i in images])
    )
    in_float = torch.stack([tv1.resize(i.float(), [12, 12], antialias=True) for i in images])
    assert (aug.resize(images, 12).float() - in_float).abs().max() <= 1
    assert aug.resize(images, 32) is images


# ---- erasing


def test_erase_against_torchvision_loop():
    images = torch.randn(len(IDS), 3, 32, 32)
    boxes = aug.erase_boxes(0, 0, IDS, 0.6, 32)
    ours = aug.erase(images.clone(), boxes)
    drawn = 0
    for image, (top, left, bottom, right), mine in zip(images, boxes.tolist(), ours, strict=True):
        assert torch.equal(
            mine, tvf.erase(image, top, left, bottom - top, right - left, torch.zeros(1, 1, 1))
        )
        drawn += bottom > top
    assert 0.4 < drawn / len(IDS) < 0.8


def test_erase_boxes_have_the_distribution_of_torchvision():
    boxes = aug.erase_boxes(0, 0, np.arange(4000), 1.0, 32)
    stock, torchvisions = v2.RandomErasing(p=1.0), []
    torch.manual_seed(0)
    for _ in range(4000):
        drawn = stock.make_params([torch.zeros(3, 32, 32)])
        torchvisions.append((drawn["i"], drawn["j"], drawn["i"] + drawn["h"], drawn["j"] + drawn["w"]))
    theirs = np.array(torchvisions)
    assert np.abs(boxes.mean(0) - theirs.mean(0)).max() < 0.6
    assert np.abs(boxes.std(0) - theirs.std(0)).max() < 0.4
    assert abs(erased(boxes).mean() - erased(theirs).mean()) < 6


def erased(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def test_erase_off_draws_nothing():
    assert not aug.erase_boxes(0, 0, IDS, 0.0, 32).any()


# ---- AutoAugment


def stock_auto_augment() -> v2.AutoAugment:
    return v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)


@pytest.mark.parametrize("name", policies.TABLES)
def test_policy_tables_are_torchvisions(name):
    stock = v2.AutoAugment(v2.AutoAugmentPolicy[name.upper()])
    theirs = [
        tuple((operation.lower(), p, level or 0) for operation, p, level in pair) for pair in stock._policies
    ]
    ours = [tuple((o.replace("_", ""), p, level) for o, p, level in pair) for pair in policies.TABLES[name]]
    assert ours == theirs


@pytest.mark.parametrize("size", [32, 12])
def test_each_operation_against_torchvision(size):
    tables = [*policies.TABLES.values()]
    operations = sorted({(name, level) for table in tables for pair in table for name, _, level in pair})
    names = {name.lower(): name for name in v2.AutoAugment._AUGMENTATION_SPACE}
    images = pictures(4, size)
    for name, level in operations:
        stock = stock_auto_augment()
        stock._policies = [((names[name.replace("_", "")], 1.0, level), ("Invert", 0.0, None))]
        for image in images:
            # Which sign torchvision drew is not visible: both of ours must occur, and nothing else.
            ours = [policies.operation(image[None], name, level, sign)[0] for sign in (False, True)]
            seen = set()
            for seed in range(12):
                torch.manual_seed(seed)
                theirs = stock(image)
                match = [i for i, mine in enumerate(ours) if torch.equal(mine, theirs)]
                assert match, (name, level, seed)
                seen |= set(match)
            assert seen == {0, 1}, (name, level)


def test_auto_augment_against_a_loop_over_samples():
    images = pictures(len(IDS), 32)
    ours = policies.auto_augment(images, 5, 2, IDS, 0.7)
    changed = 0
    for image, i, mine in zip(images, IDS, ours, strict=True):
        key, expected = np.array([i]), image[None]
        if uniform(5, 2, key, policies.POLICY_USED)[0] < 0.7:
            pair = policies.CIFAR10[int(uniform(5, 2, key, policies.POLICY)[0] * 25)]
            for half, (name, chance, level) in enumerate(pair):
                if uniform(5, 2, key, policies.POLICY_APPLY[half])[0] < chance:
                    negative = uniform(5, 2, key, policies.POLICY_SIGN[half])[0] < 0.5
                    expected = policies.operation(expected, name, level, negative)
        assert torch.equal(mine, expected[0])
        changed += not torch.equal(mine, image)
    assert 0.3 < changed / len(IDS) < 0.75


def test_auto_augment_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    policies.auto_augment(pictures(len(IDS), 12), 0, 0, IDS, 1.0)
    assert torch.equal(before, torch.get_rng_state())


def test_augmentations_do_not_depend_on_the_batch():
    size, padding = 20, 2
    images = pictures(len(IDS), size)

    def run(rows: np.ndarray) -> torch.Tensor:
        ids = IDS[rows]
        out = aug.random_crop(images[rows], aug.crop_offsets(1, 2, ids, padding, size), padding, size)
        out = policies.auto_augment(aug.flip(out, aug.flip_mask(1, 2, ids)), 1, 2, ids, 1.0)
        out = aug.normalize(out, (0.5, 0.4, 0.3), (0.2, 0.21, 0.22))
        return aug.erase(out, aug.erase_boxes(1, 2, ids, 0.5, size))

    whole = run(np.arange(len(IDS)))
    for rows in (np.arange(len(IDS))[::-1].copy(), np.arange(3, 40, 5), np.array([17])):
        assert torch.equal(run(rows), whole[rows])


# ---- MixUp and CutMix


def test_cutmix_box_is_timms(monkeypatch):
    rng = np.random.default_rng(0)
    for _ in range(300):
        size, lam = int(rng.integers(8, 40)), float(rng.random())
        y, x = (int(v) for v in rng.integers(0, size, 2))
        centres = iter((y, x))
        monkeypatch.setattr(np.random, "randint", lambda *a, centres=centres, **k: next(centres))
        (top, bottom, left, right), corrected = cutmix_bbox_and_lam((3, size, size), lam)
        box = aug.cutmix_box(lam, y, x, size)
        assert box == (top, left, bottom, right)
        assert 1 - (box[2] - box[0]) * (box[3] - box[1]) / size**2 == pytest.approx(corrected, abs=1e-12)


def mixes(seed: int, draw: int, keys: int, mixup: float, cutmix: float, size: int) -> list[aug.Mix]:
    return aug.draw_mix(seed, draw, np.arange(keys), mixup, cutmix, size)


def test_cutmix_of_a_batch_covers_one_minus_lam_of_the_pixels():
    for mix in mixes(0, 0, 40, 0.0, 1.0, size=24):
        assert mix.box is not None
        mixed = aug.apply_mix(torch.zeros(2, 3, 24, 24), torch.ones(2, 3, 24, 24), [mix])
        assert mixed.mean().item() == pytest.approx(1 - mix.lam, abs=1e-6)


def test_mixup_and_its_soft_labels_against_timm():
    images, labels = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 3, 9])
    mix = mixes(0, 0, 4, 0.2, 0.0, size=8)[3]
    assert mix.box is None
    assert 0 < mix.lam < 1
    expected = images * mix.lam + images.flip(0) * (1 - mix.lam)
    torch.testing.assert_close(aug.apply_mix(images, images.flip(0), [mix]), expected)
    soft = aug.soft_labels(labels, labels.flip(0), np.array([mix.lam]), 10, 0.05)
    torch.testing.assert_close(soft, mixup_target(labels, 10, mix.lam, 0.05))
    torch.testing.assert_close(soft.sum(1), torch.ones(6))


def test_samples_mixed_each_for_itself_are_as_mixed_alone():
    images, partners, labels = torch.randn(9, 3, 16, 16), torch.randn(9, 3, 16, 16), torch.arange(9)
    drawn = mixes(4, 1, 9, 0.4, 1.0, size=16)
    assert {mix.box is None for mix in drawn} == {True, False}
    together = aug.apply_mix(images, partners, drawn)
    soft = aug.soft_labels(labels, labels.flip(0), np.array([mix.lam for mix in drawn]), 9, 0.1)
    for i, mix in enumerate(drawn):
        one = slice(i, i + 1)
        assert mix == aug.draw_mix(4, 1, np.array([i]), 0.4, 1.0, 16)[0]
        assert torch.equal(together[one], aug.apply_mix(images[one], partners[one], [mix]))
        torch.testing.assert_close(soft[one], mixup_target_of(labels[one], labels.flip(0)[one], mix.lam))


def mixup_target_of(label: torch.Tensor, partner: torch.Tensor, lam: float) -> torch.Tensor:
    """Label and partner at the two ends of a batch, as timm mixes them."""
    return mixup_target(torch.cat([label, partner]), 9, lam, 0.1)[:1]


def test_draws_of_lam_and_mode():
    draws = mixes(7, 1, 3000, 0.2, 1.0, size=1000)
    cut = [mix.box is not None for mix in draws]
    assert 0.46 < np.mean(cut) < 0.54
    lams = np.array([mix.lam for mix, is_cut in zip(draws, cut, strict=True) if not is_cut])
    assert abs(lams.mean() - 0.5) < 0.04  # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1))
    assert abs(lams.var() - 1 / (4 * 1.4)) < 0.01
    assert draws == mixes(7, 1, 3000, 0.2, 1.0, size=1000)
    assert mixes(7, 1, 1, 0.0, 0.0, size=32) == [aug.Mix(1.0, None)]


def test_mix_and_boxes_in_proportion():
    assert aug.scale_mix(aug.Mix(0.7, (2, 0, 8, 5)), 16, 32) == aug.Mix(0.7, (4, 0, 16, 10))
    assert aug.scale_mix(aug.Mix(0.7, None), 16, 32) == aug.Mix(0.7, None)
    assert aug.scale_boxes(np.array([[0, 3, 12, 12]]), 12, 32).tolist() == [[0, 8, 32, 32]]


# ---- the settings


def test_draws_come_again_after_as_many_epochs_as_there_are():
    assert [Augment().draw(epoch) for epoch in (0, 1, 7)] == [0, 1, 7]
    assert [Augment(draws=3).draw(epoch) for epoch in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_the_settings_come_from_the_configuration_without_torch():
    code = """
import sys
from irkd_dist import config
tree = {"fixed": {"resolution": 16, "epochs": 1}, "augment": {"draws": 4}}
new = config.to_dict(config.from_dict(tree, "here"))
old = config.to_dict(config.from_dict({**tree, "augment": {}}, "here"))
assert config.semantic_difference(old, new) == ["augment.draws: None -> 4"]
del old["augment"]["draws"]  # as a run folder of an earlier version has it
assert config.semantic_difference(old, config.to_dict(config.from_dict(old, "here"))) == []
assert "torch" not in sys.modules
for wrong in (0, -1, 1.5, True):
    try:
        config.from_dict({**tree, "augment": {"draws": wrong}}, "here")
    except config.UserError as error:
        assert f"augment.draws={wrong!r}" in str(error), error
    else:
        raise AssertionError(wrong)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
