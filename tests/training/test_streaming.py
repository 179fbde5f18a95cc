"""Training from a server: killed, resumed on another number of processes, the same samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import large
from irkd_dist.eventlog import read_events, read_samples
from tests.data.servers import served
from tests.training.launch import irkd


def forked(world: int, arguments: Sequence[str], environment: dict[str, str]) -> int:
    return irkd("train", *arguments, world=world, env=environment, check=False).returncode


def test_killed_and_resumed_on_three_processes_from_an_object_store(tmp_path: Path) -> None:
    """`make large` at toy size."""
    toy = [
        "student.options={embed_dim: 24, depth: 2, num_heads: 2}", "data.batch=16", "curriculum.epochs=1",
        "track.panels=0", "checkpoint.every_steps=2", "rank_timeout_s=5", "data.order_block=2",
    ]  # fmt: skip
    wrong = large.demonstrate(tmp_path, forked, each=4, resolutions=(32, 48), per_shard=12, more=toy)
    assert wrong == []
    run = tmp_path / "killed"
    images = 72  # of 80, the rest is held out
    steps = -(-images // 16)
    samples = read_samples(run)
    assert sorted(samples) == list(range(2 * steps))
    for epoch in range(2):
        ids = [i for step in range(steps * epoch, steps * (epoch + 1)) for i in samples[step]]
        assert sorted(ids) == list(range(images))
    told = [e for e in read_events(tmp_path / "undisturbed") if e["event"] == "downloads"]
    assert sum(e["downloads"] for e in told) > 0
    again = [e for e in read_events(run) if e["event"] == "downloads"]
    assert sum(e["downloads"] for e in again) == 0  # the cache has them
    assert sum(e["hits"] for e in again) > 0


def test_no_secret_stays_and_commands_take_a_url(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        f"data: {{shards: '${{oc.env:PLACE}}', batch: 32, shard_cache: {{folder: {tmp_path}/cache, retries: 0}}}}\n"
        "student: {name: custom, options: {embed_dim: 16, depth: 1, num_heads: 1}}\n"
        f"fixed: {{resolution: 12, epochs: 1}}\ntrack: {{panels: 1}}\nout: {tmp_path}\nname: run\n"
    )
    with served(shapes) as server:
        secret = {"PLACE": server.url.replace("//", "//me:hush@") + "?sig=hush"}
        said = [irkd("train", str(tmp_path / "a.yaml"), env=secret)]
        data = ["--data", secret["PLACE"]]
        said.append(irkd("evaluate", str(tmp_path / "run"), *data))
        said.append(irkd("plan", str(tmp_path / "a.yaml"), env=secret))
        said.append(irkd("verify", secret["PLACE"]))
        said.append(irkd("report", str(tmp_path / "run"), check=False))
        said.append(irkd("doctor", str(tmp_path / "a.yaml"), env=secret, check=False))
        assert "each is checked when it is downloaded" in said[-1].stdout
        server.faults.only, server.faults.statuses = "", [404] * 99
        failed = irkd("train", str(tmp_path / "a.yaml"), "name=second", env=secret, check=False)
        assert failed.returncode == 2
        assert failed.stderr.splitlines()[-1].endswith(
            f"{server.url}/manifest.json?... cannot be read: there is no such file (HTTP status 404); data.shards "
            "names the folder that irkd render wrote, with manifest.json in it"
        )
        written = irkd("train", str(tmp_path / "a.yaml"), f"data.shards={secret['PLACE']}", check=False)
        assert written.returncode == 2
        assert "carries a password or a query" in written.stderr
        for done in [*said, failed, written]:
            assert "hush" not in done.stdout + done.stderr
    for file in (f for f in tmp_path.rglob("*") if f.is_file()):
        assert b"hush" not in file.read_bytes(), file


@pytest.mark.parametrize("order", ["exact", "shard"])
def test_a_folder_and_its_url_train_to_the_same_bits(order: str, shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        f"data: {{batch: 32, order: {order}, order_block: 2, shard_cache: {{folder: {tmp_path}/cache}}}}\n"
        "student: {name: custom, options: {embed_dim: 16, depth: 1, num_heads: 1}}\nprecision: fp32\n"
        f"fixed: {{resolution: 12, epochs: 2}}\ntrack: {{panels: 0}}\nout: {tmp_path}\n"
    )
    with served(shapes) as server:
        for name, place in (("here", shapes), ("there", server.url)):
            irkd("train", str(tmp_path / "a.yaml"), f"data.shards={place}", f"name={name}")
        # a run may move between them
        irkd("train", str(tmp_path / "a.yaml"), f"data.shards={server.url}", "name=here")
        other = irkd(
            "train",
            str(tmp_path / "a.yaml"),
            f"data.shards={shapes}",
            "name=here",
            "data.order_block=3",
            check=False,
        )
        assert "data.order_block: 2 -> 3" in other.stderr
    here, there = (
        next((tmp_path / name / "checkpoints").glob("step-00000008/student.safetensors")).read_bytes()
        for name in ("here", "there")
    )
    assert here == there
