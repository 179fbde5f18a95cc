"""What a run says before its first step and after its last: the teacher's competence, the summary table."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from irkd_dist import checkpoint, eventlog
from irkd_dist.distill import methods, probe
from irkd_dist.distill.models import parameter_count
from irkd_dist.distill.teacher import Teacher, competence, competent_shares
from irkd_dist.errors import UserError
from irkd_dist.training import build, distributed, metrics, micro, restore
from irkd_dist.training.parts import Parts
from irkd_dist.training.position import Position
from irkd_dist.training.restore import Resumed
from irkd_dist.training.tracking import Tracker, provenance, summary_table

PROBED = 16  # held-out images that the taps of a stage are judged on


def announce(parts: Parts, folder: Path, resumed: Resumed, tracker: Tracker) -> None:
    """Print and record what runs, where, and with which taps."""
    for reason in resumed.skipped:
        tracker.say(f"skipped checkpoint: {reason}")
    config, engine, step = parts.config, parts.engine, resumed.position.step
    weights = checkpoint.without(dict(parts.student.named_parameters()))
    count = sum(p.numel() for p in weights.values())
    precision, fresh = parts.identity["precision"], step == 0
    tracker.say(
        f"run {folder}{'' if fresh else f', resumed at step {step}'}: {config.student.name} ({count / 1e6:.2f} M "
        f"parameters), {engine.world} process{'es' if engine.world > 1 else ''} on {engine.device.type}, {precision}"
    )
    for note in parts.notes:
        tracker.say(note)
    tracker.event(
        "start" if fresh else "resume", step, world=engine.world, device=str(engine.device), precision=precision,
        threads=torch.get_num_threads(), parameters=count, torch=torch.__version__, skipped=resumed.skipped,
        notes=parts.notes, position=asdict(resumed.position.curriculum), images=parts.manifest.splits,
        teacher_parameters=None if parts.teacher is None else parameter_count(parts.teacher.model), **provenance(),
    )  # fmt: skip
    for text in resumed.lost:
        tracker.event("best_lost", step, what=text)
        tracker.say(f"a best checkpoint is lost, and the run goes on without it: {text}")
    if resumed.extended:
        tracker.event("extend", step, changed=resumed.extended)
        tracker.say(f"extended: {'; '.join(resumed.extended)}")


def summarize(parts: Parts, folder: Path, tracker: Tracker, position: Position) -> dict[str, Any]:
    """Test the last stage's best and last weights, print the table of stages, return the summary."""
    engine, manifest, plan = parts.engine, parts.manifest, parts.plan
    told = (
        e
        for e in reversed(eventlog.read_events(folder))
        if e["event"] == "summary" and e.get("steps") == position.step
    )
    done = distributed.on_main(engine, lambda: next(told, None))
    resolution = plan.stages[-1].resolution
    summary: dict[str, Any] = {"run": str(folder), "steps": position.step, "resolution": resolution}
    if done is not None:
        summary = {k: v for k, v in done.items() if k not in ("event", "step", "time")}
    elif "test" in manifest.splits:
        with build.evaluation_loader(parts.config, manifest, engine, "test", resolution) as loader:
            last, last_raw = metrics.judge(engine, parts.student, loader, tracker)
            if position.curriculum.best_checkpoint is not None:  # else it is lost, and the last stands for it
                restore.load_into(engine, folder / position.curriculum.best_checkpoint, moments=False)
            best, best_raw = metrics.judge(engine, parts.student, loader, tracker)
        summary |= {"test_accuracy_last": last, "test_accuracy": best}
        if best_raw is not None:  # of the weights that were trained, beside those of their average
            summary |= {"test_accuracy_last_raw": last_raw, "test_accuracy_raw": best_raw}
    events = eventlog.read_events(folder)
    if done is None:
        summary["val_accuracy"] = position.curriculum.best_accuracy
        summary["seconds"] = round(_training_seconds(events), 1)
        tracker.event("summary", position.step, **summary)
        tracker.metrics(position.step, _named(summary))
    rows = []
    for i, stage in enumerate(plan.stages):
        of_stage = [e for e in events if e["event"] == "evaluation" and e["stage"] == i]
        passed = len([e for e in events if e["event"] in ("evaluation", "epoch") and e["stage"] == i])
        if of_stage:
            best = max(of_stage, key=lambda e: e["accuracy"])
            rows.append(
                [f"{stage.resolution} px", str(passed), *(
                    "-" if a is None else f"{a:.2%}"
                    for a in (of_stage[-1]["train_accuracy"], best["accuracy"], of_stage[-1]["accuracy"])
                )]
            )  # fmt: skip
    columns = ["stage", "epochs", "train", "best val", "last val"]
    tracker.console.print(summary_table(str(folder), columns, rows))
    if done is None:
        tracker.table(position.step, "stages", columns, rows)
        if position.curriculum.best_checkpoint is not None:
            tracker.model(folder / position.curriculum.best_checkpoint)
    steps = [e for e in events if e["event"] == "train" and "seconds" in e]
    if steps:
        seconds = sum(e["seconds"] for e in steps)
        waited = sum(e["seconds"] * e["data_wait"] for e in steps)
        tracker.say(f"waiting for images: {waited / seconds:.2%} of {seconds:.0f} s in training steps")
    if "test_accuracy" in summary:
        tracker.say(
            f"test accuracy at {resolution} px: {summary['test_accuracy']:.2%} (best checkpoint), "
            f"{summary['test_accuracy_last']:.2%} (last)"
        )
    return summary


