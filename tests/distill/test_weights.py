"""Weights in the files that people have: what is taken, what is left out and said, and what is refused."""

from __future__ import annotations

import argparse
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from irkd_dist.distill import models, weights
from irkd_dist.errors import UserError

SMALL: dict[str, Any] = {"patch": 4, "options": {"embed_dim": 16, "depth": 1, "num_heads": 2}}


def network(classes: int = 3, image_size: int = 16, seed: int = 0, name: str = "custom") -> nn.Module:
    torch.manual_seed(seed)
    return models.create_model(name, classes=classes, image_size=image_size, **SMALL).eval()


STATE = dict(network().state_dict())


def with_prefix(prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value.clone() for key, value in STATE.items()}


FORMS: dict[str, tuple[Any, list[str]]] = {
    "plain.safetensors": (STATE, []),
    "plain.pth": (STATE, []),
    "no-suffix": (STATE, []),
    "module.safetensors": (with_prefix("module."), ["read without the prefix module."]),
    "compiled.safetensors": (with_prefix("_orig_mod."), ["read without the prefix _orig_mod."]),
    "both.pt": (with_prefix("module._orig_mod."), ["read without the prefix module._orig_mod."]),
    "lightning.bin": (
        {"epoch": 3, "state_dict": with_prefix("student.model."), "hyper": {"lr": 0.1}},
        ["state_dict was taken; left out: epoch, hyper", "read without the prefix student.model."],
    ),
    "model_best.pth.tar": (
        {
            "arch": "vit",
            "args": argparse.Namespace(lr=1),
            "metric": np.float64(0.5),
            "state_dict": {k: v + 1 for k, v in STATE.items()},
            "state_dict_ema": STATE,
            "optimizer": {},
        },
        ["state_dict_ema was taken; left out: arch, args, metric, state_dict, optimizer"],
    ),
    "deit.pth": (
        {"model": with_prefix("backbone.")},
        ["model was taken", "read without the prefix backbone."],
    ),
    "nested.pth": (
        {"module": {"model_ema": STATE, "step": 1}},
        ["module was taken", "model_ema was taken; left out: step"],
    ),
    "metadata.pth": ({**STATE, "_version": 3}, ["left out, as they are no tensors: _version"]),
}


def save(content: Any, file: Path) -> None:
    if file.name.endswith((".safetensors", "no-suffix")):
        save_file(content, file)
    else:
        torch.save(content, file)


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_weights_and_says_what_was_chosen(name: str, tmp_path: Path) -> None:
    content, said = FORMS[name]
    save(content, tmp_path / name)
    found, notes = weights.read(tmp_path / name, "here")
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[key], STATE[key]) for key in STATE)
    assert notes == [f"here: {text}" for text in said]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "other.pth.tar"])
def test_a_hugging_face_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save(STATE, tmp_path / name)
    assert weights.read(tmp_path, "here")[0].keys() == STATE.keys()


class Malice:
    """What a file may not do to whoever reads it."""

    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        weights.read(path, "student.weights=FILE")
    text = str(error.value)
    assert len(text.splitlines()) == 1
    assert text.startswith(("student.weights=FILE", str(path)))
    return text


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no such file or folder" in refusal(tmp_path / "nowhere.pth")
    (tmp_path / "empty").mkdir()
    assert "no weights in that folder; looked for model.safetensors" in refusal(tmp_path / "empty")
    os.mkfifo(tmp_path / "fifo")
    assert "no file and no folder" in refusal(tmp_path / "fifo")
    (tmp_path / "text.pth").write_text("hello")
    assert "neither a safetensors nor a PyTorch file" in refusal(tmp_path / "text.pth")
    torch.save({"state_dict": STATE, "extra": Malice()}, tmp_path / "evil.pth")
    assert "system, and reading that could run code" in refusal(tmp_path / "evil.pth")
    torch.save(network(), tmp_path / "module.pth")
    assert "could run code; where you trust it, write torch.save(model.state_dict()" in refusal(
        tmp_path / "module.pth"
    )
    assert not (tmp_path / "pwned").exists()
    torch.save({"epoch": 3, "optimizer": {"state": {}}}, tmp_path / "none.pth")
    assert "holds no weights by name or under state_dict_ema, model_ema" in refusal(tmp_path / "none.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    assert "it has list" in refusal(tmp_path / "list.pth")
    save(STATE, tmp_path / "cut.pth")
    os.truncate(tmp_path / "cut.pth", 700)
    assert "damaged or no PyTorch file" in refusal(tmp_path / "cut.pth")


WHOLE: dict[str, bytes] = {}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["a.pth", "a.safetensors"]),
    st.lists(st.tuples(st.integers(0, 2**20), st.binary(min_size=1, max_size=3)), max_size=3),
    st.integers(0, 2**20),
)
def test_any_damage_ends_in_one_line(
    tmp_path: Path, name: str, changes: list[tuple[int, bytes]], length: int
) -> None:
    file = tmp_path / name
    if name not in WHOLE:
        save({"a.weight": torch.ones(2, 2), "a.bias": torch.zeros(2)}, file)
        WHOLE[name] = file.read_bytes()
    content = bytearray(WHOLE[name])
    for place, new in changes:
        content[place % len(content) : place % len(content) + len(new)] = new
    file.write_bytes(content[: length % (2 * len(content)) + 1])
    try:
        found, _ = weights.read(file, "here")
    except UserError as error:
        said = str(error)
    else:
        said = "fine" if all(isinstance(v, Tensor) for v in found.values()) else ""
    assert len(said.splitlines()) == 1


