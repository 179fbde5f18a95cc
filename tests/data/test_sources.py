"""Each source against files that other libraries wrote, and its complaints about bad ones."""

import gzip
import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from PIL import Image

from irkd_dist.data import synthetic
from irkd_dist.data.sources import Source, naming, open_source
from irkd_dist.errors import UserError


def _pixels(number: int, size: int = 10, channels: tuple[int, ...] = (3,)) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (size, size, *channels), dtype=np.uint8)


def _png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def _images(source: Source, split: str, indices: list[int]) -> list[np.ndarray]:
    return [
        np.asarray(Image.open(io.BytesIO(raw.image) if isinstance(raw.image, bytes) else raw.image))
        if not isinstance(raw.image, np.ndarray)
        else raw.image
        for raw in source.read(split, indices)
    ]


# --- parquet

_CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _parquet(
    file: Path, numbers: range, image: str = "img", label: str = "label", metadata: dict | None = None
) -> None:
    cells = [{"bytes": _png(_pixels(n)), "path": None} for n in numbers]
    table = pa.table(
        {
            image: pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            label: pa.array([n % 3 for n in numbers], pa.int64()),
        }
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(metadata), file, row_group_size=4)


def test_real_cifar10_parquet(cifar_parquet: Path) -> None:
    source = open_source("parquet", cifar_parquet)
    assert source.classes == _CIFAR
    assert {split: len(labels) for split, labels in source.labels.items()} == {
        "train": 50_000,
        "test": 10_000,
    }
    assert np.bincount(source.labels["train"]).tolist() == [5000] * 10
    table = pq.read_table(next(cifar_parquet.glob("test*.parquet")))
    for i, image in zip([0, 999, 1000, 9999], _images(source, "test", [0, 999, 1000, 9999]), strict=True):
        row = table.slice(i, 1).to_pylist()[0]
        assert source.labels["test"][i] == row["label"]
        np.testing.assert_array_equal(image, np.asarray(Image.open(io.BytesIO(row["img"]["bytes"]))))


@pytest.mark.parametrize("layout", ["data/{}-0000{}-of-00002.parquet", "{}/000{}.parquet"])
def test_parquet_splits_names_and_row_groups(tmp_path: Path, layout: str) -> None:
    names = b'{"info": {"features": {"kind": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}}}'
    for part, numbers in enumerate((range(0, 10), range(10, 17))):
        _parquet(tmp_path / layout.format("train", part), numbers, "photo", "kind", {b"huggingface": names})
    _parquet(tmp_path / layout.format("validation", 0), range(30, 33), "photo", "kind")
    source = open_source("parquet", tmp_path)
    assert source.classes == ("a", "b", "c")
    assert source.labels["train"].tolist() == [n % 3 for n in range(17)]
    assert source.labels["val"].tolist() == [0, 1, 2]
    for n, image in zip([1, 8, 9, 10, 16], _images(source, "train", [1, 8, 9, 10, 16]), strict=True):
        np.testing.assert_array_equal(image, _pixels(n))


