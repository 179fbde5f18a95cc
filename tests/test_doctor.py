"""`irkd doctor` on real processes: what is well, what is damaged, and processes that differ, hang or are not there."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from irkd_dist import checkpoint, doctor, examination
from irkd_dist.config import Config, Data, Fixed
from irkd_dist.data import shards
from tests.training.conftest import STUDENT_YAML, teacher  # noqa: F401  (a fixture)
from tests.training.launch import REPOSITORY, irkd

CE = """
data: {{batch: 32, shards: {shards}}}
student: {{options: {{embed_dim: 16, depth: 2, num_heads: 2}}}}
fixed: {{resolution: 8, epochs: 1}}
track: {{backend: wandb, mode: online}}
out: {out}
"""


def lines(said: str) -> dict[str, tuple[str, str]]:
    """name -> (level, text) of the checks in a doctor's output."""
    found = re.findall(r"^(ok|warn|FAIL) +(.{14}) (.*)$", said, re.M)
    return {name.strip(): (level, text) for level, name, text in found}


def test_a_run_on_two_processes_is_ready(shapes: Path, teacher: Path, tmp_path: Path) -> None:  # noqa: F811
    file = tmp_path / "student.yaml"
    file.write_text(STUDENT_YAML.format(shards=shapes, teacher=teacher, out=tmp_path / "runs"))
    said = irkd("doctor", str(file), "track.backend=wandb", world=2).stdout
    checks = lines(said)
    assert {level for level, _ in checks.values()} == {"ok"}, said
    assert list(checks) == [
        "rendezvous", "versions", "devices", "fused kernels", "bf16", "all-reduce", "file system", "tracking",
        "configuration", "shards", "teacher", "batch", "student", "step at 12 px", "step at 16 px",
    ]  # fmt: skip
    assert "2 processes announced" in checks["rendezvous"][1]
    assert "GB/s" in checks["all-reduce"][1]
    assert "checksums agree" in checks["shards"][1]
    assert "32 over 2 processes: 16 each; 4 steps an epoch, the last has 14" in checks["batch"][1]
    assert "W&B offline" in checks["tracking"][1]
    assert float(re.search(r"peak ([\d.]+) GiB", checks["step at 16 px"][1])[1]) > 0.1  # type: ignore[index]
    assert int(re.search(r"^ready \((\d+) s\)$", said, re.M)[1]) < 60  # type: ignore[index]
    assert not (tmp_path / "runs").exists()  # nothing of the run is written
    assert [f.name for f in tmp_path.iterdir()] == ["student.yaml"]


