"""The field's other augmentations: pixels and distributions of torchvision's, keyed by sample."""

import json

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode, v2

from irkd_dist import config as configuration
from irkd_dist.data import augment as aug
from irkd_dist.data import policies
from irkd_dist.data.recipe import Augment
from irkd_dist.data.sampler import uniform
from irkd_dist.errors import UserError
from tests.data.conftest import epoch_of, opened
from tests.data.test_augment import IDS, pictures

MANY = np.arange(4000)
CROPS = [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.35, 0.6), (0.5, 1.0)), ((0.9, 1.0), (2.0, 3.0))]


# ---- RandomResizedCrop


@pytest.mark.parametrize(("scale", "ratio"), CROPS)
def test_crop_boxes_have_the_distribution_of_torchvision(scale, ratio):
    """Moments of all four sides; the last case nearly always takes the central part that stands for none that fits."""
    stock, image = v2.RandomResizedCrop(64, scale=scale, ratio=ratio), torch.zeros(3, 64, 64)
    torch.manual_seed(0)
    drawn = [stock.make_params([image]) for _ in MANY]
    theirs = np.array([(d["top"], d["left"], d["top"] + d["height"], d["left"] + d["width"]) for d in drawn])
    ours = aug.crop_boxes(0, 0, MANY, scale, ratio, 64)
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 0.9
    assert np.abs(ours.std(0) - theirs.std(0)).max() < 0.7
    for areas in zip(*(np.quantile(area(b), [0.1, 0.5, 0.9]) for b in (ours, theirs)), strict=True):
        assert abs(areas[0] - areas[1]) < 100  # of 4096
    assert ours.min() >= 0
    assert ours.max() <= 64


def area(boxes):
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def test_crop_boxes_at_another_resolution_are_the_same_view():
    small, large = (aug.crop_boxes(0, 0, MANY, *CROPS[0], size) / size for size in (64, 256))
    assert np.abs(small - large).max() <= 1.6 / 64


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resized_crop_against_torchvision(interpolation):
    images = pictures(len(IDS), 32)
    boxes = aug.crop_boxes(3, 1, IDS, *CROPS[0], 32)
    stock = v2.RandomResizedCrop(24, interpolation=InterpolationMode(interpolation))
    for image, (y, x, bottom, right), ours in zip(
        images, boxes.tolist(), aug.resized_crop(images, boxes, 24, interpolation), strict=True
    ):
        params = {"top": y, "left": x, "height": bottom - y, "width": right - x}
        assert torch.equal(ours, stock.transform(image, params))


# ---- RandAugment


@pytest.mark.parametrize("size", [32, 12])
def test_each_operation_of_rand_augment_against_torchvision(size):
    names = {name.lower(): name for name in v2.RandAugment._AUGMENTATION_SPACE}
    image = pictures(1, size)[0]
    assert [*names] == [n.replace("_", "") for n in policies.RAND_OPERATIONS]
    for name in policies.RAND_OPERATIONS[1:]:
        for level in (0, 3, 9, 15, 30):
            stock = v2.RandAugment(num_ops=1, magnitude=level)
            key = names[name.replace("_", "")]
            stock._AUGMENTATION_SPACE = {key: v2.RandAugment._AUGMENTATION_SPACE[key]}  # type: ignore[misc]
            both = [policies.operation(image[None], name, level, sign, 31)[0] for sign in (False, True)]
            seen = set()
            for seed in range(8):
                torch.manual_seed(seed)
                theirs = stock(image)
                match = [i for i, ours in enumerate(both) if torch.equal(ours, theirs)]
                assert match, (name, level)
                seen |= set(match)
            assert seen == {0, 1}


def test_rand_augment_against_a_loop_over_samples():
    images = pictures(len(IDS), 16)
    counts = np.zeros(14, int)
    for image, i, ours in zip(images, IDS, policies.rand_augment(images, 5, 2, IDS, 2, 9), strict=True):
        expected = image[None]
        for k in range(2):
            u, sign = (uniform(5, 2, np.array([i]), s + 100 * k)[0] for s in (25, 26))
            counts[number := int(u * 14)] += 1
            if number:
                expected = policies.operation(
                    expected, policies.RAND_OPERATIONS[number], 9, bool(sign < 0.5), 31
                )
        assert torch.equal(ours, expected[0])
    assert (counts > 0).all()


# ---- 3-Augment and colour


def test_three_augment_against_torchvision():
    images, kinds = pictures(len(IDS), 224), [0] * 4
    for image, i, ours in zip(images, IDS, policies.three_augment(images, 1, 0, IDS, 0.8), strict=True):
        sigma = 0.1 + 1.9 * uniform(1, 0, np.array([i]), policies.THREE_SIGMA)[0]
        kernel = policies.blur_kernel(sigma, 224)
        changed = [
            image, v2.RandomGrayscale(1.0)(image), v2.RandomSolarize(128, 1.0)(image),
            v2.GaussianBlur(kernel, (float(sigma),) * 2)(image),
        ]  # fmt: skip
        match = [n for n, each in enumerate(changed) if torch.equal(ours, each)]
        assert match, i
        kinds[match[0]] += 1
    assert 3 < kinds[0] < 24  # a fifth of 64
    assert min(kinds[1:]) > 8  # 17 each


def test_blur_fits_small_images():
    assert policies.three_augment(pictures(8, 2), 0, 0, np.arange(8), 1.0).shape == (8, 3, 2, 2)


