"""Feature alignment: against loops over samples, patches and channels, and in checkpoints."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from irkd_dist import config
from irkd_dist.distill import features, models
from irkd_dist.distill.module import Distiller, Objective, Targets
from irkd_dist.distill.teacher import Teacher, freeze
from irkd_dist.errors import UserError
from irkd_dist.runfolder import PROJECTIONS
from tests.distill import plain_vit as plain


def naive(ours: Tensor, theirs: Tensor, weight: Tensor, bias: Tensor, kind: str) -> Tensor:
    """One sample's distance: ours (N, d), theirs (N, D), weight (D, d)."""
    total = torch.zeros((), dtype=ours.dtype)
    for mine, other in zip(ours, theirs, strict=True):
        projected = torch.stack([(weight[c] * mine).sum() + bias[c] for c in range(len(bias))])
        if kind == "mse":
            total = total + sum((projected[c] - other[c]) ** 2 for c in range(len(bias))) / len(bias)
        else:
            total = total + 1 - (projected * other).sum() / (projected.norm() * other.norm())
    return total / len(ours)


@pytest.mark.parametrize("aligned", [0, 2])
@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_the_loss_and_its_gradients_are_those_of_a_loop(kind: Literal["cosine", "mse"], aligned: int) -> None:
    """A student of 3 blocks, a teacher of 4; with maps of the first samples beside it, and without."""
    student, network = plain.build("class_token", 3, seed=1), plain.build("mean", 4, seed=2)
    images, labels = plain.inputs(3, 12, seed=3)
    pairs = features.pairs(student, network, ["last", 1, ["first", "blocks.2.mlp"]])
    assert pairs == [("blocks.2", "blocks.3"), ("blocks.1", "blocks.2"), ("blocks.0", "blocks.2.mlp")]
    ours, theirs = (tuple(p) for p in zip(*pairs, strict=True))
    widths = features.widths(student, ours, 12), features.widths(network, theirs, 12)
    features.attach(student, *widths, seed=0)
    student.double()
    teacher = Teacher(freeze(network, None, True), ["blocks.0"], "gradient", feature_paths=theirs)
    objective = Objective(taps=("blocks.0",), feature_kind=kind, feature_taps=ours)
    models.without_fused_attention(student)
    distiller = Distiller(student, objective)
    targets = teacher(images, labels, aligned, logits=False, featured=True)
    assert targets.features is not None
    weight = torch.tensor([0.5, 0.3, 0.0], dtype=torch.float64)  # the last is padding
    gamma = 0.5 if aligned else 0.0
    terms = distiller(images, labels, weight, targets, 0.0, gamma, 1.0, 0.7)
    without = distiller(images, labels, weight, targets, 0.0, gamma, 1.0, 0.0)
    assert "features" not in without

    kept: dict[tuple[str, str], Tensor] = {}
    handles = [
        m.get_submodule(p).register_forward_hook(lambda _m, _a, out, key=(who, p): kept.update({key: out}))
        for who, m, paths in (("s", student, ours), ("t", network, theirs))
        for p in paths
    ]
    student(images), network(images)
    for handle in handles:
        handle.remove()
    expected = torch.zeros((), dtype=torch.float64)
    projections: Any = student.get_submodule(PROJECTIONS)
    for i in range(3):
        for layer, s, t in zip(projections, ours, theirs, strict=True):
            prefix = int(network.num_prefix_tokens)
            mine, other = kept["s", s][i, 1:], kept["t", t][i, prefix:]
            expected = expected + weight[i] * naive(mine, other, layer.weight, layer.bias, kind) / 3
    torch.testing.assert_close(terms["features"], expected)
    torch.testing.assert_close(terms["total"] - without["total"], 0.7 * expected)
    parameters = [p for p in student.parameters() if p.requires_grad]
    got = torch.autograd.grad(terms["total"] - without["total"], parameters, allow_unused=True)
    wanted = torch.autograd.grad(0.7 * expected, parameters, allow_unused=True)
    for a, b in zip(got, wanted, strict=True):
        a, b = (torch.zeros(()) if g is None else g for g in (a, b))
        # timm resamples position embeddings in fp32
        torch.testing.assert_close(a + 0 * b, b + 0 * a, rtol=1e-6, atol=1e-7)


