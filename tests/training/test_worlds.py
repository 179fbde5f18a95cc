"""One, two, three and four processes: the same global batches, augmentations, losses and gradients."""

import json
from pathlib import Path

import pytest
import torch

from tests.training.launch import irkd, losses, spawn
from tests.training.parity_worker import CASES


@pytest.fixture(scope="module")
def worlds(shapes: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict]:
    """What each world computed for every case."""
    from tests.training.conftest import STUDENT_YAML

    out = tmp_path_factory.mktemp("worlds")
    (out / "student.yaml").write_text(STUDENT_YAML.format(shards=shapes, teacher=teacher, out=out))
    # at initialisation attention is uniform, maps are nearly flat, and min-max enlarges rounding twentyfold
    irkd("train", str(out / "student.yaml"), "name=warm", "optim.lr=3e-3")
    for world in (1, 2, 3, 4):
        spawn(world, "tests.training.parity_worker", "ddp", str(teacher), str(shapes), str(out))
    return {world: torch.load(out / f"ddp-{world}.pt") for world in (1, 2, 3, 4)}


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("case", CASES)
def test_same_batches_and_gradients(worlds: dict[int, dict], case: str, world: int) -> None:
    one, many = worlds[1][case], worlds[world][case]
    assert torch.equal(one["ids"], many["ids"])
    assert torch.equal(one["images"], many["images"])
    assert torch.equal(one["targets"], many["targets"])
    assert one["seen"] == many["seen"] == len(one["ids"])
    for name in ("total", "ce", "kd", "saliency"):
        torch.testing.assert_close(many[name], one[name], rtol=1e-5, atol=1e-6)  # kd is small here
    largest = max(float(v.norm()) for k, v in one.items() if k.startswith("grad."))
    for name, gradient in one.items():
        if name.startswith("grad."):
            # a key bias has no influence on attention: its gradient is rounding, compared to the largest one
            scale = max(float(gradient.norm()), 1e-4 * largest)
            assert float((many[name] - gradient).norm()) / scale < 1e-5, name


def test_a_wrong_weight_would_be_seen(worlds: dict[int, dict]) -> None:
    """The bound is far below what a batch mean over the ranks' own counts would give (32 samples on 3 ranks)."""
    one = worlds[1]["gradient"]["grad.head.weight"]
    assert float((one * (32 / 33) - one).norm()) / float(one.norm()) > 1e-3


def test_losses_over_twenty_steps_across_a_transition(student_yaml: Path) -> None:
    """20 steps, two stages; AdamW's epsilon is raised, for it turns rounding of near-zero gradients into steps."""
    settings = ["curriculum.stages[0].epochs=2", "curriculum.stages[1].epochs=3", "optim.eps=1e-3"]
    runs = {}
    for world in (1, 2, 3, 4):
        irkd("train", str(student_yaml), f"name=w{world}", *settings, world=world)
        runs[world] = losses(student_yaml.parent / f"w{world}")
    assert len(runs[1]) == 20
    assert {e["stage"] for e in runs[1]} == {0, 1}
    for world in (2, 3, 4):
        for one, many in zip(runs[1], runs[world], strict=True):
            assert many["total"] == pytest.approx(one["total"], rel=1e-5), (world, one["step"])


@pytest.mark.parametrize("more", [[], ["teacher.schedule=aligned"]], ids=["final", "aligned"])
def test_the_teacher_is_read_by_one_process(student_yaml: Path, more: list[str]) -> None:
    """Two processes, of which only the first has the teacher's files, train as two do that both have them."""
    run = ["curriculum.epochs=1", *more]
    spawn(2, "tests.training.reader_worker", str(student_yaml), "name=one", *run)
    irkd("train", str(student_yaml), "name=both", *run, world=2)
    one, both = (losses(student_yaml.parent / name) for name in ("one", "both"))
    assert [e["total"] for e in one] == [e["total"] for e in both]


def test_evaluate_gives_the_same_on_two_processes(student_yaml: Path) -> None:
    irkd("train", str(student_yaml), "name=run", "curriculum.epochs=1")
    folder, results = student_yaml.parent / "run", []
    for world in (1, 2):
        irkd("evaluate", str(folder), world=world)
        results.append(json.loads((folder / "evaluation" / "test-8-12-16-best.json").read_text()))
    alone, two = results
    assert two["accuracy"] == alone["accuracy"]
    assert two["samples"] == alone["samples"]
    for size, maps in alone["agreement"].items():
        assert two["agreement"][size] == pytest.approx(maps, rel=1e-4)


def test_running_statistics_are_alike_at_a_transition(student_yaml: Path) -> None:
    """Each rank's BatchNorm has seen its own images: without rank 0's for all, the ranks would no longer agree."""
    student = ["student.name=resnet10t", "student.patch=null", "student.options={}", "loss.saliency.gamma=0"]
    for engine in ("ddp", "zero2"):
        run = [f"name={engine}", f"engine={engine}", "curriculum.epochs=1"]
        irkd("train", str(student_yaml), *run, *student, world=2)


def test_saliency_of_a_convolutional_student_begins_where_its_last_grid_is_a_single_value(
    student_yaml: Path,
) -> None:
    """BatchNorm refuses a batch of one there, also in the forward that is thrown away before the first step."""
    more = ["student.name=test_resnet", "student.patch=null", "student.options={}", "curriculum.epochs=1"]
    taps = ["loss.saliency.taps=[[layer1,blocks.1]]", "curriculum.stages=[{resolution: 16}]"]
    assert "16 px  epoch   1/1" in irkd("train", str(student_yaml), *more, *taps, world=2).stdout
