"""configs/imagenet: each is loaded, built and takes a step of each stage, with small stand-ins for the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from irkd_dist import config, linear_probe
from irkd_dist.config import Config
from irkd_dist.training import build, engines, step

CONFIGS = Path(__file__).parents[1] / "configs" / "imagenet"
SMALL = "{embed_dim: 24, depth: 2, num_heads: 2}"
TOY = ["data.batch=4", "data.workers=1", "data.eval_batch=8", f"student.options={SMALL}", "precision=fp32"]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few shapes at each resolution, stored larger than they are seen."""
    from irkd_dist.data import render
    from irkd_dist.data.sources import open_source

    out = tmp_path_factory.mktemp("photographs")
    source = open_source("synthetic", None, samples={"train": 12, "val": 6}, size=64)
    render.render(source, out, render.Options((96, 128, 160, 192, 224), crop_pct=0.875))
    return out


def stand_in(name: str, classes: int, side: int, file: Path) -> Path:
    torch.manual_seed(0)
    options = {"embed_dim": 24, "depth": 2, "num_heads": 2}
    model = timm.create_model(name, num_classes=classes, img_size=side, **options)  # type: ignore[arg-type]
    save_file(model.state_dict(), file)
    return file


def take_steps(loaded: Config) -> None:
    engine = engines.setup(loaded)
    try:
        parts = build.build(loaded, engine)
        for number, stage in enumerate(parts.plan.stages):
            training, held_out = build.loaders(parts, stage)
            with training, held_out:
                batches = next(iter(training.steps(0)))
                loss = loaded.loss
                taken = step.take(
                    parts, batches, loss.kd.alpha, loss.saliency.gamma, 0, parts.micro_batches(number)
                )
                assert not bool(taken.skipped)
                wanted = {"kd", "saliency"} | ({"features"} if loss.features.beta else set())
                assert wanted <= taken.terms[0].keys()
    finally:
        engine.finish()


def test_every_configuration_is_here() -> None:
    assert {f.stem for f in CONFIGS.glob("*.yaml")} == {"deit_tiny", "dinov2_probe", "vit_small"}
    for file in CONFIGS.glob("*.yaml"):
        text = file.read_text()
        assert "not run by us yet" in text
        assert file.stem == "dinov2_probe" or ("--nodes=1" in text and "--nodes=8" in text)
        config.load(file)


def test_deit_tiny_is_built(photographs: Path, tmp_path: Path) -> None:
    weights = stand_in("deit3_large_patch16_224", 10, 224, tmp_path / "deit3.safetensors")
    take_steps(
        config.load(
            CONFIGS / "deit_tiny.yaml",
            [
                *TOY,
                f"data.shards={photographs}",
                f"teacher.model.weights={weights}",
                f"teacher.model.options={SMALL}",
            ],
        )
    )


def test_vit_small_is_built_of_a_probed_dinov2(photographs: Path, tmp_path: Path) -> None:
    weights = stand_in("vit_base_patch14_reg4_dinov2", 0, 518, tmp_path / "dino.safetensors")
    toy = [*TOY, f"data.shards={photographs}", f"out={tmp_path}"]
    probed = config.load(CONFIGS / "dinov2_probe.yaml", [*toy, f"student.weights={weights}"])
    done = linear_probe.probe(probed, lambda _: None)
    assert done.folder.name == "dinov2_probe-seed0-probe"
    take_steps(config.load(CONFIGS / "vit_small.yaml", [*toy, f"teacher.run={done.folder}"]))
