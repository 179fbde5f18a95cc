"""The shard format: stock readers agree with ours, and damage is an error that names the file."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import socket
import struct
import tarfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from irkd_dist.data import samples, shards
from irkd_dist.data.pixels import encode
from irkd_dist.errors import UserError


@pytest.fixture
def copy(shapes: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shapes, tmp_path / "copy"))


def _manifest_with(folder: Path, **changes: object) -> None:
    path = folder / shards.MANIFEST
    raw = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            del raw[key]
        else:
            raw[key] = value
    path.write_text(json.dumps(raw))


def test_stock_webdataset_and_tarfile_read_the_same_samples(shapes: Path) -> None:
    manifest = shards.load_manifest(shapes)
    keys = None
    for resolution in manifest.resolutions:
        for split, count in manifest.splits.items():
            files = [
                str(shapes / f"r{resolution}" / s.name) for s in manifest.shards[f"r{resolution}"][split]
            ]
            stock = list(wds.WebDataset(files, shardshuffle=False).decode("rgb8"))
            ours = shards.open_split(shapes, manifest, split, resolution)
            assert len(stock) == len(ours) == count
            for i, sample in enumerate(stock):
                assert sample["__key__"] == ours.keys[i]
                assert sample["cls"] == ours.labels[i]
                image = shards.decode(ours.image(i), manifest.encoding)
                assert image.shape == (3, resolution, resolution)
                assert image.dtype == torch.uint8
                np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), sample["png"])
                mask = ours.mask(i)
                assert mask is not None
                np.testing.assert_array_equal(
                    np.asarray(Image.open(io.BytesIO(mask))), sample["mask.png"][..., 0]
                )
            ours.close()
            if split == "train":
                assert keys in (None, ours.keys)  # the same keys in the same order at every resolution
                keys = ours.keys


def test_manifest_survives_a_round_trip(shapes: Path, tmp_path: Path) -> None:
    manifest = shards.load_manifest(shapes)
    shards.write_manifest(tmp_path, manifest)
    assert shards.load_manifest(tmp_path) == manifest
    assert (tmp_path / shards.MANIFEST).read_bytes() == (shapes / shards.MANIFEST).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 7}, "version 7, this irkd reads version 1"),
        ({"version": None}, "no version"),
        ({"mean": None}, "incomplete: no 'mean'"),
        ({"encoding": "tiff"}, "unknown encoding 'tiff'"),
        ({"splits": {"train": 111}}, "lists 110 samples, splits say 111"),
        ({"resolutions": [12, 8]}, "not ascending"),
        ({"resolutions": [8, 99]}, "incomplete: no 'r99'"),
    ],
)
def test_wrong_manifests_are_refused(copy: Path, changes: dict, message: str) -> None:
    _manifest_with(copy, **changes)
    with pytest.raises(UserError, match=r"manifest\.json") as error:
        shards.load_manifest(copy)
    assert message in str(error.value)


def test_a_folder_without_a_whole_manifest_is_refused(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder of shards.*irkd render"):
        shards.load_manifest(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no manifest.json"):
        shards.load_manifest(tmp_path / "empty")
    path = copy / shards.MANIFEST
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match="not valid JSON"):
        shards.load_manifest(copy)
    path.unlink()
    with pytest.raises(UserError, match="unfinished"):
        shards.load_manifest(copy)


def _damage(path: Path, kind: str) -> None:
    data = bytearray(path.read_bytes())
    match kind:
        case "missing":
            path.unlink()
        case "truncated":
            os.truncate(path, len(data) - 512)
        case "longer":
            path.write_bytes(data + bytes(512))
        case "altered":
            data[600] ^= 1
            path.write_bytes(data)
        case "header":
            data[150] ^= 1
            path.write_bytes(data)


@pytest.mark.parametrize(
    ("kind", "verify", "message"),
    [
        ("missing", "size", "is missing"),
        ("truncated", "size", "is truncated"),
        ("longer", "size", "is altered"),
        ("altered", "checksum", "is altered: its sha256"),
        ("header", "size", "no valid tar header at byte 0"),
    ],
)
def test_damaged_shards_are_named(copy: Path, kind: str, verify: str, message: str) -> None:
    path = copy / "r12" / "train-000001.tar"
    _damage(path, kind)
    if kind == "header":  # an index that was written is believed: only checksums find this
        _without_indices(copy)
    with pytest.raises(UserError) as error:
        shards.open_split(copy, shards.load_manifest(copy), "train", 12, verify=verify)  # type: ignore[arg-type]
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert f"irkd render ... --out {copy}" in str(error.value)


def _without_indices(folder: Path) -> None:
    """As a folder was rendered before there were indices."""
    raw = json.loads((folder / shards.MANIFEST).read_text())
    for listed in (files for splits in raw["shards"].values() for files in splits.values()):
        for record in listed:
            del record["index"]
    _manifest_with(folder, shards=raw["shards"])
    for file in folder.rglob("*.index.json"):
        file.unlink()


def test_a_shard_with_other_samples_is_refused(copy: Path) -> None:
    raw = json.loads((copy / shards.MANIFEST).read_text())
    first, second = raw["shards"]["r12"]["train"][:2]
    first["samples"], second["samples"] = first["samples"] - 1, second["samples"] + 1
    _manifest_with(copy, shards=raw["shards"])
    with pytest.raises(
        UserError, match=r"train-000000.tar is not .*: it has 50 samples, the manifest says 49"
    ):
        shards.open_split(copy, shards.load_manifest(copy), "train", 12)


def test_a_file_cut_short_while_open_is_an_error(copy: Path) -> None:
    manifest = shards.load_manifest(copy)
    split = shards.open_split(copy, manifest, "train", 16)
    os.truncate(copy / "r16" / "train-000000.tar", 1000)
    with pytest.raises(UserError, match="cut short while in use"):
        split.image(49)
    split.close()


def test_unknown_split_and_resolution(shapes: Path) -> None:
    manifest = shards.load_manifest(shapes)
    with pytest.raises(UserError, match=r"no split 'dev'; it has train, val, test"):
        shards.open_split(shapes, manifest, "dev", 12)
    with pytest.raises(UserError, match=r"no resolution 20, only 8, 12, 16"):
        shards.open_split(shapes, manifest, "train", 20)


def test_an_index_is_read_where_the_tar_was_scanned(copy: Path) -> None:
    """What was written at rendering is what the headers say; a folder without indices opens all the same."""
    manifest = shards.load_manifest(copy)
    with_index = shards.open_split(copy, manifest, "train", 12)
    for shard in manifest.shards["r12"]["train"]:
        written = shards.written_index(copy / "r12" / shard.name, shard)
        scanned = shards.scan(copy / "r12" / shard.name, "png")
        assert written is not None
        assert written.keys == scanned.keys
        for column in ("labels", "image", "mask"):
            np.testing.assert_array_equal(getattr(written, column), getattr(scanned, column))
    _without_indices(copy)
    without = shards.open_split(copy, shards.load_manifest(copy), "train", 12)
    assert without.keys == with_index.keys
    assert [without.image(i) for i in range(110)] == [with_index.image(i) for i in range(110)]
    assert [without.mask(i) for i in (0, 109)] == [with_index.mask(i) for i in (0, 109)]


def test_a_damaged_index_is_named_and_one_of_another_tar_is_not_used(copy: Path) -> None:
    path = copy / "r12" / "train-000001.index.json"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"[", b"(", 1))
    with pytest.raises(
        UserError, match=r"train-000001.tar has an altered index: the sha256 of train-000001.index"
    ):
        shards.open_split(copy, shards.load_manifest(copy), "train", 12, verify="size")
    path.unlink()
    with pytest.raises(UserError, match=r"train-000001.tar has no readable index"):
        shards.open_split(copy, shards.load_manifest(copy), "train", 12)
    path.write_bytes(data)
    keys = shards.open_split(copy, shards.load_manifest(copy), "train", 12).keys
    _rewrite(
        copy, "r12", 1, lambda members: members[3:]
    )  # somebody takes out a sample, and mends the manifest
    opened = shards.open_split(copy, shards.load_manifest(copy), "train", 12)
    assert opened.keys == keys[:50] + keys[51:]


def _rewrite(folder: Path, resolution: str, number: int, change: Callable[[list], list]) -> None:
    """Write a train shard anew with other members, and its checksum into the manifest."""
    raw = json.loads((folder / shards.MANIFEST).read_text())
    record = raw["shards"][resolution]["train"][number]
    path = folder / resolution / record["name"]
    with tarfile.open(path) as tar:
        members = change([(m.name, tar.extractfile(m).read()) for m in tar])  # type: ignore[union-attr]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    samples = len({name.split(".")[0] for name, _ in members})
    raw["splits"]["train"] += samples - record["samples"]
    raw["resolutions"], raw["shards"] = [int(resolution[1:])], {resolution: raw["shards"][resolution]}
    record |= {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    record["samples"] = samples
    (folder / shards.MANIFEST).write_text(json.dumps(raw))


def test_open_files_of_all_splits_are_bounded(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "OPEN_FILES", 2)
    manifest = shards.load_manifest(copy)
    before = len(os.listdir("/proc/self/fd"))
    opened = [shards.open_split(copy, manifest, "train", r) for r in (8, 12, 16) for _ in range(4)]
    whole = [opened[0].image(i) for i in range(110)]
    with ThreadPoolExecutor(8) as pool:  # threads read from descriptors that are given up meanwhile
        for split in opened:
            read = list(pool.map(split.image, range(110)))
            assert split is not opened[1] or read == whole
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    for split in opened:
        split.close()
    assert len(os.listdir("/proc/self/fd")) <= before
    with pytest.raises(ValueError, match="closed"):
        opened[0].image(0)


def test_a_shard_replaced_while_in_use_is_an_error(copy: Path) -> None:
    split = shards.open_split(copy, shards.load_manifest(copy), "train", 16)
    path = copy / "r16" / "train-000000.tar"
    changed = path.with_suffix(".new")
    changed.write_bytes(path.read_bytes().replace(b"irkd", b"evil", 1))
    os.replace(changed, path)
    with pytest.raises(UserError, match="replaced while in use"):
        split.image(0)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("mean", [float("nan"), 0.5, 0.5], "mean is 'nan'"),
        ("mean", [-0.1, 0.5, 0.5], "mean is '-0.1'"),
        ("std", [0, 0.5, 0.5], "std is '0'"),
        ("std", [float("inf")] * 3, "std is 'inf'"),
        ("std", [10**400] * 3, "std is '1000"),
        ("resolutions", [-8, 12], "resolutions is '-8'"),
        ("resolutions", [8.5], "resolutions is '8.5'"),
        ("splits", {"train": True}, "splits.train is 'True'"),
        ("splits", {"train": 1e300}, "splits.train is '1e+300'"),
        ("classes", "abc", "classes is no list"),
        ("classes", [], "classes is no list"),
        ("classes", [1], "no name: 1"),
        ("val_fraction", float("inf"), "val_fraction is 'inf'"),
    ],
)
def test_hostile_manifests_are_one_line(copy: Path, place: str, value: object, message: str) -> None:
    _manifest_with(copy, **{place: value})
    with pytest.raises(UserError) as error:
        shards.load_manifest(copy)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["../../etc/passwd.tar", "/etc/x.tar", "a\n.tar", "x.zip"])
def test_a_manifest_cannot_lead_out_of_its_folder(copy: Path, name: str) -> None:
    raw = json.loads((copy / shards.MANIFEST).read_text())
    raw["shards"]["r8"]["train"][0]["name"] = name
    _manifest_with(copy, shards=raw["shards"])
    with pytest.raises(UserError, match="is no name of a shard"):
        shards.load_manifest(copy)


def test_names_from_a_manifest_can_be_shown_anywhere(copy: Path) -> None:
    names = [
        "\0",
        "\ud800",
        "[red]x[/red]",
        "a\nb",
        "\u2028",
        "naïve",
        "日本",
        "\x1b[31m",
        "\u0645\u06cc\u200c\u062e",
        "$x^{$",
    ]
    _manifest_with(copy, classes=names)
    classes = shards.load_manifest(copy).classes
    expected = [
        "\\x00",
        "\\ud800",
        "[red]x[/red]",
        "a\\nb",
        "\\u2028",
        "naïve",
        "日本",
        "\\x1b[31m",
        names[8],
        "$x^{$",
    ]
    assert list(classes) == expected


def test_labels_beyond_the_classes_name_shard_and_sample(copy: Path) -> None:
    _manifest_with(copy, classes=["disc", "ring"])
    with pytest.raises(
        UserError, match=r"train-000000.tar .*sample 0000000\d\d has label \d, the manifest has 2"
    ):
        shards.open_split(copy, shards.load_manifest(copy), "train", 12)


@pytest.mark.parametrize("what", ["manifest.json", "r12/train-000000.tar", "r12/train-000000.index.json"])
@pytest.mark.parametrize("kind", ["fifo", "device", "socket", "folder"])
def test_what_is_no_file_is_refused_at_once(copy: Path, what: str, kind: str) -> None:
    path = copy / what
    path.unlink()
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "socket":
            with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as server:
                server.bind(path.name)
        case "folder":
            path.mkdir()
    with pytest.raises(UserError, match=f"it is a {kind}, not a file".replace("fifo", "FIFO")):
        shards.open_split(copy, shards.load_manifest(copy), "train", 12)


def _png(ihdr: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    body = b"".join(chunk(kind, data) for kind, data in ((b"IHDR", ihdr), *chunks, (b"IEND", b"")))
    return b"\x89PNG\r\n\x1a\n" + body


_IHDR = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
_HUGE = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
_FINE = zlib.compress(b"\0" * 8 * 25)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(_png(_IHDR, (b"IDAT", zlib.compress(b"\0" * 30))), id="short pixels"),
        pytest.param(_png(_IHDR, (b"IDAT", zlib.compress(b"\7" * 8 * 25))), id="unknown filter"),
        pytest.param(_png(_IHDR, (b"IDAT", b"junk" * 9)), id="no zlib stream"),
        pytest.param(_png(_IHDR), id="no pixels"),
        pytest.param(_png(_HUGE, (b"IDAT", _FINE)), id="huge"),
        pytest.param(_png(_IHDR, (b"IDAT", _FINE))[:-26], id="cut"),
        pytest.param(_png(_IHDR, (b"IDAT", _FINE)).replace(b"IDAT", b"JDAT"), id="no IDAT"),
    ],
)
def test_a_damaged_png_is_an_error_and_not_the_end_of_the_process(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"not a readable png image of \d+ bytes: \S"):
        shards.decode(data, "png")


def test_decoding_mutated_images_never_ends_the_process() -> None:
    """Most of these end it when torchvision gets them, also those that Pillow can read."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(stream, "PNG")
    for seed in range(300):
        rng = np.random.default_rng(seed)
        data = bytearray(stream.getvalue())
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            data[place] = rng.integers(256)
        with contextlib.suppress(ValueError):
            assert shards.decode(bytes(data), "png").shape[0] == 3


