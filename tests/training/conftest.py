"""A small trained teacher and a student's configuration, shared by the process tests."""

from pathlib import Path

import pytest

from tests.training.launch import irkd

STUDENT_YAML = """
data: {{batch: 32, shards: {shards}}}
student: {{name: custom, patch: 4, options: {{embed_dim: 32, depth: 3, num_heads: 2}}}}
teacher: {{run: {teacher}}}
loss: {{kd: {{alpha: 1.0}}, saliency: {{gamma: 0.8}}}}
curriculum: {{stages: [{{resolution: 12}}, {{resolution: 16}}], epochs: 2}}
precision: fp32
track: {{log_every: 1, panels: 2}}
out: {out}
"""


TEACHER_YAML = """
data: {{batch: 32, shards: {shards}}}
student: {{name: custom, patch: 4, options: {{embed_dim: 48, depth: 4, num_heads: 2}}}}
fixed: {{resolution: 16, epochs: 2}}
optim: {{lr: 1e-3}}
precision: fp32
checkpoint: {{keep_epochs: 1}}
out: {out}
"""


@pytest.fixture(scope="session")
def teacher(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a teacher trained for two epochs on the shapes."""
    out = tmp_path_factory.mktemp("teacher")
    (out / "teacher.yaml").write_text(TEACHER_YAML.format(shards=shapes, out=out))
    irkd("train", str(out / "teacher.yaml"))
    return out / "teacher-seed0"


@pytest.fixture
def student_yaml(shapes: Path, teacher: Path, tmp_path: Path) -> Path:
    """A student with KD and saliency through two stages of two epochs, four steps each."""
    file = tmp_path / "student.yaml"
    file.write_text(STUDENT_YAML.format(shards=shapes, teacher=teacher, out=tmp_path))
    return file
