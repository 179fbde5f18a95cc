"""torch.compile for student and teacher: forward, inner gradient, maps, losses and outer backward as one graph each.

It works in one process, under DDP and ZeRO-0/1/2, which wrap the compiled module. FSDP2 and ZeRO-3 gather parameters
in hooks that a graph cannot hold: there everything runs as it is.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo.config
import torch._dynamo.exc
import torch._functorch.config
import torch._inductor.exc

from irkd_dist.distill.module import Distiller
from irkd_dist.distill.teacher import Teacher

_paused = False
FAILURES = (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError)


def why_not(device: torch.device, engine: str, inner_gradient: bool) -> str | None:
    """Why nothing can be compiled here, in words; None if it can. inner_gradient: whether a forward takes one."""
    if engine in ("fsdp2", "zero3"):
        return f"engine={engine} gathers parameters in hooks, which cannot be compiled"
    if inner_gradient and not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        return f"torch {torch.__version__} cannot compile a gradient inside a forward; 2.11 and later can"
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "there is no Triton (pip install triton)"
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    if not any(shutil.which(c) for c in compilers):
        return f"there is no C++ compiler ({', '.join(compilers)})"
    return None


def compiled(distiller: Distiller, backend: str = "inductor") -> Distiller:
    """Make a student's forward, inner gradient, maps and losses one compiled graph, in place; returns it.

    Names of weights stay. An engine wraps it afterwards, as it would the one that is not compiled.
    """
    distiller.forward = Compiled(distiller.forward, "the student", backend)  # type: ignore[method-assign]
    return distiller


def compiled_teacher(teacher: Teacher, backend: str = "inductor") -> Teacher:
    """The same for a teacher's logits and maps."""
    teacher.compute = Compiled(teacher.answer, "the teacher", backend, leaf=True)
    return teacher


@contextmanager
def paused() -> Iterator[None]:
    """Inside, what is compiled runs as it is: a few blank images are not worth a graph."""
    global _paused
    before, _paused = _paused, True
    try:
        yield
    finally:
        _paused = before


class Compiled:
    """A function of images and more, compiled when it first sees a shape of them.

    A batch smaller than another of its resolution (the last of an epoch), or of two samples, is not worth a graph of
    its own and runs as it is.
    What torch cannot compile runs as it is from then on, with one line that says so.

    leaf: the compiled function is given images that ask for a gradient, as torch 2.11 lets nothing inside a graph begin
    to; what no tap's gradient passes is left out of the graph all the same.
    """

    def __init__(
        self, function: Callable[..., Any], what: str, backend: str = "inductor", leaf: bool = False
    ) -> None:
        # a stage is a shape, and with saliency on every k-th step two
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        # DDP's own backend cuts a graph at its buckets: an inner gradient in one piece would miss the others, and be
        # zero without a word. Gradients are then summed after the backward, not beside it.
        torch._dynamo.config.optimize_ddp = False
        # the backward is compiled with the forward, so that what fails there is seen here; not known to every torch
        if hasattr(torch._functorch.config, "force_non_lazy_backward_lowering"):
            torch._functorch.config.force_non_lazy_backward_lowering = True
        self.function, self.what, self.leaf = function, what, leaf
        self.fast: Callable[..., Any] | None = torch.compile(
            function, fullgraph=True, dynamic=False, backend=backend
        )
        self.rows: dict[torch.Size, int] = {}

    def __call__(self, images: torch.Tensor, *more: Any) -> Any:
        if _paused:
            return self.function(images, *more)
        size = images.shape[2:]
        self.rows[size] = max(len(images), self.rows.get(size, 0))
        if self.fast is None or len(images) < max(self.rows[size], 3):
            return self.function(images, *more)
        try:
            return self.fast(images.detach().requires_grad_() if self.leaf else images, *more)
        except FAILURES as error:
            result = self.function(images, *more)  # raises what is the user's own mistake
            self.fast = None
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            print(f"irkd: torch cannot compile {self.what}, which runs as it is: {reason}", file=sys.stderr)
            return result
