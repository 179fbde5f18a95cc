"""The whole job on images that the package draws itself: render, teacher, student, baseline, report."""

from __future__ import annotations

import time
from pathlib import Path

from irkd_dist import config as configuration
from irkd_dist import evaluation, report
from irkd_dist.data import render
from irkd_dist.data.sources import open_source
from irkd_dist.training import tracking
from irkd_dist.training.train import train

SAMPLES = {"train": 4500, "test": 1000}
RESOLUTIONS = (16, 24, 32)


def demo(out: Path) -> None:
    """Run everything below folder `out` and print what came out; a second call goes on or shows the result again."""
    started = time.perf_counter()
    console = tracking.console()
    console.print(
        f"1. Drawing {SAMPLES['train']} shapes and rendering them at {RESOLUTIONS} px", style="bold"
    )
    shards = out / "shards"
    source = open_source("synthetic", None, samples=SAMPLES, size=max(RESOLUTIONS))
    render.render(source, shards, render.Options(RESOLUTIONS, samples_per_shard=1000, workers=2))

    common = [f"data.shards={shards}", f"out={out}"]
    console.print("2. Training a teacher at 32 px", style="bold")
    teacher = train(configuration.load("configs/demo/teacher.yaml", common), owns_process=True)
    console.print("3. Distilling a student: logits, saliency, three resolutions", style="bold")
    student = train(
        configuration.load("configs/demo/student.yaml", [*common, f"teacher.run={teacher['run']}"]),
        owns_process=True,
    )
    console.print("4. The same student without a teacher", style="bold")
    baseline = train(configuration.load("configs/demo/baseline.yaml", common), owns_process=True)

    console.print("5. Measuring and reporting", style="bold")
    result = evaluation.evaluate(Path(student["run"]))
    evaluation.show(result)
    page = report.write([Path(student["run"])], None)
    gain = 100 * (student["test_accuracy"] - baseline["test_accuracy"])
    size = str(max(RESOLUTIONS))
    console.print(
        f"teacher {teacher['test_accuracy']:.2%}, student {student['test_accuracy']:.2%} test accuracy at {size} px\n"
        f"gain over the same student without a teacher: {gain:+.2f} points (alone {baseline['test_accuracy']:.2%})\n"
        f"pointing game: the saliency's peak is on the object in {result['pointing'][size]:.2%} of the test images\n"
        f"report: {page}\n"
        f"{time.perf_counter() - started:.0f} s in all"
    )
