"""A picture is cut for prediction as evaluation saw it, whatever its shards were rendered with."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image

import irkd_dist
from irkd_dist import checkpoint, export, networks, predict
from irkd_dist.data import render, shards
from irkd_dist.data.decoded import Dataset
from irkd_dist.data.geometry import CENTRAL, Geometry, is_geometry
from irkd_dist.data.loader import Loader
from irkd_dist.data.sources import open_source
from irkd_dist.data.views import View
from irkd_dist.errors import UserError
from tests.training.launch import irkd

SHAPES = [(90, 60), (50, 120), (64, 64), (200, 81)]
SIZE = 16
# name: options of the render, and data.centre_crop
WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    "central": ({"resolutions": (SIZE,)}, False),
    "squash": ({"resolutions": (SIZE,), "fit": "squash"}, False),
    "pad": ({"resolutions": (SIZE,), "fit": "pad"}, False),
    "cropped": ({"resolutions": (SIZE,), "crop_pct": 0.875}, False),
    "cropped-squash": ({"resolutions": (SIZE,), "crop_pct": 0.875, "fit": "squash"}, False),
    "cropped-pad": ({"resolutions": (SIZE,), "crop_pct": 0.875, "fit": "pad"}, False),
    "cropped-from-a-larger": ({"resolutions": (28,), "crop_pct": 0.875}, False),
    "window": ({"resolutions": (25,), "mode": "crop"}, True),
    "window-pad": ({"resolutions": (25,), "mode": "crop", "fit": "pad"}, True),
    "window-of-resized": ({"resolutions": (SIZE, 25)}, True),
    "resized-from-the-largest": ({"resolutions": (25,), "mode": "crop", "fit": "squash"}, False),
}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for label in ("cat", "dog"):
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
                image = Image.fromarray(coarse).resize(SHAPES[i % 4], Image.Resampling.BICUBIC)
                image.save(folder / split / label / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def files(photographs: Path) -> list[Path]:
    """The test images, in the order of the shards."""
    return sorted((photographs / "test").rglob("*.png"))


class Trained:
    """Shards rendered in one of the ways, a run on them, and what evaluation sees of the test split."""

    def __init__(self, photographs: Path, out: Path, way: str) -> None:
        options, centre = WAYS[way]
        self.shards, self.run = out / "shards", out / "run"
        manifest = render.render(
            open_source("folder", photographs), self.shards, render.Options(**options, val_fraction=0.2)
        )
        assert manifest is not None
        values = {
            "data": {"shards": str(self.shards), "batch": 4, "centre_crop": centre}, "out": str(out), "name": "run",
            "student": {"name": "custom", "patch": 4, "options": {"embed_dim": 16, "depth": 1, "num_heads": 2}},
            "fixed": {"resolution": SIZE, "epochs": 1}, "track": {"panels": 0}, "precision": "fp32",
        }  # fmt: skip
        irkd_dist.train(values)
        view = View(SIZE, centre_crop=centre)
        with Loader(Dataset(self.shards, manifest, "test"), view, batch=8, seed=0) as loader:
            (batch,) = loader.batches(0)
        self.seen, self.manifest, self.geometry = batch.images, manifest, Geometry.of(manifest, centre)
        self.exported = out / "exported"
        self.told = export.export(self.run, self.exported, ["onnx"])


@pytest.fixture(scope="module", params=WAYS)
def trained(
    photographs: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Trained:
    return Trained(photographs, tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def cropped(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(photographs, tmp_path_factory.mktemp("alone"), "cropped-squash")


def levels(found: torch.Tensor, expected: torch.Tensor, std: tuple[float, ...]) -> float:
    """Largest difference of two normalised images, in levels of 0..255."""
    return float(((found - expected) * torch.tensor(std).view(3, 1, 1)).abs().max() * 255)


def forget(folder: Path) -> None:
    """Make checkpoints those of an earlier release, which said nothing of pictures."""
    for file in folder.rglob("state.json"):
        state = json.loads(file.read_text())
        del state["geometry"], state["sha256"]["state.json"]
        file.write_text(json.dumps(state, indent=1))


def test_pictures_are_seen_as_evaluation_saw_them(trained: Trained, files: list[Path]) -> None:
    """By the run and by its ONNX, against the shards through the View; the bilinear of two libraries is a level off."""
    student, std = irkd_dist.load(trained.run), trained.manifest.std
    assert student.geometry == trained.geometry
    assert trained.told["notes"] == []
    models = predict.open_model(trained.run), predict.open_model(trained.exported)
    assert models[1].session is not None
    with torch.no_grad():
        chances = student(trained.seen).softmax(1)
    for i, file in enumerate(files):
        assert levels(student.transform(file), trained.seen[i], std) < 1.01
        assert levels(student.transform(Image.open(file)), trained.seen[i], std) < 1.01
        for model in models:
            assert model.geometry == trained.geometry
            pixels = predict._normalised(model, np.asarray(predict._seen(model, file)))
            assert levels(torch.from_numpy(pixels), trained.seen[i], std) < 1.01
    for model in models:
        answers = [*predict.predict(model, files, top=2)]
        for answer, expected in zip(answers, chances, strict=True):
            assert isinstance(answer, predict.Prediction)
            found = dict(zip(answer.classes, answer.probabilities, strict=True))
            assert [found[c] for c in student.classes] == pytest.approx(expected.tolist(), abs=2e-3)


def test_timm_cuts_as_its_configuration_says(trained: Trained, files: list[Path]) -> None:
    """Half a pixel beside ours, where it crops after it resized; on the mean colour where ours is on black."""
    config = timm.data.resolve_data_config(model=export.load_timm(trained.exported))
    made, geometry = timm.data.create_transform(**config), trained.geometry
    _, side = geometry.sides(SIZE)
    assert math.floor(SIZE / config["crop_pct"]) == side
    assert config["crop_mode"] == {"crop": "center", "squash": "squash", "pad": "border"}[geometry.fit]
    assert (config["crop_pct"] == 1) == (side == SIZE)
    card = (trained.exported / "README.md").read_text()
    assert f"scaled to {side} px" in card
    assert (f"the central {SIZE} px are seen" in card) == (side > SIZE)
    for i, file in enumerate(files):
        image = Image.open(file)
        if geometry.fit == "pad" and image.width != image.height:
            continue
        theirs = made(image)
        assert isinstance(theirs, torch.Tensor)
        assert float((theirs - trained.seen[i]).abs().mean()) < 0.15, file
        assert float((theirs.flip(-1) - trained.seen[i]).abs().mean()) > 0.25, file


def test_an_older_checkpoint_is_read_with_its_shards(
    cropped: Trained, files: list[Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(cropped.run, run)
    forget(run)
    network = networks.load(run)
    assert networks.geometry(network) == (cropped.geometry, None)
    assert predict.open_model(run).geometry == cropped.geometry
    assert levels(irkd_dist.load(run).transform(files[0]), cropped.seen[0], cropped.manifest.std) < 1.01


@pytest.mark.parametrize("where", ["gone", "others", "remote"])
def test_an_older_checkpoint_without_its_shards_is_assumed_to_see_the_central_square(
    cropped: Trained, tmp_path: Path, where: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(cropped.run, run)
    forget(run)
    for file in run.rglob("state.json"):
        state = json.loads(file.read_text())
        if where == "others":
            state["data_digest"] = "0" * 16
        else:
            state["config"]["data"]["shards"] = {"gone": str(tmp_path / "gone"), "remote": "s3://bucket/x"}[
                where
            ]
        file.write_text(json.dumps(state))
    why = {
        "gone": "no folder of shards",
        "others": "are not those that it",
        "remote": "are in no folder here",
    }
    with pytest.warns(UserWarning, match=f"{why[where]}.*the central square is assumed"):
        student = irkd_dist.load(run)
    assert student.geometry == CENTRAL


def test_what_is_assumed_is_said_on_one_line(cropped: Trained, files: list[Path], tmp_path: Path) -> None:
    """By predict and export of an older checkpoint, by its export's files, and by an older export."""
    run, out = tmp_path / "run", tmp_path / "exported"
    shutil.copytree(cropped.run, run)
    forget(run)
    for file in run.rglob("state.json"):
        file.write_text(file.read_text().replace(str(cropped.shards), str(tmp_path / "gone")))
    for command in (("predict", run, files[0]), ("export", run, "--out", out, "--to", "onnx")):
        (line,) = irkd(*map(str, command)).stderr.splitlines()
        assert line.startswith("irkd: warning: ")
        assert "the central square is assumed" in line
    told = json.loads((out / "export.json").read_text())
    assert told["geometry"] is None
    assert len(told["notes"]) == 1
    assert "take the central square" in (out / "README.md").read_text()
    (out / "export.json").write_text(
        json.dumps({k: v for k, v in told.items() if k not in ("geometry", "notes")})
    )
    model = predict.open_model(out)
    assert model.geometry == CENTRAL
    assert model.note is not None
    assert "export.json does not say how its pictures were cut" in model.note


