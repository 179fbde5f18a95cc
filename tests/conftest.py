"""Fixtures shared by all tests: real CIFAR-10 where it is at hand, small synthetic shards everywhere."""

import os
from pathlib import Path

import pytest

CIFAR = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10"


@pytest.fixture(scope="session")
def cifar_parquet() -> Path:
    """Folder with CIFAR-10 in the Hugging Face parquet layout; $IRKD_CIFAR10 names another one."""
    folder = Path(os.environ.get("IRKD_CIFAR10", CIFAR))
    if not any(folder.glob("*.parquet")):
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must have CIFAR-10 parquet files in {folder}")
        pytest.skip(f"no CIFAR-10 parquet files in {folder}; set IRKD_CIFAR10 to a folder that has them")
    return folder
