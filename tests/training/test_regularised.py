"""Layer-wise rates, drop path by stage, blocks that keep no activations, evaluation in small batches."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers.drop import DropPath
from timm.optim._param_groups import param_groups_layer_decay
from torch import nn

from irkd_dist import checkpoint
from irkd_dist import config as configuration
from irkd_dist.distill import models
from irkd_dist.distill.module import Distiller, Objective, Targets
from irkd_dist.errors import UserError
from irkd_dist.eventlog import read_events
from irkd_dist.training import optim, preflight
from tests.training.launch import irkd, losses


def vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return models.create_model(
        "custom",
        classes=5,
        patch=4,
        image_size=16,
        options={"embed_dim": 16, "depth": 3, "num_heads": 2},
        **options,
    )


def test_layer_decay_is_timms() -> None:
    model = vit()
    theirs = {
        id(p): g["lr_scale"] for g in param_groups_layer_decay(model, layer_decay=0.7) for p in g["params"]
    }
    optimizer = torch.optim.AdamW(optim.parameter_groups(model, 0.1, 0.7), lr=1.0)
    optim.set_lr(optimizer, 0.5)
    ours = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert ours == {key: pytest.approx(0.5 * scale) for key, scale in theirs.items()}
    decayed = {id(p) for g in optim.parameter_groups(model, 0.1) for p in g["params"] if g["weight_decay"]}
    assert {id(p) for g in optimizer.param_groups for p in g["params"] if g["weight_decay"]} == decayed


def test_layer_decay_needs_a_model_that_knows_its_layers() -> None:
    config = configuration.from_dict(
        {"fixed": {"resolution": 12, "epochs": 1}, "optim": {"layer_decay": 0.7}}, "test"
    )
    preflight.check_layers(config, vit())
    with pytest.raises(UserError, match=r"layer_decay=0\.7: Linear does not say"):
        preflight.check_layers(config, nn.Linear(2, 2))


@pytest.mark.parametrize("method", ["gradient", "grad_cam", "hirescam", "attention"])
@pytest.mark.parametrize("taps", [("blocks.0", "blocks.2.norm1"), ("blocks.1.norm1", "blocks.1")])
def test_gradients_with_blocks_that_are_computed_again(method: str, taps: tuple[str, ...]) -> None:
    """Of all terms, dropout and drop path on: outer gradients and the gradient of the maps' gradient."""
    if method == "attention":
        taps = ("blocks.0.attn.qkv", "blocks.1.attn.qkv")
    plain = vit(dropout=0.1, drop_path=0.2)
    models.without_fused_attention(plain)
    images, label = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    targets = Targets(torch.randn(4, 5), [torch.rand(4, 4, 4) for _ in taps])
    found, passes = [], []
    for again in (False, True):
        student = copy.deepcopy(plain)
        if again:
            models.checkpoint_blocks(student)
        distiller = Distiller(student, Objective(method=method, taps=taps)).train()
        torch.manual_seed(1)
        calls: list[int] = []
        student.blocks[0].mlp.fc1.register_forward_hook(lambda *_, calls=calls: calls.append(1))  # type: ignore[union-attr]
        terms = distiller(images, label, torch.full((4,), 0.25), targets, 1.0, 0.8)
        terms["total"].backward()
        assert "saliency" in terms
        found.append({k: p.grad for k, p in student.named_parameters()})
        passes.append(len(calls))
    assert passes[0] == 1 < passes[1]
    for name, gradient in found[0].items():
        other = found[1][name]
        assert (gradient is None) == (other is None)
        if gradient is not None and other is not None:
            torch.testing.assert_close(other, gradient, rtol=1e-5, atol=1e-7)


def test_drop_path_of_a_stage() -> None:
    model = vit(drop_path=0.3)
    modules = [m for m in model.modules() if isinstance(m, DropPath)]
    full = [m.drop_prob for m in modules]
    assert max(full) == pytest.approx(0.3)
    for rate in (0.1, 0.0, 0.3):
        models.set_drop_path(model, rate, 0.3)
        assert [m.drop_prob for m in modules] == pytest.approx([f * rate / 0.3 for f in full])


REGULARISED = [
    "curriculum.stages=[{resolution: 12}, {resolution: 16, drop_path: 0.4}]", "curriculum.epochs=1",
    "optim.layer_decay=0.8", "optim.policy=carry", "checkpoint.every_steps=1", "checkpoint.keep=20",
]  # fmt: skip


def test_a_run_with_all_of_it_resumes_bitwise(student_yaml: Path) -> None:
    """And blocks that are computed again, or another batch of evaluation, change nothing but rounding."""
    weights = {}
    for name, more, fault in (
        ("plain", [], None), ("killed", [], "sigkill@step:6"),
        ("again", ["optim.checkpoint_blocks=true", "data.eval_batch=3"], None),
    ):  # fmt: skip
        arguments = ("train", str(student_yaml), f"name={name}", *REGULARISED, *more)
        if fault:
            irkd(*arguments, env={"IRKD_FAULT": fault}, check=False)
        irkd(*arguments)
        newest, _ = checkpoint.newest(student_yaml.parent / name / "checkpoints")
        assert newest is not None
        weights[name] = checkpoint.load_student(newest)
    assert all(torch.equal(v, weights["killed"][k]) for k, v in weights["plain"].items())
    one, other = (losses(student_yaml.parent / name) for name in ("plain", "again"))
    assert [e["total"] for e in other] == pytest.approx([e["total"] for e in one], rel=1e-4)
    told = [[e["accuracy"] for e in read_events(student_yaml.parent / n) if e["event"] == "evaluation"]
            for n in ("plain", "again")]  # fmt: skip
    assert told[0] == told[1]


@pytest.mark.parametrize("engine", ["zero2", "fsdp2"])
def test_layer_decay_and_checkpointing_under_engines(student_yaml: Path, engine: str) -> None:
    more = [*REGULARISED[1:], "optim.checkpoint_blocks=true", "optim.eps=1e-3"]
    irkd("train", str(student_yaml), "name=one", *more)
    irkd("train", str(student_yaml), f"name={engine}", f"engine={engine}", *more, world=2)
    one, two = (losses(student_yaml.parent / name) for name in ("one", engine))
    assert [e["total"] for e in two] == pytest.approx([e["total"] for e in one], rel=1e-4)
