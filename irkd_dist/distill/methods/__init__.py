"""Saliency methods, one module each, found by its file's name: `loss.saliency.method: NAME` takes NAME.py from here.

A method's module has

    INNER_GRADIENT = True               whether its map is made from ds/dA
    VOID = ("unread", "mean")           readings (see `places.readings`) at which its map is zero or constant
    def saliency_map(features, gradient)       both (B, N, D), patch tokens only -> (B, N)

or, without an inner gradient,

    INNER_GRADIENT = False
    BLOCK_TAP = ".attn.qkv"             the part of a block that a block's number stands for
    def check(model, path, role)        raises UserError where the method is not defined; path "": anywhere
    def saliency_map(model, path, features)    the tapped module's output -> (B, N)

Nothing here imports torch, so that a configuration is read without it.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

LOADED: dict[str, Any] = {}


def names() -> list[str]:
    """The methods there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Any:
    """A method's module."""
    if name not in LOADED:  # torch.compile takes a look-up along, but no import
        LOADED[name] = importlib.import_module(f"{__name__}.{name}")
    return LOADED[name]


def check(model: Any, name: str, role: str) -> None:
    """Refuse a model, the student or the teacher, where a method is defined at no place of it."""
    how = load(name)
    if not how.INNER_GRADIENT:
        how.check(model, "", role)


def inner_gradient(name: str) -> bool:
    """Whether a method differentiates the score; read from its file, without importing it."""
    spec = find_spec(f"{__name__}.{name}")
    assert spec is not None
    assert spec.origin is not None
    for node in ast.parse(Path(spec.origin).read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "INNER_GRADIENT":
            return bool(ast.literal_eval(node.value))
    raise ValueError(f"{spec.origin} sets no INNER_GRADIENT")
