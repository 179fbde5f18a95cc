"""Fixtures shared by all tests: real CIFAR-10 where it is at hand, small synthetic shards everywhere."""

import os
import shutil
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


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 110 training, 13 validation and 20 test shapes at 8, 12 and 16 px, with masks."""
    from irkd_dist.data import render
    from irkd_dist.data.sources import open_source

    out = tmp_path_factory.mktemp("shapes")
    source = open_source("synthetic", None, samples={"train": 123, "test": 20}, size=16)
    manifest = render.render(
        source, out, render.Options((8, 12, 16), samples_per_shard=50, val_fraction=0.105)
    )
    assert manifest is not None
    assert manifest.splits == {"train": 110, "val": 13, "test": 20}
    return out


@pytest.fixture(scope="session")
def chromium() -> str:
    """A browser."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI must have a browser: apt-get install chromium")
        pytest.skip("no chromium: apt-get install chromium")
    return found
