"""The paper's models by name: apart from `models`, so that a configuration is read without importing torch."""

from typing import Any

# The paper's models: (timm architecture, with distillation token, overrides). Any other name is timm's own.
PAPER_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "custom": (
        "vit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224",
        {"embed_dim": 128, "depth": 4, "num_heads": 4, "mlp_ratio": 2},
    ),
    "vit_tiny": ("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", {}),
    "vit_small": ("vit_small_patch16_224", "deit_small_distilled_patch16_224", {}),
}
PAPER_PATCH = 4  # where a configuration says nothing
