"""Student and teacher as one graph each, against the same run as it is.

With the backend that runs what AOTAutograd traced: whole graphs, forward and backward, without a minute of C++;
benchmarks/step.py compares with inductor.
"""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from irkd_dist.distill import compiling, models
from irkd_dist.distill.module import Distiller, Objective, Targets
from irkd_dist.distill.taps import MissingGradient, tap_pairs
from irkd_dist.distill.teacher import Teacher, freeze
from tests.distill import plain_vit as plain

BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def _own_graphs() -> Any:
    yield
    torch._dynamo.reset()


def batch(rows: int, aligned: int, teacher: Teacher, resolution: int = 12) -> tuple[Any, ...]:
    images, target = plain.inputs(rows, resolution, seed=rows)
    images, target = images.float(), target
    return (
        images,
        target,
        torch.full((rows,), 1 / rows),
        teacher(images, target, aligned),
        0.5,
        0.8,
        rows / aligned,
    )


def gradients(terms: dict[str, Tensor], model: nn.Module) -> list[Tensor]:
    found = torch.autograd.grad(terms["total"], list(model.parameters()), allow_unused=True)
    return [torch.zeros(1) if g is None else g for g in found]


def assert_alike(module: Distiller, arguments: tuple[Any, ...], bound: float) -> None:
    """Terms, and gradients relative to the length of all of them together."""
    ours, theirs = module(*arguments), Distiller.forward(module, *arguments)
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=bound, atol=bound)
    got, expected = (torch.cat([g.flatten() for g in gradients(t, module)]) for t in (ours, theirs))
    assert float((got - expected).norm()) <= bound * float(expected.norm())


@pytest.mark.parametrize(
    ("method", "head", "aligned"),
    [("gradient", "distilled", 3), ("grad_cam", "mean", 4), ("attention", "class_token", 4)],
)
def test_compiled_terms_and_gradients_are_the_eager_ones(method: str, head: str, aligned: int) -> None:
    student, network = (
        plain.build(head, 2, seed=1).float().train(),
        plain.build(head, 2, dim=24, seed=2).float(),
    )
    pairs = tap_pairs(student, network, ["first", "last"], method)
    teacher = Teacher(freeze(network, None, True), [t.path for _, t in pairs], method)
    objective = Objective(method=method, taps=tuple(s.path for s, _ in pairs))  # type: ignore[arg-type]
    names = list(student.state_dict())
    module = compiling.compiled(Distiller(student, objective), BACKEND)
    assert_alike(module, batch(4, aligned, teacher), 1e-5)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert_alike(module, batch(3, 3, teacher), 0.0)  # the last batch of an epoch
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert module.forward.fast is not None, "compiled, not fallen back"  # type: ignore[attr-defined]
    assert list(module.state_dict()) == [f"student.{n}" for n in names]

    images, target, _, said, *_ = batch(4, aligned, teacher)
    compiling.compiled_teacher(teacher, BACKEND)
    again: Targets = teacher(images, target, aligned)
    assert teacher.compute.fast is not None  # type: ignore[attr-defined]
    torch.testing.assert_close(again.logits, said.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again.maps, said.maps, rtol=1e-5, atol=1e-5)
    assert not any(t.requires_grad for t in (again.logits, *(again.maps or [])) if t is not None)


