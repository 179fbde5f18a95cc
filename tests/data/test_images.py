"""Images of a source become 8-bit RGB as a viewer shows them; what cannot is refused, what was changed is told."""

import io

import numpy as np
import pytest
from PIL import Image

from irkd_dist.data import images
from irkd_dist.data.sources import Raw

RAMP = np.linspace(0, 1, 32 * 32).reshape(32, 32)


def _encoded(image: Image.Image, form: str, **settings: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **settings)
    return stream.getvalue()


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("array", "form"),
    [
        (RAMP.astype(np.float32), "TIFF"),
        ((RAMP * 255).astype(np.float32), "TIFF"),
        ((RAMP * 65535).astype(np.float32), "TIFF"),
        ((RAMP * 255).astype(np.int32), "TIFF"),
        ((RAMP * 65535).astype(np.int32), "TIFF"),
        ((RAMP * 65535).astype(np.uint16), "TIFF"),
        ((RAMP * 65535).astype(np.uint16), "PNG"),
        (RAMP, "npy"),
        (RAMP.astype(np.float16), "npy"),
        ((RAMP * 255).astype(np.int16), "npy"),
        ((RAMP * 65535).astype(">u2"), "npy"),
        ((RAMP * 255).astype(np.int64), "npy"),
    ],
)
def test_every_depth_keeps_its_brightness(array: np.ndarray, form: str) -> None:
    data = _npy(array) if form == "npy" else _encoded(Image.fromarray(array), form)
    loaded = images.load(Raw("x", data))
    assert np.abs(np.asarray(loaded.image).astype(int) - RAMP[..., None] * 255).max() <= 1.01
    assert loaded.facts >= {"deep"}


@pytest.mark.parametrize("low_and_high", [(-1, 200), (0, 70_000), (float("nan"), 1), (0, float("inf"))])
def test_a_range_that_nobody_can_know_is_refused(low_and_high: tuple[float, float]) -> None:
    array = np.full((8, 8), low_and_high[0], np.float32)
    array[0] = low_and_high[1]
    for data in (_npy(array), _encoded(Image.fromarray(array), "TIFF")):
        with pytest.raises(ValueError, match=r"which is none of 0\.\.1, 0\.\.255 and 0\.\.65535"):
            images.load(Raw("x", data))


def test_sixteen_bits_that_hold_eight_are_told() -> None:
    dark = Image.fromarray((RAMP * 255).astype(np.uint16))
    assert images.load(Raw("x", _encoded(dark, "PNG"))).facts >= {"deep", "dark"}


def test_arrays_of_every_kind_and_those_that_are_no_image() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(images.load(Raw("x", _npy(pixels))).image), pixels)
    np.testing.assert_array_equal(
        np.asarray(images.load(Raw("x", pixels[..., :1])).image)[..., 2], pixels[..., 0]
    )
    np.testing.assert_array_equal(
        np.asarray(images.load(Raw("x", pixels > 99)).image), np.where(pixels > 99, 255, 0)
    )
    for wrong in (
        pixels[0, 0],
        pixels.transpose(2, 0, 1),
        pixels[:0],
        pixels[None],
        pixels * 1j,
        pixels.astype(str),
    ):
        with pytest.raises(ValueError, match=r"no image"):
            images.load(Raw("x", _npy(wrong)))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_tags_are_applied_in_every_format(form: str, orientation: int) -> None:
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :12] = (200, 40, 40)  # red at the top left
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # transpositions that the tag's is the inverse of
    image = Image.fromarray(upright)
    if orientation > 1:
        image = image.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    loaded = images.load(Raw("x", _encoded(image, form, exif=exif)))
    pixels = np.asarray(loaded.image).astype(int)
    assert pixels.shape == upright.shape
    assert pixels[:6, :10, 0].mean() > 150
    assert pixels[10:].mean() < 20
    assert ("turned" in loaded.facts) == (orientation > 1)


