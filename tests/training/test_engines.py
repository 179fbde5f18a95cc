"""Every engine against the single process: gradients, losses, weights, and checkpoints that belong to none of them."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from irkd_dist import checkpoint
from irkd_dist import config as configuration
from irkd_dist.errors import UserError
from irkd_dist.training import engines
from tests.training.launch import REPOSITORY, irkd, launch_engine, losses, spawn
from tests.training.parity_worker import CASES

# ddp is in test_worlds
WORLDS = [(engine, world) for engine in ("zero0", "zero1", "zero2", "zero3", "fsdp2") for world in (2, 3, 4)]
REFUSED = {
    name for name, keys in CASES.items() if keys.get("loss.saliency.gamma") != 0.0 and "attention" not in name
}
# 20 steps, the transition after the 8th; AdamW's epsilon is raised: it turns rounding of near-zero gradients into steps
TWENTY = [
    "curriculum.stages[0].epochs=2",
    "curriculum.stages[1].epochs=3",
    "optim.eps=1e-3",
    "optim.clip=1.0",
]
NO_SALIENCY = "loss.saliency.gamma=0"


@pytest.fixture(scope="module")
def folder(shapes: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student's configuration and weights that have learned a little: at first maps are nearly flat."""
    from tests.training.conftest import STUDENT_YAML

    out = tmp_path_factory.mktemp("engines")
    (out / "student.yaml").write_text(STUDENT_YAML.format(shards=shapes, teacher=teacher, out=out))
    irkd("train", str(out / "student.yaml"), "name=warm", "optim.lr=3e-3")
    return out


def compute(folder: Path, engine: str, world: int, shapes: Path, teacher: Path) -> dict:
    file = folder / f"{engine}-{world}.pt"
    if not file.exists():
        spawn(world, "tests.training.parity_worker", engine, str(teacher), str(shapes), str(folder))
    return torch.load(file)


@pytest.mark.parametrize(("engine", "world"), WORLDS)
def test_gradients_are_those_of_one_process(
    folder: Path, shapes: Path, teacher: Path, engine: str, world: int
) -> None:
    """Every case of every engine: all methods, forms, mixes, micro-batches, a sharded teacher."""
    one, many = (compute(folder, e, w, shapes, teacher) for e, w in (("ddp", 1), (engine, world)))
    assert {case for case, result in many.items() if result is None} == (
        REFUSED if engine == "zero3" else set()
    )
    for case, result in many.items():
        if result is None:
            continue
        assert torch.equal(one[case]["ids"], result["ids"])
        torch.testing.assert_close(result["total"], one[case]["total"], rtol=1e-5, atol=1e-6)
        largest = max(float(v.norm()) for k, v in one[case].items() if k.startswith("grad."))
        for name, gradient in one[case].items():
            if name.startswith("grad."):
                # a key bias has no influence on attention: its gradient is rounding, compared to the largest one
                scale = max(float(gradient.norm()), 1e-4 * largest)
                assert float((result[name] - gradient).norm()) / scale < 1e-5, (case, name)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float((a[k].float() - b[k].float()).square().sum()) for k in a))


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> Callable[..., Path]:
    """The single process's 20 steps, with saliency or without, under an optimizer policy; made when first asked for."""

    def run(saliency: bool, policy: str = "reset") -> Path:
        name = f"one-{saliency}-{policy}"
        if not (folder / name).exists():
            more = [f"optim.policy={policy}", *([] if saliency else [NO_SALIENCY])]
            irkd("train", str(folder / "student.yaml"), f"name={name}", *TWENTY, *more, "checkpoint.keep=9")
        return folder / name

    return run


@pytest.mark.parametrize(
    ("engine", "policy"), [("zero1", "carry"), ("zero2", "rewarm"), ("zero3", "reset"), ("fsdp2", "carry")]
)
def test_twenty_steps_and_a_checkpoint_that_belongs_to_no_engine(
    folder: Path, unbroken: Callable[..., Path], engine: str, policy: str
) -> None:
    """Losses to 1e-5 over 20 steps and a transition; weights to 1e-4 of the way they travelled; the same file."""
    one = unbroken(engine != "zero3", policy)
    more = [f"optim.policy={policy}", *([NO_SALIENCY] if engine == "zero3" else [])]
    launch_engine(engine, 2, "train", str(folder / "student.yaml"), f"name={engine}", *TWENTY, *more)
    run = folder / engine
    for a, b in zip(losses(one), losses(run), strict=True):
        assert b["total"] == pytest.approx(a["total"], rel=1e-5), a["step"]
    (weights, moments, state), (ours, our_moments, our_state) = (
        checkpoint.load(r / "checkpoints" / checkpoint.name(20)) for r in (one, run)
    )
    assert ours.keys() == weights.keys()
    assert our_moments.keys() == moments.keys()
    assert {k: v.shape for k, v in our_moments.items()} == {k: v.shape for k, v in moments.items()}
    assert {v.dtype for v in ours.values()} == {torch.float32}
    assert our_state["curriculum"]["stage"] == state["curriculum"]["stage"]
    first = checkpoint.load_student(one / "checkpoints" / checkpoint.name(4))
    assert distance(weights, ours) < 1e-4 * distance(weights, first)


