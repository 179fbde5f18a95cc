"""One function a reader: `target(data)` puts data where the reader finds it and reads it, as a command would.

It ends well or in UserError. Where nonsense could be taken for sense, the target looks at what was read, too.
Names of the package are looked up when they are used, so that a function that moves is adapted here alone.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import hashlib
import importlib
import itertools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

CORPUS = Path(__file__).parent / "corpus"
Target = Callable[[bytes], None]
_number = itertools.count()


class Nonsense(AssertionError):
    """A reader took what cannot be right."""


def irkd(name: str) -> Any:
    """`data.shards.decode` of the package, imported now."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(f"irkd_dist.{module}"), attribute)


@cache
def scratch() -> Path:
    """A folder of this process; in memory where there is such a place."""
    memory = Path("/dev/shm")
    where = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="irkd-fuzz-", dir=where))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def prepare() -> None:
    """Import what the targets need and make what they share, once, before processes are forked."""
    for module in (
        "checkpoint",
        "networks",
        "runfolder",
        "eventlog",
        "status",
        "evaluation",
        "study",
        "report.reading",
        "training.requeue",
    ):
        importlib.import_module(f"irkd_dist.{module}")
    for kind in ("cifar10", "folder", "idx", "parquet", "wds"):
        importlib.import_module(f"irkd_dist.data.sources.{kind}")
    importlib.import_module("torchvision.io")
    _shards()


