"""A run that reads what a teacher has said ends with the bits of one that asks it, whoever has asked before."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from irkd_dist import config, faults
from irkd_dist.distill import cache_admin, cache_files, cache_shards
from irkd_dist.distill.module import Targets
from irkd_dist.distill.teacher import Teacher
from irkd_dist.errors import UserError
from irkd_dist.eventlog import read_events
from irkd_dist.teach import teach
from irkd_dist.training.train import train
from tests.training.launch import REPOSITORY, irkd

ONE = ["curriculum=null", "fixed={resolution: 12, epochs: 2}"]  # a stage of two epochs of 110 samples
MIXED = [*ONE, "fixed.epochs=4", "augment={mixup: 0.8, cutmix: 1.0, draws: 2}"]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


Trained = Callable[..., Path]


@pytest.fixture
def trained(student_yaml: Path) -> Trained:
    """Train in this process under a new name; returns the run folder."""
    names = itertools.count()

    def run(*settings: str) -> Path:
        loaded = config.load(student_yaml, [f"name=run{next(names)}", *settings])
        train(loaded)
        return config.folder_of(loaded)

    return run


@pytest.fixture
def cache(tmp_path: Path) -> str:
    """The setting that names a cache."""
    return f"teacher.cache.folder={tmp_path / 'cache'}"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((run / "checkpoints").glob("step-*"))[-1] / "student.safetensors")


def same(run: Path, other: Path) -> bool:
    ours, theirs = weights(run), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())


def asked(run: Path) -> tuple[int, int]:
    """Answers that were found, and computed."""
    lines = [e for e in read_events(run) if e["event"] == "train"]
    return sum(e["cache_hits"] for e in lines), sum(e["cache_misses"] for e in lines)


def told(run: Path) -> str:
    return "\n".join(e["what"] for e in read_events(run) if e["event"] == "cache")


def shards(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob(f"*{cache_shards.SUFFIX}"))


CASES = {
    "many steps": ([*ONE, "data.batch=5", "fixed.epochs=1", "data.workers=1"], (0, 110)),
    "curriculum": ([], (0, 440)),
    "mixed, two draws": (MIXED, (220, 220)),
    "mixed in the batch": ([*ONE, "augment.mixup=0.8"], (0, 220)),
    "full view": ([*ONE, "teacher.view=full"], (0, 220)),
    "some maps": ([*ONE, "loss.saliency.every=2", "loss.saliency.fraction=0.4", "optim.accumulate=2"], None),
    "virtual ranks": ([*ONE, "data.virtual_ranks=8", "loss.saliency.fraction=0.1"], None),
    "attention": ([*ONE, "loss.saliency.method=attention", "precision=bf16"], (0, 220)),
    "maps alone": ([*ONE, "loss.kd.alpha=0", "student.distilled=false"], (0, 220)),
    "logits alone": ([*ONE, "loss.saliency.gamma=0"], (0, 220)),
    "small chunks": ([*ONE, "teacher.cache.chunk=7"], (0, 220)),
}


@pytest.mark.parametrize("case", CASES)
def test_with_and_without(trained: Trained, cache: str, case: str) -> None:
    settings, expected = CASES[case]
    # a teacher on a single sample rounds otherwise than on several, and without maps its attention is fused where there
    # is no cache; so there only a run with chunks is the same
    chunked = ("virtual ranks", "attention", "logits alone")
    off = [cache, "teacher.cache.mode=off"] if case in chunked else []
    without = trained(*[s for s in settings if "cache" not in s], *off)
    cold, warm = trained(*settings, cache), trained(*settings, cache)
    assert same(without, cold)
    assert same(without, warm)
    assert expected in (None, asked(cold))
    assert asked(warm)[1] == 0
    assert same(without, trained(*settings, cache, "teacher.cache.mode=off"))


def test_without_a_cache_the_log_says_nothing_of_it(trained: Trained) -> None:
    assert "cache_hits" not in next(e for e in read_events(trained(*ONE)) if e["event"] == "train")


def test_what_does_not_decide_an_answer_is_no_part_of_the_key(trained: Trained, cache: str) -> None:
    trained(*ONE, cache)
    for other in (
        ["loss.kd.alpha=0.3"], ["loss.saliency.gamma=0.1"], ["loss.saliency.gamma=0"], ["loss.kd.temperature=1"],
        ["optim.policy=carry"], ["student.options.depth=2"], ["data.batch=22"], ["loss.saliency.normalization=l2"],
        ["optim.accumulate=2"], ["loss.kd.alpha=0"],
    ):  # fmt: skip
        assert asked(trained(*ONE, cache, *other)) == (220, 0), other


@pytest.mark.parametrize(
    "other",
    [
        "seed=1", "augment.flip=false", "augment.padding=2", "augment.erase=0.5",
        "teacher.view=full",
        "precision=bf16", "teacher.cache.chunk=32", "teacher.cache.storage=compact", "fixed.resolution=16",
    ],
)  # fmt: skip
def test_what_decides_an_answer_is_part_of_the_key(trained: Trained, cache: str, other: str) -> None:
    trained(*ONE, "fixed.epochs=1", cache)
    assert asked(trained(*ONE, "fixed.epochs=1", cache, other))[0] == 0


def test_other_threads_round_otherwise_and_are_told(trained: Trained, cache: str, capsys) -> None:
    trained(*ONE, "fixed.epochs=1", cache)
    torch.set_num_threads(2)
    assert asked(trained(*ONE, "fixed.epochs=1", cache)) == (0, 110)
    assert "computed with threads=1 instead of 2" in capsys.readouterr().out.replace("\n", " ")


def test_maps_of_another_method_find_the_logits(trained: Trained, cache: str) -> None:
    """Maps and logits have keys of their own; a sample without its map is computed as a whole."""
    trained(*ONE, cache)
    other = [*ONE, "loss.saliency.method=grad_cam"]
    assert same(trained(*other), trained(*other, cache))
    assert len(cache_admin.entries(Path(cache.partition("=")[2]))) == 1 + 3 + 3


@pytest.mark.parametrize("settings", [[], MIXED], ids=["curriculum", "mixed"])
def test_two_processes_with_what_one_has_filled_and_the_other_way_round(
    student_yaml: Path, trained: Trained, cache: str, settings: list[str]
) -> None:
    out = student_yaml.parent
    irkd("train", str(student_yaml), "name=two", *settings, world=2)
    done = irkd("teach", str(student_yaml), *settings, cache)
    assert f"{440 if not settings else 220} answers computed, 0 were there" in done.stdout
    irkd("train", str(student_yaml), "name=two-cached", *settings, cache, world=2)
    assert same(out / "two", out / "two-cached")
    assert asked(out / "two-cached") == (440, 0)

    other = f"{cache}-by-two"
    irkd("train", str(student_yaml), "name=two-cold", *settings, other, world=2)
    assert same(out / "two", out / "two-cold")
    one = trained(*settings, other)
    assert asked(one) == (440, 0)
    assert same(trained(*settings), one)


def test_killed_while_it_writes(student_yaml: Path, trained: Trained, cache: str, tmp_path: Path) -> None:
    command = ["train", str(student_yaml), "name=killed", cache]
    assert irkd(*command, env={"IRKD_FAULT": "sigkill@cache:3"}, check=False).returncode == -9
    left = list((tmp_path / "cache").rglob(f"{cache_shards.WRITING}*"))
    assert len(left) == 1
    irkd(*command)
    without = trained()
    assert same(without, tmp_path / "killed")
    warm = trained(cache)
    assert same(without, warm)
    assert asked(warm) == (440, 0)
    assert cache_admin.verify(tmp_path / "cache") == []


def test_resumed_in_the_middle_of_an_epoch(
    student_yaml: Path, trained: Trained, cache: str, tmp_path: Path
) -> None:
    command = ["train", str(student_yaml), "name=killed", "checkpoint.every_steps=3", cache]
    irkd(*command, env={"IRKD_FAULT": "sigkill@step:7"}, check=False)
    irkd(*command)
    assert same(trained(), tmp_path / "killed")
    assert asked(trained(cache)) == (440, 0)


def test_a_teacher_that_is_spread_over_processes(student_yaml: Path, cache: str) -> None:
    """Its processes compute together: one that finds all of its samples computes along with one that does not."""
    out, settings = student_yaml.parent, [*ONE, "teacher.shard=true", "loss.saliency.fraction=0.5"]
    irkd("train", str(student_yaml), "name=without", *settings, world=2)
    irkd("train", str(student_yaml), "name=first", *settings, "fixed.epochs=1", cache, world=2)
    for path in shards(out)[1::2]:  # of each key, what one of the processes has written
        path.unlink()
    irkd("train", str(student_yaml), "name=with", *settings, cache, world=2)
    assert same(out / "without", out / "with")
    hits, misses = asked(out / "with")
    assert hits
    assert misses > 110


def test_the_teacher_computes_chunks_of_one_size(
    trained: Trained, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, call = set(), Teacher.__call__

    def watched(
        self: Teacher, images: torch.Tensor, target: torch.Tensor, *rest: Any, **named: Any
    ) -> Targets:
        if rest:  # else pre-flight and panels
            seen.add((len(images), *rest))
        return call(self, images, target, *rest, **named)

    monkeypatch.setattr(Teacher, "__call__", watched)
    some = [*ONE, "loss.saliency.fraction=0.3", "teacher.cache.chunk=9"]
    trained(*some, cache)
    trained(*some, cache, "fixed.epochs=3", "teacher.cache.mode=off")
    assert seen == {(9, 9), (9, 0), (1, 1)}  # the last: a blank image, for the grids of the maps


def test_two_runs_at_once(student_yaml: Path, trained: Trained, cache: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "irkd_dist", "train", str(student_yaml), cache, *ONE]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            [*command, f"name=at-once-{i}"], cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL
        )
        for i in range(2)
    ]
    assert [run.wait(300) for run in both] == [0, 0]
    without = trained(*ONE)
    for i in range(2):
        assert same(without, tmp_path / f"at-once-{i}")
    assert cache_admin.verify(tmp_path / "cache") == []
    assert asked(trained(*ONE, cache)) == (220, 0)
    used = {run for entry in cache_admin.entries(tmp_path / "cache") for run in entry.runs}
    assert len(used) == 3


def test_damage_is_named_and_computed_again(trained: Trained, cache: str, tmp_path: Path) -> None:
    without = trained(*ONE)
    trained(*ONE, cache)
    flipped, cut, *_ = shards(tmp_path)
    data = bytearray(flipped.read_bytes())
    data[-5] ^= 16
    flipped.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:-9])
    assert len(cache_admin.verify(tmp_path / "cache")) == 2
    mended = trained(*ONE, cache)
    assert same(without, mended)
    assert asked(mended) == (109, 111)  # a sample, and an epoch
    assert str(flipped) in told(mended)
    assert str(cut) in told(mended)
    assert "computed again" in told(mended)
    assert asked(trained(*ONE, cache)) == (220, 0)


def test_a_full_disk_ends_the_writing_and_not_the_run(
    trained: Trained, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = trained(*ONE)
    monkeypatch.setenv("IRKD_FAULT", "nospace@cache:1")
    monkeypatch.setattr(faults, "_done", set())
    full = trained(*ONE, cache)
    monkeypatch.delenv("IRKD_FAULT")
    assert same(without, full)
    assert "File too large; nothing more is kept" in told(full)
    assert len(shards(tmp_path)) == 1
    assert not list((tmp_path / "cache").rglob(f"{cache_shards.WRITING}*"))


def test_the_limit_is_kept_to(trained: Trained, cache: str, tmp_path: Path) -> None:
    limit = 40 * 2**10
    bounded = trained(*ONE, cache, f"teacher.cache.limit_gib={limit / 2**30}")
    assert "limit_gib is reached" in told(bounded)
    assert limit / 2 < cache_shards.size_of(tmp_path / "cache") <= limit
    again = trained(*ONE, cache, "teacher.cache.mode=read")
    assert same(trained(*ONE), again)
    hits, misses = asked(again)
    assert hits
    assert misses
    with pytest.raises(UserError, match="limit_gib is reached"):
        taught(again, f"teacher.cache.limit_gib={limit / 2**30}")


def taught(run: Path, *settings: str, **options: Any) -> dict[str, float]:
    return teach(config.load(run / "config.yaml", [*settings]), say=lambda text: None, **options)


def test_read_only(trained: Trained, cache: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no teacher cache"):
        trained(*ONE, cache, "teacher.cache.mode=read")
    trained(*ONE, "fixed.epochs=1", cache)
    before = shards(tmp_path)
    assert asked(trained(*ONE, cache, "teacher.cache.mode=read")) == (110, 110)
    assert shards(tmp_path) == before
    assert asked(trained(*ONE, cache, "teacher.cache.mode=write")) == (0, 220)


def test_compact(trained: Trained, cache: str) -> None:
    compact = [*ONE, "teacher.cache.storage=compact", cache]
    cold, warm = trained(*compact), trained(*compact)
    assert asked(warm) == (220, 0)
    assert same(cold, warm)
    assert same(cold, trained(*compact, "teacher.cache.mode=off"))
    assert not same(cold, trained(*ONE))
    (*_, error) = [e for e in read_events(cold) if e["event"] == "cache_error"]
    assert 0 < error["logits"] < 2**-9
    assert 0 < error["maps"] < 1 / 255


def test_a_foreign_cache_is_refused(trained: Trained, cache: str, tmp_path: Path) -> None:
    trained(*ONE, cache)
    (first, *_) = [e.folder for e in cache_admin.entries(tmp_path / "cache") if "method" in e.values]
    key = first / cache_files.KEY
    key.write_text(key.read_text().replace('"view.seed": 0', '"view.seed": 5'))
    with pytest.raises(UserError, match=r"view.seed: 5, not 0"):
        trained(*ONE, cache)
    (tmp_path / "cache" / cache_files.CACHE).write_text('{"format": 0}')
    with pytest.raises(UserError, match="format 0"):
        trained(*ONE, cache)


def test_teach_does_what_is_missing(trained: Trained, cache: str, tmp_path: Path) -> None:
    run = trained(*ONE, "fixed.epochs=1", cache)
    wanted = ["fixed.epochs=3"]
    parts = [taught(run, *wanted, part=(i, 3), epochs=2) for i in range(3)]
    assert sum(p["computed"] for p in parts) == 110
    assert sum(p["found"] for p in parts) == 110
    assert {part["computed"] for part in parts} <= {32, 46, 64, 14}
    assert taught(run, *wanted)["computed"] == 110
    assert taught(run, *wanted)["computed"] == 0
    for path in shards(tmp_path)[:1]:
        path.unlink()
    assert taught(run, *wanted)["computed"] > 0
    assert asked(trained(*ONE, *wanted, cache)) == (330, 0)


def test_teach_stops_when_asked_and_goes_on(student_yaml: Path, cache: str) -> None:
    command = ["teach", str(student_yaml), cache]
    stopped = irkd(*command, env={"IRKD_FAULT": "sigterm@cache:0"}, check=False)
    assert stopped.returncode == 75, stopped.stderr
    assert "SIGTERM" in stopped.stdout + stopped.stderr
    done = irkd(*command)
    computed, found = (int(w) for w in done.stdout.splitlines()[-1].split() if w.isdigit())
    assert computed + found == 440
    assert found >= 110


def test_teach_by_two_processes(student_yaml: Path, trained: Trained, cache: str) -> None:
    done = irkd("teach", str(student_yaml), cache, world=2)
    assert done.stdout.count("440 answers computed, 0 were there") == 1
    assert asked(trained(cache)) == (440, 0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["loss.kd.alpha=0", "loss.saliency.gamma=0", "teacher.cache.folder=x"], "asks its teacher nothing"),
        ([], "give teacher.cache.folder"),
    ],
)
def test_teach_refuses(student_yaml: Path, settings: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        teach(config.load(student_yaml, settings))


def test_the_command_lists_verifies_and_prunes(trained: Trained, cache: str, tmp_path: Path, capsys) -> None:
    from irkd_dist.cli import main

    run, folder = trained(*ONE, cache), str(tmp_path / "cache")
    capsys.readouterr()
    assert main(["cache", folder, "--verify"]) == 0
    out = capsys.readouterr().out
    assert f"serves {run}" in out
    assert "draws 0 to 1 (2)  220 samples" in out
    assert "teacher custom" in out
    assert "every record matches its sum" in out
    path = shards(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert main(["cache", folder, "--verify"]) == 1
    assert str(path) in capsys.readouterr().out
    assert main(["cache", folder, "--older-than", "1"]) == 2
    assert main(["cache", folder, "--prune", "--keep-gib", "0"]) == 0
    assert "0 keys" in capsys.readouterr().out
