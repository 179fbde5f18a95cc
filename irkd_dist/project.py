"""`irkd init`: the files that a project of one's own starts from, as the package ships them."""

from __future__ import annotations

import shutil
from pathlib import Path

from irkd_dist.errors import UserError

FOLDERS = ("configs", "slurm", "launchers", "examples")
KINDS = (".yaml", ".json", ".sbatch", ".sh", ".py")
SITE = "site.sh"  # the settings of somebody's own cluster: never shipped, never copied


def shipped() -> dict[Path, Path]:
    """Path in a project -> file of the installed package, or of the checkout that it runs from."""
    package = Path(__file__).resolve().parent
    found = dict[Path, Path]()
    for name in FOLDERS:
        places = (package / "shipped" / name, package / name, package.parent / name)
        folder = next((f for f in places if f.is_dir()), None)
        if folder is None:
            raise FileNotFoundError(f"this installation of irkd_dist has no {name}/; install it again")
        for file in sorted(folder.rglob("*")):
            if file.suffix in KINDS and file.name != SITE:
                found[Path(name) / file.relative_to(folder)] = file
    return found


def init(folder: Path) -> tuple[int, int]:
    """Copy configurations, SLURM scripts, launchers and examples to `folder`; nothing is written over.

    Returns:
        How many files were written, and how many were there already with the same content.

    Raises:
        UserError: a file of the user's has the name of one of these and another content; then none is written.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder")
    files = shipped()
    there = {name for name in files if (folder / name).exists() or (folder / name).is_symlink()}
    differ = [str(name) for name in sorted(there) if not _same(folder / name, files[name])]
    if differ:
        more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise UserError(
            f"{folder} has files of its own under our names: {', '.join(differ[:5])}{more}; nothing is written. "
            "Name another folder, or move them away"
        )
    for name, file in files.items():
        if name not in there:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder / name)
    return len(files) - len(there), len(there)


def _same(theirs: Path, ours: Path) -> bool:
    return theirs.is_file() and theirs.read_bytes() == ours.read_bytes()
