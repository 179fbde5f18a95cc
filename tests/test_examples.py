"""The scripts of examples/ run as they stand there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("example", sorted(p.name for p in (ROOT / "examples").glob("*_loop.py")))
def test_an_example_runs(example: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / example), "--steps", "2"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "step 1: loss" in done.stdout


TRAIN = """
import argparse, timm, torch
from timm.task import LogitDistillationTask

parser = argparse.ArgumentParser()
parser.add_argument("--kd-model-name")
name = parser.parse_args().kd_model_name
torch.manual_seed(0)
student = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=10)
teacher = timm.create_model(name, img_size=32, patch_size=8, depth=3, num_classes=10)
teacher.pretrained_cfg["mean"], teacher.pretrained_cfg["std"] = (0.2, 0.3, 0.4), (0.3, 0.2, 0.1)
task = LogitDistillationTask(
    student_model=student, teacher_model=teacher, criterion=torch.nn.CrossEntropyLoss(), loss_type="kl",
    distill_loss_weight=0.7, task_loss_weight=0.4, temperature=3.0, device=torch.device("cpu"), verbose=False,
)
task.train()
optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
images, labels = torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))
for step in range(2):
    result = task(images, labels)
    result["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
    print(" ".join(f"{key}={value.item():.5f}" for key, value in result.items() if value.ndim == 0))
"""


def test_timms_training_script_gets_the_saliency_term(tmp_path: Path) -> None:
    """A script that calls timm's task as timm's own does: at equal weights its terms are what timm computes."""
    script = tmp_path / "train.py"
    script.write_text(TRAIN)

    def losses(*command: str) -> list[dict[str, float]]:
        arguments = [sys.executable, *command, str(script), "--kd-model-name", "vit_tiny_patch16_224"]
        done = subprocess.run(
            arguments, capture_output=True, text=True, env={**os.environ, "IRKD_GAMMA": "2"}
        )
        assert done.returncode == 0, done.stderr
        steps = [[word.partition("=") for word in line.split()] for line in done.stdout.splitlines()]
        return [{key: float(value) for key, _, value in step} for step in steps]

    theirs, ours = losses(), losses(str(ROOT / "examples" / "timm_train.py"))
    for step in ours:
        terms = 0.4 * step["task_loss"] + 0.7 * step["kd_loss"] + 2 * step["saliency_loss"]
        assert step["saliency_loss"] > 0
        assert abs(step["loss"] - terms) < 1e-4
    assert all(abs(theirs[0][key] - ours[0][key]) < 1e-4 for key in ("task_loss", "kd_loss"))
    assert abs(theirs[1]["kd_loss"] - ours[1]["kd_loss"]) > 1e-4  # after a step along another gradient
