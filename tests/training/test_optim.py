"""Policies against torch's own AdamW, schedules against their definitions."""

import copy
import itertools
import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from irkd_dist.distill.models import create_model
from irkd_dist.training import engines, optim


def model_and_optimizer(seed: int = 0) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4))
    return model, adamw(model)


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(optim.parameter_groups(model, 1e-2), lr=3e-3, fused=True)


def engine_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> engines.Engine:
    engine = engines.Engine(Accelerator(cpu=True), None)
    engine.student, engine.optimizer = model, optimizer
    return engine


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(seed))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_reset_gives_exactly_a_new_adamws_first_steps() -> None:
    model, optimizer = model_and_optimizer()
    steps(model, optimizer, range(5))
    other = copy.deepcopy(model)
    engine_of(model, optimizer).reset_moments()
    steps(model, optimizer, range(5, 12))
    steps(other, adamw(other), range(5, 12))
    assert equal(model, other)


def test_moments_saved_and_loaded_continue_exactly_as_an_unbroken_adamw() -> None:
    model, optimizer = model_and_optimizer()
    steps(model, optimizer, range(5))
    other = copy.deepcopy(model)
    fresh = adamw(other)
    engine_of(other, fresh).load_moments(engine_of(model, optimizer).moments())
    steps(model, optimizer, range(5, 12))
    steps(other, fresh, range(5, 12))
    assert equal(model, other)
    late = copy.deepcopy(other)  # and without the moments it differs: the test can fail
    steps(other, fresh, range(12, 14))
    steps(late, adamw(late), range(12, 14))
    assert not equal(other, late)


def test_decay_is_for_weights_alone() -> None:
    model = create_model("custom", classes=10, patch=4, image_size=16, distilled=True)
    decay, free = optim.parameter_groups(model, 1e-4)
    names = {id(p): n for n, p in model.named_parameters()}
    assert decay["weight_decay"] == 1e-4
    assert free["weight_decay"] == 0
    assert {n for n in names.values() if n in ("cls_token", "dist_token", "pos_embed")} <= {
        names[id(p)] for p in free["params"]
    }
    assert all(names[id(p)].endswith(".weight") and p.ndim > 1 for p in decay["params"])
    assert len(decay["params"]) + len(free["params"]) == len(names)


def test_one_cycle_rises_and_falls_as_the_teachers_recipe_says() -> None:
    factors = [optim.lr_factor("one_cycle", s, 100, warmup=0.6, start=0.05, final=0.01) for s in range(100)]
    assert factors[59] == 1.0
    assert factors[0] == pytest.approx(0.05, abs=0.01)
    assert factors[-1] == pytest.approx(0.01)
    assert all(a < b for a, b in itertools.pairwise(factors[:60]))
    assert all(a > b for a, b in itertools.pairwise(factors[59:]))
    halfway = 0.05 + 0.95 * (1 - math.cos(math.pi * 0.5)) / 2
    assert factors[29] == pytest.approx(halfway)


def test_cosine_and_constant() -> None:
    cosine = [optim.lr_factor("cosine", s, 11) for s in range(11)]
    assert cosine[0] == 1.0
    assert cosine[5] == pytest.approx(0.5)
    assert cosine[10] == pytest.approx(0.0)
    assert {optim.lr_factor("constant", s, 11) for s in range(11)} == {1.0}
    assert [optim.lr_factor("constant", s, 10, warmup=0.4) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_rewarm_reaches_the_full_rate() -> None:
    assert [optim.rewarm_factor(s, 4) for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