def test_parquet_columns_must_be_clear(tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"
    _parquet(file, range(6))
    assert open_source("parquet", file).classes == ("0", "1", "2")  # one file, no names
    table = pq.read_table(file)
    pq.write_table(table.append_column("coarse", pa.array([0] * 6)), file)
    with pytest.raises(UserError, match=r"2 label columns: choose with --label-column label\|coarse"):
        open_source("parquet", tmp_path)
    assert open_source("parquet", tmp_path, label_column="coarse").classes == ("0",)
    with pytest.raises(UserError, match=r"no column 'fine' \(--label-column\); it has img, label, coarse"):
        open_source("parquet", tmp_path, label_column="fine")
    with pytest.raises(UserError, match=r"'img' is struct.*not integer"):
        open_source("parquet", tmp_path, label_column="img")
    pq.write_table(table.drop_columns(["img"]), file)
    with pytest.raises(UserError, match=r"no image column \(struct.*its columns: label \(int64\)"):
        open_source("parquet", tmp_path)
    file.write_bytes(b"PAR1 junk")
    with pytest.raises(UserError, match=r"cannot read .*train.parquet"):
        open_source("parquet", tmp_path)


def test_an_unlabelled_test_split_is_left_out(tmp_path: Path) -> None:
    _parquet(tmp_path / "train.parquet", range(6))
    table = pq.read_table(tmp_path / "train.parquet")
    pq.write_table(table.set_column(1, "label", pa.array([-1] * 6)), tmp_path / "test.parquet")
    source = open_source("parquet", tmp_path)
    assert set(source.labels) == {"train"}
    assert source.notes == ("split test has no labels (all -1): its 6 images are left out",)


# --- CIFAR-10 archive


def _cifar_batches() -> dict[str, bytes]:
    """The archive's files, smaller: text keys, as its Python 2 strings come out, and NumPy's old module name."""

    def pickled(value: dict) -> bytes:
        return pickle.dumps(value, protocol=2).replace(b"numpy._core", b"numpy.core")

    def batch(first: int) -> bytes:
        data = np.stack([_pixels(n, 32).transpose(2, 0, 1).reshape(-1) for n in range(first, first + 4)])
        return pickled({"data": data, "labels": [n % 10 for n in range(first, first + 4)]})

    files = {f"data_batch_{i}": batch(4 * (i - 1)) for i in range(1, 6)}
    return files | {
        "test_batch": batch(100),
        "batches.meta": pickled({"label_names": [f"name{i}" for i in range(10)]}),
    }


@pytest.mark.parametrize("form", ["folder", "parent", "archive", "archive's folder"])
def test_cifar10_archive(tmp_path: Path, form: str) -> None:
    files = _cifar_batches()
    if form in ("folder", "parent"):
        (tmp_path / "cifar-10-batches-py").mkdir()
        for name, data in files.items():
            (tmp_path / "cifar-10-batches-py" / name).write_bytes(data)
        path = tmp_path / "cifar-10-batches-py" if form == "folder" else tmp_path
    else:
        with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
            for name, data in files.items():
                member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        path = tmp_path / "cifar-10-python.tar.gz" if form == "archive" else tmp_path
    source = open_source("cifar10", path)
    assert source.classes[3] == "name3"
    assert source.labels["train"].tolist() == [n % 10 for n in range(20)]
    for n, image in zip([0, 7, 19], _images(source, "train", [0, 7, 19]), strict=True):
        np.testing.assert_array_equal(image, _pixels(n, 32))
    np.testing.assert_array_equal(_images(source, "test", [2])[0], _pixels(102, 32))


def test_a_cifar10_pickle_cannot_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "hacked"),)

    for name, data in _cifar_batches().items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "test_batch").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match=r"test_batch is not a CIFAR-10 batch: refused to load posix.mkdir"):
        open_source("cifar10", tmp_path)
    assert not (tmp_path / "hacked").exists()


def test_bad_cifar10_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist; with --download"):
        open_source("cifar10", tmp_path / "none")
    with pytest.raises(UserError, match=r"has no batches.meta: --path should be cifar-10-python.tar.gz"):
        open_source("cifar10", tmp_path)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(gzip.compress(b"junk" * 1000)[:60])
    with pytest.raises(UserError, match="not a readable archive"):
        open_source("cifar10", tmp_path / "cifar-10-python.tar.gz")


# --- IDX


def _idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def _write_idx(folder: Path, suffix: str) -> dict[str, np.ndarray]:
    images = {"train": np.stack([_pixels(n, 7, ()) for n in range(12)]), "t10k": _pixels(50, 7, (7,))}
    images["t10k"] = images["t10k"].transpose(2, 0, 1).copy()
    for name, array in images.items():
        labels = np.arange(len(array), dtype=np.uint8) % 4
        for kind, data in (("images-idx3", _idx(array)), ("labels-idx1", _idx(labels))):
            data = gzip.compress(data) if suffix else data
            (folder / f"{name}-{kind}-ubyte{suffix}").write_bytes(data)
    return images


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx(tmp_path: Path, suffix: str) -> None:
    images = _write_idx(tmp_path, suffix)
    source = open_source("idx", tmp_path)
    assert source.classes == ("0", "1", "2", "3")
    assert source.labels["train"].tolist() == [n % 4 for n in range(12)]
    np.testing.assert_array_equal(_images(source, "train", [0, 5, 11])[1], images["train"][5])
    np.testing.assert_array_equal(_images(source, "test", [6])[0], images["t10k"][6])


