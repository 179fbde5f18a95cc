"""Images as cameras, scanners, games and downloads leave them: rendered as a viewer shows them, or named."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cases.command import Done, irkd, irkd_alone, manifest_of


def render(source: Path, out: Path, *more: object) -> Done:
    return irkd("render", "folder", "--path", source, "--out", out, "--resolutions", "16", *more)


def pixels(shards: Path) -> dict[str, np.ndarray]:
    """Every training image by its key."""
    found = {}
    for file in sorted((shards / "r16").glob("train-*.tar")):
        with tarfile.open(file) as tar:
            for member in tar:
                if member.name.endswith(".png") and "mask" not in member.name:
                    data = tar.extractfile(member)
                    assert data is not None
                    found[member.name] = np.asarray(Image.open(io.BytesIO(data.read()))).astype(int)
    return found


def noise(folder: Path, count: int, size: int = 16) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(len(str(folder)))
    for i in range(count):
        Image.fromarray(random.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(folder / f"{i}.png")


def top_left() -> np.ndarray:
    """A picture whose upper half is red and whose left half has green in it: each orientation is told apart."""
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[:16, :, 0] = 220
    picture[:, :16, 1] = 120
    return picture


@pytest.mark.parametrize("suffix", ["jpg", "tiff", "webp"])
def test_orientation_tags_are_applied(tmp_path: Path, suffix: str) -> None:
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    (tmp_path / "d" / "a").mkdir(parents=True)
    for tag, method in undo.items():
        image = Image.fromarray(top_left())
        exif = Image.Exif()
        exif[0x0112] = tag
        turned = image if method is None else image.transpose(Image.Transpose(method))
        turned.save(tmp_path / "d" / "a" / f"{tag}.{suffix}", exif=exif, quality=95)
    render(tmp_path / "d", tmp_path / "s", "--val-fraction", "0").well()
    shown = list(pixels(tmp_path / "s").values())
    assert len(shown) == 8
    for tag, image in enumerate(shown, 1):
        assert image[:6, :, 0].mean() > 170, tag
        assert image[10:, :, 0].mean() < 40, tag
        assert image[:, :6, 1].mean() > 80, tag
        assert image[:, 10:, 1].mean() < 40, tag


def _modes(folder: Path) -> None:
    half = np.zeros((32, 32, 3), np.uint8)
    half[:16] = (200, 40, 40)
    ramp = np.linspace(0, 1, 32 * 32).reshape(32, 32)
    made = {
        "cmyk.jpg": Image.fromarray(half).convert("CMYK"),
        "lab.tif": Image.fromarray(half).convert("LAB"),
        "palette.png": Image.fromarray(half).convert("P"),
        "upper.JPG": Image.fromarray(half),
        "ycbcr.tif": Image.fromarray(half).convert("YCbCr"),
    }
    for name, image in made.items():
        (folder / name.split(".")[0]).mkdir(parents=True)
        extra = {"transparency": b"\x80" * 256} if name == "palette.png" else {}
        image.save(folder / name.split(".")[0] / name, **extra)
    greys = {
        "bits16.png": (ramp * 65535).astype(np.uint16),
        "float1.tif": ramp.astype(np.float32),
        "float255.tif": (ramp * 255).astype(np.float32),
        "int255.tif": (ramp * 255).astype(np.int32),
        "int65535.tif": (ramp * 65535).astype(np.int32),
    }
    for name, values in greys.items():
        (folder / name.split(".")[0]).mkdir(parents=True)
        Image.fromarray(values).save(folder / name.split(".")[0] / name)


def test_every_mode_comes_out_as_a_viewer_shows_it_or_is_named(tmp_path: Path) -> None:
    """But float and 32-bit images that do not agree on what is white are refused: a guess for each would be one."""
    _modes(tmp_path / "d")
    render(tmp_path / "d", tmp_path / "mixed", "--val-fraction", "0").refused("float1.tif", "--white")
    for name in ("float1", "int65535"):
        (tmp_path / "d" / name).rename(tmp_path / name)
        alone = tmp_path / f"only-{name}"
        alone.mkdir()
        (tmp_path / name).rename(alone / name)
        render(alone, tmp_path / f"s-{name}", "--val-fraction", "0").well()
        (image,) = pixels(tmp_path / f"s-{name}").values()
        assert image.min() < 30 < 225 < image.max(), name
    done = render(tmp_path / "d", tmp_path / "s", "--val-fraction", "0", "--max-bad", "10").well()
    names = [
        n
        for n in sorted(p.name for p in (tmp_path / "d").iterdir())
        if f"left out: {tmp_path / 'd' / n}" not in done.said
    ]
    shown = dict(zip(names, pixels(tmp_path / "s").values(), strict=True))
    for name in ("cmyk", "lab", "palette", "upper", "ycbcr"):
        assert shown[name][:6, :, 0].mean() > 150, name
        assert shown[name][:6, :, 2].mean() < 90, name
        assert shown[name][10:].mean() < 40, name
    for name, image in shown.items():
        if name.startswith(("bits", "float", "int")):  # a ramp from black to white, not black, not two tones
            assert image.max() > 225, name
            assert image.min() < 30, name
            assert 100 < image.mean() < 155, name


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "avif", "JPEG", "tif", "bmp", "gif"])
def test_a_readable_suffix_is_not_dropped_uncounted(tmp_path: Path, suffix: str) -> None:
    noise(tmp_path / "d" / "a", 3)
    noise(tmp_path / "d" / "b", 3)
    kind = {"jfif": "JPEG", "jpe": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper())
    if kind not in Image.registered_extensions().values():
        pytest.skip(f"this Pillow writes no {kind}")
    Image.new("RGB", (16, 16), (200, 0, 0)).save(tmp_path / "d" / "a" / f"x.{suffix}", kind)
    done = render(tmp_path / "d", tmp_path / "s", "--val-fraction", "0").well()
    assert manifest_of(tmp_path / "s")["splits"]["train"] == 7 or suffix in done.said


def test_damaged_files_are_named_counted_and_limited(tmp_path: Path) -> None:
    data = tmp_path / "d"
    noise(data / "a", 5)
    noise(data / "b", 5)
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(
        stream, "JPEG"
    )
    (data / "a" / "empty.jpg").touch()
    (data / "a" / "half.jpg").write_bytes(stream.getvalue()[: len(stream.getvalue()) // 2])
    (data / "b" / "page.png").write_text("<!doctype html>404")
    broken = bytearray((data / "b" / "0.png").read_bytes())
    broken[50] ^= 0xFF
    (data / "b" / "sum.png").write_bytes(broken)
    (data / "b" / "nowhere.webp").symlink_to("gone.webp")
    (data / "a" / "folder.png").mkdir()
    bad = ("empty.jpg", "half.jpg", "page.png", "sum.png", "nowhere.webp")
    render(data, tmp_path / "none", "--val-fraction", "0").refused("--max-bad 0")
    render(data, tmp_path / "four", "--val-fraction", "0", "--max-bad", "4").refused("--max-bad 4")
    done = render(data, tmp_path / "five", "--val-fraction", "0", "--max-bad", "5").well("10 train")
    for name in bad:
        assert name in done.said, name


def test_what_is_no_file_does_not_stop_a_render(tmp_path: Path) -> None:
    noise(tmp_path / "d" / "a", 4)
    noise(tmp_path / "d" / "b", 4)
    os.mkfifo(tmp_path / "d" / "b" / "pipe.jpg")
    options = ("--out", tmp_path / "s", "--resolutions", "16", "--max-bad", "1", "--val-fraction", "0")
    done = irkd_alone("render", "folder", "--path", tmp_path / "d", *options, limit=20)
    done.well_or_refused("FIFO" if done.code == 0 else "pipe.jpg")  # counted as left out, or named


@pytest.mark.parametrize("target", [".", ".."])
def test_a_link_that_leads_back_brings_no_image_twice(tmp_path: Path, target: str) -> None:
    noise(tmp_path / "d" / "a", 4)
    noise(tmp_path / "d" / "b", 4)
    (tmp_path / "d" / "a" / "again").symlink_to(target)
    done = render(tmp_path / "d", tmp_path / "s", "--val-fraction", "0").well_or_refused()
    if done.code == 0:
        assert manifest_of(tmp_path / "s")["splits"] == {"train": 8}
    else:
        assert "again" in done.err


def test_links_to_folders_and_images_elsewhere_are_followed(tmp_path: Path) -> None:
    noise(tmp_path / "disk" / "a", 3)
    noise(tmp_path / "disk" / "b", 3)
    (tmp_path / "d" / "b").mkdir(parents=True)
    (tmp_path / "d" / "a").symlink_to(tmp_path / "disk" / "a")
    for i in range(3):
        (tmp_path / "d" / "b" / f"{i}.png").symlink_to(tmp_path / "disk" / "b" / f"{i}.png")
    render(tmp_path / "d", tmp_path / "s", "--val-fraction", "0").well("2 classes", "6 train")


@pytest.mark.parametrize("flat", ["test", "val"])
def test_a_flat_split_makes_no_classes_of_the_splits(tmp_path: Path, flat: str) -> None:
    data = tmp_path / "d"
    for split in ("train", "valid" if flat == "test" else "test"):
        noise(data / split / "cat", 4)
        noise(data / split / "dog", 4)
    noise(data / flat, 3)
    done = render(data, tmp_path / "s").well_or_refused()
    if done.code == 0:
        assert manifest_of(tmp_path / "s")["classes"] == ["cat", "dog"]
    assert flat in done.said


def test_very_few_images_at_all(tmp_path: Path) -> None:
    noise(tmp_path / "one" / "only", 6)
    noise(tmp_path / "few" / "train" / "a", 4)
    noise(tmp_path / "few" / "train" / "b", 1)
    noise(tmp_path / "few" / "val" / "b", 1)
    noise(tmp_path / "empty" / "train" / "a", 3)
    noise(tmp_path / "empty" / "train" / "b", 3)
    noise(tmp_path / "empty" / "val" / "a", 2)
    (tmp_path / "empty" / "val" / "b").mkdir()
    noise(tmp_path / "two" / "a", 2)
    noise(tmp_path / "two" / "b", 1)
    for name in ("one", "few", "empty", "two"):
        render(tmp_path / name, tmp_path / f"{name}-s", "--val-fraction", "0.3").well_or_refused()
