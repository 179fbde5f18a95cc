"""The ledger: what control groups of both versions leave, and what was promised and not yet filled."""

import io
import os
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from irkd_dist.data import memory
from irkd_dist.data.decoded import Dataset, Images, Work
from irkd_dist.errors import UserError
from tests.data.conftest import CROP_FLIP, assert_same, epoch_of, write_shards

MIB = 2**20


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_a_limit_of_version_2_less_what_is_in_use(tmp_path):
    own, mounted = tmp_path / "cgroup", tmp_path / "fs"
    own.write_text("0::/slurm/job_7/step_0\n")
    # 300 in use, of which 100 are pages of files, and tmpfs's (`file` counts them) are none of those
    stat = f"anon {150 * MIB}\nfile {150 * MIB}\nshmem {50 * MIB}\ninactive_file {60 * MIB}\nactive_file {40 * MIB}"
    write(mounted / "slurm/job_7", memory__max=1000 * MIB, memory__current=300 * MIB, memory__stat=stat)
    write(mounted / "slurm/job_7/step_0", memory__max="max", memory__current=1, memory__stat="anon 1")
    assert memory.in_cgroups(own, mounted) == [800 * MIB]
    write(
        mounted / "slurm/job_7/step_0",
        memory__max=350 * MIB,
        memory__current=300 * MIB,
        memory__stat="anon 1",
    )
    assert sorted(memory.in_cgroups(own, mounted)) == [50 * MIB, 800 * MIB]
    write(mounted / "slurm/job_7/step_0", memory__max=200 * MIB)
    assert min(memory.in_cgroups(own, mounted)) == 0  # a limit lowered below what is in use


def test_a_limit_of_version_1_less_what_is_in_use(tmp_path):
    own, mounted = tmp_path / "cgroup", tmp_path / "fs"
    own.write_text("9:name=systemd:/x\n4:cpu,cpuacct:/x\n3:memory:/docker/abc\n0::/\n")
    stat = f"cache {90 * MIB}\ninactive_file 1\ntotal_inactive_file {30 * MIB}\ntotal_active_file {20 * MIB}"
    names = {"memory__limit_in_bytes": 500 * MIB, "memory__usage_in_bytes": 400 * MIB, "memory__stat": stat}
    write(
        mounted / "memory", **names
    )  # a container sees its own group at the root, not under the path it is told
    assert memory.in_cgroups(own, mounted) == [150 * MIB]


def test_without_control_groups_nothing_limits(tmp_path):
    assert memory.in_cgroups(tmp_path / "none", tmp_path) == []
    (tmp_path / "cgroup").write_text("0::/\n")
    assert memory.in_cgroups(tmp_path / "cgroup", tmp_path) == []


