"""`compile` from the configuration: what cannot be compiled is said before the first step."""

from __future__ import annotations

from pathlib import Path

from irkd_dist import config as configuration
from tests.training.launch import irkd

NO_COMPILER = {"CXX": "no-such-compiler"}


def test_without_a_compiler_auto_says_so_and_on_refuses(student_yaml: Path) -> None:
    short = ["curriculum.stages=[{resolution: 12}]", "curriculum.epochs=1", "data.subset=40"]
    assert configuration.load(student_yaml, ["compile=off"]).compile is False
    done = irkd("train", str(student_yaml), *short, "compile=auto", env=NO_COMPILER)
    assert "compile=auto: nothing is compiled, there is no C++ compiler (no-such-compiler)" in done.stdout
    refused = irkd(
        "train", str(student_yaml), *short, "compile=on", "name=refused", env=NO_COMPILER, check=False
    )
    assert refused.returncode == 2
    assert "compile=on, but there is no C++ compiler (no-such-compiler)" in refused.stderr