@pytest.mark.parametrize(
    ("saved_by", "world", "resumed_by", "new_world"),
    [
        ("zero2", 2, "ddp", 1), ("ddp", 1, "zero1", 3), ("fsdp2", 3, "zero2", 2), ("zero1", 3, "fsdp2", 4),
        ("zero3", 2, "fsdp2", 2), ("ddp", 2, "zero3", 3),
    ],
)  # fmt: skip
def test_any_engine_goes_on_from_any_others_checkpoint(
    folder: Path, unbroken: Callable[..., Path], saved_by: str, world: int, resumed_by: str, new_world: int
) -> None:
    """Stopped in the second stage by SIGTERM to one rank, resumed elsewhere: the unbroken run's losses."""
    saliency = "zero3" not in (saved_by, resumed_by)
    more = [] if saliency else [NO_SALIENCY]
    name = f"{saved_by}-{world}-{resumed_by}-{new_world}"
    arguments = ["train", str(folder / "student.yaml"), f"name={name}", *TWENTY, *more]
    stop = {"IRKD_FAULT": f"sigterm@step:13:{world - 1}"}
    stopped = irkd(*arguments, f"engine={saved_by}", world=world, env=stop, check=False)
    assert "stopped at step 15 (rank" in stopped.stdout
    assert "SIGTERM" in stopped.stdout
    assert checkpoint.newest(folder / name / "checkpoints")[
        0
    ] == folder / name / "checkpoints" / checkpoint.name(15)
    irkd(*arguments, f"engine={resumed_by}", world=new_world)
    told, expected = losses(folder / name), losses(unbroken(saliency))
    assert [e["step"] for e in told] == list(range(1, 21))
    for a, b in zip(expected, told, strict=True):
        assert b["total"] == pytest.approx(a["total"], rel=1e-5), a["step"]


def test_zero3_with_a_saliency_gradient_is_refused_before_anything_starts(folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"engine=zero3 with loss\.saliency\.method=gradient.*use engine=fsdp2"
    ):
        configuration.load(folder / "student.yaml", ["engine=zero3"])
    configuration.load(folder / "student.yaml", ["engine=zero3", "loss.saliency.method=attention"])


@pytest.mark.parametrize(
    ("environment", "engine", "expected"),
    [
        ({}, "auto", "ddp"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "auto", "fsdp2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "zero1", "zero1"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "auto", "we have FSDP2 only"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "zero2", "chooses fsdp2, our .* engine=zero2"),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "configs/deepspeed/zero2.json"},
            "ddp", r"zero2\.json.*chooses zero2, our configuration engine=ddp",
        ),
    ],
)  # fmt: skip
def test_the_launchers_choice_and_ours_agree_or_are_both_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], engine: str, expected: str
) -> None:
    monkeypatch.chdir(REPOSITORY)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    config = configuration.load(folder / "student.yaml", [f"engine={engine}"])
    if expected in ("ddp", "fsdp2", "zero1"):
        assert engines.choose(config) == expected
    else:
        with pytest.raises(UserError, match=expected):
            engines.choose(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ('{"zero_optimization": {"stage": 2}, "gradient_clipping": 5.0}', r"gradient_clipping=5\.0, our .* has 0\.0"),
        ('{"zero_optimization": {"stage": 2}, "scheduler": {"type": "WarmupLR"}}', "scheduler is ours to set"),
        ('{"zero_optimization": {"stage": 2}, "fp16": {"enabled": true}}', r"fp16\.enabled is ours to set"),
        ("{", "cannot be read"),
    ],
)  # fmt: skip
def test_deepspeeds_settings_that_disagree_with_ours_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: str, message: str
) -> None:
    (tmp_path / "own.json").write_text(settings)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "own.json"))
    config = configuration.load(folder / "student.yaml", ["engine=auto"])
    with pytest.raises(UserError, match=message):
        engines.setup(config)