def test_bad_idx_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no IDX images, such as train-images-idx3-ubyte"):
        open_source("idx", tmp_path)
    _write_idx(tmp_path, "")
    file = tmp_path / "train-images-idx3-ubyte"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte is truncated or altered"):
        open_source("idx", tmp_path)
    file.write_bytes(_idx(np.frombuffer(whole, np.uint8, 7 * 49, 16).reshape(7, 7, 7)))
    os.utime(file)
    with pytest.raises(UserError, match=r"has 7 images, train-labels-idx1-ubyte has 12 labels"):
        open_source("idx", tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="has no labels beside it"):
        open_source("idx", tmp_path)


# --- folders


def _tree(root: Path, classes: str = "ant bee", count: int = 3) -> Path:
    for name in classes.split():
        for n in range(count):
            file = root / name / ("deep" if n else ".") / f"{n}.PNG"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(_png(_pixels(n)))
    return root


def test_folder_of_classes(tmp_path: Path) -> None:
    source = open_source("folder", _tree(tmp_path))
    (tmp_path / "ant" / "Thumbs.db").write_bytes(b"no image")
    (tmp_path / ".cache").mkdir()
    assert source.fingerprint == open_source("folder", tmp_path).fingerprint  # neither is an image
    assert source.classes == ("ant", "bee")
    assert source.labels["train"].tolist() == [0, 0, 0, 1, 1, 1]
    assert [raw.name for raw in source.read("train", [3])] == [str(tmp_path / "bee" / "0.PNG")]
    np.testing.assert_array_equal(_images(source, "train", [1])[0], _pixels(1))


