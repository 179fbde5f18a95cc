"""Strict configuration: what is accepted, what is refused, and in which words."""

import contextlib
import dataclasses
import functools
import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from irkd_dist import config, keys, plain
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
        (["Seed=1"], "override 'Seed=1': unknown key Seed=1; did you mean seed?"),
        (["optim.lr2=1"], "override 'optim.lr2=1': unknown key optim.lr2=1; did you mean lr?"),
        (["1=2"], "unknown key 1=2; known here: seed, data, augment"),
        (["references={seed: x}"], "unknown key references"),
        (["optim.lr=1", "optim.lr=-1"], "override 'optim.lr=-1': optim.lr=-1: input should be greater than 0"),
        (["optim.lr.x=3"], "override 'optim.lr.x=3' does not fit: optim.lr is no mapping"),
        (["student.distilled=3"], "student.distilled=3: input should be a valid boolean or input should be 'auto'"),
        (["optim.lr=1e-3 # low"], "'# low' would not be read"),
        (["student.options={depth}"], "key 'depth' has no value"),
        (["student.options={1: 2}"], "key '1' is no word"),
        (["student.options={a: 1, a: 2}"], "key 'a' is given twice"),
        (["optim={lr:1"], "override 'optim={lr:1': line 1: while parsing a flow mapping"),
        (["optim.lr=1:30"], "optim.lr='1:30': input should be a valid number"),
        (["data.batch=010"], "data.batch='010': input should be a valid integer"),
        (["augment.padding=100000"], "augment.padding=100000: input should be less than or equal to 4096"),
        (["augment.padding_at=100000"], "input should be less than or equal to 4096"),
        (["student.image_size=100000"], "input should be less than or equal to 4096"),
        (["curriculum.stages[0].resolution=100000"], "input should be less than or equal to 4096"),
        (["data.workers=100000"], "data.workers=100000: input should be less than or equal to 1024"),
        (["rank_timeout_s=1e300"], "rank_timeout_s=1e+300: input should be less than"),
        (["name=../x"], "name='../x' is not the name of a folder below"),
        (["name=/x"], "name='/x' is not the name of a folder below"),
        (["name=.."], "name='..' is not the name of a folder below"),
        (["name=a\0b"], "has a control character"),
        (["name=a\nb"], "has a control character"),
        (["out=a\udcffb"], "is no UTF-8"),
        (["out="], "out=None: input should be a valid string"),
        (["out=~nobody-of-this-name/x"], "there is no such home folder"),
        (["optim.lr=${oc.env:NOT_THERE}"], "override 'optim.lr=${oc.env:NOT_THERE}': optim.lr='${oc.env:NOT_THERE}'"),
        (["optim.lr=${nowhere}"], "Interpolation key 'nowhere' not found"),
        (["data=${optim}"], "data='${optim}' stands for a mapping"),
    ],
)  # fmt: skip
def test_refusals_name_key_value_and_what_would_be_right(
    base: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError) as error:
        config.load(base, overrides)
    assert message in str(error.value)


BOMB = "k: &a [1]\n" + "".join(
    f"k{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in itertools.pairwise("abcdefghij")
)
EVERY_KEY = {
    **config.to_dict(config.Config()), "teacher": asdict(config.Teacher()), "curriculum": asdict(config.Curriculum()),
}  # fmt: skip
FLOATS = [
    ".".join(str(part) for part in way)
    for way, annotation, _ in keys.walk(EVERY_KEY, config.Config)
    if float in keys.alternatives(annotation)
]  # fmt: skip


@pytest.mark.parametrize("key", FLOATS)
@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e400"])
def test_no_float_key_takes_what_is_not_finite(base: Path, key: str, value: str) -> None:
    assert len(FLOATS) >= 23
    with pytest.raises(UserError, match=rf"{key}=(-?inf|nan): input should be a finite number"):
        config.load(base, [f"{key}={value}"])


