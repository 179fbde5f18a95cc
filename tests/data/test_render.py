"""Rendering: what is in the shards, the same bytes whatever happens, and every bad end."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from irkd_dist.cli import main
from irkd_dist.data import render, shards
from irkd_dist.data.render import Options
from irkd_dist.data.sources import open_source
from irkd_dist.errors import UserError

SYNTHETIC = ["synthetic", "--samples", "train=120,test=30", "--size", "16", "--samples-per-shard", "10"]


def _bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a render but its records."""
    return {
        str(f.relative_to(folder)): f.read_bytes()
        for f in sorted(folder.rglob("*"))
        if f.is_file() and shards.PARTS not in f.parts
    }


def _render(out: Path, *arguments: object) -> int:
    return main(["render", *map(str, arguments), "--out", str(out)])


def _fails(out: Path, *arguments: object, capsys: pytest.CaptureFixture) -> str:
    """The one line that a failing command prints."""
    capsys.readouterr()
    assert _render(out, *arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("irkd: error:")]
    assert len(errors) == 1
    assert not (out / shards.MANIFEST).exists()
    assert not list(out.rglob("*.tmp"))
    return errors[0]


def _stock(folder: Path, resolution: int, split: str) -> list[dict]:
    manifest = shards.load_manifest(folder)
    files = [str(folder / f"r{resolution}" / s.name) for s in manifest.shards[f"r{resolution}"][split]]
    return list(wds.WebDataset(files, shardshuffle=False).decode("rgb8"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "shards"
    assert _render(out, *SYNTHETIC, "--resolutions", "8,16") == 0
    return out


def test_real_cifar10_pixels_split_mean_and_std(cifar_parquet: Path, tmp_path: Path) -> None:
    out = tmp_path / "cifar"
    assert _render(out, "parquet", "--path", cifar_parquet, "--limit", 300, "--resolutions", "32,12") == 0
    manifest = shards.load_manifest(out)
    assert manifest.resolutions == (12, 32)
    assert manifest.splits == {"train": 300, "val": 300, "test": 300}
    source = open_source("parquet", cifar_parquet)
    originals = {
        Image.open(_stream(raw.image)).tobytes(): label
        for label, raw in zip(
            source.labels["test"], source.read("test", range(len(source.labels["test"]))), strict=True
        )
    }
    for large, small in zip(_stock(out, 32, "test"), _stock(out, 12, "test"), strict=True):
        assert originals[large["png"].tobytes()] == large["cls"]  # at its own size an image is untouched
        resized = Image.fromarray(large["png"]).resize((12, 12), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(small["png"], np.asarray(resized))
        assert small["cls"] == large["cls"]
    pixels = np.stack([s["png"] for s in _stock(out, 32, "train")]).astype(np.float64) / 255
    np.testing.assert_allclose(manifest.mean, pixels.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(manifest.std, pixels.std((0, 1, 2)), rtol=1e-10)
    assert manifest.classes[5] == "dog"
    width, height = Image.open(out / render.preview.PREVIEW).size
    assert width > 800
    assert height > 200


def _stream(image: object) -> object:
    import io

    return io.BytesIO(image) if isinstance(image, bytes) else image


def test_validation_is_held_out_of_train_once(reference: Path) -> None:
    manifest = shards.load_manifest(reference)
    assert manifest.splits == {"train": 108, "val": 12, "test": 30}
    drawn = {raw.image.tobytes(): i for i, raw in enumerate(_source().read("train", range(120)))}  # type: ignore[union-attr]
    found = {
        split: [drawn[s["png"].tobytes()] for s in _stock(reference, 16, split)] for split in ("train", "val")
    }
    assert sorted(found["train"] + found["val"]) == list(range(120))
    assert found["val"] == sorted(found["val"])
    assert found["val"] != list(range(108, 120))  # drawn, not the tail
    keys = [s["__key__"] for split in ("train", "val", "test") for s in _stock(reference, 16, split)]
    assert len(set(keys)) == 150


def _source():
    return open_source("synthetic", None, samples={"train": 120, "test": 30}, size=16)


def test_three_workers_write_the_same_bytes(reference: Path, tmp_path: Path) -> None:
    assert _render(tmp_path / "w3", *SYNTHETIC, "--resolutions", "16,8", "--workers", 3) == 0
    assert _bytes(tmp_path / "w3") == _bytes(reference)


def test_parts_of_a_job_array_merge_to_the_same_bytes(reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "parts"
    for part in ("2/3", "1/3", "3/3"):
        assert _render(out, *SYNTHETIC, "--resolutions", "8,16", "--part", part) == 0
        with pytest.raises(UserError, match="unfinished"):
            shards.load_manifest(out)
    before = {f: f.stat().st_mtime_ns for f in out.rglob("*.tar")}
    assert _render(out, *SYNTHETIC, "--resolutions", "8,16") == 0
    assert {f: f.stat().st_mtime_ns for f in out.rglob("*.tar")} == before  # merged, not rendered again
    assert _bytes(out) == _bytes(reference)


@contextlib.contextmanager
def _process(out: Path, *arguments: object) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-m", "irkd_dist", "render", *map(str, arguments), "--out", str(out)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _wait(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def _group(leader: int) -> list[int]:
    """Processes of a session that still run, from /proc."""
    alive = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader and fields[0] != "Z":
                alive.append(int(stat.parent.name))
    return alive


def test_kill_9_in_the_middle_and_restart(tmp_path: Path) -> None:
    out, whole = tmp_path / "killed", tmp_path / "whole"
    arguments = ["synthetic", "--samples", "train=800", "--size", "16", "--samples-per-shard", "20"]
    arguments += ["--resolutions", "8,16", "--workers", "2"]
    with _process(out, *arguments) as process:
        _wait(lambda: len(list(out.glob(".parts/*.json"))) >= 3)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        _wait(lambda: not _group(process.pid), 20)  # its workers do not linger
    done = {f: f.stat().st_mtime_ns for f in out.glob(".parts/*.json")}
    assert 3 <= len(done) < 40
    with pytest.raises(UserError, match="unfinished"):
        shards.load_manifest(out)
    (out / "r8" / "train-000030.tar.tmp").write_bytes(b"half")  # as a kill in a write leaves it
    arguments[-1] = "1"
    assert _render(out, *arguments) == 0
    assert {f: f.stat().st_mtime_ns for f in done} == done  # kept, not made again
    assert _render(whole, *arguments) == 0
    assert _bytes(out) == _bytes(whole)


def test_a_damaged_render_is_repaired_by_the_same_command(reference: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(reference, tmp_path / "copy"))
    (out / "r8" / "train-000002.tar").unlink()
    altered = out / "r16" / "test-000001.tar"
    altered.write_bytes(altered.read_bytes().replace(b"irkd", b"evil", 1))
    assert _render(out, *SYNTHETIC, "--resolutions", "8,16") == 0
    assert _bytes(out) == _bytes(reference)


def test_a_label_that_was_put_right_is_not_taken_for_rendered(tmp_path: Path, capsys) -> None:
    """In the middle of a tar, whose size and ends stay: the same command would keep the wrong one."""
    tar = tmp_path / "in" / "train-0.tar"
    tar.parent.mkdir()
    picture = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)).save(picture, "PNG")

    def write(wrong: int) -> None:
        with wds.TarWriter(str(tar), mtime=0) as writer:
            for i in range(100):
                writer.write(
                    {"__key__": f"{i:03d}", "png": picture.getvalue(), "cls": wrong if i == 50 else i % 3}
                )

    write(0)
    command = ["wds", "--path", str(tar.parent), "--resolutions", "8", "--samples-per-shard", "50"]
    assert _render(tmp_path / "out", *command) == 0
    assert _render(tmp_path / "out", *command) == 0
    size = tar.stat().st_size
    assert size > 3 << 16
    write(1)
    assert tar.stat().st_size == size
    capsys.readouterr()
    assert _render(tmp_path / "out", *command) == 2
    assert "holds shards of another source or other options" in capsys.readouterr().err
    marker = tmp_path / "out" / shards.PARTS / "plan"
    marker.write_text(marker.read_text().split()[0])  # as an earlier release left it: it goes on
    write(0)
    assert _render(tmp_path / "out", *command) == 0


def test_another_render_is_not_replaced_unless_told(reference: Path, tmp_path: Path, capsys) -> None:
    out = Path(shutil.copytree(reference, tmp_path / "copy"))
    (out / "r16" / "mine.txt").write_text("not a shard")
    (out / "r2d2").mkdir()
    assert _render(out, *SYNTHETIC, "--resolutions", "12") == 2
    assert "holds shards of another source or other options" in capsys.readouterr().err
    assert _bytes(out).keys() > _bytes(reference).keys()
    assert _render(out, *SYNTHETIC, "--resolutions", "12", "--overwrite") == 0
    assert shards.load_manifest(out).resolutions == (12,)
    assert not (out / "r8").exists()
    assert [f.name for f in (out / "r16").iterdir()] == ["mine.txt"]
    assert (out / "r2d2").is_dir()


def _folder(root: Path) -> Path:
    """One image of every mode that is not plain RGB, and their pixels by another way than ours."""
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (20, 20), dtype=np.uint8)
    colour = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
    images = {
        "grey.png": Image.fromarray(grey),
        "sixteen.png": Image.fromarray(grey.astype(np.uint16) * 257),
        "bits.png": Image.fromarray(grey > 127),
        "palette.gif": Image.fromarray(colour).quantize(16),
        "alpha.png": Image.fromarray(np.dstack([colour, np.full_like(grey, 255)])),
        "cmyk.tif": Image.fromarray(255 - np.dstack([colour, np.full_like(grey, 255)]), "CMYK"),
        "wide.png": Image.fromarray(np.dstack([np.repeat(grey, 2, 1)] * 3)),
    }
    expected = {
        "grey.png": np.dstack([grey] * 3),
        "sixteen.png": np.dstack([grey] * 3),
        "bits.png": np.dstack([np.where(grey > 127, 255, 0)] * 3),
        "palette.gif": np.array(images["palette.gif"].getpalette()).reshape(-1, 3)[
            np.array(images["palette.gif"])
        ],
        "alpha.png": colour,
        "cmyk.tif": colour,
        "wide.png": np.dstack([np.repeat(grey, 2, 1)[:, 10:30]] * 3),
    }
    for name, image in images.items():
        (root / "train" / name.split(".")[0]).mkdir(parents=True)
        image.save(root / "train" / name.split(".")[0] / name)
        np.save(root / f"{name}.npy", expected[name])
    return root


def test_every_image_mode_becomes_rgb(tmp_path: Path) -> None:
    root = _folder(tmp_path / "modes")
    out = tmp_path / "out"
    assert _render(out, "folder", "--path", root / "train", "--resolutions", 20, "--val-fraction", 0) == 0
    manifest = shards.load_manifest(out)
    samples = _stock(out, 20, "train")
    assert len(samples) == len(manifest.classes) == 7
    for sample in samples:
        name = manifest.classes[sample["cls"]]
        expected = np.load(next(root.glob(f"{name}.*.npy")))
        np.testing.assert_array_equal(sample["png"], expected, err_msg=name)


@pytest.mark.parametrize("encoding", ["npy", "webp", "jpg"])
def test_encodings_hold_the_same_pixels(reference: Path, tmp_path: Path, encoding: shards.Encoding) -> None:
    assert _render(tmp_path / "out", *SYNTHETIC, "--resolutions", "16", "--encoding", encoding) == 0
    manifest = shards.load_manifest(tmp_path / "out")
    ours = shards.open_split(tmp_path / "out", manifest, "test", 16)
    png = shards.open_split(reference, shards.load_manifest(reference), "test", 16)
    stock = list(wds.WebDataset(str(tmp_path / "out/r16/test-000000.tar"), shardshuffle=False).decode("rgb8"))
    for i in range(10):
        pixels = shards.decode(ours.image(i), encoding).int()
        exact = shards.decode(png.image(i), "png").int()
        assert (pixels - exact).abs().max() <= (40 if encoding == "jpg" else 0)
        np.testing.assert_allclose(
            stock[i][encoding].astype(int), pixels.permute(1, 2, 0).numpy(), atol=2 * (encoding == "jpg")
        )


def test_our_own_shards_are_a_source_again(reference: Path, tmp_path: Path) -> None:
    assert _render(tmp_path / "out", "wds", "--path", reference / "r16", "--resolutions", "8,16") == 0
    before, after = shards.load_manifest(reference), shards.load_manifest(tmp_path / "out")
    assert (after.classes, after.splits, after.masks) == (before.classes, before.splits, True)
    assert (after.mean, after.std) == (before.mean, before.std)
    assert after.val_fraction == 0  # it had a validation split of its own
    names = ("r16/train-000003.tar", "r8/val-000000.tar")
    for split in ("train", "val"):
        for ours, theirs in zip(
            _stock(tmp_path / "out", 16, split), _stock(reference, 16, split), strict=True
        ):
            np.testing.assert_array_equal(ours["png"], theirs["png"])
            np.testing.assert_array_equal(ours["mask.png"], theirs["mask.png"])
    assert all((tmp_path / "out" / name).exists() == (name == names[1]) for name in names)  # 2000 a shard now


def test_crop_keeps_the_full_size_only(tmp_path: Path) -> None:
    assert _render(tmp_path / "out", *SYNTHETIC, "--resolutions", "8,16", "--mode", "crop") == 0
    manifest = shards.load_manifest(tmp_path / "out")
    assert (manifest.mode, manifest.resolutions) == ("crop", (16,))


def test_enlarging_warns_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert _render(tmp_path / "out", *SYNTHETIC, "--resolutions", "20") == 0
    captured = capsys.readouterr()
    assert captured.out.count("150 images are smaller than the largest resolution, and enlarged") == 1


def _two_classes(root: Path) -> Path:
    for name in ("ant", "bee"):
        (root / name).mkdir(parents=True)
        for n in range(10):
            pixels = np.random.default_rng(n).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{n}.png")
    return root


def test_unreadable_images_are_named_counted_and_limited(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root, out = _two_classes(tmp_path / "images"), tmp_path / "out"
    bad = [root / "ant" / "3.png", root / "bee" / "7.png"]
    bad[0].write_bytes(b"junk")
    bad[1].write_bytes(bad[1].read_bytes()[:120])
    command = ["folder", "--path", root, "--resolutions", "8", "--samples-per-shard", 5, "--val-fraction", 0]
    for _ in range(6):  # never whole by trying again
        assert "1 unreadable image, over the limit --max-bad 0:" in _fails(out, *command, capsys=capsys)
    assert "2 unreadable images, over" in _fails(out, *command, "--max-bad", 1, capsys=capsys)
    message = _fails(out, *command, "--max-bad", 1, capsys=capsys)
    assert all(str(file) in message for file in bad)
    assert _render(out, *command, "--max-bad", 2) == 0
    manifest = shards.load_manifest(out)
    assert manifest.splits == {"train": 18}
    assert [name.split(" ")[0] for name in manifest.render["unreadable"]] == [str(file) for file in bad]
    keys = shards.open_split(out, manifest, "train", 8).keys
    assert keys == [f"{i:09d}" for i in range(20) if i not in (3, 17)]


def test_what_is_white_in_floats_is_one_value_for_a_source(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root, out = tmp_path / "images", tmp_path / "out"
    values = {
        "ant/0": 200,
        "ant/1": 0.5,
        "ant/2": 0,
        "bee/0": 250,
        "bee/1": 90,
    }  # 0.5: dark; 0: black, tells nothing
    for name, value in values.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), value, np.float32)).save(root / f"{name}.tiff")
    Image.fromarray(np.full((8, 8), 7, np.uint8)).save(root / "bee" / "2.png")
    command = ["folder", "--path", root, "--resolutions", "8", "--val-fraction", 0, "--samples-per-shard", 3]
    for workers in (1, 1, 2):  # the records of the first are gone on from
        message = _fails(out, *command, "--workers", workers, capsys=capsys)
        assert f"1 within 0..1 (such as {root / 'ant' / '1.tiff'})" in message
        assert f"within 0..255 (such as {root / 'ant' / '0.tiff'})" in message
        assert "--white 1, 255 or 65535" in message
    assert _render(out, *command, "--white", 255, "--overwrite") == 0
    assert "4 images are of floats or 32-bit numbers, white at 255 (--white)" in capsys.readouterr().out
    assert [int(s["png"].max()) for s in _stock(out, 8, "train")] == [200, 0, 0, 250, 90, 7]
    assert shards.load_manifest(out).render["white"] == 255
    assert "go from 200 to 200, not within 0..1 (--white)" in _fails(
        tmp_path / "o", *command, "--white", 1, capsys=capsys
    )
    (root / "ant" / "1.tiff").unlink()  # a single range needs no word
    assert _render(tmp_path / "one", *command) == 0
    assert "3 images are of floats or 32-bit numbers, white at 255 (--white)" in capsys.readouterr().out
    assert "white" not in shards.load_manifest(tmp_path / "one").render


def test_what_was_changed_is_counted_and_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = _two_classes(tmp_path / "images")
    Image.new("RGB", (8, 6), "red").save(root / "ant" / "wide.png")
    Image.new("L", (8, 8)).save(root / "ant" / "grey.png")
    (root / "bee" / "notes.txt").write_text("x")
    command = ["folder", "--path", root, "--resolutions", "8", "--val-fraction", 0, "--samples-per-shard", 5]
    assert _render(tmp_path / "out", *command) == 0
    said = capsys.readouterr().out
    for text in (
        "left out: 1 .txt",
        "1 image is not square: their centre is cut out (--fit crop)",
        "1 image is grey",
    ):
        assert said.count(text) == 1
    render_facts = shards.load_manifest(tmp_path / "out").render
    assert render_facts["images"] == {"not_square": 1, "enlarged": 1, "grey": 1}
    assert render_facts["notes"] == ["left out: 1 .txt"]
    assert _render(tmp_path / "pad", *command, "--fit", "pad") == 0
    assert "they are put on black (--fit pad)" in capsys.readouterr().out
    image = next(
        s["png"] for s in _stock(tmp_path / "pad", 8, "train") if s["png"][4, 4].tolist() == [255, 0, 0]
    )
    assert image[0].max() == image[7].max() == 0
    assert _render(tmp_path / "out", *command, "--fit", "squash") == 2  # another render than is there
    assert "holds shards of another source or other options" in capsys.readouterr().err


@pytest.mark.filterwarnings("error::UserWarning")
def test_names_that_no_font_and_no_formula_has(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = _two_classes(tmp_path / "images")
    (root / "ant").rename(root / "$x^{$")
    (root / "bee").rename(root / os.fsdecode(b"\xe9[red]"))
    (root / "日本語").mkdir()
    bad = root / "日本語" / os.fsdecode(b"\xe9[bold].png")
    shutil.copy(root / "$x^{$" / "0.png", root / "日本語")
    bad.write_bytes(b"")
    assert _render(tmp_path / "out", "folder", "--path", root, "--resolutions", 8, "--max-bad", 1) == 0
    said = capsys.readouterr().out
    assert "unreadable, left out" in said
    assert "\\udce9[bold].png (not an image" in said
    assert shards.load_manifest(tmp_path / "out").classes == ("$x^{$", "日本語", "é[red]")
    assert (tmp_path / "out" / render.preview.PREVIEW).stat().st_size > 5000


def test_shards_of_a_render_before_indices_go_on(reference: Path, tmp_path: Path, capsys) -> None:
    """A folder as an older irkd left it: opened as it is, and given indices by the same command."""
    out = Path(shutil.copytree(reference, tmp_path / "copy"))
    for file in out.glob(".parts/*.json"):
        record = json.loads(file.read_text())
        record |= {"upscaled": False}
        del record["facts"]
        for shard in record["shards"].values():
            del shard["index"]
        file.write_text(json.dumps(record))
    for file in out.rglob("*.index.json"):
        file.unlink()
    before = {f: f.stat().st_mtime_ns for f in out.rglob("*.tar")}
    assert _render(out, *SYNTHETIC, "--resolutions", "8,16") == 0
    assert {f: f.stat().st_mtime_ns for f in out.rglob("*.tar")} == before
    assert "16 shards are of an older irkd, which did not count" in capsys.readouterr().out
    assert {n: b for n, b in _bytes(out).items() if n != shards.MANIFEST} == {
        n: b for n, b in _bytes(reference).items() if n != shards.MANIFEST
    }


def test_ctrl_c_with_workers_is_one_line(tmp_path: Path) -> None:
    """While the workers still import, and in the middle of their work; to all processes, as a terminal does."""
    arguments = ["synthetic", "--samples", "train=6000", "--size", "24", "--samples-per-shard", "200"]
    arguments += ["--resolutions", "24", "--workers", "2"]
    for number, begun in enumerate(
        (lambda out: (out / ".parts" / "plan").exists(), lambda out: any(out.glob("r24/*.tar")))
    ):
        out = tmp_path / str(number)
        with _process(out, *arguments) as process:
            _wait(lambda begun=begun, out=out: begun(out), 120)
            time.sleep(0.2)
            os.killpg(process.pid, signal.SIGINT)
            told, _ = process.communicate(timeout=60)
            assert process.returncode == 130
            lines = [line for line in told.decode().splitlines() if "of 30 shards" not in line]
            assert lines == ["irkd: interrupted; the same command goes on from here"]
            _wait(lambda pid=process.pid: not _group(pid), 20)
        assert not list(out.rglob("*.tmp"))


def test_a_source_has_its_own_options_only(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for source, there, elsewhere in (
        ("parquet", {"--image-column", "--path", "--size"}, {"--download", "--samples"}),
        ("cifar10", {"--download", "--path"}, {"--image-column", "--samples"}),
        ("synthetic", {"--samples", "--size"}, {"--image-column", "--download", "--path"}),
        ("folder", {"--path", "--fit", "--classes"}, {"--download", "--samples", "--label-column"}),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["render", source, "--help"])
        assert ended.value.code == 0
        said = capsys.readouterr().out.split()
        shown = {word.strip("[]") for word in said}
        assert shown >= there
        assert not shown & elsewhere
    root = _two_classes(tmp_path / "images")
    for options in (["--download"], ["--image-column", "x"], ["--samples", "train=4"]):
        message = _fails(
            tmp_path / "out", "folder", "--path", root, "--resolutions", 8, *options, capsys=capsys
        )
        assert f"{options[0]} is for source " in message
        assert "not folder" in message


def test_classes_in_an_order_of_the_user(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = _two_classes(tmp_path / "images")
    (tmp_path / "names.txt").write_text("bee\nant\n")
    command = ["folder", "--path", root, "--resolutions", 8]
    assert _render(tmp_path / "out", *command, "--classes", tmp_path / "names.txt") == 0
    assert shards.load_manifest(tmp_path / "out").classes == ("bee", "ant")
    assert "no 'bee', a class of images" in _fails(
        tmp_path / "o", *command, "--classes", "ant,be", capsys=capsys
    )


def test_no_space_left(tmp_path: Path) -> None:
    """A limit on file size stops a write as a full disk does."""
    out = tmp_path / "out"
    arguments = [*SYNTHETIC[:-1], "60", "--resolutions", "8,16"]
    command = [sys.executable, "-m", "irkd_dist", "render", *arguments, "--out", str(out)]
    limit = "import resource, os, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))"
    run = [sys.executable, "-c", f"{limit}; os.execv(sys.argv[1], sys.argv[1:])", *command]
    result = subprocess.run(run, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert f"irkd: error: cannot write {out}" in result.stderr
    assert "MiB free there" in result.stderr
    assert not list(out.rglob("*.tmp"))
    assert not (out / shards.MANIFEST).exists()
    assert main(command[3:]) == 0  # with space again, the same command goes on
    assert shards.load_manifest(out).splits["train"] == 108


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resolutions", "12,sixteen"], "--resolutions '12,sixteen' is not a list of whole numbers"),
        (["--resolutions", "0,12"], "give sizes in pixels"),
        (["--resolutions", "999999"], "--resolutions 999999: give sizes in pixels up to 8192"),
        (["--resolutions", "8", "--workers", "99999"], "--workers 99999 must be at most 1024"),
        (["--resolutions", "8", "--size", "99999"], "--size 99999 is too large to be drawn"),
        (["--resolutions", "8", "--samples", "train=999999999"], "at most 10,000,000 are drawn"),
        (["--resolutions", "8", "--samples", "train=²"], "--samples 'train=²' is not of the form"),
        (["--resolutions", "8", "--part", "²/³"], "--part '²/³' is not of the form"),
        (["--resolutions", "8", "--val-fraction", "1.5"], "--val-fraction 1.5"),
        (["--resolutions", "8", "--samples-per-shard", "0"], "--samples-per-shard 0 must be at least 1"),
        (["--resolutions", "8", "--workers", "0"], "--workers 0 must be at least 1"),
        (["--resolutions", "8", "--limit", "0"], "--limit 0 must be at least 1"),
        (["--resolutions", "8", "--max-bad", "-1"], "--max-bad -1 must be at least 0"),
        (["--resolutions", "8", "--size", "2"], "--size 2 is too small"),
        (["--resolutions", "8", "--samples", "train:40"], "--samples 'train:40' is not of the form"),
        (["--resolutions", "8", "--part", "4/3"], "--part '4/3' is not of the form"),
        (["--resolutions", "8", "--download"], "--download is for source cifar10"),
    ],
)
def test_wrong_options(tmp_path: Path, capsys, arguments: list[str], message: str) -> None:
    assert message in _fails(tmp_path / "out", "synthetic", *arguments, capsys=capsys)
    assert not list(tmp_path.glob("out/r*"))


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    assert _render(tmp_path / "file", *SYNTHETIC, "--resolutions", "8") == 2
    assert "irkd: error:" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "in the way"


def test_the_records_are_of_exact_sums(reference: Path) -> None:
    """Mean and std come from integers, so that no order of adding can change them."""
    records = [json.loads(f.read_text()) for f in sorted(reference.glob(".parts/train-*.json"))]
    pixels = np.stack([s["png"] for s in _stock(reference, 16, "train")]).astype(np.int64)
    assert [sum(r["sums"][c] for r in records) for c in range(3)] == pixels.sum((0, 1, 2)).tolist()
    assert [sum(r["squares"][c] for r in records) for c in range(3)] == (pixels**2).sum((0, 1, 2)).tolist()


def test_options_are_checked_when_called_directly(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--resolutions"):
        render.render(_source(), tmp_path, Options(()))