def test_folder_of_splits(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        _tree(tmp_path / split, "ant bee" if split == "train" else "bee")
    source = open_source("folder", tmp_path)
    assert {s: v.tolist() for s, v in source.labels.items()} == {
        "train": [0, 0, 0, 1, 1, 1],
        "val": [1, 1, 1],
        "test": [1, 1, 1],
    }
    _tree(tmp_path / "test", "wasp")
    with pytest.raises(UserError, match=r"class 'wasp' has no folder in .*train"):
        open_source("folder", tmp_path)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_source("folder", tmp_path / "none")
    with pytest.raises(UserError, match="needs --path"):
        open_source("folder", None)
    with pytest.raises(UserError, match="has no class folders"):
        open_source("folder", tmp_path)
    _tree(tmp_path)
    (tmp_path / "wasp").mkdir()
    (tmp_path / "wasp" / "notes.txt").write_text("none yet")
    with pytest.raises(UserError, match=r"class folder .*wasp is empty"):
        open_source("folder", tmp_path)
    with pytest.raises(UserError, match="is a file; source folder needs a folder"):
        open_source("folder", tmp_path / "wasp" / "notes.txt")


def test_the_fingerprint_follows_the_files(tmp_path: Path) -> None:
    before = open_source("folder", _tree(tmp_path)).fingerprint
    assert open_source("folder", tmp_path).fingerprint == before
    (tmp_path / "ant" / "0.PNG").write_bytes(_png(_pixels(0, 11)))
    assert open_source("folder", tmp_path).fingerprint != before


def _flat(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for n in range(count):
        (folder / f"{n}.png").write_bytes(_png(_pixels(n)))


@pytest.mark.parametrize("name", ["test", "Test", "testing"])
def test_a_flat_test_folder_is_left_out_and_told(tmp_path: Path, name: str) -> None:
    _tree(tmp_path / "train")
    _tree(tmp_path / "val")
    _flat(tmp_path / name, 5)
    (tmp_path / "models").mkdir()
    source = open_source("folder", tmp_path)
    assert (source.classes, sorted(source.labels)) == (("ant", "bee"), ["train", "val"])
    assert source.notes == (
        "models/ is beside the folders of splits and is left out",
        f"{name}/ has no folder of a class in train: its 5 images are left out",
    )


def test_train_beside_what_is_no_split(tmp_path: Path) -> None:
    """As Kaggle's test1/: what holds class folders and is called train is no class of that name."""
    _tree(tmp_path / "train")
    _flat(tmp_path / "test1", 4)
    source = open_source("folder", tmp_path)
    assert (source.classes, list(source.labels)) == (("ant", "bee"), ["train"])
    assert source.notes == ("test1/ is beside the folders of splits and is left out",)


def test_a_test_folder_with_one_folder_that_is_no_class(tmp_path: Path) -> None:
    """As those who must have a class folder put unlabelled images: test/unknown/*.png."""
    _tree(tmp_path / "train")
    _flat(tmp_path / "test" / "unknown", 4)
    source = open_source("folder", tmp_path)
    assert list(source.labels) == ["train"]
    assert "test/ has no folder of a class in train: its 4 images are left out" in source.notes


def test_splits_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    _flat(tmp_path / "a" / "train", 3)
    _flat(tmp_path / "a" / "test", 3)
    with pytest.raises(UserError, match=r"train has no class folders \(3 images beside each other\)"):
        open_source("folder", tmp_path / "a")
    for name in ("train", "val", "valid"):
        _tree(tmp_path / "b" / name)
    with pytest.raises(UserError, match=r"two folders of val images: .*val and .*valid"):
        open_source("folder", tmp_path / "b")
    _tree(tmp_path / "c" / "test")
    with pytest.raises(UserError, match="has no train folder beside test"):
        open_source("folder", tmp_path / "c")


def test_a_class_may_be_called_like_a_split(tmp_path: Path) -> None:
    source = open_source("folder", _tree(tmp_path, "test bus"))
    assert source.classes == ("bus", "test")
    assert source.notes == ("test/ is taken for a class: beside it is bus/",)


def test_links_are_followed_and_no_image_is_read_twice(tmp_path: Path) -> None:
    pool, root = _tree(tmp_path / "pool", "cat dog ext"), tmp_path / "d"
    _tree(root, "ant bee")
    (root / "cat").symlink_to(pool / "cat")  # a class folder
    (root / "bee" / "from_dog.png").symlink_to(pool / "dog" / "0.PNG")  # an image
    (root / "bee" / "more").symlink_to(pool / "ext")  # a folder of images
    expected = {"ant": 3, "bee": 7, "cat": 3}
    for link, target in {
        "ant/self": ".", "ant/up": "..", "ant/other": "../bee", "ant/deep2": "deep", "ant/one.png": "../bee/0.PNG",
        "ant/ext": pool / "ext", "up": ".", "above": "..", "alias": "bee", "part": "bee/deep", "cat/loop": pool,
    }.items():  # fmt: skip
        (root / link).symlink_to(target)
    source = open_source("folder", root)
    counts = dict(zip(source.classes, np.bincount(source.labels["train"]).tolist(), strict=True))
    assert sum(counts.values()) == sum(expected.values())
    assert counts.keys() == expected.keys()
    assert (counts["ant"], counts["bee"]) in ((3, 7), (6, 4))  # what two classes link to is read once
    notes = " ".join(source.notes)
    for left in (
        "up/ is a link to what holds",
        "above/ is a link to what holds",
        "alias/ is a link to bee/",
        "part/ is",
    ):
        assert left in notes
    assert "7 link to a folder or file that is read already" in notes


def test_what_is_no_image_is_counted_by_kind(tmp_path: Path) -> None:
    _tree(tmp_path)
    for name in ("a.heic", "b.HEIC", "notes.txt", ".hidden.png", "._0.png", "README"):
        (tmp_path / "ant" / name).write_bytes(b"x")
    (tmp_path / "__MACOSX").mkdir()
    os.mkfifo(tmp_path / "ant" / "fifo.png")
    (tmp_path / "ant" / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "loose.jpg").write_bytes(b"x")
    source = open_source("folder", tmp_path)
    assert len(source.labels["train"]) == 6
    beside, left = source.notes
    assert beside == f"left out beside the class folders of {tmp_path.name}/: 1 .jpg"
    kinds = "2 FIFO, device or socket, 2 hidden, 1 .HEIC, 1 .heic, 1 .txt, 1 without suffix"
    assert left == f"left out: {kinds}"


@pytest.mark.parametrize(
    "suffix", [".jfif", ".jpe", ".avif", ".jp2", ".tga", ".TIF", ".dib", ".pnm", ".webp"]
)
def test_every_suffix_that_pillow_reads(tmp_path: Path, suffix: str) -> None:
    _tree(tmp_path)
    Image.fromarray(_pixels(7, 16)).save(tmp_path / "ant" / f"x{suffix}")
    source = open_source("folder", tmp_path)
    assert len(source.labels["train"]) == 7
    assert source.notes == ()


def test_class_names_that_are_not_utf8(tmp_path: Path) -> None:
    for name in (b"caf\xe9", b"tea", b"a\nb"):
        _tree(tmp_path, os.fsdecode(name).replace("\n", "~"))
    (tmp_path / "a~b").rename(tmp_path / "a\nb")
    source = open_source("folder", tmp_path)
    assert source.classes == ("a\\nb", "café", "tea")
    assert "class name b'caf\\xe9' is read as 'café'" in source.notes
    _tree(tmp_path, "café")
    with pytest.raises(UserError, match="two classes are called 'café'"):
        open_source("folder", tmp_path)


# --- class names


def test_labels_from_one_give_no_empty_class(tmp_path: Path) -> None:
    for split in ("train", "t10k"):
        images, labels = np.zeros((52, 7, 7), np.uint8), np.arange(52, dtype=np.uint8) % 26 + 1
        (tmp_path / f"{split}-images-idx3-ubyte").write_bytes(_idx(images))
        (tmp_path / f"{split}-labels-idx1-ubyte").write_bytes(_idx(labels))
    source = open_source("idx", tmp_path)
    assert source.classes == tuple(map(str, range(1, 27)))
    assert source.labels["train"].tolist() == [n % 26 for n in range(52)]
    assert source.notes == ("labels 1 to 26 became 0 to 25: no class without an image",)
    letters = tuple("abcdefghijklmnopqrstuvwxyz")
    assert open_source("idx", tmp_path, classes=letters).classes == letters
    with pytest.raises(
        UserError, match=r"--classes gives 2 names, but the labels of .* are 1 to 26; give 26 names"
    ):
        open_source("idx", tmp_path, classes=("a", "b"))


def test_a_label_of_a_million_million_is_a_class_and_no_hang(tmp_path: Path) -> None:
    with wds.TarWriter(str(tmp_path / "train-0.tar")) as writer:
        for n, label in enumerate((5, 10**12, 5, 7)):
            writer.write({"__key__": f"{n}", "png": _png(_pixels(n)), "cls": str(label)})
    source = open_source("wds", tmp_path)
    assert source.classes == ("5", "7", "1000000000000")
    assert source.labels["train"].tolist() == [0, 2, 0, 1]


def test_names_and_orders_that_a_user_gives(tmp_path: Path) -> None:
    _tree(tmp_path / "d", "ant bee wasp")
    ordered = open_source("folder", tmp_path / "d", classes=("wasp", "ant", "fly", "bee"))
    assert ordered.labels["train"].tolist() == [1] * 3 + [3] * 3 + [0] * 3
    assert ordered.notes == ("1 class has no image in train: 'fly'",)
    assert ordered.fingerprint != open_source("folder", tmp_path / "d").fingerprint
    renamed = open_source("folder", tmp_path / "d", classes=("x", "y", "z"))
    assert renamed.classes == ("x", "y", "z")
    assert renamed.notes == ("classes renamed by --classes: 'ant' is 'x', 'bee' is 'y', 'wasp' is 'z'",)
    with pytest.raises(UserError, match=r"--classes has no 'wasp', a class of d; give all 3"):
        open_source("folder", tmp_path / "d", classes=("ant", "bee", "wsap"))
    file = tmp_path / "names.txt"
    file.write_text("sea lion\nfox, red\n\n")
    assert naming.given(str(file)) == ("sea lion", "fox, red")
    assert naming.given("a, b") == ("a", "b")
    assert len(naming.given(",".join(map(str, range(1000))))) == 1000
    os.mkfifo(tmp_path / "fifo")
    for wrong in ("a,,b", "a,a", str(tmp_path / "none.txt"), str(tmp_path), str(tmp_path / "fifo"), ""):
        with pytest.raises(UserError, match="--classes"):
            naming.given(wrong)


def test_parquet_files_must_agree_on_class_names(tmp_path: Path) -> None:
    def metadata(*names: str) -> dict:
        feature = {"label": {"names": names, "_type": "ClassLabel"}}
        return {b"huggingface": json.dumps({"info": {"features": feature}}).encode()}

    _parquet(tmp_path / "train-0.parquet", range(6), metadata=metadata("a", "b", "c"))
    _parquet(tmp_path / "train-1.parquet", range(6))
    assert open_source("parquet", tmp_path).classes == ("a", "b", "c")
    _parquet(tmp_path / "test-0.parquet", range(6), metadata=metadata("a", "c", "b"))
    with pytest.raises(
        UserError, match=r"class names differ: class 1 is 'c' in .*test-0.*, 1 is 'b'|1 is 'b' in .*train-0"
    ):
        open_source("parquet", tmp_path)
    _parquet(tmp_path / "test-0.parquet", range(6), metadata=metadata("a", "b", "c", "d"))
    with pytest.raises(UserError, match=r"class names differ: class (3 is 'd'|there is no 3) in"):
        open_source("parquet", tmp_path)
    bad = {b"huggingface": b'{"info": {"features": {"label": {"names": 7, "_type": "ClassLabel"}}}}'}
    _parquet(tmp_path / "test-0.parquet", range(6), metadata=bad)
    with pytest.raises(UserError, match=r"test-0.parquet: the class names of column 'label' are no list"):
        open_source("parquet", tmp_path)


def test_a_parquet_job_opens_its_own_file_only(tmp_path: Path) -> None:
    for part in range(3):
        _parquet(tmp_path / f"train-{part}.parquet", range(10 * part, 10 * part + 10))
    source = open_source("parquet", tmp_path)
    for part in (0, 2):
        (tmp_path / f"train-{part}.parquet").unlink()
    for n, image in zip([10, 13, 19], _images(source, "train", [10, 13, 19]), strict=True):
        np.testing.assert_array_equal(image, _pixels(n))
    with pytest.raises(UserError, match=r"cannot read .*train-2.parquet"):
        _images(source, "train", [20])


# --- hostile files


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("wds", "train-0.tar"),
        ("parquet", "train-0.parquet"),
        ("idx", "train-images-idx3-ubyte"),
        ("idx", "train-labels-idx1-ubyte"),
        ("cifar10", "batches.meta"),
        ("cifar10", "data_batch_1"),
    ],
)
def test_a_fifo_among_the_files_is_no_hang(tmp_path: Path, kind: str, name: str) -> None:
    _write_idx(tmp_path, "")
    for file, data in _cifar_batches().items():
        (tmp_path / file).write_bytes(data)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=r"FIFO|no labels beside it|has no (batches.meta|data_batch_1)"):
            open_source(kind, path)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(12, 7), (12, 0, 7), (12, 7, 7, 2), (2**32 - 1, 2**32 - 1, 2**32 - 1)])
