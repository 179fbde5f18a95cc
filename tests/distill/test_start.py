"""The networks a run starts with: by name, folder or hub, with whose weights, and fed with which normalisation."""

from __future__ import annotations

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import nn

from irkd_dist import config, configured
from irkd_dist.data import shards
from irkd_dist.distill import hub, models
from irkd_dist.errors import UserError
from irkd_dist.networks import Network

CHANNELS = {"channels": [8, 8, 8, 8]}
HALF = (0.5, 0.5, 0.5)
IMAGENET = (0.485, 0.456, 0.406)


def folder_of_timm(folder: Path, classes: int, **config_json: Any) -> nn.Module:
    """A small ResNet as timm saves a model for the hub."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(4)
    model = timm.create_model("resnet10t", num_classes=classes, **CHANNELS)
    save_file(model.state_dict(), folder / "model.safetensors")
    own = {"mean": HALF, "std": HALF, "num_classes": classes, "input_size": [3, 32, 32], "classifier": "fc"}
    content = {
        "architecture": "resnet10t",
        "num_classes": classes,
        "model_args": CHANNELS,
        "pretrained_cfg": own,
    }
    (folder / "config.json").write_text(json.dumps({**content, **config_json}))
    return model


def configuration(
    student: dict[str, Any] | None = None, teacher: dict[str, Any] | None = None
) -> config.Config:
    small = {"name": "custom", "options": {"embed_dim": 16, "depth": 1, "num_heads": 2}}
    tree: dict[str, Any] = {"fixed": {"resolution": 16, "epochs": 1}, "student": student or small}
    return config.from_dict(tree | ({"teacher": teacher} if teacher else {}), "here")


def student(**spec: Any) -> tuple[nn.Module, list[str]]:
    model, _, notes = configured.create_student(configuration(spec), 3)
    return model, notes


def same(a: nn.Module, b: nn.Module, but: str = "-") -> bool:
    other = b.state_dict()
    return all(torch.equal(v, other[k]) for k, v in a.state_dict().items() if not k.startswith(but))


# -- names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["local-dir:", ""])
def test_a_folder_is_a_model_with_its_weights(tmp_path: Path, prefix: str) -> None:
    saved = folder_of_timm(tmp_path / "m", 3)
    name = f"{prefix}{tmp_path / 'm'}"
    model, notes = student(name=name, pretrained=True)
    assert same(model, saved)
    assert notes == []
    fresh, notes = student(name=name)
    assert not same(fresh, saved)
    assert notes == [
        f"student.name={name}: its weights are not loaded; student.pretrained=true starts from them"
    ]
    _, arguments, _ = configured.create_student(configuration({"name": name}), 3)
    assert (arguments["name"], arguments["options"]) == ("resnet10t", CHANNELS), (
        "built again without the folder"
    )
    assert json.dumps(arguments)


def test_a_student_goes_on_with_the_shards_normalisation_and_says_so(tmp_path: Path) -> None:
    folder_of_timm(tmp_path / "m", 3)
    config = configuration({"name": f"local-dir:{tmp_path / 'm'}", "pretrained": True})
    assert configured.create_student(config, 3, (*HALF, *HALF))[2] == []
    (note,) = configured.create_student(config, 3, (*HALF, 0.2, 0.2, 0.2))[2]
    assert "were trained with mean (0.5000, 0.5000, 0.5000) and std (0.5000" in note
    assert note.endswith("it goes on with the shards' own")


def test_the_folders_head_of_another_size(tmp_path: Path) -> None:
    saved = folder_of_timm(tmp_path / "m", 7)
    spec = {"name": f"local-dir:{tmp_path / 'm'}", "pretrained": True}
    with pytest.raises(
        UserError, match=r"its head fc has 7 classes, the shards have 3; student\.reset_head=true"
    ):
        student(**spec)
    model, notes = student(**spec, reset_head=True)
    assert same(model, saved, but="fc.")
    assert ["is replaced by a new one of 3" in note for note in notes] == [True]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": "vit", "architectures": ["ViTModel"]}', "names no timm architecture (it has vit)"),
        ('{"architecture": "nonsense"}', "architecture='nonsense', which this timm does not know"),
        ("[1]", "cannot be read as a description of a timm model"),
        ("{", "cannot be read as a description"),
        ('{"architecture": "resnet10t", "mean": [1]}', "mean=[1], std=None: three numbers each"),
        ('{"architecture": "resnet10t", "mean": [0,0,0], "std": [0,1,1]}', "three numbers each"),
        ('{"architecture": "resnet10t", "mean": [0,0,0], "std": [NaN,1,1]}', "three numbers each"),
    ],
)
def test_folders_that_are_none(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError) as error:
        hub.look_up(f"local-dir:{tmp_path}", "student.name")
    assert message in str(error.value)
    assert str(error.value).startswith("student.name=local-dir:")


def test_names_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no .*/nowhere/config\.json"):
        hub.look_up(f"local-dir:{tmp_path}/nowhere", "student.name")
    with pytest.raises(
        UserError, match=r"a folder with config\.json is local-dir:org/name, a model of the hub hf-hub:org"
    ):
        hub.look_up("org/name", "student.name")
    with pytest.raises(UserError, match="no model is named 'resnet10'; did you mean"):
        student(name="resnet10")


def test_a_convolutional_name_alone_works_and_a_vits_patch_is_its_own() -> None:
    assert models.patch_size(student(name="test_resnet")[0]) is None
    assert models.patch_size(student(name="test_vit")[0]) == 16
    assert models.patch_size(student(name="custom")[0]) == 4


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224"])
def test_transformers_that_take_any_size(name: str) -> None:
    small = (
        {"embed_dim": 12, "depths": [1, 1], "num_heads": [2, 2]}
        if "swin" in name
        else {"embed_dim": 24, "depth": 1, "num_heads": 2}
    )
    model = models.create_model(name, classes=3, patch=4, image_size=32, options=small).eval()
    for side in (16, 32):
        assert model(torch.randn(2, 3, side, side)).shape == (2, 3)
    assert models.sizes_it_takes(model) == ""


def test_a_model_for_one_size_says_what_would_do() -> None:
    options = {"embed_dim": 24, "depth": 1, "num_heads": 2}
    model = models.create_model("beit_base_patch16_224", classes=3, image_size=32, options=options).eval()
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    with pytest.raises(AssertionError):
        model(torch.randn(2, 3, 16, 16))
    assert "it is made for one size: train it at one resolution" in models.sizes_it_takes(model)


# -- the hub ------------------------------------------------------------------------------------------


def test_what_the_hubs_cache_has_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--org--name"
    saved = folder_of_timm(repository / "snapshots" / ("0" * 40), 3)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert same(student(name="hf-hub:org/name", pretrained=True)[0], saved)
    with pytest.raises(UserError, match=r"student\.name=hf-hub:org/other: org/other is not on this machine"):
        student(name="hf-hub:org/other")
    with pytest.raises(
        UserError, match=r"student\.pretrained=true: timm/vit_tiny.*HF_HUB_OFFLINE is set.*run: python"
    ):
        student(name="vit_tiny_patch16_224", pretrained=True)


def test_a_server_that_is_away_or_hangs_is_found_out_within_five_seconds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        port = silent.getsockname()[1]
        started = time.monotonic()
        with pytest.raises(
            UserError, match=rf"here: NAME is not on this machine, and 127\.0\.0\.1:{port} does not"
        ):
            hub.require_answer(f"http://127.0.0.1:{port}/x", "here", "NAME")
        assert time.monotonic() - started < 5
    with pytest.raises(UserError, match="refused"):
        hub.require_answer(f"http://127.0.0.1:{port}/x", "here", "NAME")


def test_a_server_that_says_no_is_there() -> None:
    class Refuses(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(401)

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub.require_answer(f"http://127.0.0.1:{server.server_port}/x", "here", "NAME")
        server.shutdown()


# -- teachers -----------------------------------------------------------------------------------------


def teacher(shapes: Path, model: dict[str, Any], **spec: Any) -> tuple[Network, shards.Manifest]:
    manifest = shards.load_manifest(shapes)
    return configured.load_teacher(configuration(teacher={"model": model, **spec}), manifest), manifest


def saved(file: Path, name: str, classes: int, **options: Any) -> nn.Module:
    torch.manual_seed(5)
    model = timm.create_model(name, num_classes=classes, **options)
    save_file(model.state_dict(), file)
    return model


def test_a_teachers_own_normalisation_is_used_and_said(shapes: Path, tmp_path: Path) -> None:
    classes = len(shards.load_manifest(shapes).classes)
    folder_of_timm(tmp_path / "m", classes)
    network, _ = teacher(shapes, {"name": f"local-dir:{tmp_path / 'm'}"})
    assert (network.mean, network.std) == (HALF, HALF)
    assert "the teacher is fed with mean (0.5000" in network.notes[0]
    assert "as its config.json has it" in network.notes[0]

    saved(tmp_path / "w.safetensors", "resnet10t", classes, **CHANNELS)
    spec = {"name": "resnet10t", "weights": str(tmp_path / "w.safetensors"), "options": CHANNELS}
    network, manifest = teacher(shapes, spec)
    assert network.mean == IMAGENET
    assert "as timm's description of resnet10t has it" in network.notes[0]
    assert (
        "teacher.mean and teacher.std give others, teacher.renormalize=false the shards'" in network.notes[0]
    )
    network, manifest = teacher(shapes, spec, renormalize=False)
    assert (network.mean, network.std) == (manifest.mean, manifest.std)
    assert "are not used, as teacher.renormalize=false asks" in network.notes[0]
    network, _ = teacher(shapes, spec, mean=[0.1, 0.2, 0.3], std=[0.3, 0.3, 0.3])
    assert network.mean == (0.1, 0.2, 0.3)
    network, _ = teacher(shapes, spec, mean=list(manifest.mean), std=list(manifest.std))
    assert network.notes == ()

    overlay = {
        "options": {**CHANNELS, "pretrained_cfg_overlay": {"file": spec["weights"], "num_classes": classes}}
    }
    with pytest.raises(UserError, match="its pretrained head has 1000 classes"):
        teacher(shapes, {"name": "resnet10t", "pretrained": True, **overlay})


def test_an_architecture_of_the_papers_has_the_shards_normalisation(shapes: Path, tmp_path: Path) -> None:
    manifest = shards.load_manifest(shapes)
    small = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    model = models.create_model(
        "custom", classes=len(manifest.classes), patch=4, image_size=16, options=small
    )
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    network, _ = teacher(
        shapes, {"name": "custom", "weights": str(tmp_path / "w.safetensors"), "options": small}
    )
    assert (network.mean, network.notes) == (manifest.mean, ())


@pytest.mark.parametrize("distilled", ["auto", True])
def test_a_distilled_teacher_says_the_mean_of_its_heads(shapes: Path, tmp_path: Path, distilled: Any) -> None:
    classes = len(shards.load_manifest(shapes).classes)
    small: dict[str, Any] = {"embed_dim": 24, "depth": 1, "num_heads": 2}
    name, file = "deit_tiny_distilled_patch16_224", tmp_path / "w.safetensors"
    own: Any = saved(file, name, classes, patch_size=4, img_size=16, **small).eval()
    network, _ = teacher(
        shapes, {"name": name, "patch": 4, "options": small, "weights": str(file), "distilled": distilled}
    )
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(network.model(images), own(images))
    with pytest.raises(UserError, match=r"has distillation token, but distilled=False was asked for"):
        teacher(
            shapes, {"name": name, "patch": 4, "options": small, "weights": str(file), "distilled": False}
        )


def test_a_teacher_with_nan_is_refused_with_file_and_tensor(shapes: Path, tmp_path: Path) -> None:
    classes = len(shards.load_manifest(shapes).classes)
    model = saved(tmp_path / "w.safetensors", "resnet10t", classes, **CHANNELS)
    state = model.state_dict()
    state["layer1.0.bn1.running_var"][0] = float("nan")
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(
        UserError, match=r"teacher\.model\.weights=.*w\.safetensors.*first is layer1\.0\.bn1\.running_var"
    ):
        teacher(
            shapes, {"name": "resnet10t", "weights": str(tmp_path / "w.safetensors"), "options": CHANNELS}
        )


@pytest.mark.parametrize("change", ["deeper", "shallower", "renamed"])
def test_weights_that_timm_leaves_out_in_silence_are_refused(tmp_path: Path, change: str) -> None:
    """With another number of classes than the file's, timm reads what fits and starts the rest at random."""
    torch.manual_seed(1)
    saved = timm.create_model("test_vit", num_classes=1000).state_dict()
    if change == "renamed":
        saved = {k.replace("blocks.", "layers."): v for k, v in saved.items()}
    save_file(saved, tmp_path / "m.safetensors")
    overlay = {"pretrained_cfg_overlay": {"file": str(tmp_path / "m.safetensors")}}
    spec: dict[str, Any] = {"name": "test_vit", "pretrained": True, "options": overlay}
    if change != "renamed":
        model, notes = student(**spec)
        assert torch.equal(model.state_dict()["blocks.0.attn.qkv.weight"], saved["blocks.0.attn.qkv.weight"])
        assert any("its head (1000 classes) is replaced by a new one" in note for note in notes)
        spec["options"] = {**overlay, "depth": {"deeper": 8, "shallower": 4}[change]}
    wrong = "none of its own" if change == "shallower" else "are not in the file .*, and would be random"
    with pytest.raises(UserError, match=rf"student\.pretrained=true: test_vit: .*{wrong}"):
        student(**spec)