def test_a_convolutional_teacher_is_resized_to_the_students_grid() -> None:
    student = plain.build("class_token", 2, seed=1).float()
    network = models.create_model("test_resnet", classes=plain.CLASSES).eval()
    (pair,) = features.pairs(student, network, [["last", "layer2"]])
    images = torch.randn(2, 3, 16, 16)
    features.attach(
        student, features.widths(student, pair[:1], 16), features.widths(network, pair[1:], 16), 0
    )
    teacher = Teacher(freeze(network, None, True), [], "gradient", feature_paths=pair[1:])
    said = teacher(images, torch.zeros(2, dtype=torch.long), logits=False, featured=True)
    assert said.features is not None
    assert said.features[0].shape[:3] == (2, 2, 2)
    assert said.logits is None
    resized = features.resize(said.features[0], (4, 4))
    expected = nn.functional.interpolate(said.features[0].permute(0, 3, 1, 2), size=(4, 4), mode="bilinear")
    assert torch.equal(resized.permute(0, 3, 1, 2), expected)
    distiller = Distiller(student, Objective(feature_taps=pair[:1]))
    term = distiller(images, torch.zeros(2, dtype=torch.long), torch.full((2,), 0.5), said, 0, 0, 1, 1.0)
    assert 0 < float(term["features"]) < 2


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        ([["first"]], r"\['first'\] is not a pair"),
        ([5], r"5: the student has blocks 0 to 1"),
        (["nowhere"], "the student has no module 'nowhere'; it has patch_embed"),
        ([["last", "layer9"]], "the teacher has no module 'layer9'"),
    ],
)
def test_bad_taps_are_named(taps: list[Any], message: str) -> None:
    student, network = plain.build("class_token", 2), plain.build("mean", 2)
    with pytest.raises(UserError, match=message):
        features.pairs(student, network, taps)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"features": {"beta": 1}}}, r"loss\.features\.beta=1\.0 needs a teacher"),
        (
            {"loss": {"features": {"beta": 1}}, "teacher": {"run": "r", "cache": {"folder": "c"}}},
            r"beta=1\.0 with teacher\.cache\.folder: a cache keeps logits and maps, not features",
        ),
        (
            {"loss": {"features": {"beta": 1, "taps": []}}, "teacher": {"run": "r"}},
            r"loss\.features\.taps is empty",
        ),
    ],
)
def test_what_cannot_be_is_refused_when_the_configuration_is_read(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        config.from_dict({"fixed": {"resolution": 16, "epochs": 1}, **changes}, "here")


def test_widths_of_a_teacher_that_computes_in_bf16() -> None:
    """Its linear layers are bf16 when it is frozen, its class token is not."""
    network = freeze(plain.build("class_token", 2, seed=1).float(), torch.bfloat16, False)
    assert {p.dtype for p in network.parameters()} == {torch.float32, torch.bfloat16}
    assert features.widths(network, ("blocks.1",), 12, torch.bfloat16) == [16]


def test_a_tap_inside_a_checkpointed_block_keeps_one_forward() -> None:
    """The inner gradient computes the block again; what it gives then is no further sample."""
    images, labels = plain.inputs(4, 12, seed=3)
    images, terms = images.float(), []
    for checkpointed in (False, True):
        student = plain.build("class_token", 2, seed=1).float()
        models.without_fused_attention(student)
        features.attach(student, [16], [16], 0)
        if checkpointed:
            models.checkpoint_blocks(student)
        distiller = Distiller(student, Objective(taps=("blocks.0",), feature_taps=("blocks.1.attn",))).train()
        torch.manual_seed(0)
        told = Targets(None, [torch.rand(4, 3, 3)], [torch.randn(4, 3, 3, 16)])
        weight = torch.full((4,), 0.25)
        terms.append(distiller(images, labels, weight, told, 0.0, 1.0, 1.0, 1.0))
    for name, value in terms[0].items():
        torch.testing.assert_close(terms[1][name], value)