def test_idx_files_of_wrong_dimensions(tmp_path: Path, shape: tuple[int, ...]) -> None:
    _write_idx(tmp_path, "")
    header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
    size = 12 * 98 if len(shape) == 4 else 0 if 0 in shape else 12 * 7
    (tmp_path / "train-images-idx3-ubyte").write_bytes(header + bytes(size))
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte (is|holds)"):
        open_source("idx", tmp_path)


@pytest.mark.parametrize("type_code", [9, 11, 12, 13, 14, 0])
def test_idx_files_of_other_types_and_damaged_gzip(tmp_path: Path, type_code: int) -> None:
    _write_idx(tmp_path, ".gz")
    file = tmp_path / "train-labels-idx1-ubyte.gz"
    data = bytearray(gzip.decompress(file.read_bytes()))
    data[2] = type_code
    file.write_bytes(gzip.compress(data))
    with pytest.raises(UserError, match=r"train-labels-idx1-ubyte.gz is not an IDX file of unsigned bytes"):
        open_source("idx", tmp_path)
    whole = bytearray(gzip.compress(bytes(1000)))
    whole[12:16] = b"\xff" * 4  # the deflate stream itself
    file.write_bytes(whole)
    with pytest.raises(UserError, match=r"cannot read .*train-labels-idx1-ubyte.gz"):
        open_source("idx", tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batches.meta", {}),
        ("batches.meta", []),
        ("batches.meta", {"label_names": [1, 2]}),
        ("batches.meta", {"label_names": "abc"[:0]}),
        ("data_batch_2", 7),
        ("data_batch_2", {"labels": [0], "data": np.zeros((1, 3072), np.float32)}),
        ("data_batch_2", {"labels": [0.5], "data": np.zeros((1, 3072), np.uint8)}),
        ("data_batch_2", {"labels": [10**30], "data": np.zeros((1, 3072), np.uint8)}),
        ("data_batch_2", {"labels": [0, 1], "data": np.zeros((1, 3072), np.uint8)}),
        ("data_batch_2", {"labels": [0], "data": np.zeros((3072, 1), np.uint8)}),
        ("data_batch_2", {"labels": 0, "data": np.zeros((0, 3072), np.uint8)}),
    ],
)
def test_cifar_batches_of_wrong_types(tmp_path: Path, name: str, value: object) -> None:
    for file, data in _cifar_batches().items():
        (tmp_path / file).write_bytes(data)
    (tmp_path / name).write_bytes(pickle.dumps(value, protocol=2))
    with pytest.raises(UserError, match=f"{name} is not a CIFAR-10 batch"):
        open_source("cifar10", tmp_path)


