"""What a run says before its first step and after its last: the teacher's competence, the summary table."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from irkd_dist import runfolder
from irkd_dist.distill.models import parameter_count
from irkd_dist.distill.teacher import Teacher, competence
from irkd_dist.training import distributed, setup
from irkd_dist.training.setup import Job, Position
from irkd_dist.training.tracking import Tracker, summary_table


def announce(job: Job, position: Position, skipped: list[str], tracker: Tracker) -> None:
    """Print and record what runs, where, and with which taps."""
    for reason in skipped:
        tracker.say(f"skipped checkpoint: {reason}")
    fresh = position.step == 0
    where = "" if fresh else f", resumed at step {position.step}"
    tracker.say(
        f"run {job.folder}{where}: {job.config.student.name} ({parameter_count(job.student) / 1e6:.2f} M parameters), "
        f"{job.engine.world} process{'es' if job.engine.world > 1 else ''} on {job.engine.device.type}, "
        f"{'bf16' if job.engine.autocast else 'fp32'}"
    )
    for note in job.notes:
        tracker.say(note)
    tracker.event(
        "start" if fresh else "resume", position.step, world=job.engine.world, device=str(job.engine.device),
        precision="bf16" if job.engine.autocast else "fp32", parameters=parameter_count(job.student),
        torch=torch.__version__, skipped=skipped, notes=job.notes,
        position=asdict(position.curriculum),
    )  # fmt: skip


def summarize(job: Job, position: Position, tracker: Tracker) -> dict[str, Any]:
    """Test the last stage's best and last weights, print the table of stages, return the summary."""
    done = (
        next((e for e in reversed(runfolder.read_events(job.folder)) if e["event"] == "summary"), None)
        if position.finished
        else None
    )
    done = distributed.broadcast(job.engine, done)
    resolution = job.stages[-1].resolution
    summary: dict[str, Any] = {"run": str(job.folder), "steps": position.step, "resolution": resolution}
    if done is not None:
        summary = {k: v for k, v in done.items() if k not in ("event", "step", "time")}
    elif "test" in job.manifest.splits:
        with setup.evaluation_loader(job, "test", resolution) as loader:
            summary["test_accuracy_last"] = setup.accuracy(job, job.student, loader)
            assert position.curriculum.best_checkpoint is not None
            setup.load_into(job, job.folder / position.curriculum.best_checkpoint, moments=False)
            summary["test_accuracy"] = setup.accuracy(job, job.student, loader)
    events = runfolder.read_events(job.folder)
    if done is None:
        summary["val_accuracy"] = position.curriculum.best_accuracy
        summary["seconds"] = round(_training_seconds(events), 1)
        tracker.event("summary", position.step, **summary)
        tracker.metrics(position.step, {k: v for k, v in summary.items() if isinstance(v, float)})
    rows = []
    for i, stage in enumerate(job.stages):
        of_stage = [e for e in events if e["event"] == "evaluation" and e["stage"] == i]
        if of_stage:
            best = max(of_stage, key=lambda e: e["accuracy"])
            rows.append(
                [f"{stage.resolution} px", str(len(of_stage)), f"{of_stage[-1]['train_accuracy']:.2%}",
                 f"{best['accuracy']:.2%}", f"{of_stage[-1]['accuracy']:.2%}"]
            )  # fmt: skip
    table = summary_table(str(job.folder), ["stage", "epochs", "train", "best val", "last val"], rows)
    tracker.console.print(table)
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


def _training_seconds(events: list[dict[str, Any]]) -> float:
    """Seconds between the first and the last event of each unbroken stretch."""
    total, start, last = 0.0, None, 0.0
    for event in events:
        if event["event"] in ("start", "resume"):
            total += last - start if start is not None else 0.0
            start = event["time"]
        last = event["time"]
    return total + (last - start if start is not None else 0.0)


def probe_teacher(job: Job, tracker: Tracker, position: Position) -> list[float]:
    """Measure and print the teacher's accuracy at each stage's resolution; returns its competence by stage."""
    if job.teacher is None or position.finished:
        return [1.0] * len(job.stages)
    full = setup.full_view(job)
    split, accuracies = setup.held_out(job.manifest), []
    tracker.say(f"measuring the teacher on the {split} split at each stage's resolution")
    for i, stage in enumerate(job.stages):
        setup.load_stage_teacher(job, i)
        key = (stage.resolution, job.teacher_folders[i])
        known = next((a for k, a in accuracies if k == key), None)
        if known is None:
            with setup.evaluation_loader(job, split, stage.resolution, full) as loader:
                known = setup.accuracy(job, _TeacherView(job.teacher), loader)
        accuracies.append((key, known))
    values = [a for _, a in accuracies]
    skill = [competence(a, max(values), len(job.manifest.classes)) for a in values]
    shown = ", ".join(f"{s.resolution} px {a:.2%}" for s, a in zip(job.stages, values, strict=True))
    tracker.say(f"teacher's accuracy ({split}{', full resolution' if full else ''}): {shown}")
    tracker.event(
        "teacher",
        position.step,
        resolutions=[s.resolution for s in job.stages],
        accuracy=values,
        competence=skill,
    )
    return skill


class _TeacherView(torch.nn.Module):
    """The teacher as a model that gives logits, its own normalisation included."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self._teacher = teacher  # a plain object, not a submodule: its mode is its own

    def forward(self, images: Tensor) -> Tensor:
        logits = self._teacher(images, images.new_zeros(len(images), dtype=torch.long)).logits
        assert logits is not None
        return logits