def _named(summary: dict[str, Any]) -> dict[str, float]:
    """The numbers of a summary by the names of metrics."""
    names = {
        "test_accuracy": "test/accuracy", "test_accuracy_last": "test/accuracy_last",
        "val_accuracy": "val/best_accuracy", "seconds": "system/seconds",
    }  # fmt: skip
    found = {name: float(summary[key]) for key, name in names.items() if key in summary}
    return found | {"val_accuracy": float(summary["val_accuracy"])}  # what sweeps of earlier releases look at


def _training_seconds(events: list[dict[str, Any]]) -> float:
    """Seconds between the first and the last event of each unbroken stretch."""
    total, start, last = 0.0, None, 0.0
    for event in events:
        if event["event"] in ("start", "resume"):
            total += last - start if start is not None else 0.0
            start = event["time"]
        last = event["time"]
    return total + (last - start if start is not None else 0.0)


def probe_teacher(
    parts: Parts, folder: Path, tracker: Tracker, position: Position
) -> tuple[list[float], list[tuple[float, ...]]]:
    """The teacher's competence by stage, measured at each stage's resolution and printed, once in a run; and the shares
    of several teachers by stage.

    A restart takes it from the record, so that the weights of past stages and of those to come stay what they were.
    """
    stages, manifest, engine = parts.plan.stages, parts.manifest, parts.engine
    headless = parts.config.teacher is not None and not parts.config.teacher.logits
    if parts.teacher is None or position.finished or headless:
        return [1.0] * len(stages), [()] * len(stages)
    full, split = build.full_view(parts.config), build.held_out(manifest)
    facts = {
        "resolutions": [s.resolution for s in stages], "teachers": [s.teacher for s in stages], "full": full,
        "digest": parts.identity["teacher_digest"], "data": parts.identity["data_digest"],
    }  # fmt: skip
    recorded = distributed.on_main(engine, lambda: _recorded(folder, facts) if position.step else None)
    values, shares = recorded or (None, [])
    if values is None:
        tracker.say(f"measuring the teacher on the {split} split at each stage's resolution")
        shares = _shares(parts, tracker)
        known: dict[tuple[int, str | None], float] = {}
        for i, stage in enumerate(stages):
            restore.load_stage_teacher(parts, i)
            if (key := (stage.resolution, stage.teacher)) in known:
                continue
            parts.teacher.shares = shares[i]
            # not in its compiled form, which would take these batches for the training's
            known[key] = _teachers_accuracy(
                parts, replace(parts.teacher), stage.resolution, "the teacher", tracker
            )
        values = [known[s.resolution, s.teacher] for s in stages]
    skill = [competence(a, max(values), len(manifest.classes)) for a in values]
    shown = ", ".join(f"{s.resolution} px {a:.2%}" for s, a in zip(stages, values, strict=True))
    tracker.say(f"teacher's accuracy ({split}{', full resolution' if full else ''}): {shown}")
    tracker.event(
        "teacher",
        position.step,
        accuracy=values,
        competence=skill,
        facts=facts,
        resolutions=facts["resolutions"],
        **({"shares": shares} if parts.teacher.members else {}),
    )
    rows = [
        [f"{s.resolution} px", f"{a:.2%}", f"{c:.3g}"] for s, a, c in zip(stages, values, skill, strict=True)
    ]
    tracker.table(position.step, "teacher", ["resolution", "accuracy", "competence"], rows)
    return skill, shares


def _teachers_accuracy(parts: Parts, teacher: Teacher, resolution: int, who: str, tracker: Tracker) -> float:
    full, split = build.full_view(parts.config), build.held_out(parts.manifest)
    with build.evaluation_loader(
        parts.config, parts.manifest, parts.engine, split, resolution, full
    ) as loader:
        return metrics.accuracy(parts.engine, TeacherView(teacher), loader, who, tracker)


def _shares(parts: Parts, tracker: Tracker) -> list[tuple[float, ...]]:
    """Shares of several teachers in each stage: those of the configuration, or by accuracy at its resolution."""
    teacher, spec, stages = parts.teacher, parts.config.teacher, parts.plan.stages
    assert teacher is not None
    assert spec is not None
    if not teacher.members or spec.shares != "competence":
        return [teacher.shares] * len(stages)
    count, measured = 1 + len(teacher.members), dict[int, list[float]]()
    for size in dict.fromkeys(s.resolution for s in stages):
        measured[size] = [
            _teachers_accuracy(parts, teacher.only(i), size, f"teacher {i}", tracker) for i in range(count)
        ]
    found = [competent_shares(measured[s.resolution], len(parts.manifest.classes)) for s in stages]
    for stage, shares in zip(stages, found, strict=True):
        told = (f"{share:.2f} ({a:.2%})" for share, a in zip(shares, measured[stage.resolution], strict=True))
        tracker.say(f"shares of the teachers at {stage.resolution} px (accuracy): {', '.join(told)}")
    return found


