"""Strict configuration: what is accepted, what is refused, and in which words."""

import subprocess
import sys
from pathlib import Path

import pytest

from irkd_dist import config
from irkd_dist.errors import UserError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
EXPERIMENTS = sorted(f for f in CONFIGS.rglob("*.yaml") if f.parent.name not in ("accelerate", "sweeps"))
BASE = """
data: {batch: 64}
curriculum: {stages: [{resolution: 12}, {resolution: 16, epochs: 2}]}
optim: {lr: 3e-4}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    file = tmp_path / "base.yaml"
    file.write_text(BASE)
    return file


@pytest.mark.parametrize("dashes", ["", "--"])
def test_overrides_in_both_forms_with_every_kind_of_value(base: Path, dashes: str) -> None:
    overrides = [
        "optim.lr=3e-05",
        "augment.flip=False",
        "curriculum.stages[0].epochs=5",
        "loss.saliency.taps=[first,[2,5]]",
        "student.options={embed_dim: 64}",
        "data.subset=null",
    ]
    c = config.load(base, [dashes + o for o in overrides])
    assert c.optim.lr == 3e-05
    assert c.augment.flip is False
    assert c.curriculum is not None
    assert [s.epochs for s in config.stages(c)] == [5, 2]
    assert c.loss.saliency.taps == ["first", [2, 5]]
    assert c.student.options == {"embed_dim": 64}
    assert c.data.subset is None
    assert c.name == "base-seed0"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optm.lr=1"], "unknown key optm={'lr': 1}; did you mean optim?"),
        (["optim.lrr=1"], "unknown key optim.lrr=1; did you mean lr?"),
        (["curriculum.stages[0].resolutoin=3"], "did you mean resolution?"),
        (["optim.lr=fast"], "optim.lr='fast': input should be a valid number"),
        (["data.batch=2.5"], "data.batch=2.5: input should be a valid integer"),
        (["data.batch=0"], "data.batch=0: input should be greater than 0"),
        (["optim.policy=rest"], "did you mean reset?"),
        (
            ["curriculum.stages[1].resolution=18"],
            "curriculum.stages[1].resolution=18 is not a multiple of patch size 4 (student); use 16 or 20",
        ),
        (["curriculum.stages[7].epochs=1"], "override 'curriculum.stages[7].epochs=1' does not fit"),
        (["fixed.resolution=32", "fixed.epochs=3"], "curriculum and fixed are both given"),
        (["curriculum.stages=[]"], "curriculum.stages is empty"),
        (["loss.kd.alpha=1"], "loss.kd.alpha=1.0 needs a teacher"),
        (["loss.saliency.gamma=1"], "loss.saliency.gamma=1.0 needs a teacher"),
        (["loss.form=convex", "loss.kd.alpha=1.5", "teacher.run=x"], "makes CE's weight negative"),
        (["teacher.view=full"], "teacher needs either run"),
        (["student.distilled=true"], "nothing teaches the distillation token"),
        (["seed"], "is not of the form key=value"),
        (["optim.betas=[1.0,0.9]"], "optim.betas[0]=1.0: input should be less than 1"),
        (["seed=99999999999999999999"], "seed=99999999999999999999: input should be less than"),
    ],
)  # fmt: skip
def test_refusals_name_key_value_and_what_would_be_right(
    base: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError) as error:
        config.load(base, overrides)
    assert message in str(error.value)


def test_neither_curriculum_nor_fixed(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("seed: 1\n")
    with pytest.raises(UserError, match="neither curriculum nor fixed"):
        config.load(file)


def test_not_yaml_and_not_there(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("a: [1\n")
    with pytest.raises(UserError, match="is not YAML"):
        config.load(file)
    with pytest.raises(UserError, match="no configuration file"):
        config.load(tmp_path / "other.yaml")


def test_dump_loads_to_the_same(base: Path, tmp_path: Path) -> None:
    c = config.load(base, ["seed=3", "loss.saliency.taps=[first,[2,5]]"])
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml(c))
    assert config.load(again) == c


def test_operational_keys_may_change_and_semantic_ones_may_not(base: Path) -> None:
    a, b = config.load(base), config.load(base, ["data.workers=5", "track.log_every=1", "optim.lr=1e-3"])
    assert config.semantic_difference(config.to_dict(a), config.to_dict(b)) == ["optim.lr: 0.0003 -> 0.001"]


def test_a_sweeps_trials_never_collide(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "r7")
    assert config.load(base).name == "base-seed0-r7"


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda f: str(f.relative_to(CONFIGS)))
def test_every_shipped_configuration_is_valid(file: Path) -> None:
    if "study" in file.stem:
        from irkd_dist import study

        loaded = study.load(file)
        for name in [*loaded.teachers, *loaded.experiments.values()]:
            config.load(name)
    else:
        config.load(file)
        first = file.read_text().splitlines()[0]
        assert first.startswith("# "), "a configuration begins with what it is and its command"


def test_command_line_ends_with_code_2_and_one_line(base: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "irkd_dist", "train", str(base), "--optim.lrr=1"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        f"irkd: error: {base}: unknown key optim.lrr=1; did you mean lr?"
    ]