def test_what_is_left_here_is_no_more_than_the_host_has(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert 0 < memory.left() <= psutil.virtual_memory().available + 64 * MIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.left() < psutil.virtual_memory().available / 3


class Owner:
    def __init__(self, unfilled: int, shared: bool = False) -> None:
        self.unfilled, self.shared = unfilled, shared


@pytest.fixture
def ten_mib(monkeypatch):
    """A process that has 10 MiB left, whatever is in use."""
    monkeypatch.setattr(memory, "in_cgroups", lambda: [10 * MIB])
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


@pytest.mark.usefixtures("ten_mib")
def test_memory_is_promised_once():
    first, second = Owner(6 * MIB), Owner(6 * MIB)
    assert memory.promise(first, 6 * MIB)
    assert memory.left() == 4 * MIB
    assert not memory.promise(second, 6 * MIB)
    first.unfilled = MIB  # what is filled shows in the host's own figures
    assert memory.left() == 9 * MIB
    assert memory.promise(second, 6 * MIB)
    del first, second
    assert memory.left() == 10 * MIB


@pytest.mark.usefixtures("ten_mib")
def test_what_is_shared_counts_once_a_node(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert (memory.left(), memory.left(shared=True)) == (2.5 * MIB, 10 * MIB)
    common, own = Owner(2 * MIB, shared=True), Owner(MIB)
    memory.note(common)
    assert (memory.left(), memory.left(shared=True)) == (2 * MIB, 8 * MIB)
    assert memory.promise(own, MIB)  # and the three others are taken to have the same
    assert (memory.left(), memory.left(shared=True)) == (MIB, 4 * MIB)
    common.unfilled = 0
    assert memory.left(shared=True) == 6 * MIB


def images(data, size: int, **work) -> Images:
    folder, manifest = data
    return Images(Dataset(folder, manifest, "train"), size, Work(**work))


def test_a_second_set_of_images_does_not_get_what_the_first_was_promised(resized, monkeypatch):
    needed = 150 * 3 * 32 * 32
    monkeypatch.setattr(memory, "in_cgroups", lambda: [int(2.2 * needed)])
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    first = images(resized, 32)
    assert (first.kept, first.note, first.unfilled) == ("ram", None, needed)
    second = images(resized, 32)
    assert (second.kept, second.unfilled) == ("none", 0)
    assert second.note is not None
    assert "train at 32 px: decoded images are kept not at all, not data.cache=ram: they take" in second.note
    first.take(first.ids[:100])
    assert first.unfilled == needed // 3
    first.close()
    assert images(resized, 32, cache="device").kept == "device"  # all read, on a device that is the CPU
    second.close()


def test_an_image_whose_bytes_change_after_it_was_decoded_is_looked_through_again(tmp_path):
    """With size and time as they were: torchvision's decoder would end the process."""
    data = tmp_path, write_shards(tmp_path, (16,), "resize")
    opened = images(data, 16, cache="none")
    first = opened.take(opened.ids)
    path = tmp_path / "r16" / "train-000000.tar"
    before, content = path.stat(), bytearray(path.read_bytes())
    at = content.index(b"IDAT") + 20
    content[at] ^= 255
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UserError, match="sample 000000000 cannot be read"):
        opened.take(opened.ids[:1])
    assert torch.equal(opened.take(opened.ids[1:]), first[1:])


def test_an_image_that_only_pillow_may_decode_stays_pillows(tmp_path):
    """With a palette: that Pillow reads it says nothing of what libpng does with it."""
    data = tmp_path, write_shards(tmp_path, (16,), "resize")
    opened = images(data, 16, cache="none")
    palette = io.BytesIO()
    Image.new("P", (16, 16)).save(palette, "png")
    opened._split.images = lambda ids: [palette.getvalue()] * len(ids)  # type: ignore[method-assign]
    for _ in range(2):
        opened.take(np.array([0]))
        assert opened._sound[0] == -1


@pytest.mark.parametrize("processes", ["1", str(2**30)])
def test_images_that_would_not_fit_are_decoded_again_and_are_the_same(resized, monkeypatch, processes):
    expected = epoch_of(resized, augment=CROP_FLIP)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)  # of this host, and all would keep them
    for ours, kept in zip(epoch_of(resized, augment=CROP_FLIP), expected, strict=True):
        assert_same(ours, kept)


def test_a_device_that_is_too_small_falls_back_to_ram(resized, monkeypatch):
    """Decided from what the device has left, before anything is put there."""
    monkeypatch.setattr(memory, "left_on", lambda _: 150 * 3 * 32 * 32)
    fallen = images(resized, 32, cache="device", device=torch.device("cuda", 0))
    assert (fallen.kept, fallen.unfilled) == ("ram", 150 * 3 * 32 * 32)
    assert fallen.note is not None
    assert "kept in RAM instead, not data.cache=device: they take" in fallen.note
    fallen.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_images_kept_on_a_device(resized):
    device = torch.device("cuda", 0)
    there = images(resized, 32, cache="device", device=device)
    assert (there.kept, there.note, there.unfilled) == ("device", None, 0)
    assert 0 < memory.left_on(device) <= torch.cuda.get_device_properties(device).total_memory
    here = images(resized, 32)
    assert torch.equal(there.take(there.ids).cpu(), here.take(here.ids))