@cache
def _shards() -> Path:
    """Eight training images and four of a test, at 8 and 12 px."""
    folder = Path(tempfile.mkdtemp(prefix="irkd-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source = irkd("data.sources.open_source")("synthetic", None, samples={"train": 8, "test": 4}, size=12)
    irkd("data.render.render")(source, folder, irkd("data.render.Options")((8, 12), samples_per_shard=4))
    return folder


@cache
def shard_folder() -> Path:
    """A copy of these shards, of this process."""
    return Path(shutil.copytree(_shards(), scratch() / "shards"))


@cache
def run_folder() -> Path:
    """A run of a few steps, as it was written by `irkd train`."""
    folder = scratch() / "run"
    shutil.copytree(CORPUS / "run", folder)
    return folder


def a_copy(folder: Path) -> Path:
    """The same folder under a name that no cache knows."""
    link = scratch() / f"link-{next(_number)}"
    link.symlink_to(folder)
    return link


@contextlib.contextmanager
def _instead(file: Path, data: bytes) -> Any:
    """The file holds `data` for a while."""
    before = file.read_bytes() if file.exists() else None
    file.write_bytes(data)
    try:
        yield
    finally:
        file.unlink() if before is None else file.write_bytes(before)


def _sound(condition: bool, what: object) -> None:
    if not condition:
        raise Nonsense(f"taken: {what!r:.200}")


# ---- shards


def manifest(data: bytes) -> None:
    """manifest.json of a folder of shards."""
    folder = shard_folder()
    with _instead(folder / "manifest.json", data):
        found = irkd("data.shards.load_manifest")(folder)
        numbers = (*found.mean, *found.std, found.val_fraction)
        _sound(all(math.isfinite(n) for n in numbers) and all(s > 0 for s in found.std), numbers)
        _sound(all(r > 0 for r in found.resolutions), found.resolutions)
        _sound(all(n >= 0 for n in found.splits.values()), found.splits)
        _sound(bool(found.classes), found.classes)
        for split, resolution in itertools.product(found.splits, found.resolutions):
            opened = irkd("data.shards.open_split")(folder, found, split, resolution, verify="size")
            opened.close()


def shard(data: bytes) -> None:
    """A tar that the manifest vouches for: its scan and its samples."""
    folder = shard_folder()
    good = irkd("data.shards.load_manifest")(folder)
    record = good.shards["r8"]["train"][0]
    new = dataclasses.replace(record, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    files = (new, *good.shards["r8"]["train"][1:])
    changed = dataclasses.replace(good, shards={**good.shards, "r8": {**good.shards["r8"], "train": files}})
    with _instead(folder / "r8" / record.name, data):
        opened = irkd("data.shards.open_split")(folder, changed, "train", 8)
        try:
            _sound(bool((opened.labels >= 0).all()), opened.labels)
            for i in range(min(len(opened), 4)):
                opened.image(i)
                opened.mask(i)
        finally:
            opened.close()


def _decode(data: bytes, encoding: str) -> None:
    try:
        pixels = irkd("data.shards.decode")(data, encoding)
    except ValueError:  # as documented; the loader names the sample
        return
    _sound(pixels.ndim == 3 and pixels.shape[0] == 3, pixels.shape)


def npy(data: bytes) -> None:
    """A stored image, as npy."""
    _decode(data, "npy")


def png(data: bytes) -> None:
    """A stored image, as png."""
    _decode(data, "png")


def jpg(data: bytes) -> None:
    """A stored image, as jpg."""
    _decode(data, "jpg")


def webp(data: bytes) -> None:
    """A stored image, as webp."""
    _decode(data, "webp")


# ---- sources of a render


def _source(kind: str, path: Path) -> None:
    """Open a source and read the first images of each split, as a render does."""
    source = irkd("data.sources.open_source")(kind, path)
    for split, labels in source.labels.items():
        list(source.read(split, range(min(len(labels), 3))))


def idx_images(data: bytes) -> None:
    """Images of an IDX pair."""
    folder = _files("idx", {"train-images-idx3-ubyte": data, "train-labels-idx1-ubyte": _seed("idx_labels")})
    _source("idx", folder)


def idx_labels(data: bytes) -> None:
    """Labels of an IDX pair."""
    folder = _files("idx", {"train-images-idx3-ubyte": _seed("idx_images"), "train-labels-idx1-ubyte": data})
    _source("idx", folder)


def cifar_batch(data: bytes) -> None:
    """One of CIFAR-10's pickled batches."""
    whole = {name: _seed("cifar_batch") for name in ("test_batch", *(f"data_batch_{i}" for i in range(1, 6)))}
    folder = _files("cifar", whole | {"batches.meta": _seed("cifar_meta"), "data_batch_1": data})
    _source("cifar10", a_copy(folder))


def cifar_meta(data: bytes) -> None:
    """CIFAR-10's pickled class names."""
    whole = {name: _seed("cifar_batch") for name in ("test_batch", *(f"data_batch_{i}" for i in range(1, 6)))}
    _source("cifar10", a_copy(_files("cifar", whole | {"batches.meta": data})))


def parquet(data: bytes) -> None:
    """A parquet file of images."""
    _source("parquet", _files("parquet", {"train-00000-of-00001.parquet": data}))


def wds_tar(data: bytes) -> None:
    """Somebody's WebDataset tar."""
    _source("wds", _files("wds", {"train-000000.tar": data}))


def image(data: bytes) -> None:
    """An image file of a folder of classes, rendered; those that cannot be read are counted, not raised."""
    folder = _files("folder/a", {"0.png": data}).parent
    _files("folder/b", {"0.png": _seed("png")})
    out = scratch() / "rendered"
    shutil.rmtree(out, ignore_errors=True)
    options = irkd("data.render.Options")((8,), val_fraction=0.0, max_bad=1)
    source = irkd("data.sources.open_source")("folder", folder)
    for job in irkd("data.render._jobs")(source, options)[0]:
        work = irkd("data.renderjob.Work")(source, out, options, (8,), "")
        irkd("data.renderjob.render_shard")(work, job, lambda: False)


def _files(name: str, files: dict[str, bytes]) -> Path:
    folder = scratch() / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, data in files.items():
        (folder / file).write_bytes(data)
    return folder


@cache
def _seed(target: str) -> bytes:
    """A whole input of another target."""
    whole = [f for f in (CORPUS / target).iterdir() if not f.name.startswith("found-")]
    return min(whole).read_bytes()


# ---- run folders


def _checkpoint() -> Path:
    return next((run_folder() / "checkpoints").iterdir())


def state(data: bytes) -> None:
    """state.json of a checkpoint: chosen, loaded, built."""
    folder = _checkpoint()
    with _instead(folder / "state.json", data):
        irkd("checkpoint.newest")(folder.parent)
        irkd("checkpoint.load")(folder)
        irkd("checkpoint.find")(run_folder(), "best")
        irkd("networks.load")(folder)


def weights(data: bytes) -> None:
    """student.safetensors of a checkpoint whose state vouches for it, and as a file that a configuration names."""
    folder = _checkpoint()
    with _vouched(folder, "student.safetensors", data):
        irkd("networks.load")(folder)
        irkd("distill.weights.read")(folder / "student.safetensors", "weights")


def moments(data: bytes) -> None:
    """optimizer.safetensors of a checkpoint whose state vouches for it."""
    folder = _checkpoint()
    with _vouched(folder, "optimizer.safetensors", data):
        irkd("checkpoint.load")(folder)


@contextlib.contextmanager
def _vouched(folder: Path, name: str, data: bytes) -> Any:
    values = json.loads((folder / "state.json").read_text())
    values["sha256"][name] = hashlib.sha256(data).hexdigest()
    with _instead(folder / name, data), _instead(folder / "state.json", json.dumps(values).encode()):
        yield


def _read_run() -> None:
    run = run_folder()
    reading = importlib.import_module("irkd_dist.report.reading")
    found = reading.read(run)
    reading.stage_seconds(found)
    reading.timed_evaluations(found)
    reading.total_seconds(found)
    _ = found.best


def events(data: bytes) -> None:
    """events.jsonl: resumed from, asked for its status, reported."""
    run = run_folder()
    with _instead(run / "events.jsonl", data):
        irkd("eventlog.read_events")(run)
        irkd("eventlog.read_decisions")(run, "0")
        _status(run)
        _read_run()


def _status(run: Path) -> None:
    irkd("status.show")(irkd("status.read")(run))


def status(data: bytes) -> None:
    """status.json: `irkd status` and `irkd requeue`."""
    run = run_folder()
    with _instead(run / "status.json", data):
        _status(run)
        str(irkd("training.requeue.decide")(run, 3, count=False))


def restarts(data: bytes) -> None:
    """restarts.json, counted up by `irkd requeue`."""
    run = run_folder()
    before = (run / "status.json").read_bytes()
    with _instead(run / "restarts.json", data), _instead(run / "status.json", before):
        (run / "status.json").unlink()
        str(irkd("training.requeue.decide")(run, 3))
        (run / "status.json").write_bytes(before)


def run_config(data: bytes) -> None:
    """config.yaml of somebody's run folder."""
    run = run_folder()
    with _instead(run / "config.yaml", data):
        irkd("runfolder.read_config")(run)
        _status(run)


def samples(data: bytes) -> None:
    """samples/rank-00000.jsonl."""
    run = run_folder()
    (run / "samples").mkdir(exist_ok=True)
    with _instead(run / "samples" / "rank-00000.jsonl", data):
        irkd("eventlog.read_samples")(run)


def evaluation(data: bytes) -> None:
    """evaluation.json, as the report reads it."""
    with _instead(run_folder() / irkd("runfolder.EARLIER_EVALUATION"), data):
        _read_run()


def panels(data: bytes) -> None:
    """A stage's saliency panels, as the report reads them."""
    file = next((run_folder() / "panels").iterdir())
    with _instead(file, data):
        _read_run()


# ---- what people write


def config(data: bytes) -> None:
    """A configuration file."""
    file = scratch() / "config.yaml"
    file.write_bytes(data)
    loaded = irkd("config.load")(file)
    values = irkd("config.to_dict")(loaded)
    _sound(_finite(values), values)
    irkd("config.to_yaml")(loaded)
    irkd("config.folder_of")(loaded)


def override(data: bytes) -> None:
    """Overrides of a configuration, one a line."""
    file = scratch() / "base.yaml"
    file.write_bytes(_seed("config"))
    lines = [line for line in data.decode(errors="surrogateescape").split("\n") if line]
    loaded = irkd("config.load")(file, lines)
    values = irkd("config.to_dict")(loaded)
    _sound(_finite(values), values)
    irkd("config.to_yaml")(loaded)


def study(data: bytes) -> None:
    """A study's YAML."""
    file = scratch() / "study.yaml"
    file.write_bytes(data)
    irkd("study.load")(file)


def _finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


TARGETS: dict[str, Target] = {
    target.__name__: target
    for target in (
        manifest, shard, npy, png, jpg, webp, idx_images, idx_labels, cifar_batch, cifar_meta, parquet, wds_tar, image,
        state, weights, moments, events, status, restarts, run_config, samples, evaluation, panels, config, override,
        study,
    )
}  # fmt: skip
