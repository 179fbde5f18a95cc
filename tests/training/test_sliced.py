"""A sharded teacher is read in slices: within a memory budget, and it says what the whole one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.training.launch import irkd, spawn

NAME = "vit_base_patch16_224"


def run_yaml(shapes: Path, out: Path, weights: Path, options: str) -> Path:
    (out / "student.yaml").write_text(f"""
data: {{batch: 8, shards: {shapes}}}
student: {{name: custom, patch: 4, options: {{embed_dim: 16, depth: 2, num_heads: 2}}}}
teacher: {{shard: true, model: {{name: {NAME}, patch: 4, weights: {weights}, options: {options}}}}}
loss: {{kd: {{alpha: 1.0}}, saliency: {{gamma: 0.8}}}}
fixed: {{resolution: 16, epochs: 1}}
precision: fp32
out: {out}
""")
    return out / "student.yaml"


def write(file: Path, side: int, prefix: str = "", **options: int) -> Path:
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=10, img_size=side, patch_size=4, **options)  # type: ignore[arg-type]
    save_file({prefix + k: v for k, v in model.state_dict().items()}, file)
    return file


def answers(yaml: Path, out: Path, world: int, *changes: str) -> list[dict]:
    spawn(world, "tests.training.sliced_worker", str(yaml), str(out), *changes)
    return [torch.load(f"{out}-{rank}.pt") for rank in range(world)]


def test_no_process_holds_a_copy(shapes: Path, tmp_path: Path) -> None:
    """200 MB of weights over two processes: memory grows by half of them and the pages of the file that are read, and
    some for what else is begun; where one process reads them whole, by half of them more at least.
    """
    weights = write(tmp_path / "large.safetensors", 16, embed_dim=768, depth=7, num_heads=12)
    size = weights.stat().st_size / 2**20
    assert 185 < size < 215
    yaml = run_yaml(shapes, tmp_path, weights, "{embed_dim: 768, depth: 7, num_heads: 12}")
    for told in answers(yaml, tmp_path / "measure", 2):
        in_slices, whole = told["measured"]
        assert in_slices < 1.5 * size
        assert whole > in_slices + 0.5 * size
        assert told["held"] < 0.51 * size
        assert any("are read by each process in slices of its own" in note for note in told["notes"])


@pytest.mark.parametrize("side", [16, 24])
def test_it_says_what_the_whole_one_says(shapes: Path, tmp_path: Path, side: int) -> None:
    """Three processes, rows that do not divide evenly, a prefix, and position embeddings of another size."""
    weights = write(tmp_path / "small.safetensors", side, "module.", embed_dim=32, depth=2, num_heads=2)
    yaml = run_yaml(shapes, tmp_path, weights, "{embed_dim: 32, depth: 2, num_heads: 2}")
    (whole,) = answers(yaml, tmp_path / "one", 1)
    many = answers(yaml, tmp_path / "three", 3)
    for told in many:
        torch.testing.assert_close(told["logits"], whole["logits"], rtol=1e-5, atol=1e-6)
        for a, b in zip(told["maps"], whole["maps"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert told["digest"] == whole["digest"]
    assert any("slices of its own" in note for note in many[0]["notes"])
    assert not any("slices of its own" in note for note in whole["notes"])


def test_a_run_as_a_sharded_teacher_and_what_is_wrong_with_a_file(
    student_yaml: Path, teacher: Path, shapes: Path, tmp_path: Path
) -> None:
    done = irkd("train", str(student_yaml), "name=a", "teacher.shard=true", "curriculum.epochs=1", world=2)
    assert "in slices of its own" in done.stdout
    torch.manual_seed(0)
    weights = write(tmp_path / "nan.safetensors", 16, embed_dim=32, depth=2, num_heads=2)
    yaml = run_yaml(shapes, tmp_path, weights, "{embed_dim: 32, depth: 3, num_heads: 2}")
    refused = irkd("train", str(yaml), "name=b", world=2, check=False)
    assert refused.returncode == 2
    assert "does not fit VisionTransformer" in refused.stderr
    assert "blocks.2.norm1.weight" in refused.stderr
