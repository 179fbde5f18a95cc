"""Decoded images that the processes of a node have in common: two real processes, one of which is killed."""

import hashlib
import os
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
from torch._C._distributed_c10d import TCPStore

from irkd_dist.data import shards
from irkd_dist.data.decoded import Dataset, Images, Work
from irkd_dist.data.shared import Node
from tests.data.conftest import SIZES, write_shards

SIZE = 160  # 150 images: 11 MiB


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    write_shards(folder, (SIZE,), "resize")
    return folder


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60), wait_for_workers=False)


class Worker:
    def __init__(self, folder: Path, store: TCPStore) -> None:
        command = [sys.executable, "-m", "tests.data.sharing_worker", str(folder), str(SIZE)]
        # freed memory goes back to the system at once, so that what is measured is what is kept
        environment = {
            "MASTER_PORT": str(store.port),
            "LOCAL_WORLD_SIZE": "2",
            "MALLOC_MMAP_THRESHOLD_": "65536",
        }
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    def ask(self, what: str) -> str:
        assert self.process.stdin
        assert self.process.stdout
        print(what, file=self.process.stdin, flush=True)
        return self.process.stdout.readline().strip()


def left_behind() -> set[Path]:
    return {f for where in ("/dev/shm", tempfile.gettempdir()) for f in Path(where).glob("*irkd*")}


def test_one_copy_for_two_processes_and_nothing_is_left_of_a_killed_one(large, store):
    there, size = left_behind(), SIZES["train"] * 3 * SIZE * SIZE
    alone = Images(Dataset(large, shards.load_manifest(large), "train"), SIZE, Work("none"))
    expected = hashlib.sha256(alone.take(alone.ids).numpy().tobytes()).hexdigest()
    pair = first, second = Worker(large, store), Worker(large, store)

    def taken() -> float:
        """What both take together, as a part of what the images take."""
        return 1024 * sum(int(each.ask("pss")) for each in pair) / size

    assert [each.ask("digest") for each in pair] == [expected] * 2  # what decoding takes is taken now
    before = taken()
    assert [each.ask("keep own") for each in pair] == ["ram None"] * 2
    assert [each.ask("digest") for each in pair] == [expected] * 2
    assert 1.9 < taken() - before < 2.3
    assert [each.ask("keep shared") for each in pair] == ["ram None"] * 2
    assert first.ask("fill 0") == f"{size // 2}"
    assert second.ask("fill 0") == f"{size // 2}"  # it is there already
    assert second.ask("fill 1") == "0"
    assert [each.ask("digest") for each in pair] == [expected] * 2
    assert 0.9 < taken() - before < 1.3

    first.process.kill()
    first.process.wait()
    assert second.ask("digest") == expected
    second.process.communicate()
    assert left_behind() == there


def test_whoever_comes_first_decides_and_a_region_that_is_gone_is_made_anew(store):
    one, other = Node(store), Node(store)
    made = one.region("a", 10, may=True)
    assert made is not None
    made.bytes[:2] = b"ab"
    opened = other.region("a", 10, may=False)
    assert opened is not None
    assert opened.bytes[:3] == b"ab\0"
    assert one.region("b", 10, may=False) is None
    assert other.region("b", 10, may=True) is None

    gone = one.region("c", 10, may=True)
    assert gone is not None
    gone.close()
    with open(os.devnull, "rb"):  # has its number now
        again = other.region("c", 10, may=True)
    assert again is not None
    assert again.bytes[:] == bytes(10)
    third = Node(store).region("c", 10, may=True)
    assert third is not None
    again.bytes[:1] = b"x"
    assert third.bytes[:1] == b"x"