@pytest.mark.parametrize(
    "key", ["out", "data.shards", "student.weights", "track.project", "name", "student.name"]
)
@pytest.mark.parametrize(
    "text", ["run #2", "a: b", "a=b", "[x]", "{y}", "a,b", "ü é", "%d", "x:y",
             "[red]x[/b]", "$HOME", "1e3", "on", "010", "'", "*a", "!x"],
)  # fmt: skip
def test_a_key_that_takes_text_takes_it_whole(base: Path, tmp_path: Path, key: str, text: str) -> None:
    c = config.load(base, [f"{key}={text}", "student.patch=4"])
    assert value_of(c, key) == text
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml(c))
    assert value_of(config.from_dict(plain.read(again), "again"), key) == text
    quoted = text.replace("'", "''")
    assert value_of(config.load(base, [f"{key}='{quoted}'", "student.patch=4"]), key) == text


def value_of(c: config.Config, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), c)


def test_null_and_none_are_null_where_a_text_may_be_null(base: Path) -> None:
    for text in ("null", "None", "", "~"):
        c = config.load(base, ["student.weights=x", f"student.weights={text}", f"name={text}"])
        assert (c.student.weights, c.name) == (None, "base-seed0")


def test_a_mapping_without_spaces_is_the_mapping(base: Path, tmp_path: Path) -> None:
    expected = {"depth": 3, "drop": 1e-4, "act": "a:b", "flag": True, "deep": {"er": [1, 2]}}
    text = "{depth:3, drop:1e-4, act:a:b, flag:on, deep:{er:[1, 2]}}"
    assert config.load(base, [f"student.options={text}"]).student.options == expected
    file = tmp_path / "f.yaml"
    file.write_text(BASE + f"student: {{options: {text}}}\n")
    assert config.load(file).student.options == expected
    assert config.load(
        base, ["curriculum.stages=[{resolution:8},{resolution:16}]"]
    ).curriculum == config.Curriculum([config.Stage(resolution=8), config.Stage(resolution=16)])


