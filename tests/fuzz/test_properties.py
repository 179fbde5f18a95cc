"""What holds for any input, against something independent: Python's tarfile and json, and the text that was given."""

from __future__ import annotations

import io
import json
import os
import string
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from irkd_dist.errors import UserError
from tests.fuzz.targets import irkd

settings.register_profile("irkd", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("irkd")

names = st.text(string.ascii_letters + string.digits + "_-é/", min_size=1, max_size=120).filter(
    lambda n: not n.startswith("/") and not n.endswith("/") and "//" not in n
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def _well(action: object, *arguments: object) -> object:
    """The result, or None where it ended in a line."""
    try:
        return action(*arguments)  # type: ignore[operator]
    except UserError:
        return None


@settings(max_examples=60)
@given(
    st.dictionaries(names, st.binary(max_size=1500), min_size=1, max_size=6),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT]),
)
def test_our_scan_finds_what_tarfile_finds(members: dict[str, bytes], style: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.tar"
        try:
            with tarfile.open(file, "w", format=style) as tar:
                for name, data in members.items():
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        except ValueError:  # a name that ustar cannot hold
            return
        data = file.read_bytes()
        ours = {
            name: data[offset : offset + size]
            for name, _, _, offset, size, _ in irkd("data.index.members")(
                lambda count, at: data[at : at + count], len(data)
            )
        }
        assert ours == members


@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(1, 9), st.randoms(use_true_random=False))
def test_npy_images_come_back_as_numpy_wrote_them(height: int, width: int, random: object) -> None:
    pixels = np.random.default_rng(random.getrandbits(32)).integers(
        0, 255, (height, width, 3), dtype=np.uint8
    )  # type: ignore[attr-defined]
    stream = io.BytesIO()
    np.save(stream, pixels)
    decoded = irkd("data.shards.decode")(stream.getvalue(), "npy")
    assert (decoded.permute(1, 2, 0).numpy() == pixels).all()


@settings(max_examples=200)
@given(st.text(min_size=1, max_size=30), st.sampled_from(["out", "data.shards"]))
def test_a_path_of_any_text_as_override_is_taken_whole_or_refused(text: str, key: str) -> None:
    wanted = f"/x/{text}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "c.yaml"
        file.write_text("fixed: {resolution: 16, epochs: 1}\n")
        config = _well(irkd("config.load"), file, [f"{key}={wanted}"])
    if config is not None:
        assert (config.out if key == "out" else config.data.shards) == wanted  # type: ignore[attr-defined]


@settings(max_examples=150)
@given(
    st.dictionaries(
        st.sampled_from(["seed", "data", "student", "loss", "optim", "fixed", "name", "curriculum"]), values
    )
)
def test_any_tree_as_a_configuration_ends_well_or_in_a_line(tree: dict) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "c.yaml"
        file.write_text(yaml.safe_dump(tree, allow_unicode=True), errors="surrogatepass")
        config = _well(irkd("config.load"), file)
        if config is not None:  # and what was taken comes back from its own dump
            file.write_text(irkd("config.to_yaml")(config))
            assert irkd("config.load")(file) == config


@settings(max_examples=150)
@given(
    st.lists(st.dictionaries(st.sampled_from(["event", "step", "time", "stage", "x"]), values), max_size=6)
)
def test_events_of_any_values_are_read_or_left_out(lines: list[dict]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        found = _well(irkd("eventlog.read_events"), Path(folder))
        kept = [json.dumps(line) for line in lines]
        assert all(json.dumps(event) in kept for event in found or [])


@settings(max_examples=100)
@given(values, values)
def test_a_requeue_is_decided_whatever_its_files_hold(status: object, restarts: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        os.mkdir(run / "checkpoints")
        (run / "status.json").write_text(json.dumps(status))
        (run / "restarts.json").write_text(json.dumps(restarts))
        verdict = _well(irkd("training.requeue.decide"), run, 3)
        assert verdict is None or verdict.action in ("requeue", "finished", "failed")  # type: ignore[attr-defined]
