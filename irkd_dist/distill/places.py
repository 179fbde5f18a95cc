"""Where a model can be tapped, and how what it has there reaches its logits.

Of timm's plain transformers that is known by their structure; of any other network it is measured, on noise.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from irkd_dist.distill.models import inference_logits
from irkd_dist.distill.points import feature_info, put_taps, tapped_forward
from irkd_dist.errors import UserError

READINGS = "_irkd_readings"  # attribute of a model: what was measured, by path and size
ROUNDING = 1e-3  # what is below this part of its terms is left of a sum that cancels


def places(model: nn.Module, name: object, role: str) -> list[str]:
    """Module paths that block numbers stand for: a transformer's blocks, or the stages of a network without any.

    `name`, the tap that asks, and `role` go into the error where it has neither.
    """
    if (blocks := getattr(model, "blocks", None)) is not None:
        return [f"blocks.{i}" for i in range(len(blocks))]
    found = [str(info["module"]) for info in feature_info(model) if info.get("module")]
    modules = dict(model.named_modules())
    stages = [path for path in dict.fromkeys(found) if path in modules]
    if len(stages) > 1 and _kind(stages[0]) != _kind(stages[1]):
        stages = stages[1:]  # the stem
    if not stages:
        names = ", ".join(n for n, _ in model.named_children())
        raise UserError(
            f"saliency.taps: {name!r} needs a {role} with blocks or stages, and {type(model).__name__} names none: "
            f"pair taps by module path, as [student tap, teacher tap] (children of the {role}: {names})"
        )
    return stages


def _kind(path: str) -> str:
    return re.sub(r"\d+", "", path)


def reads_only_prefix_tokens(model: nn.Module) -> bool:
    """Whether the head reads the class or distillation token alone, never the patch tokens."""
    return getattr(model, "num_prefix_tokens", 0) > 0 and getattr(model, "global_pool", "") == "token"


def readings(model: nn.Module, path: str, size: int | None = None) -> frozenset[str]:
    """How the patch tokens at a tap reach the logits.

    `unread`: not at all, after the last attention where the head reads the prefix tokens alone. `norm`: through a norm
    alone, which ignores its input's length. `mean`: the head reads their mean. `other`: any other way. Measured where
    the model is no plain transformer of timm's, on images of `size` pixels (None: those that the model is made for).
    """
    blocks: Any = getattr(model, "blocks", ())
    if len(blocks) and isinstance(blocks[-1], Block):
        return frozenset({_structural(model, path)})
    known: dict[tuple[str, int], frozenset[str]] = model.__dict__.setdefault(READINGS, {})
    side = size or own_size(model)
    if (path, side) not in known:
        known[path, side] = _measured(model, path, side)
    return known[path, side]


def own_size(model: nn.Module) -> int:
    """Side in pixels of the images that a model is made for."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    size = size or ((getattr(model, "pretrained_cfg", None) or {}).get("input_size") or (3, 224, 224))[1:]
    return int(size[0]) if isinstance(size, (tuple, list)) else int(size)


def _structural(model: nn.Module, path: str) -> str:
    blocks: Any = model.blocks
    last, before = f"blocks.{len(blocks) - 1}", f"blocks.{len(blocks) - 2}"
    final_norm = not isinstance(getattr(model, "norm", None), (nn.Identity, type(None)))
    if reads_only_prefix_tokens(model):
        inside = path.removeprefix(last).removeprefix(".")
        after = path.startswith(last) and not re.match(r"norm1|attn\.(?!proj|norm)", inside)
        if path == "norm" or after:
            return "unread"
        return "norm" if path == before else "other"
    if final_norm and path == last:
        return "norm"
    pooled = getattr(model, "global_pool", "") == "avg" and hasattr(model, "fc_norm")
    return "mean" if pooled and (path == "norm" or (path == last and not final_norm)) else "other"


