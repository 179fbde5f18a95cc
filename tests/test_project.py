"""What somebody who installed with pip alone gets: a project's files, completion, help in the order of use."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from irkd_dist import project
from tests.training.launch import irkd

ROOT = Path(__file__).resolve().parents[1]


def test_init_copies_what_git_has_and_writes_over_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    said = irkd("init", str(folder)).stdout
    listed = subprocess.run(
        ["git", "ls-files", *project.FOLDERS], cwd=ROOT, capture_output=True, text=True, check=True
    )
    copied = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert copied == {*listed.stdout.split()}
    assert f"{len(copied)} files" in said
    for name in copied:
        assert (folder / name).read_bytes() == (ROOT / name).read_bytes()

    (folder / "slurm" / "irkd.sbatch").unlink()
    assert (
        f"1 files in configs, slurm, launchers, examples, {len(copied) - 1} were"
        in irkd("init", str(folder)).stdout
    )
    (folder / "configs" / "demo" / "student.yaml").write_text("seed: 1\n")
    (folder / "slurm" / "irkd.sbatch").unlink()
    refused = irkd("init", str(folder), check=False)
    assert refused.returncode == 2
    assert "configs/demo/student.yaml; nothing is written" in refused.stderr
    assert not (folder / "slurm" / "irkd.sbatch").exists()
    assert (folder / "configs" / "demo" / "student.yaml").read_text() == "seed: 1\n"


def test_a_file_or_a_link_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refused = irkd("init", str(tmp_path / "file"), check=False)
    assert refused.returncode == 2
    assert "is a file; name a folder" in refused.stderr
    (tmp_path / "mine" / "slurm").mkdir(parents=True)
    (tmp_path / "mine" / "slurm" / "irkd.sbatch").symlink_to(tmp_path / "elsewhere")
    assert "slurm/irkd.sbatch" in irkd("init", str(tmp_path / "mine"), check=False).stderr
    assert not (tmp_path / "elsewhere").exists()


def test_somebodys_own_site_is_not_shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "irkd_dist").mkdir()
    for name in project.FOLDERS:
        (tmp_path / name).mkdir()
    (tmp_path / "slurm" / "site.sh").write_text("export SBATCH_ACCOUNT=secret\n")
    (tmp_path / "slurm" / "a.sbatch").write_text("")
    monkeypatch.setattr(project, "__file__", str(tmp_path / "irkd_dist" / "project.py"))
    assert [*map(str, project.shipped())] == ["slurm/a.sbatch"]


def complete(script: str, *words: str) -> list[str]:
    """What a real bash offers for the last of these words."""
    line = " ".join(f"'{w}'" for w in words)
    code = f'{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _irkd; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_completion_in_a_real_bash() -> None:
    script = irkd("completion", "bash").stdout
    assert complete(script, "irkd", "ex") == ["export"]
    assert complete(script, "irkd", "predict", "--t") == ["--top"]
    assert complete(script, "irkd", "predict", "photo") == []  # then bash offers files
    assert {"init", "train", "--version"} <= {*complete(script, "irkd", "")}
    assert "bashcompinit" in irkd("completion", "zsh").stdout


def test_help_names_commands_in_the_order_of_use() -> None:
    names = re.findall(r"^    (\w+)", irkd("--help").stdout, re.MULTILINE)
    order = [
        "demo",
        "init",
        "render",
        "doctor",
        "plan",
        "train",
        "status",
        "evaluate",
        "report",
        "export",
        "predict",
    ]
    assert [n for n in names if n in order] == order


@pytest.mark.parametrize(
    "words",
    [
        ["--help"], ["--version"], ["train", "--help"], ["status", "nothing"], ["init", "x"], ["completion", "bash"],
        ["train", "no.yaml"], ["train", "configs/demo/student.yaml", "optim.lrr=1"],
        ["train", "configs/demo/student.yaml", "optim.lr=fast"], ["train", "configs/demo/student.yaml", "optim.lr=0"],
        ["plan", "configs/demo/student.yaml", "optim.lrr=1"], ["teach", "configs/demo/student.yaml", "optim.lrr=1"],
        ["evaluate", "nothing"], ["report", "nothing"], ["export", "nothing", "--out", "x"],
        ["render", "folder", "--out", "x", "--samples", "train=1"],
    ],
)  # fmt: skip
def test_what_needs_no_torch_imports_none(words: list[str], tmp_path: Path) -> None:
    """And nothing else that is heavy: 0.06 s on a free core, 0.2 s with a configuration; torch alone takes 2 s.

    Processor time, the best of three, since other work on the machine is no fault of these commands.
    """
    best = float("inf")
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "irkd_dist", *words],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if best < 0.4:
            break
    heavy = {"torch", "timm", "torchvision", "matplotlib", "PIL", "rich", "pyarrow", "safetensors"}
    imported = {
        line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time")
    }
    assert "irkd_dist.cli" in imported
    assert not heavy & imported
    assert best < 0.4
