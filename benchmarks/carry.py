"""Pack what a machine with a GPU but without a network lacks: wheels and data in one folder.

    python benchmarks/carry.py [DATA ...] [--present torch torchvision ...] [--with deepspeed pytest]

The wheels are those of pyproject.toml's dependencies and of `--with`, with all that they need, in the versions that are
installed here, for Python 3.12 on x86-64 Linux; without what `--present` names and needs, which the other machine has.
There, in the root of the repository:

    . carry/install.sh

installs them into a folder of its own (/tmp/carried, or $SITE) and puts that and the repository on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
TARGET = {
    "python_version": "3.12", "python_full_version": "3.12.3", "implementation_name": "cpython", "extra": "",
    "sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix",
}  # fmt: skip
GLIBC = (28, 27, 26, 24, 17, 12, 5)  # of manylinux tags; pip takes each by its name alone
PRESENT = ("torch", "torchvision", "accelerate", "safetensors", "matplotlib", "pyarrow")
INSTALL = """\
python3 -c "import {present}" && python3 -m pip install --quiet --no-index --no-deps --no-compile --upgrade \\
    --target "${{SITE:=/tmp/carried}}" carry/*.whl &&
export PYTHONPATH="$PWD:$SITE"
"""


def closure(names: list[str], known: dict[str, str]) -> dict[str, str]:
    """Packages with all that they need on the other machine, without those known: name -> version installed here.

    Raises:
        SystemExit: one of them is not installed here.
    """
    found: dict[str, str] = {}
    waiting = [canonicalize_name(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found or name in known:
            continue
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise SystemExit(f"{name} is not installed here, so its version is not known") from None
        found[name] = package.version
        needs = [Requirement(text) for text in package.requires or ()]
        waiting += [
            canonicalize_name(n.name) for n in needs if n.marker is None or n.marker.evaluate(dict(TARGET))
        ]
    return found


def fetch(name: str, version: str, out: Path) -> None:
    """Put a package's wheel for the other machine into a folder; built from its source where there is none."""
    pip = [sys.executable, "-m", "pip", "--quiet"]
    platforms = [f"--platform=manylinux_2_{n}_x86_64" for n in GLIBC]
    platforms += [f"--platform={name}_x86_64" for name in ("manylinux2014", "manylinux1", "linux")]
    ready = subprocess.run(
        [*pip, "download", "--no-deps", "--only-binary=:all:", "--python-version=3.12", "--implementation=cp",
         "--dest", str(out), *platforms, f"{name}=={version}"],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    if ready.returncode == 0:
        return
    before = set(out.iterdir())
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), f"{name}=={version}"],
        check=True,
    )
    (built,) = set(out.iterdir()) - before
    if not built.name.endswith("-none-any.whl"):
        raise SystemExit(f"{built.name} is of this machine's Python: {name} has no wheel for the other one")


def size(paths: list[Path]) -> float:
    """MiB of files."""
    return sum(path.stat().st_size for path in paths) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="*", type=Path, help="files or folders to take along")
    parser.add_argument(
        "--present",
        nargs="*",
        default=PRESENT,
        help="packages that the other machine has, with what they need (install.sh looks whether it has)",
    )
    parser.add_argument("--with", nargs="*", dest="extra", default=["deepspeed", "pytest"])
    parser.add_argument("--limit-mib", type=float, default=64.0, help="of the folder and all tracked files")
    arguments = parser.parse_args()
    out = ROOT / "carry"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(text).name for text in project["dependencies"]]
    wheels = closure([*wanted, *arguments.extra], closure([*arguments.present], {}))
    for name, version in sorted(wheels.items()):
        fetch(name, version, out)
    for given in arguments.data:
        if given.is_dir():
            shutil.copytree(given, out / given.name)
        else:
            shutil.copy(given, out)
    (out / "install.sh").write_text(INSTALL.format(present=", ".join(arguments.present)))

    files = sorted((f for f in out.rglob("*") if f.is_file()), key=lambda f: -f.stat().st_size)
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    own = size([ROOT / name for name in tracked.stdout.split("\0") if name and (ROOT / name).is_file()])
    for file in files[:8]:
        print(f"{size([file]):7.1f} MiB  {file.relative_to(out)}")
    print(f"{len(wheels)} wheels; with data {size(files):.1f} MiB, and the repository's {own:.1f} MiB")
    if size(files) + own > arguments.limit_mib:
        raise SystemExit(
            f"more than {arguments.limit_mib:g} MiB: take fewer data along, or name with --present what is there"
        )
    print(f"there, in the repository's root: . {out.relative_to(ROOT)}/install.sh")


if __name__ == "__main__":
    main()