def test_a_header_that_promises_too_much(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    assert "neither a safetensors" in refusal(tmp_path / "a.safetensors")


# -- fitted to a model --------------------------------------------------------------------------------


def test_a_head_of_another_size_is_replaced_on_request_only() -> None:
    model, other = network(classes=5), network(classes=3, seed=1).state_dict()
    with pytest.raises(
        UserError, match=r"here: its head head has 3 classes, the shards have 5; k\.reset_head=true"
    ):
        weights.fit(model, other, "here", False, "k.reset_head")
    with pytest.raises(UserError, match="give it one of these by `irkd probe`, fine-tune it first"):
        weights.fit(model, other, "here")
    fitted, notes = weights.fit(model, other, "here", reset_head=True)
    assert notes == ["here: its head head (3 classes) is replaced by a new one of 5"]
    models.load_weights(model, fitted, "here")
    for key, value in model.state_dict().items():
        assert torch.equal(value, other[key]) == (not key.startswith("head.")), key
    headless = {k: v for k, v in other.items() if not k.startswith("head.")}
    assert weights.fit(model, headless, "here", True)[1] == [
        "here: its head head (no classes) is replaced by a new one of 5"
    ]
    same = weights.fit(network(), network(seed=1).state_dict(), "here", reset_head=True)
    assert same[1] == [], "a head of the right size is the file's"


def test_both_heads_of_a_distilled_model_are_replaced() -> None:
    small = {"patch_size": 4, "img_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model, other = (
        timm.create_model("deit_tiny_distilled_patch16_224", num_classes=n, **small) for n in (5, 3)
    )
    fitted, notes = weights.fit(model, other.state_dict(), "here", reset_head=True)
    assert [note.split(" (")[0] for note in notes] == ["here: its head head", "here: its head head_dist"]
    models.load_weights(model, fitted, "here")


@pytest.mark.parametrize(
    "options", [{}, {"class_token": False, "global_pool": "avg"}, {"no_embed_class": True}]
)
def test_position_embeddings_of_another_grid_are_resampled(options: dict[str, Any]) -> None:
    """The network made for 16 px then says of 16 px what the one made for 32 px says, which interpolates as it goes."""
    made: Any = {"classes": 3, "patch": 4, "options": {**SMALL["options"], **options}}
    torch.manual_seed(3)
    large = models.create_model("custom", image_size=32, **made).eval()
    large.pos_embed.data.normal_()  # type: ignore[union-attr,operator]
    small = models.create_model("custom", image_size=16, **made).eval()
    fitted, notes = weights.fit(small, large.state_dict(), "here")
    tokens = [model.pos_embed.shape[1] for model in (large, small)]  # type: ignore[union-attr,index]
    assert notes == [f"here: pos_embed of {tokens[0]} tokens is resampled to {tokens[1]}"]
    models.load_weights(small, fitted, "here")
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(small(images), large(images))


def test_what_cannot_be_fitted_is_named() -> None:
    deeper = models.create_model(
        "custom", classes=3, patch=4, image_size=16, options={**SMALL["options"], "embed_dim": 24}
    )
    fitted, _ = weights.fit(network(), deeper.state_dict(), "here")
    with pytest.raises(
        UserError, match=r"here does not fit VisionTransformer: \d+ entries differ: cls_token"
    ):
        models.load_weights(network(), fitted, "here")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_with_their_name(value: float) -> None:
    state = {key: tensor.clone() for key, tensor in STATE.items()}
    state["blocks.0.norm1.bias"][3] = value
    with pytest.raises(
        UserError, match=r"here: 1 of its tensors holds NaN or infinity, the first is blocks\.0\.norm1\.bias"
    ):
        models.load_weights(network(), state, "here")
