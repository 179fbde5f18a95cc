"""The rules of docs/architecture.md, read from the imports."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "irkd_dist"
LEAVES = [
    "data/recipe.py",
    "data/sampler.py",
    "distill/saliency.py",
    "training/curriculum.py",
    "training/optim.py",
]
ONLY_DOOR = {
    "accelerate": "training/engines",
    "deepspeed": "training/engines/zero.py",
    "fsspec": "data/remote.py",
    "wandb": "training/tracking.py",
}


def imports(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves_import_no_sibling_and_no_configuration(leaf: str) -> None:
    ours = {n for n in imports(PACKAGE / leaf) if n.startswith("irkd_dist")}
    assert ours <= {"irkd_dist.distill", "irkd_dist.distill.losses", "irkd_dist.distill.losses.at_least_fp32"}


@pytest.mark.parametrize("library", ONLY_DOOR)
def test_each_engine_and_tracker_has_one_door(library: str) -> None:
    users = {
        str(f.relative_to(PACKAGE))
        for f in PACKAGE.rglob("*.py")
        if any(n.split(".")[0] == library for n in imports(f))
    }
    assert users
    assert all(user == ONLY_DOOR[library] or user.startswith(f"{ONLY_DOOR[library]}/") for user in users)


def test_only_launchers_import_submitit() -> None:
    assert not [f for f in PACKAGE.rglob("*.py") if any(n.split(".")[0] == "submitit" for n in imports(f))]


def test_data_and_distill_know_nothing_of_training() -> None:
    for folder in ("data", "distill"):
        for file in (PACKAGE / folder).rglob("*.py"):
            assert not any(
                n.startswith("irkd_dist.training") or n == "irkd_dist.config" for n in imports(file)
            ), file


def test_run_folders_and_checkpoints_are_read_without_training() -> None:
    names = "runfolder eventlog files typed networks configured checkpoint writer faults config"
    for file in (f"{name}.py" for name in names.split()):
        assert not any(n.startswith("irkd_dist.training") for n in imports(PACKAGE / file)), file


# names of a run folder that are words of their own too: spelled where a path is joined with them
JOINED = {"best", "panels", "samples", "session", "owner", "figures", "evaluation", "tensorboard"}
SPELLED = re.compile(
    r"(config\.yaml|events\.jsonl|(status|restarts|state|evaluation)\.json|(student|optimizer)\.safetensors|checkpoints"
    r"|report\.html|milestones\.txt|wandb-id\.txt|\.writing-|(\*|stage-.*)?step-.*|rank-.*\.jsonl|stage-.*-epoch-.*)"
)


def strings(file: Path) -> set[str]:
    """Whole strings and the pieces of f-strings, and as `/word` those that a path is joined with; no docstrings."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
        elif isinstance(node, ast.JoinedStr):
            found.add("*".join(str(p.value) for p in node.values if isinstance(p, ast.Constant)))
        elif (
            isinstance(node, ast.BinOp)
            and isinstance(node.op, ast.Div)
            and isinstance(node.right, ast.Constant)
        ):
            found.add(f"/{node.right.value}")
    return found


def test_only_runfolder_spells_the_names_of_a_run_folder() -> None:
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "launchers").glob("*.py")]
    for file in files:
        if file.name not in ("runfolder.py", "hub.py"):  # the second knows torch hub's folder of that name
            spelled = {s for s in strings(file) if SPELLED.fullmatch(s) or s in {f"/{w}" for w in JOINED}}
            assert not spelled, f"{file} spells {spelled}: irkd_dist/runfolder.py has these names"


def test_run_folders_are_looked_at_without_torch() -> None:
    code = "import sys; from irkd_dist import eventlog, runfolder, status; from irkd_dist.training import requeue\n"
    code += "assert not {'torch', 'numpy', 'safetensors'} & set(sys.modules), sorted(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
