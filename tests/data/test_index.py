"""The tar reader: every form of tar as Python's tarfile reads it, and damage that is an error, never a loop."""

import io
import random
import tarfile

import pytest

from irkd_dist.data import index


def _tar(form: int, names: list[str], data: bytes = b"12") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def _members(data: bytes) -> list[index.Member]:
    return list(index.members(lambda count, offset: data[offset : offset + count], len(data)))


FORMS = [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]


@pytest.mark.parametrize("form", FORMS)
def test_long_names_in_every_form(form: int) -> None:
    key = "folder" * 10 + "/" + "k" * 90
    data = _tar(form, [f"{key}.cls", f"{key}.npy", "b.cls", "b.npy"])
    found = index.scan(lambda count, offset: data[offset : offset + count], len(data), "npy")
    assert (found.keys, found.labels.tolist()) == ([key, "b"], [12, 12])
    assert all(data[offset : offset + size] == b"12" for offset, size in found.image)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_no_plain_file_is_told(form: int) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        for name, kind in (
            ("./", tarfile.DIRTYPE),
            ("l", tarfile.SYMTYPE),
            ("f", tarfile.FIFOTYPE),
            ("x", tarfile.REGTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type = kind
            tar.addfile(member)
    assert [(m.plain, m.folder) for m in _members(stream.getvalue())] == [
        (False, True),
        *[(False, False)] * 2,
        (True, False),
    ]


def test_a_name_of_bytes_that_are_no_utf8_is_kept() -> None:
    data = _tar(tarfile.USTAR_FORMAT, ["caf\udce9.cls"])
    assert _members(data)[0].name == "caf\udce9.cls"


def _pax(record: bytes, form: int = tarfile.USTAR_FORMAT) -> bytes:
    header = tarfile.TarInfo("x")
    header.type, header.size = b"x", len(record)
    return header.tobuf(form) + record.ljust(512, b"\0") + _tar(form, ["a.cls"])


@pytest.mark.parametrize(
    "record",
    [
        b"0 path=x\n",
        b"00 path=x\n",
        b"3 path=x\n",
        b"99 path=x\n",
        b"x",
        b"-9 path=x\n",
        b"12 size=-512\n",
        b"8 path\n",
    ],
)
def test_damaged_pax_records_are_errors_and_no_loops(record: bytes) -> None:
    with pytest.raises(ValueError, match=r"PAX header is damaged|size is -512"):
        _members(_pax(record))


def test_tars_cut_between_entries_or_joined_by_cat_are_not_whole() -> None:
    data = _tar(tarfile.USTAR_FORMAT, ["a.cls", "b.cls"])
    with pytest.raises(ValueError, match="end marker is missing"):
        _members(data[:1024])
    with pytest.raises(ValueError, match="data follows its end marker"):
        _members(data + data)
    with pytest.raises(ValueError, match="beyond the end"):
        _members(data[:1537])


def test_mutated_tars_end_well_or_in_a_value_error() -> None:
    whole = {form: _tar(form, ["l" * 120 + ".cls" if form else "a.cls", "b.cls"]) for form in FORMS}
    for seed in range(1500):
        rng = random.Random(seed)
        data = bytearray(whole[rng.choice(FORMS)])
        block = 512 * rng.randrange(8)
        for _ in range(rng.randrange(1, 4)):
            data[block + rng.choice([rng.randrange(512), 124 + rng.randrange(12), 156])] = rng.choice(
                [0, 0x80, 0xFF, *b"xgLKS5071-"]
            )
        header = data[block : block + 512]
        checksum = sum(header) - sum(header[148:156]) + 8 * 32
        data[block + 148 : block + 156] = b"%06o\0 " % checksum
        try:
            assert len(_members(bytes(data))) <= 8
        except ValueError:
            continue


@pytest.mark.parametrize(
    ("label", "value"),
    [(b"3", 3), (b" 3\n", 3), (b"-1", -1), (b"1_0", None), (b"", None), (b"9" * 40, None), (b"1.5", None)],
)
def test_labels_are_whole_numbers(label: bytes, value: int | None) -> None:
    (member,) = _members(_tar(tarfile.USTAR_FORMAT, ["a.cls"], label))
    if value is not None:
        assert index.label(member) == value
        return
    with pytest.raises(ValueError, match="holds no class number"):
        index.label(member)


def test_an_index_that_points_outside_its_tar_is_refused() -> None:
    data = _tar(tarfile.USTAR_FORMAT, ["a.cls", "a.npy"])
    whole = index.encode(
        index.scan(lambda count, offset: data[offset : offset + count], len(data), "npy"), "sha"
    )
    assert index.decode(whole, len(data), "sha") is not None
    assert index.decode(whole, len(data), "another") is None
    for wrong in (
        b"[[1536,2]]",
        b"[[-1,2]]",
        b"[[1536,99999]]",
        b"[[1.5,2]]",
        b"[[1e30,2]]",
        b"[]",
        b"7",
        b"null",
    ):
        changed = whole.replace(b"[[1536,2]]", wrong)
        if wrong != b"[[1536,2]]":
            with pytest.raises(ValueError, match=r"it is|it points|its numbers|int"):
                index.decode(changed, len(data), "sha")
    for none in (b"", b"{}", b"[]", b"[" * 100_000, b'"x"', b"\xff"):
        with pytest.raises(ValueError, match=r"."):
            index.decode(none, len(data), "sha")
