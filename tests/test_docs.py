"""Code in docs/ and examples/ runs as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def blocks(page: str) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)


@pytest.mark.parametrize("example", sorted(p.name for p in (ROOT / "examples").glob("*.py")))
def test_an_example_runs(example: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / example), "--steps", "2"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "step 1: loss" in done.stdout


def test_the_page_on_python(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first block at toy size: another configuration and another photo."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), (200, 30, 30)).save("photo.jpg")
    (tmp_path / "own.yaml").write_text(
        f"data: {{shards: {shapes}, batch: 64}}\nfixed: {{resolution: 16, epochs: 1}}\ntrack: {{panels: 0}}\n"
        "student: {options: {embed_dim: 32, depth: 2, num_heads: 2}}\n"
    )
    first, second = blocks("docs/python.md")
    names: dict[str, object] = {}
    exec(first.replace("configs/cifar10/vit_tiny_p4_irkd.yaml", str(tmp_path / "own.yaml")), names)
    assert names["logits"].shape == (1, 10)  # type: ignore[attr-defined]
    assert names["result"]["accuracy"]  # type: ignore[index]
    exec(second, names)
    assert names["picture"].shape == (2, 7, 7)  # type: ignore[attr-defined]
