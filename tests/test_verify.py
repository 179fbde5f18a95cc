"""`irkd verify` finds every kind of damage in a folder of shards, and names file and sample."""

import contextlib
import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from irkd_dist import verify
from irkd_dist.cli import main
from irkd_dist.data import index, shards
from irkd_dist.errors import UserError
from irkd_dist.training import probing


@pytest.fixture
def copy(shapes: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shapes, tmp_path / "copy"))


def _mended(folder: Path, resolution: str, name: str, members: dict[str, bytes]) -> None:
    """Put other members into a shard and give the manifest the right checksums of tar and index."""
    path = folder / resolution / name
    with tarfile.open(path) as tar:
        old = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, data in (old | members).items():
            member = tarfile.TarInfo(key)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    data = path.read_bytes()
    listed = index.encode(
        index.scan(lambda n, at: data[at : at + n], len(data), "png"), hashlib.sha256(data).hexdigest()
    )
    (path.parent / index.file_name(name)).write_bytes(listed)
    raw = json.loads((folder / "manifest.json").read_text())
    record = next(r for listed in raw["shards"][resolution].values() for r in listed if r["name"] == name)
    record |= {
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "index": hashlib.sha256(listed).hexdigest(),
    }
    (folder / "manifest.json").write_text(json.dumps(raw))


def test_whole_shards_have_no_problem(shapes: Path, capsys: pytest.CaptureFixture) -> None:
    assert list(verify.verify(shapes)) == []
    assert main(["verify", str(shapes)]) == 0
    assert capsys.readouterr().out == f"{shapes}: all as it should be\n"


def test_progress_counts_every_file(shapes: Path) -> None:
    told: list[tuple[int, int]] = []
    assert list(verify.verify(shapes, lambda done, total: told.append((done, total)))) == []
    files = len(list(shapes.rglob("*.tar")))
    assert told == [(done, files) for done in range(files + 1)]


def test_one_flipped_bit_anywhere_is_found_and_named(copy: Path) -> None:
    for name in ("r12/train-000001.tar", "r8/test-000000.tar", "r16/val-000000.index.json"):
        path = copy / name
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 1
        path.write_bytes(data)
        (problem,) = verify.verify(copy)
        assert problem.startswith(str(path).replace(".index.json", ".tar"))
        assert "altered" in problem
        data[len(data) // 3] ^= 1
        path.write_bytes(data)
    assert list(verify.verify(copy)) == []


def test_what_checksums_do_not_tell(copy: Path, capsys: pytest.CaptureFixture) -> None:
    """Samples whose shard has the right checksum: cut pixels, another size, a label beyond the classes."""
    _mended(copy, "r8", "train-000000.tar", {"000000002.png": b"\x89PNG junk"})
    _mended(copy, "r12", "train-000000.tar", {"000000003.cls": b"12"})
    with tarfile.open(copy / "r16" / "test-000000.tar") as tar:
        name = next(n for n in tar.getnames() if n.endswith(".png") and "mask" not in n)
        image = tar.extractfile(name).read()  # type: ignore[union-attr]
    _mended(copy, "r8", "test-000000.tar", {name: image, name.replace(".png", ".mask.png"): b""})
    (copy / "r16" / "val-000000.tar").unlink()
    problems = list(verify.verify(copy))
    for shard, text in (
        ("r8/train-000000.tar", "sample 000000002: image: not a readable png image of 9 bytes"),
        ("r12/train-000000.tar", "sample 000000003: label 12, the manifest has 10 classes"),
        ("r12/train-000000.tar", "has other keys or labels than at 8 px"),
        ("r8/test-000000.tar", f"sample {name[:9]}: image: its shape is (3, 16, 16), not (3, 8, 8)"),
        ("r16/val-000000.tar", "is missing"),
    ):
        assert any(p.startswith(str(copy / shard)) and text in p for p in problems), (shard, text, problems)
    assert len(problems) == 5
    assert main(["verify", str(copy)]) == 1
    assert capsys.readouterr().out.splitlines() == [*problems, f"{copy}: 5 problems"]


def test_an_index_that_lies_is_found(copy: Path) -> None:
    path = copy / "r8" / "train-000000.index.json"
    raw = json.loads(path.read_text())
    raw["image"][4], raw["image"][5] = raw["image"][5], raw["image"][4]
    path.write_text(json.dumps(raw))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["shards"]["r8"]["train"][0]["index"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    (problem,) = verify.verify(copy)
    assert problem == f"{path.with_name('train-000000.tar')} has an index that is not its tar's"


def test_what_is_nothing_known_is_one_line(tmp_path: Path, copy: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["verify", str(tmp_path / "none")]) == 2
    assert "is no folder of irkd shards" in capsys.readouterr().err
    (copy / "manifest.json").write_text("[")
    assert main(["verify", str(copy)]) == 1
    assert "manifest.json is not valid JSON" in capsys.readouterr().out


def test_a_damaged_mask_is_named_where_it_is_measured_on(copy: Path) -> None:
    manifest, path = shards.load_manifest(copy), copy / "r8" / "test-000000.tar"
    offset, size = shards.scan(path, "png").mask[1]
    data = bytearray(path.read_bytes())
    data[offset : offset + size] = bytes(size)
    path.write_bytes(data)
    with contextlib.closing(shards.open_split(copy, manifest, "test", 8, verify="size")) as opened:
        assert probing._mask(opened, 0, 8).shape == (8, 8)
        with pytest.raises(UserError, match=f"{path}: the mask of sample {opened.keys[1]} cannot be read"):
            probing._mask(opened, 1, 8)
        with pytest.raises(UserError, match=r"it has \(8, 8\) pixels, not \(12, 12\)"):
            probing._mask(opened, 0, 12)
