"""One run, any world: virtual ranks give the same bits on one, two and four processes, also when the world changes."""

import hashlib
import itertools
from pathlib import Path

import pytest
import torch

from irkd_dist import checkpoint
from irkd_dist.training import virtual
from tests.chaos import Fault, finish, start, strike
from tests.training.launch import irkd

SETTINGS = ["data.virtual_ranks=4", "student.dropout=0.1", "student.drop_path=0.1", "augment.mixup=0.4"]


def bits(run: Path) -> dict[str, str]:
    """SHA-256 of the last checkpoint's files."""
    folder = max((run / "checkpoints").glob("step-*"))
    files = [folder / name for name in (checkpoint.STUDENT, checkpoint.OPTIMIZER)]
    return {folder.name + f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def alone(student: Path) -> dict[str, str]:
    irkd("train", str(student), "name=alone", *SETTINGS)
    return bits(student.parent / "alone")


@pytest.fixture(scope="module")
def student(shapes: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.training.conftest import STUDENT_YAML

    out = tmp_path_factory.mktemp("virtual")
    (out / "student.yaml").write_text(STUDENT_YAML.format(shards=shapes, teacher=teacher, out=out))
    return out / "student.yaml"


@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_end_with_the_bits_of_one(student: Path, alone: dict[str, str], world: int) -> None:
    done = irkd("train", str(student), f"name=world-{world}", *SETTINGS, world=world)
    assert "1, 2, 4, ... 4 processes give the same bits" in done.stdout
    assert bits(student.parent / f"world-{world}") == alone


def test_worlds_that_change_under_sigkill_end_with_the_bits_of_one(
    student: Path, alone: dict[str, str]
) -> None:
    more = [*SETTINGS, "checkpoint.every_steps=3"]
    for world, fault in ((4, "sigkill@step:5:3"), (1, "sigkill@transition:8:0"), (2, "sigkill@step:11:1")):
        assert strike(student, "changing", world, Fault("kill", fault), *more).code != 0
    assert finish(start(student, "changing", 4, *more)).code == 0
    irkd("train", str(student), "name=steady", *more, "track.samples=true", "rank_timeout_s=3")
    assert bits(student.parent / "changing") == bits(student.parent / "steady")


def test_a_world_that_has_no_whole_branches_says_so_and_other_bits_would_be_seen(
    student: Path, alone: dict[str, str]
) -> None:
    done = irkd("train", str(student), "name=three", *SETTINGS, world=3)
    assert "agree up to rounding only" in done.stdout
    assert bits(student.parent / "three") != alone  # the comparison can fail


def test_the_tree_adds_alike_whoever_carries_the_leaves() -> None:
    leaves = [torch.randn(3, generator=torch.Generator().manual_seed(i)) * 10**i for i in range(8)]

    def tree(values: list[torch.Tensor]) -> torch.Tensor:
        """Pairs that differ in the highest bit first."""
        half = len(values) // 2
        pairs = [a + b for a, b in zip(values[:half], values[half:], strict=True)]
        return pairs[0] if half == 1 else tree(pairs)

    for world in (1, 2, 4, 8):
        partial = []
        for rank in range(world):
            sums = virtual.TreeSum()
            for v in virtual.carried(8, rank, world):
                sums.add([leaves[v].clone()])
            partial.append(sums.total()[0])
        assert torch.equal(tree(partial) if world > 1 else partial[0], tree(leaves))
    assert not torch.equal(sum(leaves[1:], leaves[0]), tree(leaves))  # one after the other is another sum


def test_each_virtual_rank_is_carried_once() -> None:
    for count, world in itertools.product((1, 2, 4, 8, 16), (1, 2, 4)):
        if virtual.exact(count, world):
            carried = [v for rank in range(world) for v in virtual.carried(count, rank, world)]
            assert sorted(carried) == list(range(count))