def test_ddp_does_not_cut_the_graph_of_an_inner_gradient() -> None:
    """More parameters than a bucket of DDP holds: the tap and what follows would be in other pieces than the score."""
    torch.manual_seed(0)
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=174, depth=3, num_heads=3, num_classes=10)
    models.without_fused_attention(model)
    whole = Distiller(model, Objective(taps=("blocks.1",)))
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([1, 2, 3, 4])
    told = Targets(torch.randn(4, 10), [torch.rand(4, 2, 2)])
    arguments = images, labels, torch.full((4,), 0.25), told, 1.0, 1.0, 1.0, 0.0
    expected = whole(*arguments)
    gradient = gradients(expected, whole)
    assert float(expected["saliency"]) > 0.1
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        compiled = compiling.compiled(whole, BACKEND)
        found = nn.parallel.DistributedDataParallel(compiled)(*arguments)
        found["total"].backward()
        assert isinstance(compiled.forward, compiling.Compiled)
        assert compiled.forward.fast is not None, "it was compiled"
    finally:
        torch.distributed.destroy_process_group()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    for ours, theirs in zip((p.grad for p in whole.parameters()), gradient, strict=True):
        torch.testing.assert_close(torch.zeros(1) if ours is None else ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_student_with_batch_norm_under_bf16_autocast() -> None:
    torch.manual_seed(3)
    student = models.create_model("test_resnet", classes=plain.CLASSES).train()
    taps = ["layer1", "layer2"]
    teacher = Teacher(
        freeze(models.create_model("test_resnet", classes=plain.CLASSES), None, True), taps, "hirescam"
    )
    objective = Objective(method="hirescam", taps=tuple(taps))
    module = compiling.compiled(Distiller(student, objective, torch.bfloat16), BACKEND)
    before = student.bn1.num_batches_tracked.clone()  # type: ignore[union-attr,operator]
    assert_alike(module, batch(4, 4, teacher, resolution=32), 3e-2)
    assert module.forward.fast is not None  # type: ignore[attr-defined]
    assert student.bn1.num_batches_tracked == before + 2  # type: ignore[union-attr]


class Aside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vit, self.aside = plain.build("class_token", 1).float(), nn.Identity()
        self.num_prefix_tokens = 1

    def forward(self, images: Tensor) -> Tensor:
        self.aside(self.vit.patch_embed(images).flatten(1, 2))
        return self.vit(images)


def test_a_missing_gradient_is_an_error_when_compiled_too() -> None:
    images, target = torch.randn(3, 3, 12, 12), torch.tensor([0, 1, 2])
    module = compiling.compiled(Distiller(Aside(), Objective(taps=("aside",))), BACKEND)
    arguments = (images, target, torch.full((3,), 1 / 3), Targets(None, [torch.rand(3, 3, 3)]), 0.0, 1.0, 1.0)
    with pytest.raises(MissingGradient, match="does not depend on the output of 'aside'"):
        module(*arguments)
    plain = Distiller(Aside(), Objective(taps=("aside",)))
    with pytest.raises(torch._dynamo.exc.Unsupported):  # without our wrapper an error too, never zeros
        torch.compile(plain.forward, fullgraph=True, backend=BACKEND)(*arguments)


def test_what_cannot_be_compiled_runs_as_it_is_and_says_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    def function(images: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return images + 1

    both = compiling.Compiled(function, "the student", BACKEND)
    for _ in range(2):
        assert torch.equal(both(torch.zeros(3, 3, 4, 4)), torch.ones(3, 3, 4, 4))
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert told[0].startswith("irkd: torch cannot compile the student, which runs as it is: ")


@pytest.mark.parametrize(
    ("device", "engine", "found", "expected"),
    [
        ("cpu", "ddp", "/usr/bin/g++", None),
        ("cpu", "zero2", None, r"there is no C++ compiler (g++, c++, clang++)"),
        (
            "cpu",
            "fsdp2",
            "/usr/bin/g++",
            "engine=fsdp2 gathers parameters in hooks, which cannot be compiled",
        ),
        (
            "cuda",
            "zero3",
            "/usr/bin/g++",
            "engine=zero3 gathers parameters in hooks, which cannot be compiled",
        ),
    ],
)
def test_where_it_can_be_is_known_beforehand(
    monkeypatch: pytest.MonkeyPatch, device: str, engine: str, found: str | None, expected: str | None
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda _: found)
    assert compiling.why_not(torch.device(device), engine, True) == expected


def test_an_older_torch_compiles_what_takes_no_inner_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._dynamo, "config", object())
    told = compiling.why_not(torch.device("cpu"), "ddp", True)
    assert told == f"torch {torch.__version__} cannot compile a gradient inside a forward; 2.11 and later can"
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/g++")
    assert compiling.why_not(torch.device("cpu"), "ddp", False) is None