def _measured(model: nn.Module, path: str, side: int) -> frozenset[str]:
    """On one image of noise, by the gradient of a random direction of the logits."""
    model = _begun(model)
    some, training = next(model.parameters()), model.training
    noise = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, side, side, generator=noise).to(some.device, some.dtype)
    model.eval()
    try:
        with torch.enable_grad():
            output, (features,) = tapped_forward(model, image, [path])
            logits = inference_logits(output)
            direction = torch.randn(logits.shape, generator=noise).to(logits)
            (gradient,) = torch.autograd.grad((logits * direction).sum(), [features], allow_unused=True)
    except UserError:
        raise
    except (RuntimeError, AssertionError, ValueError, TypeError, LookupError):
        return frozenset({"other"})  # it takes no such image: the forward before the run says so
    finally:
        model.train(training)
    if gradient is None or features.ndim not in (3, 4):
        return frozenset({"other"})  # the first forward with maps says so
    return _judged(*(tokens(model, path, t.detach(), (side, side))[0] for t in (features, gradient)))


def _begun(model: nn.Module) -> nn.Module:
    """The model, or where residual branches begin at zero (a norm's weight is) a copy in which they do not.

    At zero they pass nothing on yet, and what is read through them alone would seem to be read by its mean.
    """

    def asleep(of: nn.Module) -> list[nn.Parameter]:
        norms = [p for name, p in of.named_parameters() if p.ndim == 1 and name.endswith("weight")]
        return [p for p in norms if not p.detach().any()]

    if not asleep(model):
        return model
    other = copy.deepcopy(model)
    for weight in asleep(other):
        nn.init.constant_(weight, 0.5)
    return other


def _judged(features: Tensor, gradient: Tensor) -> frozenset[str]:
    """Features and gradient (1, N, D) of patch tokens."""
    largest, product = gradient.abs().max(), gradient * features
    if largest == 0:
        return frozenset({"unread"})
    found = set()
    if (gradient - gradient.mean(1, keepdim=True)).abs().max() < ROUNDING * largest:
        found.add("mean")
    if product.sum(2).abs().max() < ROUNDING * product.abs().sum(2).max():
        found.add("norm")
    return frozenset(found or {"other"})


# ---- patch tokens and their grid


def tokens(
    model: nn.Module, path: str, features: Tensor, size: tuple[int, int]
) -> tuple[Tensor, tuple[int, int]]:
    """Patch tokens (B, N, D) of a tap's features on images of `size`, in reading order, and their rows and columns.

    Raises:
        UserError: it has none, or they form no grid.
    """
    block = re.fullmatch(r"blocks\.(\d+)", path)
    if block and hasattr(model, "reroll"):  # Hiera keeps the tokens of a mask unit together
        features = model.reroll(features, int(block[1]), mask=None)  # type: ignore[operator]
        return features.flatten(1, 2), (features.shape[1], features.shape[2])
    if features.ndim == 4:
        last = put_taps(model, [path])[path].is_channels_last(features.shape)
        grid = features.shape[1:3] if last else features.shape[2:4]
        flat = features.flatten(1, 2) if last else features.flatten(2).transpose(1, 2)
        return flat, (grid[0], grid[1])
    if features.ndim != 3:
        raise UserError(f"saliency.taps: {path!r} gives {tuple(features.shape)}, no patch tokens and no grid")
    prefix = int(getattr(model, "num_prefix_tokens", 0))
    if features.shape[1] == _expected(model, size)[2]:
        prefix = 0  # the class token joins later (CaiT, XCiT)
    found = features[:, prefix:]
    return found, token_grid(model, path, found.shape[1], size)


def _expected(model: nn.Module, size: tuple[int, int]) -> tuple[int, int, int]:
    """Rows, columns and number of patches of an image, as the size of a patch tells; zeros if nothing does."""
    patch: Any = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is None:
        return 0, 0, 0
    down, right = patch if isinstance(patch, (tuple, list)) else (patch, patch)
    rows, columns = -(-size[0] // down), -(-size[1] // right)
    return rows, columns, rows * columns


def token_grid(model: nn.Module, path: str, count: int, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a tap's patch tokens on images of `size` (height, width).

    Raises:
        UserError: they form no grid of the image's shape.
    """
    height, width = size
    rows, columns, patches = _expected(model, size)
    if count and patches == count:
        return rows, columns
    rows = max(round((count * height / width) ** 0.5), 1)
    columns = count // rows
    if count == 0 or rows * columns != count or rows * width != columns * height:
        raise UserError(
            f"saliency.taps: {path!r} gives {count} patch tokens, which form no grid on images of {height} x {width} "
            "pixels; tap another module"
        )
    return rows, columns