def choose_micro_batches(parts: Parts, folder: Path, number: int) -> str:
    """Under optim.accumulate=auto choose a stage's micro-batches, and say why; empty if they are known.

    A stage that is gone on with, in as many processes, keeps those that its record has: the same bits. One that came to
    no step chooses anew: its choice may have been why.
    """
    if parts.config.optim.accumulate != "auto" or number in parts.chosen:
        return ""
    engine = parts.engine
    if (
        recorded := distributed.on_main(engine, lambda: _begun_with(folder, number, engine.world))
    ) is not None:
        parts.chosen[number] = recorded
        return f"stage {number}: {recorded} micro-batches a process, as it was begun with"
    parts.chosen[number], why = micro.choose(parts, number)
    return f"stage {number}: {parts.chosen[number]} micro-batches a process: {why}"


def _begun_with(folder: Path, number: int, world: int) -> int | None:
    last = 0
    for e in reversed(eventlog.read_log(folder).events):  # also of steps that a restart went behind
        last = max(last, e["step"])
        if (
            e["event"] == "stage"
            and e["stage"] == number
            and e.get("processes") == world
            and "accumulate" in e
        ):
            return e["accumulate"] if last > e["step"] else None
    return None


def probe_stages(parts: Parts, tracker: Tracker, position: Position) -> None:
    """Say which taps of the stages to come have no map to align: the saliency term is 0 there.

    Raises:
        UserError: no stage has any: now, not when it is reached.
    """
    stages = range(position.curriculum.stage, 0 if position.finished else len(parts.plan.stages))
    found = [(number, *probe_taps(parts, number)) for number in stages]
    if found and all(dead for _, _, dead in found):
        raise UserError(
            "; ".join(line for _, line, _ in found[:1]) + " (in no stage is there a map to align)"
        )
    for number, line, dead in found:
        if line:
            what = "; no tap of this stage has a map, so its saliency term is 0" if dead else ""
            tracker.event("taps", position.step, stage=number, found=line, dead=dead)
            tracker.say(f"warning: {line}{what}")


def probe_taps(parts: Parts, number: int) -> tuple[str, bool]:
    """What is wrong with taps of a stage, in one line, and whether none of them will ever have a map to align.

    They are judged on some held-out images. A student whose map is flat only because of the weights it starts with
    (residual branches that begin at zero) is named, and not given up.

    Raises:
        UserError: a map or the logits are not finite.
    """
    config, engine, stage, teacher = parts.config, parts.engine, parts.plan.stages[number], parts.teacher
    inner = methods.inner_gradient(config.loss.saliency.method)
    if teacher is None or not config.loss.saliency.gamma or (engine.no_inner_gradient and inner):
        return "", False
    images, labels = _some(parts, stage.resolution, full=False)
    view = _some(parts, stage.resolution, full=True)[0] if build.full_view(config) else images
    restore.load_stage_teacher(parts, number)
    found = probe.probe(parts.tapped, teacher, images, labels, view)
    shaken = found
    if engine.replicated and any(p.role == "student" and p.verdict == "flat" for p in found):
        other = replace(parts.tapped, model=probe.shaken(parts.student))
        shaken = probe.probe(other, teacher, images, labels, view)
    line = probe.complaint(found, parts.student, teacher.model, stage.resolution)
    if any(p.verdict == "not finite" for p in found):
        raise UserError(line)
    return line, bool(found) and all(p.verdict != "fine" for p in shaken)


def _some(parts: Parts, resolution: int, full: bool) -> tuple[Tensor, Tensor]:
    """The first held-out images and their labels, the same on every process."""
    split = build.held_out(parts.manifest)
    with build.evaluation_loader(
        parts.config, parts.manifest, parts.engine, split, resolution, full
    ) as loader:
        return loader.pick(np.arange(min(len(loader), PROBED)))


def _recorded(folder: Path, facts: dict[str, Any]) -> tuple[list[float], list[tuple[float, ...]]] | None:
    """What an earlier start of the run has measured, under the same circumstances: accuracies, and shares by stage."""
    told = (e for e in eventlog.read_events(folder) if e["event"] == "teacher" and e.get("facts") == facts)
    nothing: list[tuple[float, ...]] = [()] * len(facts["resolutions"])
    return next((((e["accuracy"]), [(*s,) for s in e.get("shares", nothing)]) for e in told), None)


class TeacherView(torch.nn.Module):
    """The teacher as a model that gives logits, its own normalisation included."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self._teacher = teacher  # a plain object, not a submodule: its mode is its own

    def forward(self, images: Tensor) -> Tensor:
        logits = self._teacher(images, images.new_zeros(len(images), dtype=torch.long)).logits
        assert logits is not None
        return logits