def test_unusual_png_is_decoded_as_pillow_does() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    for image in (
        Image.fromarray(pixels).quantize(16),
        Image.fromarray(pixels[..., 0] > 99),
        Image.fromarray(pixels).convert("RGBA"),
    ):
        stream = io.BytesIO()
        image.save(stream, "PNG")
        decoded = shards.decode(stream.getvalue(), "png").permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(decoded, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 3), bool),
        np.zeros(48, np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_npy_that_is_no_8_bit_image_is_refused(array: np.ndarray) -> None:
    stream = io.BytesIO()
    np.save(stream, array)
    with pytest.raises(ValueError, match="npy image"):
        shards.decode(stream.getvalue(), "npy")


def test_a_webp_of_a_huge_size_gets_no_memory() -> None:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "WEBP", lossless=True)
    data = bytearray(stream.getvalue())
    data[21:25] = (16382 | 16382 << 14).to_bytes(4, "little")  # libwebp would make 16,383 px of what is there
    with pytest.raises(ValueError, match="not a readable webp"):
        shards.decode(bytes(data), "webp")


def test_a_jpeg_of_a_huge_size_gets_no_memory() -> None:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "JPEG")
    data = stream.getvalue()
    at = data.index(b"\xff\xc0") + 5
    with pytest.raises(ValueError, match="not a readable jpg"):
        shards.decode(data[:at] + b"\xff\xff\xff\xff" + data[at + 4 :], "jpg")


@pytest.mark.parametrize("encoding", ["png", "webp", "jpg", "npy"])
def test_decode_agrees_with_pillow_and_refuses_garbage(encoding: shards.Encoding) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    if encoding == "npy":
        data, expected = encode(pixels, "npy"), pixels
    else:
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, {"jpg": "JPEG"}.get(encoding, encoding.upper()), lossless=True)
        data, expected = stream.getvalue(), np.asarray(Image.open(stream).convert("RGB"))
    decoded = shards.decode(data, encoding).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(decoded - expected).max() <= (2 if encoding == "jpg" else 0)  # two libjpegs may round apart
    for garbage in (b"", b"junk" * 20, data[: len(data) // 3]):
        with pytest.raises(ValueError, match=r"not a|npy"):
            shards.decode(garbage, encoding)
