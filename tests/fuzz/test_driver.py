"""The driver itself: it tells a crash, a hang, a wrong exception and a message for no terminal from what is well."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest

from irkd_dist.errors import UserError
from tests.fuzz import driver, targets


def _user_error(_data: bytes) -> None:
    raise UserError("shards/manifest.json is not valid JSON")


def _bug(_data: bytes) -> None:
    raise KeyError("x")


def _slow(_data: bytes) -> None:
    while True:
        pass


def _crash(_data: bytes) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _memory(_data: bytes) -> None:
    bytearray(64 << 30)


@pytest.mark.parametrize(
    ("target", "found"),
    [(len, None), (_user_error, None), (_bug, "KeyError"), (_slow, "TooLong"),
     (_crash, "SIGSEGV"), (_memory, "MemoryError")],
)  # fmt: skip
def test_each_end_is_told(monkeypatch: pytest.MonkeyPatch, target: Callable, found: str | None) -> None:
    monkeypatch.setitem(targets.TARGETS, "status", target)
    monkeypatch.setattr(driver, "LIMIT", 0.3)
    result = driver.run("status", 0.5, 1)
    assert result.inputs >= 1
    if found is None:
        assert not result.findings
        assert (result.refused == result.inputs) == (target is _user_error)
    else:
        assert any(found in f.message for f in result.findings.values()), result.findings
        assert all(isinstance(f.data, bytes) for f in result.findings.values())


def test_what_does_not_come_back_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(_data: bytes) -> None:
        time.sleep(60)

    monkeypatch.setitem(targets.TARGETS, "status", hang)
    monkeypatch.setattr(driver, "KILL", 0.5)
    result = driver.run("status", 0.5, 1)
    assert any("hangs" in where for where in result.findings)


def test_a_finding_is_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    def target(data: bytes) -> None:
        if b"{" in data:
            raise KeyError("brace")

    monkeypatch.setitem(targets.TARGETS, "status", target)
    result = driver.run("status", 1.0, 1)
    assert [f.data for f in result.findings.values()] == [b"{"]