# --- WebDataset


def _tar(file: Path, numbers: range, **extra: bytes) -> None:
    with wds.TarWriter(str(file)) as writer:
        for n in numbers:
            writer.write({"__key__": f"x/{n:03d}", "png": _png(_pixels(n)), "cls": str(n % 3), **extra})


def test_wds(tmp_path: Path) -> None:
    _tar(tmp_path / "train-0.tar", range(0, 5))
    _tar(tmp_path / "train-1.tar", range(5, 9))
    _tar(tmp_path / "val-0.tar", range(20, 23))
    source = open_source("wds", tmp_path)
    assert source.classes == ("0", "1", "2")
    assert source.labels["train"].tolist() == [n % 3 for n in range(9)]
    assert source.labels["val"].tolist() == [2, 0, 1]
    for n, image in zip([0, 4, 5, 8], _images(source, "train", [0, 4, 5, 8]), strict=True):
        np.testing.assert_array_equal(image, _pixels(n))


def test_wds_refuses_what_it_would_have_to_trust(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no \*.tar"):
        open_source("wds", tmp_path)
    file = tmp_path / "train-0.tar"
    _tar(file, range(3), pyd=pickle.dumps({}))  # what is not needed is not read either
    assert open_source("wds", tmp_path).notes == ("left out of the tars' members: 3 .pyd",)
    _tar(file, range(3), jpg=b"second image")
    with pytest.raises(UserError, match="a second image of its sample"):
        open_source("wds", tmp_path)
    _tar(file, range(3))
    whole = file.read_bytes()
    file.write_bytes(whole[:1800])
    with pytest.raises(UserError, match="is not a readable tar"):
        open_source("wds", tmp_path)
    with wds.TarWriter(str(file)) as writer:
        writer.write({"__key__": "a", "png": _png(_pixels(0))})
    with pytest.raises(UserError, match=r"sample 'a' has no label \(.cls\)"):
        open_source("wds", tmp_path)
    file.write_bytes(whole)
    (tmp_path / "more.tar").write_bytes(whole)
    with pytest.raises(UserError, match=r"cannot tell the split of .*more.tar"):
        open_source("wds", tmp_path)


def test_tars_as_others_make_them(tmp_path: Path) -> None:
    """Names that begin with ./, folders, AppleDouble members, captions and metadata, in folders of splits."""
    for split, numbers in (("train", range(6)), ("validation", range(3))):
        (tmp_path / "data" / split).mkdir(parents=True)
        with tarfile.open(tmp_path / "data" / split / "0000.tar", "w") as tar:
            folder = tarfile.TarInfo("./")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            for n in numbers:
                parts = {
                    "png": _png(_pixels(n)),
                    "cls": b"%d\n" % (n % 3),
                    "json": b"{}",
                    "txt": b"x",
                    "seg.png": b"x",
                }
                for kind, data in parts.items():
                    for prefix in ("./", "./._"):
                        member = tarfile.TarInfo(f"{prefix}{n:03d}.{kind}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
    (tmp_path / "data" / "._0000.tar").write_bytes(b"Mac")
    (tmp_path / "README.md").write_text("x")
    source = open_source("wds", tmp_path)
    assert {split: v.tolist() for split, v in source.labels.items()} == {
        "train": [0, 1, 2] * 2,
        "val": [0, 1, 2],
    }
    np.testing.assert_array_equal(_images(source, "train", [4])[0], _pixels(4))
    assert source.notes == (
        "left out: 1 .md, 1 hidden",
        "left out of the tars' members: 45 hidden, 9 .json, 9 .seg.png, 9 .txt",
    )


def test_a_folder_of_several_resolutions_is_no_source(shapes: Path) -> None:
    with pytest.raises(
        UserError, match=r"holds shards at several resolutions; name one of them: --path .*/r16"
    ):
        open_source("wds", shapes)


# --- synthetic


def test_synthetic_images_are_functions_of_seed_split_and_index() -> None:
    source = open_source("synthetic", None, samples={"train": 30, "test": 10}, size=24, seed=5)
    assert source.masks
    assert source.labels["train"].tolist() == list(range(10)) * 3
    raws = list(source.read("train", [3, 17]))
    for i, raw in zip([3, 17], raws, strict=True):
        image, mask, label = synthetic.draw(5, "train", i, 24)
        np.testing.assert_array_equal(raw.image, image)  # type: ignore[arg-type]
        np.testing.assert_array_equal(raw.mask, mask)  # type: ignore[arg-type]
        assert label == i % 10
        assert image.shape == (24, 24, 3)
        assert set(np.unique(mask)) == {0, 255}
    assert not np.array_equal(synthetic.draw(5, "test", 3, 24)[0], raws[0].image)  # type: ignore[arg-type]
    assert not np.array_equal(synthetic.draw(6, "train", 3, 24)[0], raws[0].image)  # type: ignore[arg-type]


def test_synthetic_masks_scale_with_the_image() -> None:
    for index in range(10):
        small, large = (synthetic.draw(1, "train", index, size)[1] / 255 for size in (24, 96))
        shrunk = large.reshape(24, 4, 24, 4).mean((1, 3)) >= 0.5
        assert 0.02 < small.mean() < 0.6
        assert (shrunk != (small > 0.5)).mean() < 0.05  # the same object at another size


def test_samples_need_a_train_split() -> None:
    with pytest.raises(UserError, match="a train split is needed"):
        open_source("synthetic", None, samples={"test": 10})
    with pytest.raises(UserError, match=r"--download is for source cifar10, not idx"):
        open_source("idx", Path("."), download=True)