def test_a_damaged_shard_and_an_absent_server_are_two_failures(shapes: Path, tmp_path: Path) -> None:
    data = shutil.copytree(shapes, tmp_path / "shards")
    tar = next((data / "r8").glob("train*.tar"))
    content = bytearray(tar.read_bytes())
    content[600] ^= 1
    tar.write_bytes(content)
    (tmp_path / "ce.yaml").write_text(CE.format(shards=data, out=tmp_path / "runs"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env = {"WANDB_BASE_URL": f"http://127.0.0.1:{free.getsockname()[1]}"}
        done = irkd("doctor", str(tmp_path / "ce.yaml"), env=env, check=False)
    checks = lines(done.stdout)
    assert done.returncode == 1
    assert checks["shards"] == (
        "FAIL", f"{tar} is altered: its sha256 is not the manifest's; `irkd render` with the same arguments repairs "
        "what is damaged",
    )  # fmt: skip
    assert checks["tracking"][0] == "FAIL"
    assert "does not answer" in checks["tracking"][1]
    assert not any(name.startswith("step") for name in checks)
    assert "not ready: 2 checks failed" in done.stdout


def test_a_teacher_of_other_classes(
    shapes: Path,
    teacher: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    other = shutil.copytree(teacher, tmp_path / "other")
    for file in other.rglob("state.json"):
        content = checkpoint.read(file.parent)
        state = {k: v for k, v in content.state.items() if k not in ("version", "sha256")}
        state["classes"] = [*state["classes"][:-1], "unicorn"]
        checkpoint.save(file.parent, content.student, content.optimizer, state)
    file = tmp_path / "student.yaml"
    file.write_text(STUDENT_YAML.format(shards=shapes, teacher=other, out=tmp_path))
    done = irkd("doctor", str(file), check=False)
    assert done.returncode == 1
    level, text = lines(done.stdout)["teacher"]
    assert level == "FAIL"
    assert "'unicorn'" in text
    assert "not ready: 1 check failed" in done.stdout


def test_a_wrong_configuration_is_a_failure(tmp_path: Path) -> None:
    done = irkd("doctor", "configs/cifar10/cpu/ce.yaml", "optim.lrr=1", check=False)
    assert done.returncode == 1
    assert "did you mean lr?" in lines(done.stdout)["configuration"][1]


def test_a_batch_of_fewer_images_than_processes_is_a_warning(shapes: Path) -> None:
    config = Config(data=Data(batch=2), fixed=Fixed(8, 1))
    with pytest.raises(
        examination.Warn, match="2 over 3 processes: 0 to 1 each; 55 steps an epoch, the last has 2"
    ):
        doctor._batch(SimpleNamespace(world=3), config, shards.load_manifest(shapes))  # type: ignore[arg-type]


WORKER = """
import os, sys, time
from irkd_dist import doctor, doctor_machine, examination
doctor_machine.VISIBLE_S, examination.PATIENCE_S = 1.0, 5.0
kind = sys.argv[1]
if os.environ["RANK"] == "1" and kind == "differ":
    os.chdir(sys.argv[2])
    doctor_machine.version = lambda name: "0.0.1"
if os.environ["RANK"] == "1" and kind == "hang":
    doctor_machine._bf16 = lambda *_: time.sleep(100)
sys.exit(doctor.doctor(None, []))
"""


def worker(tmp_path: Path, kind: str) -> subprocess.CompletedProcess[str]:
    """Two processes under torchrun, of which the second is not well."""
    script, elsewhere = tmp_path / "worker.py", tmp_path / "elsewhere"
    script.write_text(WORKER)
    elsewhere.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, str(script), kind, str(elsewhere)], cwd=tmp_path, capture_output=True, text=True, timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip


def test_processes_that_differ_are_named(tmp_path: Path) -> None:
    done = worker(tmp_path, "differ")
    checks = lines(done.stdout)
    assert done.returncode != 0
    assert checks["versions"][0] == "FAIL"
    assert re.search(
        r"; rank 1 on \S+ has .*timm 0\.0\.1.*: install the same everywhere", checks["versions"][1]
    )
    assert checks["file system"][0] == "FAIL"
    assert checks["file system"][1].startswith("rank 1 on")
    assert f"{tmp_path / 'elsewhere'}: what rank 0 writes" in checks["file system"][1]


def test_a_process_that_hangs_ends_the_examination(tmp_path: Path) -> None:
    done = worker(tmp_path, "hang")
    assert done.returncode != 0
    level, text = lines(done.stdout)["bf16"]
    assert level == "FAIL"
    assert "no answer for 5 s" in text


def test_a_rendezvous_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        for key, value in {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "WORLD_SIZE": "2",
            "RANK": "1",
        }.items():
            monkeypatch.setenv(key, value)
        monkeypatch.setattr(examination, "REACH_S", 0.5)
        assert doctor.doctor(None, []) == 1
    assert re.search(
        rf"FAIL +rendezvous +rank 1 on \S+: 127\.0\.0\.1:{port} cannot be reached", capsys.readouterr().out
    )


def test_slurm_outside_of_an_allocation_is_one_line() -> None:
    done = irkd("doctor", "--slurm", check=False)
    assert done.returncode == 2
    assert "SLURM_JOB_ID is not set" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
