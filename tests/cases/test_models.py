"""Networks and weights as people have them: trained with, or refused before the first step in a line that helps."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from irkd_dist.data.synthetic import CLASSES
from tests.cases.command import irkd, write_config

TINY = {"embed_dim": 24, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards for families that need larger images."""
    out = tmp_path_factory.mktemp("wide") / "s"
    options = ("--samples", "train=24,test=16", "--resolutions", "14,16,28,32,64", "--out", out)
    irkd("render", "synthetic", *options).well()
    return out


def saved(model: torch.nn.Module, file: Path) -> str:
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, file)
    return str(file)


FAMILIES: dict[str, tuple[str, int | None, dict[str, Any], tuple[int, int], dict[str, Any]]] = {
    # name: timm's name, patch, options, resolutions, loss.saliency
    "registers": (
        "vit_small_patch16_224", 4,
        TINY | {"reg_tokens": 2, "class_token": False, "global_pool": "avg", "no_embed_class": True}, (16, 32),
        {"gamma": 0.5, "taps": ["first", "last"]},
    ),
    "siglip": (
        "vit_base_patch16_siglip_224", 4, TINY, (16, 32), {"gamma": 0.5, "method": "grad_cam", "taps": ["first"]},
    ),
    "dinov2": ("vit_small_patch14_reg4_dinov2", 14, TINY, (14, 28), {"gamma": 0.5, "taps": ["first", "last"]}),
    "eva": (
        "eva02_tiny_patch14_224", None, TINY | {"patch_size": 4, "img_size": 32, "dynamic_img_size": True}, (16, 32),
        {"gamma": 0.5, "taps": [[0, 0]]},
    ),
    "swin": (
        "swin_tiny_patch4_window7_224", None,
        {"embed_dim": 12, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "img_size": 32,
        "strict_img_size": False},
        (16, 32), {"gamma": 0.0},
    ),
    "convnext": (
        "convnext_atto", None, {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}, (32, 64),
        {"gamma": 0.5, "taps": [["first", "stages.1"]]},
    ),
    "resnet": ("resnet10t", None, {"channels": [8, 8, 16, 16]}, (32, 64), {"gamma": 0.5, "taps": [["layer2",
    "layer2"]]}),
    "mobilenet": ("mobilenetv3_small_050", None, {}, (32, 64), {"gamma": 0.5, "taps": [["first", "blocks.1"]]}),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_teachers_of_other_families_go_through_two_stages(wide: Path, tmp_path: Path, family: str) -> None:
    name, patch, options, sizes, saliency = FAMILIES[family]
    torch.manual_seed(0)
    own = {"patch_size": patch, "img_size": sizes[1], "dynamic_img_size": True} if patch else {}
    model = timm.create_model(name, num_classes=len(CLASSES), **options, **own)
    student: dict[str, Any] = {"name": "custom", "patch": 7 if patch == 14 else 4, "options": TINY}
    if family == "resnet":
        student = {"name": "resnet10t", "options": {"channels": [8, 8, 8, 8]}}
    spec = {
        "name": name,
        "patch": patch,
        "options": options,
        "weights": saved(model, tmp_path / "t.safetensors"),
    }
    file = write_config(
        tmp_path / "c.yaml", wide, fixed=None, student=student, teacher={"model": spec}, name="r",
        loss={"kd": {"alpha": 1.0}, "saliency": saliency}, track={"panels": 1, "log_every": 1},
        curriculum={"stages": [{"resolution": r} for r in sizes], "epochs": 1},
    )  # fmt: skip
    irkd("train", file).well()
    irkd("evaluate", tmp_path / "runs" / "r", "--split", "test").well()
    assert json.loads((tmp_path / "runs" / "r" / "status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize("more", [[], ["optim.accumulate=8"]])
def test_batch_norm_and_a_remainder_of_one(tmp_path: Path, more: list[str]) -> None:
    options = (
        "--samples",
        "train=17,test=8",
        "--val-fraction",
        "0",
        "--resolutions",
        "32",
        "--out",
        tmp_path / "s",
    )
    irkd("render", "synthetic", *options).well()
    student = {"name": "resnet18", "options": {"channels": [8, 8, 8, 16]}}
    fixed = {"resolution": 32, "epochs": 1}
    file = write_config(tmp_path / "c.yaml", tmp_path / "s", student=student, fixed=fixed, name="r")
    done = irkd("train", file, *more).well_or_refused()
    if done.code == 2:
        assert "batch" in done.err
        assert not list((tmp_path / "runs").glob("r/checkpoints/*"))
        events = tmp_path / "runs" / "r" / "events.jsonl"
        assert not events.exists() or '"train"' not in events.read_text()


def _weights(folder: Path) -> dict[str, Path]:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=len(CLASSES), patch_size=4, img_size=16, **TINY
    )
    state = {k: v.clone() for k, v in model.state_dict().items()}

    def prefixed(prefix: str) -> dict[str, torch.Tensor]:
        return {prefix + k: v.clone() for k, v in state.items()}

    save_file(state, folder / "plain.safetensors")
    save_file(prefixed("module."), folder / "module.safetensors")
    save_file(prefixed("_orig_mod."), folder / "compiled.safetensors")
    save_file(prefixed("module._orig_mod."), folder / "both.safetensors")
    torch.save(state, folder / "plain.pth")
    torch.save({"model": prefixed("module."), "epoch": 3}, folder / "deit.pth")
    best = {
        "epoch": 3,
        "state_dict": prefixed("module."),
        "args": argparse.Namespace(lr=1.0),
        "optimizer": {},
    }
    torch.save(best, folder / "model_best.pth.tar")
    torch.save(
        {"state_dict": {k: v * 0 for k, v in state.items()}, "state_dict_ema": state}, folder / "ema.pth"
    )
    return {f.name: f for f in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    "name",
    ["plain.safetensors", "module.safetensors", "compiled.safetensors", "both.safetensors", "plain.pth", "deit.pth",
     "model_best.pth.tar", "ema.pth"],
)  # fmt: skip
def test_weights_in_the_forms_that_people_keep_them(small: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "w").mkdir()
    file = _weights(tmp_path / "w")[name]
    model = {"name": "vit_tiny_patch16_224", "patch": 4, "options": TINY, "weights": str(file)}
    spec = write_config(
        tmp_path / "c.yaml", small, name="r", teacher={"model": model}, loss={"kd": {"alpha": 1.0}}
    )
    irkd("train", spec).well()


def test_a_pickle_that_runs_code_is_refused(small: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, Any]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": {}, "x": Evil()}, tmp_path / "w.pth")
    model = {"name": "vit_tiny_patch16_224", "patch": 4, "options": TINY, "weights": str(tmp_path / "w.pth")}
    spec = write_config(tmp_path / "c.yaml", small, teacher={"model": model}, loss={"kd": {"alpha": 1.0}})
    irkd("train", spec).refused("w.pth")
    assert not (tmp_path / "ran").exists()


def test_a_teacher_with_a_distillation_token(small: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    name = "deit_tiny_distilled_patch16_224"
    made = timm.create_model(name, num_classes=len(CLASSES), patch_size=4, img_size=16, **TINY)
    model = {"name": name, "patch": 4, "options": TINY, "weights": saved(made, tmp_path / "t.safetensors")}
    loss = {"kd": {"alpha": 1.0}, "saliency": {"gamma": 0.5, "taps": ["first", "last"]}}
    for told in (True, None):
        teacher = {"model": model | ({"distilled": True} if told else {})}
        file = write_config(tmp_path / "c.yaml", small, teacher=teacher, loss=loss, name=f"r{told}")
        done = irkd("train", file)
        if told or done.code == 0:
            done.well()
        else:
            done.refused("distilled")


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_timms_own_name_of_a_model_on_disk(small: Path, tmp_path: Path, role: str) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=len(CLASSES), channels=[8, 8, 8, 8])
    saved(model, folder / "model.safetensors")
    pretrained = {
        "input_size": [3, 32, 32],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "num_classes": len(CLASSES),
        "first_conv": "conv1.0",
        "classifier": "fc",
    }
    told = {
        "architecture": "resnet10t",
        "num_classes": len(CLASSES),
        "model_args": {"channels": [8, 8, 8, 8]},
        "pretrained_cfg": pretrained,
    }
    (folder / "config.json").write_text(json.dumps(told))
    timm.create_model(f"local-dir:{folder}", pretrained=True)  # timm reads it
    spec = {"name": f"local-dir:{folder}", "pretrained": True}
    changes: dict[str, Any] = {"student": spec}
    if role == "teacher":
        teacher = {"model": spec, "mean": [0.5] * 3, "std": [0.5] * 3, "renormalize": True}
        changes = {"teacher": teacher, "loss": {"kd": {"alpha": 1.0}}}
    irkd("train", write_config(tmp_path / "c.yaml", small, name="r", **changes)).well()


def _thousand_classes(folder: Path) -> None:
    random = np.random.default_rng(0)
    for split, count in (("train", 32), ("test", 16)):
        rows = []
        for _ in range(count):
            stream = io.BytesIO()
            Image.fromarray(random.integers(0, 90, (32, 32, 3), dtype=np.uint8)).save(stream, "PNG")
            rows.append({"bytes": stream.getvalue(), "path": None})
        table = pa.table({"image": rows, "label": pa.array([i * 20 for i in range(count)], pa.int64())})
        names = {"label": {"names": [f"c{i}" for i in range(1000)], "_type": "ClassLabel"}}
        told = {"huggingface": json.dumps({"info": {"features": names}})}
        pq.write_table(table.replace_schema_metadata(told), folder / f"{split}-00000-of-00001.parquet")


def test_a_pretrained_teachers_own_normalisation_is_not_passed_over(tmp_path: Path) -> None:
    _thousand_classes(tmp_path)
    irkd("render", "parquet", "--path", tmp_path, "--out", tmp_path / "s", "--resolutions", "32").well()
    torch.manual_seed(0)
    made = timm.create_model("resnet10t", num_classes=1000, channels=[8, 8, 8, 8])
    overlay = {"file": saved(made, tmp_path / "t.safetensors")}
    options = {"channels": [8, 8, 8, 8], "pretrained_cfg_overlay": overlay}
    model = {"name": "resnet10t.c3_in1k", "pretrained": True, "options": options}
    file = write_config(
        tmp_path / "c.yaml", tmp_path / "s", fixed={"resolution": 32, "epochs": 1}, teacher={"model": model},
        loss={"kd": {"alpha": 1.0}},
    )  # fmt: skip
    assert "mean" in irkd("train", file).well_or_refused().said
    irkd("train", file, "teacher.renormalize=true", "name=own").well()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("term", ["loss.kd.alpha=1", "loss.saliency.gamma=1"])
def test_a_teacher_that_is_not_finite_is_refused(
    finished: Path, trainable: Path, value: float, term: str
) -> None:
    import hashlib

    for folder in (*(finished / "checkpoints").iterdir(), *(finished / "best").iterdir()):
        file = folder / "student.safetensors"
        weights = load_file(file)
        weights["blocks.0.mlp.fc1.weight"][0, 0] = value
        save_file(weights, file)
        state = json.loads((folder / "state.json").read_text())
        before = state["sha256"][file.name]
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        (folder / "state.json").write_text((folder / "state.json").read_text().replace(before, digest))
    irkd("train", trainable, "name=s", f"teacher.run={finished}", term).refused(str(finished))
