"""Are there maps to align? One batch of a stage through both models before it starts."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from irkd_dist.distill import saliency
from irkd_dist.distill.measure import TappedModel
from irkd_dist.distill.places import reads_only_prefix_tokens
from irkd_dist.distill.points import feature_info
from irkd_dist.distill.taps import MissingGradient
from irkd_dist.distill.teacher import Teacher
from irkd_dist.errors import UserError

Verdict = Literal["fine", "flat", "void", "not finite"]


@dataclass(frozen=True)
class Probed:
    """What one pair of taps gives on a batch."""

    student: str  # module paths
    teacher: str
    verdict: Verdict
    role: str = ""  # of the one whose map is wrong: student or teacher; empty if fine
    why: str = ""  # in words


def probe(
    student: TappedModel, teacher: Teacher, images: Tensor, labels: Tensor, view: Tensor
) -> list[Probed]:
    """Judge each pair of taps on one real batch; every process must call it, for sharded parameters.

    images (B, 3, r, r) for the student, view (B, 3, r', r') for the teacher, labels (B,). `void`: the score does not
    depend on the tap. `flat`: no map of the batch has a shape, because its grid is one by one or its values are equal.
    A student whose logits are the same for every image (a head that starts at zero) is not judged yet.

    Raises:
        UserError: logits that are not finite.
    """
    ours = _verdicts(lambda paths: student.with_paths(paths).answer(images, labels), student.paths, "student")
    theirs = _verdicts(lambda paths: _said(teacher, paths, view, labels), teacher.paths, "teacher")
    return [
        Probed(s, t, a[0], "student", a[1])
        if a[0] != "fine"
        else Probed(s, t, b[0], "teacher" if b[1] else "", b[1])
        for s, t, a, b in zip(student.paths, teacher.paths, ours, theirs, strict=True)
    ]


def _said(teacher: Teacher, paths: list[str], view: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
    targets = Teacher(teacher.model, paths, teacher.method, teacher.autocast, teacher.renormalize)(
        view, labels, aligned=len(view)
    )
    assert targets.logits is not None
    return targets.logits, targets.maps or []


def _verdicts(
    run: Callable[[list[str]], tuple[Tensor, list[Tensor]]], paths: list[str], role: str
) -> list[tuple[Verdict, str]]:
    results: list[tuple[Verdict, str]] = []
    for path in paths:  # one at a time, so that one without a gradient does not hide the others
        try:
            logits, (m,) = run([path])
        except MissingGradient:
            results.append(("void", f"the {role}'s class score does not depend on {path}"))
            continue
        if not bool(logits.isfinite().all()):
            raise UserError(
                f"the {role}'s logits are not finite on real images: its weights hold NaN or infinity"
            )
        results.append(_verdict(m, logits, f"{role}'s {path}"))
    return results


def _verdict(m: Tensor, logits: Tensor, where: str) -> tuple[Verdict, str]:
    if not bool(m.isfinite().all()):
        return "not finite", f"the map of the {where} has NaN or infinity"
    if m.shape[1] * m.shape[2] == 1:
        return "flat", f"the {where} has a grid of 1 x 1 at this resolution"
    undecided = len(logits) > 1 and bool((logits == logits[0]).all())
    if undecided or bool(saliency.normalize_map(m, "minmax")[1].any()):
        return "fine", ""
    return "flat", f"every map of the {where} is flat"


def complaint(probed: list[Probed], student: nn.Module, teacher: nn.Module, resolution: int) -> str:
    """What is wrong with a stage's taps, in one line with what would work instead; empty if nothing is."""
    wrong = [p for p in probed if p.verdict != "fine"]
    if not wrong:
        return ""
    reasons = "; ".join(f"[{p.student}, {p.teacher}] is {p.verdict}: {p.why}" for p in wrong)
    advice = ", ".join(
        f"of the {role} use {_would_work(model, paths, resolution)}"
        for role, model, paths in (
            ("student", student, [p.student for p in wrong if p.role == "student"]),
            ("teacher", teacher, [p.teacher for p in wrong if p.role == "teacher"]),
        )
        if paths
    )
    return f"saliency.taps at {resolution} px: {reasons}; {advice}"


def shaken(model: nn.Module) -> nn.Module:
    """A copy with noise on every weight: what is flat in it too is flat by the model's shape, whatever it learns."""
    other = copy.deepcopy(model)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            drawn = torch.randn(parameter.shape, generator=noise).to(parameter.device, parameter.dtype)
            parameter.add_(0.1 * drawn)
    return other


def _would_work(model: nn.Module, wrong: list[str], resolution: int) -> str:
    if hasattr(model, "num_prefix_tokens"):
        return "last or a lower block" if reads_only_prefix_tokens(model) else "a lower block"
    stages = [i for i in feature_info(model) if i.get("module") and -(-resolution // i["reduction"]) > 1]
    good = list(itertools.takewhile(lambda stage: stage["module"] not in wrong, stages))
    return f"{good[-1]['module']} or a module before it" if good else "a module with a larger grid"