def test_an_exported_graph_cuts_without_torch(cropped: Trained, files: list[Path]) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'torchvision', 'timm'):\n"
        "    sys.modules[name] = None\n"
        "from pathlib import Path\n"
        "from irkd_dist import predict\n"
        f"model = predict.open_model(Path({str(cropped.exported)!r}))\n"
        f"print(predict.as_json([*predict.predict(model, [Path({str(files[3])!r})], 2)]))\n"
        "print(model.geometry.crop_pct, model.geometry.fit, model.note)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer, how = done.stdout.splitlines()
    assert how == "0.875 squash None"
    (ours,) = predict.predict(predict.open_model(cropped.run), files[3:4], 2)
    assert isinstance(ours, predict.Prediction)
    assert json.loads(answer)["probabilities"] == pytest.approx(ours.probabilities, abs=1e-5)


def test_an_altered_geometry_is_refused(cropped: Trained, tmp_path: Path) -> None:
    good = json.loads(json.dumps(asdict(cropped.geometry)))
    assert is_geometry(good)
    assert Geometry.parse(good) == cropped.geometry
    bad = [
        {"fit": "stretch"}, {"fit": ["crop"]}, {"crop_pct": 0}, {"crop_pct": 2}, {"crop_pct": "1"}, {"mode": None},
        {"stored": 16}, {"stored": [0]}, {"stored": [1 << 40]}, {"centre_crop": 1},
    ]  # fmt: skip
    assert not any(is_geometry(good | change) for change in bad)
    assert not any(is_geometry(value) for value in (None, [], {}, {"fit": "crop"}))
    shutil.copytree(cropped.run, tmp_path / "run")
    folder = networks.load(tmp_path / "run").folder
    state = json.loads((folder / "state.json").read_text())
    del state["sha256"]["state.json"]
    (folder / "state.json").write_text(json.dumps(state | {"geometry": good | {"crop_pct": 7}}, indent=1))
    with pytest.raises(UserError, match=r"state\.json is altered: geometry="):
        checkpoint.load_state(folder)
    shutil.copytree(cropped.exported, tmp_path / "exported")
    file = tmp_path / "exported" / "export.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"geometry": {"fit": "crop"}}))
    with pytest.raises(UserError, match=r"export\.json is altered: geometry"):
        predict.open_model(tmp_path / "exported")


def test_sizes_that_cannot_be_seen_are_named() -> None:
    window = Geometry(mode="crop", stored=(25,), centre_crop=True)
    with pytest.raises(UserError, match="size=26 is larger than the 25 px that the shards stored"):
        window.square(Image.new("RGB", (40, 30)), 26)
    assert replace(window, centre_crop=False).square(Image.new("RGB", (40, 30)), 26).size == (26, 26)


def test_a_manifest_of_an_unknown_fit_is_refused(cropped: Trained, tmp_path: Path) -> None:
    raw = json.loads((cropped.shards / "manifest.json").read_text())
    raw["render"]["fit"] = "stretch"
    (tmp_path / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"render\.fit is 'stretch', none of crop, squash, pad"):
        shards.load_manifest(tmp_path)
