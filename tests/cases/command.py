"""Whole commands: in this process where that is safe, else in one of their own that may crash, hang or be killed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from irkd_dist import cli
from tests.training.launch import _SERVER as SERVER


@dataclass(frozen=True)
class Done:
    """How a command ended. code is None if it had to be killed, negative if a signal ended it."""

    code: int | None
    out: str
    err: str

    @property
    def said(self) -> str:
        """All it printed."""
        return self.out + self.err

    def well(self, *words: str) -> Done:
        """Assert that it ended with 0, without a traceback, and said these words."""
        assert self.code == 0, self.said[-3000:]
        return self._says(words)

    def refused(self, *words: str) -> Done:
        """Assert that it ended with 2 and said these words in its error."""
        assert self.code == 2, self.said[-3000:]
        assert any(line.startswith("irkd: error: ") for line in self.err.splitlines()), self.err
        missing = [word for word in words if word not in self.err]
        assert not missing, self.err
        return self._says(())

    def well_or_refused(self, *words: str) -> Done:
        """Assert one of both, and that it said these words either way."""
        assert self.code in (0, 2), self.said[-3000:]
        return self._says(words)

    def _says(self, words: tuple[str, ...]) -> Done:
        assert "Traceback" not in self.said, self.said[-3000:]
        missing = [word for word in words if word not in self.said]
        assert not missing, self.said[-3000:]
        return self


def irkd(*arguments: object) -> Done:
    """Run `irkd ...` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main([str(a) for a in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        except Exception:
            traceback.print_exc()
            code = 1
    return Done(code, out.getvalue(), err.getvalue())


class Process:
    """`irkd ...` in a process of its own, forked from one that has imported torch already."""

    def __init__(
        self, *arguments: object, cwd: Path | None = None, env: dict[str, str | None] | None = None
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name, name) for name in ("out", "err")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        environment = {k: v for k, v in environment.items() if v is not None}
        self._process = SERVER.Process(
            target=_become,
            args=([str(a) for a in arguments], str(cwd or Path.cwd()), environment, self._outputs),
        )
        self._process.start()

    def wait(self, limit: float = 60.0) -> Done:
        """Its end; it is killed when the limit (s) is over."""
        self._process.join(limit)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
            self._process.join()
        with self._folder:
            return Done(code, *(o.read_text(errors="replace") for o in self._outputs))

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.exitcode is None


def irkd_alone(
    *arguments: object, limit: float = 60.0, cwd: Path | None = None, env: dict[str, str | None] | None = None
) -> Done:
    """Run `irkd ...` in a process of its own, for at most `limit` seconds."""
    return Process(*arguments, cwd=cwd, env=env).wait(limit)


def _become(arguments: list[str], cwd: str, environment: dict[str, str], outputs: list[Path]) -> None:
    for stream, path in zip((sys.stdout, sys.stderr), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    encoding = environment.get("PYTHONIOENCODING")
    if encoding:
        sys.stdout.reconfigure(encoding=encoding)
        sys.stderr.reconfigure(encoding=encoding)
    os.chdir(cwd)
    sys.argv = ["irkd", *arguments]
    runpy.run_module("irkd_dist", run_name="__main__", alter_sys=True)


def write_config(file: Path, shards: Path, **changes: Any) -> Path:
    """A configuration of the smallest job beside which `changes` are put, by key; runs go beside the file."""
    tree = {
        "data": {"shards": str(shards), "batch": 16, "workers": 1},
        "student": {"name": "custom", "patch": 4, "options": {"embed_dim": 16, "depth": 2, "num_heads": 2}},
        "fixed": {"resolution": 16, "epochs": 1},
        "precision": "fp32",
        "track": {"log_every": 1, "panels": 0},
        "out": str(file.parent / "runs"),
        **changes,
    }
    file.write_text(yaml.safe_dump({k: v for k, v in tree.items() if v is not None}, allow_unicode=True))
    return file


def manifest_of(shards: Path) -> dict[str, Any]:
    """manifest.json."""
    return json.loads((shards / "manifest.json").read_text())


def until(condition: Any, limit: float = 60.0) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, "never came true"
        time.sleep(0.02)
