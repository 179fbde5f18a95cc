"""The shard format: stock readers agree with ours, and damage is an error that names the file."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from irkd_dist.data import shards
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
    with pytest.raises(UserError, match=r"train-000000.tar has 50 samples, the manifest says 49"):
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


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_the_index_reads_long_names_of_all_tar_forms(tmp_path: Path, form: int) -> None:
    path, key = tmp_path / "a.tar", "folder" * 10 + "/" + "k" * 90
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in ((f"{key}.npy", b"x" * 700), (f"{key}.cls", b"12")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    found = shards.scan(path, "npy")
    assert (found.keys, found.labels.tolist(), found.image[0, 1]) == ([key], [12], 700)
    assert path.read_bytes()[found.image[0, 0] :][:700] == b"x" * 700


@pytest.mark.parametrize("encoding", ["png", "webp", "jpg", "npy"])
def test_decode_agrees_with_pillow_and_refuses_garbage(encoding: shards.Encoding) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    if encoding == "npy":
        data, expected = shards.encode_npy(pixels), np.load(io.BytesIO(shards.encode_npy(pixels)))
    else:
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, {"jpg": "JPEG"}.get(encoding, encoding.upper()), lossless=True)
        data, expected = stream.getvalue(), np.asarray(Image.open(stream).convert("RGB"))
    decoded = shards.decode(data, encoding).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(decoded - expected).max() <= (2 if encoding == "jpg" else 0)  # two libjpegs may round apart
    for garbage in (b"", b"junk" * 20, data[: len(data) // 3]):
        with pytest.raises(ValueError, match=r"not a|not an|npy"):
            shards.decode(garbage, encoding)


def test_atomic_leaves_nothing_behind_when_the_writer_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), shards.atomic(path) as file:  # noqa: PT012
        file.write(b"new")
        raise RuntimeError("stop")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"
