"""Small shards, loaders of them by keyword, and what two batches are compared by."""

import dataclasses
import hashlib
import io
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
from irkd_dist.data.decoded import Dataset, Work
from irkd_dist.data.loader import Batch, Loader
from irkd_dist.data.recipe import Augment
from irkd_dist.data.sampler import Share
from irkd_dist.data.views import View

SIZES = {"train": 150, "val": 21}
PER_SHARD = 80
CLASSES = 5
MEAN, STD = (0.5, 0.45, 0.4), (0.25, 0.24, 0.23)
EVERYTHING = Augment(auto_augment=0.5, erase=0.4, mixup=0.2, cutmix=1.0, smoothing=0.1)
CROP_FLIP = Augment()
DRAWS = dataclasses.replace(EVERYTHING, draws=2)


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


def naive_view(image: torch.Tensor, i: int, padding: int, size: int, epoch: int) -> torch.Tensor:
    """Crop and flip of one sample by torchvision."""
    key = np.array([i])
    y, x = aug.crop_offsets(3, epoch, key, padding, size, image.shape[-1])[0].tolist()
    cropped = tv1.crop(tv1.pad(image, [padding]), y, x, size, size)
    return tv1.hflip(cropped) if aug.flip_mask(3, epoch, key)[0] else cropped


def assert_same(a: Batch, b: Batch) -> None:
    for field in dataclasses.fields(Batch):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, torch.Tensor):
            assert torch.equal(left, right), field.name
        else:
            assert np.array_equal(left, right), field.name


def by_id(batches: list[Batch]) -> dict[int, tuple[torch.Tensor, ...]]:
    """What each sample looks like, and its soft label."""
    found = {}
    for b in batches:
        tensors = [t for t in (b.images, b.full, b.labels, b.soft_labels) if t is not None]
        found |= {int(i): tuple(t[row] for t in tensors) for row, i in enumerate(b.ids) if b.weight[row] > 0}
    return found


def same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
