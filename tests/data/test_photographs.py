"""Photographs of any shape: stored larger than they are seen, cropped as timm does, from one size or from several."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from timm.data import create_transform

from irkd_dist.data import render, shards
from irkd_dist.data.recipe import Augment
from irkd_dist.data.sources import open_source
from irkd_dist.errors import UserError
from tests.data.conftest import epoch_of
from tests.training.launch import irkd

SHAPES = [(90, 60), (50, 120), (64, 64), (200, 81)]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 4)):
        for label in ("cat", "dog"):
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
                image = PIL.Image.fromarray(coarse).resize(SHAPES[i % 4], PIL.Image.Resampling.BICUBIC)
                image.save(folder / split / label / f"{i}.png")
    return folder


def rendered(
    photographs: Path, out: Path, *resolutions: int, pct: float = 0.875
) -> tuple[Path, shards.Manifest]:
    options = render.Options(resolutions, val_fraction=0.2, crop_pct=pct)
    manifest = render.render(open_source("folder", photographs), out, options)
    assert manifest is not None
    return out, manifest


def test_sizes_are_timms(photographs: Path, tmp_path: Path) -> None:
    _, manifest = rendered(photographs, tmp_path / "a", 28, 42, 56)
    assert manifest.resolutions == (32, 48, 64)
    assert manifest.largest == 56
    assert [manifest.stored(r) for r in (20, 28, 30, 56, 57)] == [32, 32, 48, 64, None]
    assert shards.load_manifest(tmp_path / "a").crop_pct == 0.875
    for pct in (0.875, 0.9, 0.95, 0.96):
        for size in (96, 160, 224, 384):
            made = create_transform(size, crop_pct=pct, interpolation="bicubic")
            assert replace(manifest, render={"crop_pct": pct}).scaled(size) == made.transforms[0].size


@pytest.mark.parametrize("resolutions", [(28, 56), (56,)])
def test_evaluation_is_timms(photographs: Path, tmp_path: Path, resolutions: tuple[int, ...]) -> None:
    """Shorter side to 32, centre crop of 28, from a photograph of any shape; also from those at 64 px alone."""
    data = rendered(photographs, tmp_path / "a", *resolutions)
    (batch,) = epoch_of(data, "test", 28, augment=None)
    files = sorted((photographs / "test").rglob("*.png"))
    made = create_transform(28, crop_pct=0.875, interpolation="lanczos", mean=data[1].mean, std=data[1].std)
    for image, file in zip(batch.images, files, strict=True):
        theirs = made(PIL.Image.open(file).convert("RGB"))
        # of a standard deviation: timm's crop of a side of 79 px lies half a pixel beside the middle
        assert (image - theirs).abs().mean() < 0.1, file
        assert (image.flip(-1) - theirs).abs().mean() > 0.3
        shifted = (image[:, :, 2:] - theirs[:, :, :-2]).abs().mean()
        assert shifted > 1.5 * (image - theirs).abs().mean(), file
    largest = rendered(photographs, tmp_path / "b", 56)
    (whole,) = epoch_of(largest, "test", 56, augment=None)
    assert whole.images.shape[1:] == (3, 56, 56)


@pytest.mark.parametrize(
    "augment", [Augment(crop="resized"), Augment(padding=0), Augment(crop="resized", mixup=0.3)]
)
def test_training_crops_from_the_larger_image(photographs: Path, tmp_path: Path, augment: Augment) -> None:
    data = rendered(photographs, tmp_path / "a", 28, 56)
    batches = epoch_of(data, "train", 28, augment=augment, full=56)
    assert {b.images.shape[1:] for b in batches} == {(3, 28, 28)}
    assert {b.full.shape[1:] for b in batches if b.full is not None} == {(3, 56, 56)}
    for b in batches:
        assert b.full is not None
        small = torch.nn.functional.avg_pool2d(b.full, 2)
        assert float((small - b.images).abs().mean()) < 0.3  # the same view at another size


def test_a_run_and_its_evaluation_on_one_stored_size(photographs: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    said = irkd(
        "render",
        "folder",
        "--path",
        str(photographs),
        "--out",
        str(out),
        "--size",
        "56",
        "--crop-pct",
        "0.875",
    )
    assert "at 64 px (seen up to 56 px, crop_pct 0.875)" in said.stdout
    assert (out / "preview.png").is_file()
    file = tmp_path / "run.yaml"
    file.write_text(f"""
data: {{shards: {out}, batch: 4}}
student: {{name: custom, patch: 4, options: {{embed_dim: 16, depth: 1, num_heads: 2}}}}
augment: {{crop: resized, three_augment: 1.0}}
curriculum: {{stages: [{{resolution: 28, augment: {{rand_augment: 1}}}}, {{resolution: 56}}], epochs: 1}}
out: {tmp_path}
name: run
""")
    irkd("train", str(file))
    assert "28 px" in irkd("evaluate", str(tmp_path / "run")).stdout
    wrong = irkd("train", str(file), "curriculum.stages=[{resolution: 60}]", "name=wrong", check=False)
    assert wrong.returncode == 2
    assert "60 px" in wrong.stderr


def test_wrong_options_are_named(photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--crop-pct 2"):
        render.check(render.Options((28,), crop_pct=2.0))
    with pytest.raises(UserError, match="--mode crop"):
        render.check(render.Options((28,), mode="crop", crop_pct=0.9))
    without = ["render", "folder", "--path", str(photographs), "--out", str(tmp_path / "x")]
    assert "no size is given" in irkd(*without, check=False).stderr
