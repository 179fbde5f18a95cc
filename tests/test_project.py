"""What somebody who installed with pip alone gets: a project's files, completion, help in the order of use."""

from __future__ import annotations

import re
import subprocess
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
    order = ["init", "render", "train", "status", "evaluate", "report", "export", "predict"]
    assert [n for n in names if n in order] == order


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["status", "nothing"], ["train", "no.yaml"], ["init", "x"]]
)
def test_trivial_commands_import_no_torch(words: list[str], tmp_path: Path) -> None:
    """Time on a busy machine says little; what costs it are these packages."""
    import sys

    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "irkd_dist", *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    heavy = {"torch", "timm", "torchvision", "numpy", "matplotlib", "PIL", "rich"}
    imported = {
        line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time")
    }
    assert "irkd_dist.cli" in imported
    assert not heavy & imported