def test_colour_jitter_against_torchvision():
    images, strength = pictures(len(IDS), 16), (0.4, 0.4, 0.4, 0.1)
    stock = v2.ColorJitter(*strength)
    orders = set()
    for image, i, ours in zip(images, IDS, policies.colour_jitter(images, 1, 0, IDS, strength), strict=True):
        names = ("brightness", "contrast", "saturation", "hue")
        factors = {}
        for name, stream, strong in zip(names, policies.JITTER_FACTORS, strength, strict=True):
            u = uniform(1, 0, np.array([i]), stream)
            factors[f"{name}_factor"] = float(policies.jitter_factor(u, strong, name)[0])
        found = [
            order for order in np.array(np.meshgrid(*[range(4)] * 4)).T.reshape(-1, 4).tolist()
            if len({*order}) == 4
            and torch.equal(ours, stock.transform(image, {"fn_idx": torch.tensor(order), **factors}))
        ]  # fmt: skip
        assert found
        orders.add(tuple(found[0]))
    assert len(orders) > 12


@pytest.mark.parametrize(("strength", "name"), [(0.3, "contrast"), (1.5, "brightness"), (0.1, "hue")])
def test_jitter_factors_have_the_range_of_torchvision(strength, name):
    low, high = getattr(v2.ColorJitter(**{name: strength}), name)
    drawn = policies.jitter_factor(uniform(0, 0, MANY, 30), strength, name)
    assert drawn.min() == pytest.approx(low, abs=0.002)
    assert drawn.max() == pytest.approx(high, abs=0.002)
    assert drawn.mean() == pytest.approx((low + high) / 2, abs=0.02 * (high - low))


# ---- as a whole

ALL = Augment(
    crop="resized", scale=(0.3, 1.0), rand_augment=2, three_augment=0.5, colour_jitter=0.3, hue=0.1, erase=0.3,
    auto_augment=0.3, policy="imagenet", mixup=0.2, cutmix=1.0,
)  # fmt: skip


@pytest.mark.parametrize("augment", [ALL, Augment(repeats=3), Augment(repeats=2, mixup=0.2, cutmix=1.0)])
@pytest.mark.parametrize("world", [2, 3])
def test_every_world_sees_the_same(resized, augment, world):
    alone = epoch_of(resized, augment=augment, batch=32)
    parts = [epoch_of(resized, augment=augment, batch=32, parts=world, own=(r,)) for r in range(world)]
    for step, whole in enumerate(alone):
        for part in parts:
            mine = part[step]
            at = mine.positions
            assert (mine.ids == whole.ids[at]).all()
            assert torch.equal(mine.images, whole.images[at])
            if whole.soft_labels is not None:
                assert mine.soft_labels is not None
                assert torch.equal(mine.soft_labels, whole.soft_labels[at])


def test_repeats_are_other_draws_of_the_same_samples(resized):
    batches = epoch_of(resized, augment=Augment(repeats=3), batch=30)
    plain = {int(i): image for b in epoch_of(resized, augment=Augment(), batch=30)
             for i, image in zip(b.ids, b.images, strict=True)}  # fmt: skip
    assert [len(b.ids) for b in batches] == [30] * 5
    seen = np.concatenate([b.ids for b in batches])
    assert len({*seen.tolist()}) == 50
    for b in batches:
        assert (np.unique(b.ids, return_counts=True)[1] == 3).all()
        for n in range(0, 30, 3):
            images = b.images[n : n + 3]
            assert torch.equal(
                images[0], plain[int(b.ids[n])]
            )  # the first is the draw of a run without repeats
            assert not torch.equal(images[0], images[1]) or not torch.equal(images[1], images[2])


def test_a_view_key_of_earlier_releases_stays(resized):
    keys = {"padding", "padding_at", "flip", "auto_augment", "erase", "mixup", "cutmix", "smoothing"}
    with opened(resized, augment=Augment()) as loader:
        assert loader.view_key()["augment"].keys() == keys
    with opened(resized, augment=ALL) as loader:
        told = loader.view_key()["augment"]
        assert json.loads(json.dumps(told)) == told
        assert told.keys() == keys | {
            "crop", "scale", "rand_augment", "three_augment", "colour_jitter", "hue", "policy"
        }  # fmt: skip


BASE = {
    "curriculum": {
        "stages": [
            {"resolution": 12, "augment": {"rand_augment": 1, "scale": [0.5, 1.0]}},
            {"resolution": 16},
        ]
    }
}


def test_a_stage_has_its_own_augmentation():
    config = configuration.from_dict({**BASE, "augment": {"rand_augment": 3}}, "test")
    weak, strong = (configuration.stage_augment(config, s) for s in configuration.stages(config))
    assert (weak.rand_augment, weak.scale, strong.rand_augment) == (1, (0.5, 1.0), 3)
    assert configuration.from_dict(configuration.to_dict(config), "again") == config


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"rand_augmnt": 1}, "unknown key rand_augmnt=1; did you mean rand_augment?"),
        ({"draws": 3}, "augment.draws: it holds for the whole run"),
        ({"erase": 2}, "erase=2"),
        ({"scale": [0.9, 0.5]}, r"augment.scale=\[0.9, 0.5\]: the first is above the second"),
    ],
)
def test_a_wrong_key_of_a_stage_is_named(own, said):
    with pytest.raises(UserError, match=said) as error:
        configuration.from_dict({"curriculum": {"stages": [{"resolution": 12, "augment": own}]}}, "test")
    assert "curriculum.stages[0].augment" in str(error.value)
    assert "\n" not in str(error.value)


def test_repeats_with_a_cache_are_refused():
    teacher = {"run": "x", "cache": {"folder": "y"}}
    with pytest.raises(UserError, match=r"augment\.repeats=2 with teacher\.cache\.folder"):
        configuration.from_dict({**BASE, "augment": {"repeats": 2}, "teacher": teacher}, "test")