def test_what_is_changed_is_told() -> None:
    colour = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    alpha = colour.convert("RGBA")
    alpha.putalpha(128)
    told = {
        "plain": (colour, "PNG", {}),
        "grey": (colour.convert("L"), "PNG", {}),
        "alpha": (alpha, "PNG", {}),
        "palette": (colour.quantize(8), "PNG", {"transparency": 0}),
        "frames": (
            colour,
            "WEBP",
            {"save_all": True, "append_images": [colour.rotate(90)], "lossless": True},
        ),
    }
    found = {name: images.load(Raw(name, _encoded(i, form, **s))) for name, (i, form, s) in told.items()}
    facts = {name: loaded.facts - {"not_square"} for name, loaded in found.items()}
    assert facts == {
        "plain": set(),
        "grey": {"grey"},
        "alpha": {"alpha"},
        "palette": {"alpha"},
        "frames": {"frames"},
    }
    assert all("not_square" in loaded.facts for loaded in found.values())
    for name in ("plain", "alpha", "frames"):  # colours beneath alpha stay, the first frame is taken
        np.testing.assert_array_equal(np.asarray(found[name].image), np.asarray(colour))


def test_each_way_to_fit_what_is_not_square() -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, :10], wide[:, 10:20], wide[:, 20:] = 50, 100, 150
    image = Image.fromarray(wide)
    crop, squash, pad = (
        np.asarray(images.fit(image, 30, how)).astype(int) for how in ("crop", "squash", "pad")
    )
    assert crop.shape == squash.shape == pad.shape == (30, 30, 3)
    assert set(np.unique(crop)) == {100}
    assert [squash[:, x].mean().round() for x in (2, 15, 27)] == [50, 100, 150]
    assert pad[:10].max() == pad[20:].max() == 0
    assert [pad[10:20, x].mean().round() for x in (2, 15, 27)] == [50, 100, 150]
    assert images.fit(Image.new("L", (10_000, 1)), 8, "pad").size == (8, 8)
    square = image.crop((0, 0, 10, 10))
    assert all(images.fit(square, 10, how) is square for how in ("crop", "squash", "pad"))


def test_a_mask_follows_its_image_or_is_refused() -> None:
    """Drawn on the stored pixels of a picture that a tag turns, or on the turned ones; of another scale or shape."""
    image = Image.fromarray(np.zeros((30, 60, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.zeros((30, 60), np.uint8)
    stored[:10, :20] = 255
    turned = np.rot90(stored, -1)

    def seen(mask: np.ndarray) -> np.ndarray:
        raw = Raw("x", _encoded(image, "JPEG", exif=exif), _encoded(Image.fromarray(mask), "PNG"))
        loaded = images.load(raw)
        assert loaded.image.size == (30, 60)
        assert loaded.mask is not None
        return np.asarray(loaded.mask)

    np.testing.assert_array_equal(seen(stored), turned)
    np.testing.assert_array_equal(seen(np.ascontiguousarray(turned)), turned)
    assert seen(np.full((120, 60), 255, np.uint8)).shape == (120, 60)
    with pytest.raises(ValueError, match="its mask has 50x50 pixels, the image 30x60"):
        seen(np.full((50, 50), 255, np.uint8))


@pytest.mark.parametrize("palette", [False, True])
def test_a_mask_of_ones_is_refused(palette: bool) -> None:
    mask = Image.fromarray((np.arange(16).reshape(4, 4) > 7).astype(np.uint8))
    if palette:
        mask = mask.convert("P")
        mask.putpalette([0, 0, 0, 128, 0, 0])
    image = _encoded(Image.new("RGB", (4, 4)), "PNG")
    with pytest.raises(
        ValueError, match=r"its mask has no value above (1|38)(, of a palette)?, and the object is 128"
    ):
        images.load(Raw("x", image, _encoded(mask, "PNG")))
    assert images.load(Raw("x", image, _encoded(Image.new("L", (4, 4)), "PNG"))).mask is not None


def test_a_malformed_tag_beside_the_orientation_turns_nobody_away() -> None:
    """As some cameras write them: ImageWidth as a text."""
    tags = b"".join(
        (tag).to_bytes(2, "little") + kind.to_bytes(2, "little") + count.to_bytes(4, "little") + value
        for tag, kind, count, value in ((0x0100, 2, 4, b"60\0\0"), (0x0112, 3, 1, b"\6\0\0\0"))
    )
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + tags + bytes(4)
    loaded = images.load(Raw("x", _encoded(Image.new("RGB", (60, 30)), "JPEG", exif=exif)))
    assert loaded.image.size == (30, 60)
