"""Shards behind URLs: what real servers give, with all their faults, is what the folder holds."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from irkd_dist import verify
from irkd_dist.data import remote, render, sampler, shards, store
from irkd_dist.data.decoded import Dataset, Work
from irkd_dist.data.loader import Loader
from irkd_dist.data.recipe import Augment
from irkd_dist.data.remote import Settings
from irkd_dist.data.sampler import Share
from irkd_dist.data.sources import fetched as downloads
from irkd_dist.data.sources import open_source
from irkd_dist.data.store import GIB, Store, Wanted
from irkd_dist.data.views import View
from irkd_dist.errors import Passing, UserError
from tests.data.servers import Server, s3, served

FAST = {"retries": 3, "timeout_s": 2.0}


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 120 training and 20 test shapes at 8 and 12 px, ten in each shard."""
    out = tmp_path_factory.mktemp("many")
    source = open_source("synthetic", None, samples={"train": 120, "test": 20}, size=12)
    assert render.render(source, out, render.Options((8, 12), samples_per_shard=10, val_fraction=0.0))
    return out


@pytest.fixture
def server(many: Path) -> Iterator[Server]:
    with served(many) as server:
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of 4 KiB, so that a shard takes several; pauses of milliseconds."""
    monkeypatch.setattr(remote, "CHUNK", 4096)
    monkeypatch.setattr(remote, "_LONGEST_WAIT", 0.02)


def place(server: Server, folder: Path, **settings: object) -> remote.Url:
    url = remote.place(server.url, Settings(str(folder), **{**FAST, **settings}))  # type: ignore[arg-type]
    assert isinstance(url, remote.Url)
    return url


def loader(folder: Path | remote.Url, augment: Augment | None = None, **data: object) -> Loader:
    manifest = shards.load_manifest(folder)
    split = "train" if augment else "test"
    of = Dataset(folder, manifest, split, verify="size", **data)  # type: ignore[arg-type]
    return Loader(of, View(8, augment), batch=16, seed=3, work=Work("none"))


def seen(batches: Loader, epoch: int = 0) -> list[tuple[list[int], bytes]]:
    with batches:
        return [(b.ids.tolist(), b.images.numpy().tobytes()) for b in batches.batches(epoch)]


def first(many: Path, url: remote.Url) -> tuple[Wanted, bytes]:
    """A training shard at 12 px, and what it holds."""
    shard = shards.load_manifest(many).shards["r12"]["train"][0]
    content = (many / "r12" / shard.name).read_bytes()
    return Wanted(url / "r12" / shard.name, shard.sha256, shard.bytes), content


def test_batches_from_a_url_are_those_of_the_folder(many: Path, server: Server, tmp_path: Path) -> None:
    url = place(server, tmp_path)
    for augment in (Augment(), None):
        assert seen(loader(url, augment)) == seen(loader(many, augment))
    kept = store.of(url.settings)
    counts = kept.take_counts()
    assert (counts.retries, counts.evictions, counts.damaged, counts.ranges) == (0, 0, 0, 0)
    assert counts.hits >= 140
    files = shards.load_manifest(many).shards["r8"]
    asked = server.faults.names()
    assert {name.rpartition("/")[2] for name in asked} == {s.name for split in files.values() for s in split}
    seen(loader(url, Augment()), epoch=1)
    assert server.faults.names() == asked  # nothing comes twice
    assert kept.take_counts().downloads == 0


def test_masks_and_labels_come_too(many: Path, server: Server, tmp_path: Path) -> None:
    url = place(server, tmp_path)
    manifest = shards.load_manifest(url)
    assert manifest == shards.load_manifest(many)
    here, there = (shards.open_split(f, manifest, "test", 12) for f in (many, url))
    assert here.keys == there.keys
    assert np.array_equal(here.labels, there.labels)
    assert [here.mask(i) for i in range(20)] == [there.mask(i) for i in range(20)]
    assert str(there.where(0)) == f"{server.url}/r12/test-000000.tar"


def test_s3_gives_the_same(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3("images", many) as environment:
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        remote._opened.cache_clear()
        url = remote.place("s3://images", Settings(str(tmp_path), **FAST))  # type: ignore[arg-type]
        assert isinstance(url, remote.Url)
        assert seen(loader(url, Augment())) == seen(loader(many, Augment()))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
        plain, here = open_source("wds", "s3://images/r8"), open_source("wds", many / "r8")
        for split, labels in here.labels.items():
            assert plain.labels[split].tolist() == labels.tolist()
        with pytest.raises(
            UserError, match=r"s3://images/no/manifest\.json cannot be read: there is no such file"
        ):
            shards.load_manifest(url / "no")
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(key)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        remote._opened.cache_clear()
        import fsspec

        fsspec.get_filesystem_class("s3").clear_instance_cache()
        with pytest.raises(UserError, match=r"no credentials for s3:// were found; give AWS_ACCESS_KEY_ID"):
            shards.load_manifest(url)
    remote._opened.cache_clear()


# ---- faults of servers


def size(file: Path) -> int:
    try:
        return file.stat().st_size if file.is_file() else 0
    except FileNotFoundError:
        return 0


def fetched(wanted: Wanted, folder: Path) -> tuple[bytes, store.Counts]:
    own = Store(folder)
    own.fetch(wanted)
    return own.path(wanted).read_bytes(), own.take_counts()


@pytest.mark.parametrize(
    ("fault", "retries"),
    [({"statuses": [503, 500, 429]}, 3), ({"drop": 2}, 2), ({"cut": 3}, 3), ({"bytes_per_s": 2e5}, 0)],
)  # fmt: skip
def test_what_passes_is_tried_again(
    fault: dict[str, object], retries: int, many: Path, server: Server, tmp_path: Path
) -> None:
    for name, value in fault.items():
        setattr(server.faults, name, value)
    wanted, content = first(many, place(server, tmp_path))
    data, counts = fetched(wanted, tmp_path)
    assert data == content
    # aiohttp itself asks once more where a kept connection was closed
    assert retries - 1 <= counts.retries <= retries
    assert counts.damaged == 0


def test_a_server_without_ranges_gives_the_whole(many: Path, server: Server, tmp_path: Path) -> None:
    server.faults.ranges = False
    wanted, content = first(many, place(server, tmp_path))
    data, counts = fetched(wanted, tmp_path)
    assert data == content
    assert counts.bytes == len(content)
    assert len(server.faults.names()) == 1


def test_wrong_bytes_are_found_and_fetched_anew(many: Path, server: Server, tmp_path: Path) -> None:
    server.faults.wrong = 1
    wanted, content = first(many, place(server, tmp_path))
    data, counts = fetched(wanted, tmp_path)
    assert data == content
    assert counts.damaged == 1
    server.faults.alter = lambda path, data: data[:-1] + b"x"
    with pytest.raises(UserError, match=r"train-000000\.tar is not what the manifest says: its sha256"):
        fetched(wanted, tmp_path / "again")
    assert not [f for f in (tmp_path / "again").rglob("*") if f.is_file() and f.stat().st_size]
    server.faults.alter = lambda path, data: data[:5000]
    with pytest.raises(UserError, match=r"train-000000\.tar .*5,000 bytes, the manifest says|shorter there"):
        fetched(wanted, tmp_path / "third")


def test_a_broken_download_goes_on_where_it_stopped(many: Path, server: Server, tmp_path: Path) -> None:
    """The server dies in the middle, and comes back on the same port."""
    server.faults.bytes_per_s = 1e5
    wanted, content = first(many, place(server, tmp_path, retries=0))
    assert len(content) > 3 * remote.CHUNK
    dying = threading.Timer(2.2 * remote.CHUNK / 1e5, server.die)
    dying.start()
    with pytest.raises(Passing, match=r"train-000000\.tar cannot be read: .*; tried once"):
        fetched(wanted, tmp_path)
    dying.join()
    had = sum(f.stat().st_size for f in tmp_path.rglob("*.part"))
    assert had >= remote.CHUNK
    again = Server(server.folder, server.server_address[1])
    try:
        data, counts = fetched(wanted, tmp_path)
    finally:
        again.die()
    assert data == content
    assert counts.bytes == len(content) - had
    assert again.faults.asked[0][1] == f"bytes={had}-{had + remote.CHUNK - 1}"


def test_a_server_that_is_away_and_comes_back_in_time(many: Path, server: Server, tmp_path: Path) -> None:
    port = server.server_address[1]
    server.die()
    back: list[Server] = []
    threading.Timer(0.1, lambda: back.append(Server(many, port))).start()
    try:
        assert shards.load_manifest(place(server, tmp_path, retries=100)) == shards.load_manifest(many)
    finally:
        for each in back:
            each.die()


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (404, UserError, r"there is no such file \(HTTP status 404\); data\.shards names the folder"),
        (403, UserError, r"access is denied \(HTTP status 403\); log in"),
        (400, UserError, r"HTTP status 400"),
        (503, Passing, r"HTTP status 503; tried 4 times in \d+ s \(data\.shard_cache\.retries\)"),
    ],
)
def test_what_does_not_pass_is_one_line(
    status: int, kind: type[Exception], message: str, server: Server, tmp_path: Path
) -> None:
    server.faults.only, server.faults.statuses = "", [status] * 20
    with pytest.raises(kind, match=rf"http://127.*manifest\.json cannot be read: {message}"):
        shards.load_manifest(place(server, tmp_path))
    assert len(server.faults.asked) == (4 if kind is Passing else 1)


def test_wrong_urls_are_one_line(tmp_path: Path, many: Path, server: Server) -> None:
    with pytest.raises(UserError, match=r"ftp://a/b: ftp:// is not read; use https, http, s3, gs or hf"):
        remote.place("ftp://a/b")
    with pytest.raises(UserError, match=r"names no server or bucket: write s3://SERVER/FOLDER"):
        remote.place("s3://")
    url = remote.place("http://no-such-host.invalid/a", Settings(str(tmp_path), retries=1))
    with pytest.raises(UserError, match=r"http://no-such-host\.invalid/a/manifest\.json cannot be read"):
        shards.load_manifest(url)
    server.faults.alter = lambda path, data: b"<html>"
    with pytest.raises(UserError, match=r"manifest\.json is not valid JSON .*; upload again"):
        shards.load_manifest(place(server, tmp_path))


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    remote._opened.cache_clear()
    with pytest.raises(UserError, match=r"gs://bucket/a: gs:// needs a package .*: pip install gcsfs$"):
        remote.place("gs://bucket/a")


def test_secrets_are_sent_and_never_shown(many: Path, server: Server, tmp_path: Path) -> None:
    secret = server.url.replace("http://", "http://me:hush@") + "?sig=hush"
    url = remote.place(secret, Settings(str(tmp_path), **FAST))  # type: ignore[arg-type]
    assert shards.load_manifest(url) == shards.load_manifest(many)
    assert server.faults.asked[0][0] == "/manifest.json?sig=hush"
    server.faults.only, server.faults.statuses = "", [503] * 20
    with pytest.raises(UserError) as caught:
        shards.load_manifest(url)
    assert "hush" not in f"{caught.value} {url} {url!r}"
    server.die()
    with pytest.raises(UserError) as caught:
        shards.load_manifest(url)
    assert "hush" not in str(caught.value)
    assert remote.without_secrets("at http://a:hush@b/c?hush=1&d=hush, no") == "at http://b/c?... no"


# ---- the cache


def test_the_limit_holds_and_the_least_recently_used_goes(many: Path, server: Server, tmp_path: Path) -> None:
    files = shards.load_manifest(many).shards["r12"]["train"]
    url, most = place(server, tmp_path), max(s.bytes for s in files)
    wanted = [Wanted(url / "r12" / s.name, s.sha256, s.bytes) for s in files]
    own = Store(tmp_path / "own", 3 * most)
    for each in wanted[:3]:
        own.read(each, 0, 1)
        time.sleep(0.01)
    time.sleep(store._TOUCH_S)
    own.read(wanted[0], 0, 1)  # used again
    own.fetch(wanted[3])
    assert [own.path(w).exists() for w in wanted[:4]] == [True, False, True, True]
    assert own.take_counts().evictions == 1
    assert own.read(wanted[1], 100, 50) == (many / "r12" / files[1].name).read_bytes()[100:150]
    threads = [threading.Thread(target=own.fetch, args=(w,)) for w in wanted]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert sum(size(f) for f in (tmp_path / "own").rglob("*")) <= 3 * most
    for thread in threads:
        thread.join()


def test_a_file_that_was_cut_short_is_fetched_again(many: Path, server: Server, tmp_path: Path) -> None:
    wanted, content = first(many, place(server, tmp_path))
    own = Store(tmp_path)
    own.fetch(wanted)
    os.truncate(own.path(wanted), 100)
    assert own.read(wanted, 512, 90) == content[512:602]
    assert own.take_counts().damaged == 1


HOLD = """
import sys, pathlib
from irkd_dist.data import remote, store
remote.CHUNK = 4096
url = remote.place(sys.argv[1], remote.Settings(sys.argv[2]))
store.Store(pathlib.Path(sys.argv[2])).fetch(store.Wanted(url, sys.argv[3], int(sys.argv[4])))
"""


def holder(wanted: Wanted, folder: Path) -> subprocess.Popen[bytes]:
    arguments = [str(wanted.url), str(folder), wanted.sha256, str(wanted.size)]
    return subprocess.Popen([sys.executable, "-c", HOLD, *arguments])


def test_a_node_downloads_once_and_survives_the_holders_death(
    many: Path, server: Server, tmp_path: Path
) -> None:
    wanted, content = first(many, place(server, tmp_path))
    processes = [holder(wanted, tmp_path) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert len(server.faults.names()) == -(-len(content) // remote.CHUNK)  # each part once

    server.faults.bytes_per_s = 4e4
    dead = holder(wanted, tmp_path / "dead")
    while not any(f.stat().st_size for f in (tmp_path / "dead").rglob("*.part")):
        time.sleep(0.01)
    own = Store(tmp_path / "dead")
    assert not own.fetch(wanted, wait=False)  # it is being downloaded
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    server.faults.bytes_per_s = None
    had = sum(f.stat().st_size for f in (tmp_path / "dead").rglob("*.part"))
    own.fetch(wanted)
    assert own.path(wanted).read_bytes() == content
    assert own.take_counts().bytes == len(content) - had
    assert not [*(tmp_path / "dead").rglob("*.part")]


def test_a_full_disk_is_one_line(many: Path, server: Server, tmp_path: Path) -> None:
    wanted, _ = first(many, place(server, tmp_path))
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n{HOLD}"
    arguments = [str(wanted.url), str(tmp_path), wanted.sha256, str(wanted.size)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert "UserError: data.shard_cache.folder: " in done.stderr.splitlines()[-1]
    assert "File too large" in done.stderr.splitlines()[-1]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.shard_cache\.folder: .*/file cannot be used: "):
        Store(tmp_path / "file").fetch(wanted)


def test_a_limit_below_one_shard_is_refused_and_one_below_the_split_fetches_alone(
    many: Path, server: Server, tmp_path: Path
) -> None:
    files = shards.load_manifest(many).shards["r8"]["train"]
    most = max(s.bytes for s in files)
    url = place(server, tmp_path / "small", limit_gib=(most - 1) / GIB)
    with pytest.raises(UserError, match=r"limit_gib=.* has no room for one shard: http://.*/r8/train-"):
        loader(url, Augment())
    url = place(server, tmp_path / "some", limit_gib=4 * most / GIB)
    opened = loader(url, Augment())
    assert any("each image is fetched alone" in note for note in opened.notes)
    assert seen(opened) == seen(loader(many, Augment()))
    counts = store.of(url.settings).take_counts()
    assert (counts.downloads, counts.ranges) == (len(files), 120)  # indices, samples
    blocks = loader(url, Augment(), order="shard", block=2)
    assert not blocks.notes
    assert seen(blocks) == seen(loader(many, Augment(), order="shard", block=2))
    counts = store.of(url.settings).take_counts()
    assert counts.ranges == 0
    assert counts.downloads >= len(files)


def test_a_server_without_ranges_does_not_send_a_shard_for_each_image(
    many: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = max(s.bytes for s in shards.load_manifest(many).shards["r8"]["train"])
    url = place(server, tmp_path, limit_gib=4 * most / GIB)
    opened, again = loader(url, Augment()), loader(url, Augment())
    server.faults.ranges = False
    monkeypatch.setattr(remote, "CHUNK", 8 << 20)
    assert seen(opened) == seen(loader(many, Augment())), "small ones may come whole"
    monkeypatch.setattr(remote, "CHUNK", 1000)
    with pytest.raises(
        UserError, match=r"its server ignores ranges and sent [\d,]+ bytes for [\d,]+, for each image"
    ):
        seen(again)


def test_shards_without_an_index_are_scanned_once(many: Path, server: Server, tmp_path: Path) -> None:
    manifest = shards.load_manifest(many)
    old = {
        size: {
            split: tuple(dataclasses.replace(s, index=None) for s in listed)
            for split, listed in splits.items()
        }
        for size, splits in manifest.shards.items()
    }
    manifest, url = dataclasses.replace(manifest, shards=old), place(server, tmp_path)
    here = shards.open_split(many, manifest, "train", 8)
    there = shards.open_split(url, manifest, "train", 8)
    assert there.keys == here.keys
    assert [there.image(i) for i in range(120)] == [here.image(i) for i in range(120)]
    asked = len(server.faults.names())
    for kept in tmp_path.rglob("*"):
        if kept.is_file() and kept.read_bytes()[:1] != b"{":
            kept.unlink()  # the tars, not the indices
    assert shards.open_split(url, manifest, "train", 8).keys == here.keys
    assert len(server.faults.names()) == asked


# ---- the order


def test_shard_order_goes_block_by_block_and_is_a_permutation() -> None:
    counts, block = (7, 5, 9, 1, 4, 6, 3), 3
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        order = sampler.shard_order(seed, epoch, counts, block)
        assert sorted(order.tolist()) == list(range(35))
        of, groups, begin = np.repeat(np.arange(7), counts)[order].tolist(), [], 0
        while begin < 35:
            group = {*itertools.islice(dict.fromkeys(of[begin:]), block)}
            total = sum(counts[shard] for shard in group)
            assert {*of[begin : begin + total]} == group  # all its samples come before another block's
            groups.append(group)
            begin += total
        assert [len(group) for group in groups] == [3, 3, 1]
        # within a block the samples stand in the order of the whole
        rank = np.argsort(sampler.order(seed, epoch, 35))
        begin = 0
        for group in groups:
            total = sum(counts[shard] for shard in group)
            assert (np.diff(rank[order[begin : begin + total]]) > 0).all()
            begin += total
        orders.append(order.tolist())
    assert len({tuple(order) for order in orders}) == 3
    assert np.array_equal(sampler.shard_order(4, 2, counts, 7), sampler.order(4, 2, 35))


@pytest.mark.parametrize("order", ["exact", "shard"])
def test_any_world_sees_the_same_batches(order: str, many: Path, server: Server, tmp_path: Path) -> None:
    """At 1, 2, 3 and 4 processes, and from the middle of an epoch on."""
    url = place(server, tmp_path)
    manifest = shards.load_manifest(url)
    of = Dataset(url, manifest, "train", verify="size", order=order, block=3)  # type: ignore[arg-type]
    augment = Augment(mixup=0.3)

    def batches(world: int, rank: int, start: int) -> list[dict[int, bytes]]:
        with Loader(
            of, View(8, augment), batch=16, seed=1, share=Share(world, (rank,)), work=Work("none")
        ) as own:
            return [
                dict(zip(b.ids.tolist(), [i.numpy().tobytes() for i in b.images], strict=True))
                for b in own.batches(2, start)
            ]

    alone = batches(1, 0, 0)
    if order == "shard":
        counts = tuple(s.samples for s in manifest.shards["r8"]["train"])
        due = sampler.shard_order(1, 2, counts, 3)
        assert [i for batch in alone for i in batch] == due.tolist()
    assert sorted(i for batch in alone for i in batch) == list(range(120))
    for world in (2, 3, 4):
        parts = [batches(world, rank, 5) for rank in range(world)]
        for step, whole in enumerate(alone[5:]):
            together = {i: image for part in parts for i, image in part[step].items()}
            assert together == whole


def test_downloads_come_in_the_order_of_use_and_within_the_room(
    many: Path, server: Server, tmp_path: Path
) -> None:
    manifest = shards.load_manifest(many)
    files = manifest.shards["r8"]["train"]
    most = max(s.bytes for s in files)
    url = place(server, tmp_path, limit_gib=5 * most / GIB, downloads=1)
    with loader(url, Augment(), order="shard", block=2) as own:
        store.of(url.settings).take_counts()
        for _ in own.batches(0):
            kept = sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file())
            assert kept <= 5 * most
            time.sleep(0.05)
    counts = store.of(url.settings).take_counts()
    assert counts.downloads == len(files)  # none twice: what comes ahead is not evicted
    order = sampler.shard_order(3, 0, tuple(s.samples for s in files), 2)
    of = np.repeat(np.arange(len(files)), [s.samples for s in files])[order]
    due = [files[i].name for i in dict.fromkeys(of.tolist())]
    asked = [name.rpartition("/")[2] for name in dict.fromkeys(server.faults.names())]
    blocks = [{*due[i : i + 2]} for i in range(0, len(due), 2)]
    assert [{*asked[i : i + 2]} for i in range(0, len(asked), 2)] == blocks


def test_verify_reads_what_the_server_has(
    many: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "CHUNK", 30_000)
    url = place(server, tmp_path)
    assert list(verify.verify(url)) == []
    server.faults.ranges = False
    assert list(verify.verify(url)) == []
    server.faults.ranges = True
    server.faults.alter = lambda path, data: (
        data[:-1] + b"x" if path.endswith("r8/train-000003.tar") else data
    )
    assert list(verify.verify(url)) == [
        f"{server.url}/r8/train-000003.tar is altered: its sha256 is not the manifest's"
    ]
    server.faults.alter = lambda path, data: data[:9000] if path.endswith("r8/train-000003.tar") else data
    (problem,) = verify.verify(url)
    assert problem.startswith(f"{server.url}/r8/train-000003.tar")
    assert "truncated: 9,000 bytes" in problem or "shorter there" in problem
    assert not [f for f in tmp_path.rglob("*") if f.is_file()]


def test_shards_of_one_class_each_are_warned_of_and_shuffled_ones_are_not(tmp_path: Path) -> None:
    for i in range(120):
        (own := tmp_path / "images" / "train" / f"class-{i // 10:02d}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 2 * i, 0)).save(own / f"{i}.png")
    source = open_source("folder", tmp_path / "images")
    notes, labels = [], []
    for shuffle in (False, True):
        out = tmp_path / str(shuffle)
        options = render.Options((8,), samples_per_shard=10, val_fraction=0.0, shuffle=shuffle)
        manifest = render.render(source, out, options)
        assert manifest is not None
        assert manifest.splits == {"train": 120}
        of = Dataset(out, manifest, "train", verify="size", order="shard", block=2)
        with Loader(of, View(8, Augment()), batch=20, seed=0) as own:
            notes.append(own.notes)
            batch = next(iter(own.batches(0)))
            labels.append(len(set(batch.labels.tolist())))
            opened = shards.open_split(out, manifest, "train", 8)
            colours = sorted(shards.decode(opened.image(i), "png")[0, 0, 0].item() for i in range(120))
            assert colours == list(range(120))  # each image once, under its own class
            for i in range(120):
                assert opened.labels[i] == shards.decode(opened.image(i), "png")[0, 0, 0].item() // 10
    assert labels[0] == 2
    assert labels[1] > 6
    assert notes[1] == []
    assert "the first 20 images of an epoch have 2 classes, 10 are to be expected" in notes[0][0]


def test_tars_of_one_name_in_two_folders_are_two() -> None:
    """The usual layout of WebDataset: a folder for each split."""
    found = downloads._tars(remote.Url("https://h/d/{train,val}/{000000..000001}.tar", "", remote.Settings()))
    names = ["train/000000.tar", "train/000001.tar", "val/000000.tar", "val/000001.tar"]
    assert {name: url.base for name, url in found.items()} == {name: f"https://h/d/{name}" for name in names}
    alone = downloads._tars(remote.Url("https://h/d/train-{0..1}.tar", "", remote.Settings()))
    assert [*alone] == ["train-0.tar", "train-1.tar"]


def test_plain_tars_behind_a_url_are_rendered(
    many: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    named = f"{server.url}/r12/train-{{000000..000011}}.tar?sig=hush"
    by_url, here = open_source("wds", named), open_source("wds", many / "r12")
    assert by_url.labels.keys() == {"train"}
    assert np.array_equal(by_url.labels["train"], here.labels["train"])
    for one, other in zip(by_url.read("train", range(120)), here.read("train", range(120)), strict=True):
        assert one == other
    asked = len(server.faults.asked)
    assert open_source("wds", named).fingerprint == by_url.fingerprint
    assert not [r for path, r in server.faults.asked[asked:] if r]  # sizes only
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    server.faults.ranges = False
    assert np.array_equal(open_source("wds", named).labels["train"], here.labels["train"])
    with pytest.raises(
        UserError, match=r"http has no list of files: name the tars, http://host/train-\{000000"
    ):
        open_source("wds", server.url)
    with pytest.raises(UserError, match=r"train-000012\.tar.* cannot be read: there is no such file"):
        open_source("wds", f"{server.url}/r12/train-{{000000..000012}}.tar")
    with pytest.raises(UserError, match=r"only source wds is read from a URL, not folder"):
        open_source("folder", server.url)