def test_home_is_expanded_in_paths_and_nothing_else_is(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    paths = ["data.shards", "student.weights", "teacher.run", "out", "curriculum.stages[1].teacher"]
    c = config.load(base, [f"{key}=~/x" for key in [*paths, "track.project"]])
    assert c.curriculum is not None
    assert c.teacher is not None
    got = [c.data.shards, c.student.weights, c.teacher.run, c.out, c.curriculum.stages[1].teacher]
    assert got == ["/h/x"] * 5
    assert c.track.project == "~/x"
    assert config.load(base, ["out=$HOME/x"]).out == "$HOME/x"
    written = {
        name for name in keys.of(config.Config) if keys.marked(keys.of(config.Config)[name], keys.PATH)
    }
    assert written == {"out"}


def test_references_are_resolved_for_their_own_user_alone(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is written down has the reference; whoever reads that gets the reference, not his own value."""
    monkeypatch.setenv("PLACE", "s3cret")
    monkeypatch.setenv("RATE", "1e-4")
    overrides = [
        "track.project=p-${oc.env:PLACE}",
        "out=${oc.env:PLACE}/r",
        "optim.lr=${oc.env:RATE}",
        "seed=7",
    ]
    c = config.load(base, [*overrides, "optim.rewarm_steps=${seed}", "name=n-${seed}"])
    assert (c.track.project, c.out, c.optim.lr, c.optim.rewarm_steps, c.name) == (
        "p-s3cret",
        "s3cret/r",
        1e-4,
        7,
        "n-7",
    )
    assert config.folder_of(c) == Path("s3cret/r/n-7")
    assert "s3cret" not in config.to_yaml(c) + str(config.to_dict(c))
    kept = tmp_path / "kept.yaml"
    kept.write_text(config.to_yaml(c))
    read = config.from_dict(plain.read(kept), "kept")
    assert (read.track.project, read.out, read.optim.lr) == ("p-${oc.env:PLACE}", "${oc.env:PLACE}/r", 1e-4)
    assert config.to_dict(config.from_dict(config.to_dict(c), "here")) == config.to_dict(c)
    assert "s3cret" not in config.to_yaml(dataclasses.replace(c, engine="ddp"))
    monkeypatch.setenv("PLACE", "elsewhere")  # an operational key may change; it is not even seen
    again = config.load(base, [*overrides, "optim.rewarm_steps=${seed}"])
    assert config.semantic_difference(config.to_dict(c), config.to_dict(again)) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "key 'seed' is given twice"),
        ("name: !!binary aGVsbG8=\n", "tags such as !!binary are not taken"),
        ("name: !!python/object/apply:os.system [a]\n", "tags such as !!python/object/apply:os.system are not"),
        ("seed: !!float 1\n", "tags such as !!float"),
        (BOMB, "more than 100000 values"),
        ("a: &a [*a]\n", "an alias refers to what it stands in"),
        ("student: " + "{a: " * 3000 + "1" + "}" * 3000, "more than 50 levels deep"),
        ("seed: " + "9" * 5000, "integer string conversion"),
        ("on: 1\n", "key 'on' is no word"),
        ("? [a]\n: 1\n", "is no word"),
        ("a: 1\n---\nb: 2\n", "expected a single document"),
        ("- 1\n", "is not a mapping"),
        ("seed: \0\n", "special characters are not allowed"),
        ("name: \"a\\0b\"\nfixed: {resolution: 16, epochs: 1}\n", "has a control character"),
        ("# " + "x" * 2**20, "more than 1048576 bytes"),
        ("# caf\udce9\n", "invalid"),
        ("<<: {seed: !!int 1}\n", "tags such as !!int"),
    ],
)  # fmt: skip
def test_hostile_files_end_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=re.escape(message)) as error:
        config.load(file)
    assert "\n" not in str(error.value)
    assert str(file) in str(error.value)


def test_values_as_people_write_them(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(
        b"\xef\xbb\xbfdefaults: &d {lr: 1e-4}\r\n".replace(b"defaults: &d {lr: 1e-4}", b"seed: 1")
        + b"optim: &o {lr: 1e-4, weight_decay: 5E-5, clip: null, eps: 1.e-6}\r\naugment: {flip: off, padding_at: ~}\r\n"
        b"fixed: {resolution: 16, epochs: 1_0}\r\nout: 2024-01-01\r\n"
    )
    c = config.load(file)
    assert (c.optim.lr, c.optim.weight_decay, c.optim.clip, c.optim.eps) == (1e-4, 5e-5, None, 1e-6)
    assert (c.augment.flip, c.augment.padding_at, c.fixed and c.fixed.epochs, c.out) == (
        False,
        None,
        10,
        "2024-01-01",
    )


def test_aliases_are_values_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("curriculum: {stages: [&s {resolution: 8, epochs: 2}, *s, {<<: *s, resolution: 16}]}\n")
    c = config.load(file, ["curriculum.stages[0].epochs=5"])
    assert [(s.resolution, s.epochs) for s in config.stages(c)] == [(8, 5), (8, 2), (16, 2)]


def test_what_a_key_is_by_default_may_depend_on_another(base: Path) -> None:
    assert config.load(base, ["student.name=vit_tiny"]).student.patch == 4
    assert config.load(base, ["student.name=resnet10t"]).student.patch is None
    assert config.load(base, ["student.name=vit_tiny_patch16_224"]).student.patch is None
    assert config.load(base, ["student.name=custom", "student.patch=null"]).student.patch is None
    own = config.load(base, ["teacher.model={name: resnet10t, weights: x}"]).teacher
    run = config.load(base, ["teacher.run=x"]).teacher
    assert own is not None
    assert run is not None
    assert own.model is not None
    assert (own.model.patch, own.renormalize, run.renormalize) == (None, True, False)
    again = config.load(
        base, ["teacher={model: {name: resnet10t, weights: x, patch: 2}, renormalize: false}"]
    ).teacher
    assert again is not None
    assert again.model is not None
    assert (again.model.patch, again.renormalize) == (2, False)


def test_operational_is_written_at_the_keys() -> None:
    """The keys that stood in a list, so that older checkpoints compare as they did; and what came since."""
    assert sorted(keys.operational(config.Config)) == sorted(
        ["name", "out", "engine", "rank_timeout_s", "optim.accumulate", "optim.max_skips", "teacher.shard",
         "checkpoint", "track", "data.shards", "data.shard_cache", "data.cache", "data.workers", "data.verify",
         "data.leave_out",
         "teacher.run", "references", "compile", "teacher.cache.folder", "teacher.cache.mode",
         "teacher.cache.limit_gib", "data.eval_batch", "optim.checkpoint_blocks"]
    )  # fmt: skip


# -- any input ends well or in one line ---------------------------------------------------------------

WORDS = st.sampled_from(
    ["seed", "optim.lr", "optim", "student.options", "curriculum.stages[0].epochs", "curriculum.stages", "teacher.run",
     "name", "out", "loss.saliency.taps", "student.distilled", "fixed", "data.batch", "a.b[3].c",
     "curriculum.stages[9]"]
)  # fmt: skip
PIECES = st.sampled_from(
    [*"{}[]:,#&*!|>'\"%@`~?-= \n\t0123456789.e_abcxyz$\\/ü\0\udcff", "${", "}", "null", ".inf", "1e400", "<<: ",
     "!!int ", "oc.env:"]
)  # fmt: skip
TEXTS = st.lists(PIECES, max_size=12).map("".join) | st.text(max_size=20)
TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | TEXTS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(WORDS | TEXTS, TEXTS), max_size=3))
def test_any_override_is_taken_or_refused_in_one_line(base: Path, given: list[tuple[str, str]]) -> None:
    fine_or_one_line(lambda: config.load(base, [f"{key}={value}" for key, value in given]))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60) | TEXTS.map(lambda t: (BASE + t).encode(errors="surrogateescape")))
def test_any_file_is_taken_or_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "any.yaml"
    file.write_bytes(content)
    fine_or_one_line(lambda: config.load(file))


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(list(keys.of(config.Config))) | TEXTS, TREES, max_size=5))
def test_any_tree_is_taken_or_refused_in_one_line(tree: dict[str, Any]) -> None:
    fine_or_one_line(lambda: config.from_dict({"fixed": {"resolution": 16, "epochs": 1}, **tree}, "here"))


@settings(max_examples=300, deadline=None)
@given(TREES)
def test_what_is_written_as_yaml_is_read_back(tree: Any) -> None:
    with contextlib.suppress(UserError):
        value = plain.parse(plain.dump(tree), "here")
        if plain.odd(tree) is None:
            assert value == tree


def fine_or_one_line(call: Callable[[], config.Config]) -> None:
    try:
        loaded = call()
    except UserError as error:
        said = str(error)
    else:
        said = "fine"
        assert loaded.references or config.from_dict(config.to_dict(loaded), "dump") == loaded
    assert len(said.splitlines()) == 1


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
    if "study" in file.stem or file.parent.name == "table1":
        from irkd_dist import study

        loaded = study.load(file)
        for scale in (None, *loaded.scales):
            cells = study.cells(loaded, scale=scale)
            assert len({cell.folder for cell in cells}) == len(cells)
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
        "irkd: error: override '--optim.lrr=1': unknown key optim.lrr=1; did you mean lr?"
    ]


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"run": "a", "mean": [0.5] * 3, "std": [0.5] * 3}, r"teacher\.mean with teacher\.run: a run knows"),
        (
            {"run": "a", "ensemble": [{"run": "b", "mean": [0.5] * 3}]},
            r"teacher\.ensemble\[0\]\.mean and .*together",
        ),
        (
            {"run": "a", "ensemble": [{"run": "b", "mean": [0.5] * 3, "std": [0.5] * 3}]},
            r"teacher\.ensemble\[0\]\.mean with teacher\.ensemble\[0\]\.run",
        ),
    ],
)
def test_a_normalisation_that_nobody_would_read_is_refused(teacher: dict[str, Any], message: str) -> None:
    tree = {"fixed": {"resolution": 16, "epochs": 1}, "teacher": teacher, "loss": {"kd": {"alpha": 1}}}
    with pytest.raises(UserError, match=message):
        config.from_dict(tree, "here")
