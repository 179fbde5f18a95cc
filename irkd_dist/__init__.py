"""Distil a large Vision Transformer into a small one, in stages of image resolution.

The names below are imported when they are first used: `import irkd_dist` alone takes no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from irkd_dist.api import (
        SaliencyLoss,
        Student,
        distillation_loss,
        evaluate,
        load,
        normalize_map,
        read_run,
        saliency_maps,
        train,
    )

__version__ = "0.1.0"
__all__ = [
    "SaliencyLoss",
    "Student",
    "distillation_loss",
    "evaluate",
    "load",
    "normalize_map",
    "read_run",
    "saliency_maps",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from irkd_dist import api

        return getattr(api, name)
    raise AttributeError(f"module 'irkd_dist' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
