"""Writes a CycloneDX bill of what a Python environment holds: python release/sbom.py OUT [LOCK].

Components, licences and dependencies are what the environment's own metadata says, so it is made by the environment's
Python. With a lock, each component gets the sha256 of every file that the lock allows for it.
"""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path
from typing import Any

ROOT = "irkd_dist"


def bill(lock: str = "") -> dict[str, Any]:
    """The bill as plain values; the same environment gives the same one."""
    hashes = _hashes(lock)
    found = {_name(d.name): d for d in distributions()}
    refs = {name: f"pkg:pypi/{name}@{d.version}" for name, d in sorted(found.items())}
    own = _name(ROOT)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": _component(distribution(ROOT), refs[own], [])},
        "components": [
            _component(found[name], ref, hashes.get((name, found[name].version), []))
            for name, ref in refs.items()
            if name != own
        ],
        "dependencies": [{"ref": ref, "dependsOn": _needs(found[name], refs)} for name, ref in refs.items()],
    }


def _component(found: Distribution, ref: str, hashes: list[str]) -> dict[str, Any]:
    component: dict[str, Any] = {
        "type": "library", "name": found.name, "version": found.version, "bom-ref": ref, "purl": ref,
        "licenses": _licences(found), "hashes": [{"alg": "SHA-256", "content": h} for h in hashes],
    }  # fmt: skip
    return {key: value for key, value in component.items() if value}


def _licences(found: Distribution) -> list[dict[str, Any]]:
    expression = found.metadata.get("License-Expression")
    if expression:
        return [{"expression": expression}]
    classified = [
        c.split(" :: ")[-1] for c in found.metadata.get_all("Classifier", []) if c.startswith("License ::")
    ]
    told = (found.metadata.get("License") or "").splitlines()
    return [{"license": {"name": name}} for name in classified or told[:1] if name]


def _needs(found: Distribution, refs: dict[str, str]) -> list[str]:
    """What it names and the environment has; extras that were not asked for are not there, or are there for others."""
    names = {
        _name(re.split(r"[^\w.-]", text, maxsplit=1)[0])
        for text in found.requires or []
        if "extra ==" not in text
    }
    return sorted(refs[name] for name in names if name in refs)


def _hashes(lock: str) -> dict[tuple[str, str], list[str]]:
    """By (name, version), of a file as `make lock` writes it: a line each, hashes on lines of their own."""
    found: dict[tuple[str, str], list[str]] = {}
    for line in lock.splitlines():
        if pinned := re.match(r"([\w.-]+)==([^\s;]+)", line):
            present = found.setdefault((_name(pinned[1]), pinned[2]), [])
        elif digest := re.search(r"--hash=sha256:([0-9a-f]{64})", line):
            present.append(digest[1])
    return found


def _name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    text = Path(sys.argv[2]).read_text() if len(sys.argv) > 2 else ""
    Path(sys.argv[1]).write_text(json.dumps(bill(text), indent=1) + "\n")
