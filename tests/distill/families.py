"""The table of docs/teachers.md: what each saliency method does with timm's families, at the default taps.

    python -m tests.distill.families docs/teachers.md

writes the page's table anew; `test_families.py` holds the page against it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from irkd_dist.distill import models, probe, saliency, taps
from irkd_dist.distill.teacher import Teacher, freeze
from irkd_dist.errors import UserError

METHODS = ("gradient", "grad_cam", "hirescam", "attention")
TAPS = ["first", "second", "last"]  # the configuration's default
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"


@dataclass(frozen=True)
class Family:
    """A family by one of its members, made small."""

    title: str
    name: str  # of timm
    size: int  # side of its images in pixels
    options: dict[str, Any] = field(default_factory=dict)


def _vit(depth: int = 3, **more: Any) -> dict[str, Any]:
    return {"embed_dim": 24, "depth": depth, "num_heads": 2, **more}


FAMILIES = [
    Family("ViT", "vit_tiny_patch16_224", 64, _vit()),
    Family("ViT, mean-pooled", "vit_tiny_patch16_224", 64, _vit(global_pool="avg")),
    Family("ViT, CLIP", "vit_base_patch16_clip_224", 64, _vit()),
    Family("FlexiViT", "flexivit_small", 64, _vit()),
    Family("DeiT, distilled", "deit_tiny_distilled_patch16_224", 64, _vit()),
    Family("DeiT III", "deit3_small_patch16_224", 64, _vit()),
    Family("DINOv2", "vit_small_patch14_dinov2", 56, _vit()),
    Family("DINOv2, registers", "vit_small_patch14_reg4_dinov2", 56, _vit()),
    Family("DINOv3", "vit_small_patch16_dinov3", 64, _vit()),
    Family("SigLIP (attention pooling)", "vit_base_patch16_siglip_224", 64, _vit()),
    Family("EVA-02", "eva02_tiny_patch14_224", 56, _vit()),
    Family("BEiT", "beit_base_patch16_224", 64, _vit()),
    Family("BEiT v2", "beitv2_base_patch16_224", 64, _vit()),
    Family("ViTamin", "vitamin_small_224", 64, {"depth": 2}),
    Family("CaiT", "cait_xxs24_224", 64, _vit()),
    Family("XCiT", "xcit_nano_12_p16_224", 64, _vit()),
    Family("ConViT", "convit_tiny", 64, {"embed_dim": 6, "depth": 3, "num_heads": 4, "local_up_to_layer": 2}),
    Family("TNT", "tnt_s_patch16_224", 64, {"embed_dim": 24, "inner_dim": 8, "depth": 3, "num_heads_inner": 2}),
    Family("CrossViT", "crossvit_9_240", 240),
    Family("MLP-Mixer", "mixer_s32_224", 64),
    Family("ResMLP", "resmlp_12_224", 64),
    Family("Hiera", "hiera_tiny_224", 64, {"embed_dim": 8, "num_heads": 1, "stages": (1, 1, 1, 1)}),
    Family("Swin", "swin_tiny_patch4_window7_224", 64,
           {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4), "window_size": 2}),
    Family("Swin v2", "swinv2_tiny_window8_256", 64,
           {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4), "window_size": 2}),
    Family("MaxViT", "maxvit_tiny_rw_224", 64, {"depths": (1, 1, 1, 1), "embed_dim": (32, 32, 32, 32)}),
    Family("CoAtNet", "coatnet_nano_rw_224", 64, {"depths": (1, 1, 1, 1), "embed_dim": (32, 32, 32, 32)}),
    Family("PVT v2", "pvt_v2_b0", 64, {"depths": (1, 1, 1, 1)}),
    Family("Twins", "twins_svt_small", 64, {"depths": (1, 1, 1, 1)}),
    Family("LeViT", "levit_128s", 128),
    Family("TinyViT", "tiny_vit_5m_224", 64, {"depths": (1, 1, 1, 1)}),
    Family("EfficientFormer", "efficientformer_l1", 224, {"depths": (1, 1, 1, 2), "embed_dims": (16, 16, 32, 32)}),
    Family("DaViT", "davit_tiny", 64, {"depths": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32),
                                       "num_heads": (1, 1, 2, 2)}),
    Family("PoolFormer", "poolformer_s12", 64),
    Family("ConvNeXt", "convnext_atto", 64, {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)}),
    Family("ConvNeXt V2", "convnextv2_atto", 64, {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)}),
    Family("ResNet", "resnet10t", 64, {"channels": (16, 16, 32, 32)}),
    Family("RegNet", "regnetx_002", 64),
    Family("EfficientNet", "efficientnet_b0", 64),
    Family("MobileNetV3", "mobilenetv3_small_050", 64),
    Family("MobileNetV4", "mobilenetv4_conv_small_050", 64),
    Family("DenseNet", "densenet121", 64, {"block_config": (1, 1, 1, 1), "growth_rate": 8}),
    Family("NFNet", "test_nfnet", 96),
    Family("RepVGG", "repvgg_a0", 64),
    Family("FastViT", "fastvit_t8", 64),
    Family("small_resnet (our own)", "small_resnet", 32),
]  # fmt: skip


def make(family: Family) -> nn.Module:
    """Random weights, none of them at zero as some families begin."""
    torch.manual_seed(0)
    model = models.create_model(
        family.name, classes=5, image_size=family.size, distilled=None, options=family.options
    )
    return probe.shaken(model).eval()


@dataclass(frozen=True)
class Outcome:
    """What a method does with a family: the taps that it reads, or why it is refused."""

    paths: tuple[str, ...] = ()
    refused: str = ""
    wrong: str = ""  # a crash or a map without a shape: never to be


def outcome(model: nn.Module, method: str, size: int) -> Outcome:
    """As a run finds it out, before its data are opened."""
    try:
        pairs = taps.tap_pairs(model, model, TAPS, method, sizes=(size, size))
    except UserError as error:
        return Outcome(refused=str(error))
    paths = [t.path for _, t in pairs if not t.void]
    if not paths:
        return Outcome(refused="every tap is void")
    images = torch.randn(10, 3, size, size, generator=torch.Generator().manual_seed(1))
    teacher = Teacher(freeze(model, None, True), paths, method)
    said = teacher(images, torch.arange(10) % 5, aligned=10)
    for path, m in zip(paths, said.maps or [], strict=True):
        if not bool(m.isfinite().all()) or not bool(saliency.normalize_map(m, "minmax")[1].any()):
            return Outcome(wrong=f"{path}: {tuple(m.shape)} flat or not finite")
    return Outcome(tuple(paths))


def cell(found: Outcome) -> str:
    """A cell of the table."""
    if found.refused or found.wrong:
        return "refused" if found.refused else f"WRONG {found.wrong}"
    return ", ".join(p.removesuffix(".attn.qkv") for p in found.paths)


def row(family: Family) -> str:
    """A family's line of the table."""
    model = make(family)
    cells = [cell(outcome(model, method, family.size)) for method in METHODS]
    if len({*cells[:3]}) == 1:
        cells[1:3] = ["same", "same"] if cells[0] != "refused" else ["refused"] * 2
    return f"| {family.title} | `{family.name}` | " + " | ".join(cells) + " |"


def table() -> list[str]:
    """The table's lines."""
    head = "| family | member | " + " | ".join(f"`{m}`" for m in METHODS) + " |"
    return [head, "|---" * (2 + len(METHODS)) + "|", *(row(family) for family in FAMILIES)]


def main(page: Path) -> None:
    """Put the table into a page, between its two comments."""
    text = page.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text("\n".join([before + BEGIN, "", *table(), "", END + after]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
