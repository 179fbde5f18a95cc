"""The rules of docs/architecture.md, read from the imports."""

import ast
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
    "accelerate": "training/engines.py",
    "deepspeed": "training/engines.py",
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
    assert users <= {ONLY_DOOR[library]}


def test_only_launchers_import_submitit() -> None:
    assert not [f for f in PACKAGE.rglob("*.py") if any(n.split(".")[0] == "submitit" for n in imports(f))]


def test_data_and_distill_know_nothing_of_training() -> None:
    for folder in ("data", "distill"):
        for file in (PACKAGE / folder).rglob("*.py"):
            assert not any(
                n.startswith("irkd_dist.training") or n == "irkd_dist.config" for n in imports(file)
            ), file


def test_run_folders_and_checkpoints_are_read_without_training() -> None:
    for file in ("runs.py", "checkpoint.py", "faults.py", "config.py"):
        assert not any(n.startswith("irkd_dist.training") for n in imports(PACKAGE / file)), file
