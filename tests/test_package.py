"""What a user installs: the lock, the bill of materials, and the wheel, used from another folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

import irkd_dist
from irkd_dist import project

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pinned(file: str) -> dict[str, str]:
    """Name and version of what a requirements file gives this Python on this machine."""
    lines = re.findall(r"^(\w\S*==[^\\\n]+)", (ROOT / file).read_text(), re.MULTILINE)
    ours = [r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate()]
    return {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in ours}


@pytest.mark.parametrize("file", ["requirements.lock", "requirements-lowest.txt"])
def test_a_lock_has_a_version_of_all_that_is_asked_for(file: str) -> None:
    extras = PROJECT["optional-dependencies"]
    have = pinned(file)
    for requirement in map(
        Requirement, (*PROJECT["dependencies"], *extras["all"], *extras["dev"], *extras["docs"])
    ):
        version = have[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}: {version}; make lock"


def test_a_lowest_version_is_the_bound_itself() -> None:
    """Where it is not, the registry lacks that version, and the bound promises what nobody has tried."""
    have = pinned("requirements-lowest.txt")
    for requirement in map(Requirement, (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["all"])):
        bound = next(s.version for s in requirement.specifier if s.operator == ">=")
        version = have[canonicalize_name(requirement.name)]
        assert version == bound or version.startswith(f"{bound}."), f"{requirement}: {version}"


def test_the_lock_gives_each_file_by_its_hash_and_no_place() -> None:
    text = (ROOT / "requirements.lock").read_text()
    entries = re.split(r"^(?=\w)", text, flags=re.MULTILINE)[1:]
    assert len(entries) > 80
    for entry in entries:
        first, *hashes = entry.replace("\\\n", "\n").strip().splitlines()
        assert re.fullmatch(r"[\w.-]+==[\w.+!]+( ; .+)?", first.strip()), first
        assert hashes, first
        assert all(re.fullmatch(r"\s+--hash=sha256:[0-9a-f]{64}\s*", h) for h in hashes), first


@pytest.mark.skipif("LOCKED" not in os.environ, reason="LOCKED=1 make test installs the locked versions")
def test_what_is_tested_is_what_is_locked() -> None:
    locked = pinned("requirements.lock")
    installed = {canonicalize_name(d.name): d.version for d in distributions()}
    for name in ("pip", "setuptools", "irkd-dist"):  # a new environment's own, and ours
        installed.pop(name, None)
    assert {n: v for n, v in installed.items() if locked.get(n) != v} == {}


def test_the_bill_of_materials(tmp_path: Path) -> None:
    out = tmp_path / "sbom.json"
    script, lock = ROOT / "release" / "sbom.py", ROOT / "requirements.lock"
    subprocess.run([sys.executable, script, out, lock], check=True, cwd=ROOT)
    bill = json.loads(out.read_text())
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["version"] == irkd_dist.__version__
    components = {c["name"].lower(): c for c in bill["components"]}
    for name in ("torch", "timm"):
        assert components[name]["purl"] == f"pkg:pypi/{name}@{components[name]['version']}"
        assert components[name]["licenses"]
    refs = {d["ref"]: d["dependsOn"] for d in bill["dependencies"]}
    assert components["torch"]["bom-ref"] in refs[bill["metadata"]["component"]["bom-ref"]]
    assert {ref for needs in refs.values() for ref in needs} <= set(refs)


def build(out: Path) -> list[Path]:
    """sdist, and the wheel from it, without a network; their times are of 2026."""
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1767225600"}
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return sorted(out.iterdir())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The wheel and the sdist."""
    return build(tmp_path_factory.mktemp("dist"))


def test_builds_are_the_same_byte_for_byte(built: list[Path], tmp_path: Path) -> None:
    again = build(tmp_path)
    assert [f.name for f in again] == [f.name for f in built]
    for one, other in zip(built, again, strict=True):
        assert hashlib.sha256(one.read_bytes()).digest() == hashlib.sha256(other.read_bytes()).digest(), (
            one.name
        )


def test_the_wheel_holds_what_git_has_and_nothing_else(built: list[Path]) -> None:
    """No test, no cache, nothing that lies about untracked."""
    wheel = next(f for f in built if f.suffix == ".whl")
    names = [n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n]
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    configs = {f"irkd_dist/{f}" for f in tracked if f.startswith("configs/")}
    assert {n for n in names if n.startswith("irkd_dist/configs/")} == configs
    ours = {f for f in tracked if f.startswith("irkd_dist/")}
    others = {
        f"irkd_dist/shipped/{f}" for f in tracked if f.split("/")[0] in ("slurm", "launchers", "examples")
    }
    assert {n for n in names if n not in configs} == ours | others


def test_the_installed_wheel_renders_and_trains_from_another_folder(
    built: list[Path], tmp_path: Path
) -> None:
    """In a bare environment that has the dependencies of this one and nothing of the repository."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    wheel = next(f for f in built if f.suffix == ".whl")
    quiet = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", *quiet, wheel], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "env")}))
    # after the wheel in the path; an editable install's own .pth in there is not read
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    here = tmp_path / "elsewhere"
    here.mkdir()

    def run(*arguments: str) -> str:
        command = [tmp_path / "env" / "bin" / "irkd", *arguments]
        done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = [python, "-c", "import irkd_dist; print(irkd_dist.__file__)"]
    found = subprocess.run(
        where, cwd=here, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert found.startswith(str(tmp_path / "env"))
    assert run("--version").strip() == f"irkd_dist {irkd_dist.__version__}"
    run("render", "synthetic", "--samples", "train=40,test=16", "--resolutions", "8,16", "--out", "shards")
    assert "lr: 0.001" in run("train", "configs/cifar10/cpu/kd.yaml", "--print-config", "optim.lr=1e-3")
    student = "student.options={embed_dim: 16, depth: 2, num_heads: 2}"
    stages = "curriculum={stages: [{resolution: 8}, {resolution: 16}], epochs: 1}"
    own = (
        "data.shards=shards",
        "data.batch=16",
        "data.subset=null",
        student,
        "teacher=null",
        "loss.kd.alpha=0",
        "loss.saliency.gamma=0",
    )
    said = run("train", "configs/cifar10/cpu/irkd.yaml", "name=r", "out=runs", *own, stages, "fixed=null")
    assert "test accuracy at 16 px" in said
    assert run("report", "runs/r").strip() == "runs/r/report.html"
    assert "8 px" in run("evaluate", "runs/r")
    run("export", "runs/r", "--to", "timm", "--out", "exported")
    Image.new("RGB", (20, 16), (200, 30, 30)).save(here / "photo.png")
    assert run("predict", "exported", "photo.png", "--csv").count("photo.png") == 1
    run("init", "mine")
    listed = ["git", "ls-files", *project.FOLDERS]
    shipped = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {str(p.relative_to(here / "mine")) for p in (here / "mine").rglob("*") if p.is_file()} == {
        *shipped
    }
