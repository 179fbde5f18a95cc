"""What the site has beyond docs/: the README as its first page, notebooks as pages, the Python reference.

Pages link to files of the repository as GitHub wants it (`../examples/timm_loop.py`); here these files come along.
"""

from __future__ import annotations

import json
import posixpath
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import irkd_dist

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Replace `results/*` and `notebooks/*` in the navigation by the pages that there are; `*` takes all others."""
    docs = Path(config.docs_dir)
    pages = sorted(
        str(p.relative_to(docs).with_suffix(".md")) for p in docs.rglob("*") if p.suffix in (".md", ".ipynb")
    )
    named = yaml.safe_dump(config.nav)
    others = [p for p in pages if p not in named and not p.startswith(("results/", "notebooks/"))]
    config.nav = _spread(config.nav, pages, others)
    return config


def _spread(nav: Any, pages: list[str], others: list[str]) -> Any:
    if isinstance(nav, dict):
        return {title: _spread(below, pages, others) for title, below in nav.items()}
    if not isinstance(nav, list):
        return nav
    spread = list[Any]()
    for entry in nav:
        if entry == "*":
            spread += others
        elif isinstance(entry, str) and "*" in entry:
            spread += [page for page in pages if fnmatch(page, entry)]
        else:
            spread.append(_spread(entry, pages, others))
    return spread


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here, and the files of the repository that pages link to."""
    made = {"index.md": (ROOT / "README.md").read_text(), "reference.md": reference()}
    made |= {f.src_uri.replace(".ipynb", ".md"): notebook(f) for f in files if f.src_uri.endswith(".ipynb")}
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        made[f"repository/{name}"] = (ROOT / name).read_text()
    for uri, text in made.items():
        files.append(File.generated(config, uri, content=text))
    linked = {
        repository_path(f.src_uri, t)
        for f in files
        if f.src_uri.endswith(".md")
        for t in _links(f.content_string)
    }
    for place in sorted(filter(None, linked)):
        outside = not place.startswith("docs/") and files.get_file_from_path(f"repository/{place}") is None
        if outside and place != "README.md" and (ROOT / place).is_file():
            files.append(File.generated(config, f"repository/{place}", content=(ROOT / place).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links out of docs/ into links to the copies of what they name; those to folders become their names."""

    def turned(match: re.Match[str]) -> str:
        uri, (target, _, anchor) = page.file.src_uri, match[2].partition("#")
        place = repository_path(uri, target)
        if place is None:
            return match[0]
        inside = place.removeprefix("docs/") if place.startswith("docs/") else f"repository/{place}"
        inside = "index.md" if place == "README.md" else inside
        if files.get_file_from_path(inside) is None:
            inside = next(
                (
                    f.src_uri
                    for f in files
                    if f.src_uri.startswith(f"{inside}/") and f.src_uri.endswith(".md")
                ),
                inside,
            )
        here = posixpath.relpath(inside, posixpath.dirname(uri) or ".")
        return f"{match[1]}{here}{'#' + anchor if anchor else ''}{match[3]}"

    parts = FENCE.split(markdown)
    return "".join(part if n % 2 else LINK.sub(turned, part) for n, part in enumerate(parts))


def repository_path(uri: str, target: str) -> str | None:
    """Where a link of a page leads in the repository, if that is out of docs/ or the page itself is from there."""
    if not target or "://" in target or target.startswith(("#", "mailto:")):
        return None
    outside = uri == "index.md" or uri.startswith("repository/")
    folder = (
        posixpath.dirname(uri.removeprefix("repository/"))
        if outside
        else posixpath.join("docs", posixpath.dirname(uri))
    )
    place = posixpath.normpath(posixpath.join(folder, target.partition("#")[0]))
    return place if outside or not place.startswith("docs/") else None


def _links(text: str) -> list[str]:
    return [m[2] for part in FENCE.split(text)[::2] for m in LINK.finditer(part)]


def notebook(file: File) -> str:
    """A notebook as a page: its words, and its code in blocks."""
    cells = json.loads(file.content_string)["cells"]
    texts = [("".join(c["source"]), c["cell_type"]) for c in cells]
    body = "\n\n".join(text if kind == "markdown" else f"```python\n{text}\n```" for text, kind in texts)
    return f"{body}\n\n[The notebook itself]({posixpath.basename(file.src_uri)})\n"


def reference() -> str:
    """The public interface, taken from the docstrings."""
    head = "# Reference\n\nWhat `import irkd_dist` gives; [python.md](python.md) shows it in use.\n"
    return head + "".join(f"\n::: irkd_dist.{name}\n" for name in irkd_dist.__all__)
