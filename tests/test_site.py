"""The site that `make docs` builds: strictly, complete, and without a request to another host when it is read."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import irkd_dist
from pages import reference

ROOT = Path(__file__).resolve().parents[1]
# what a browser fetches by itself to show a page: element -> attribute
FETCHED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "object": "data"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make docs` builds it."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


class Page(HTMLParser):
    """What a page fetches, where it links to, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched, self.links, self.anchors = set[str](), set[str](), set[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if (
            tag in FETCHED
            and (target := given.get(FETCHED[tag]))
            and given.get("rel") not in ("next", "prev", "canonical")
        ):
            self.fetched.add(target)
        if tag == "a" and (target := given.get("href")):
            self.links.add(target)
        self.anchors |= {value for name, value in attrs if name == "id" and value}


def test_no_page_asks_another_host(site: Path) -> None:
    pages = [*site.rglob("*.html")]
    assert len(pages) > 20
    for page in pages:
        text = page.read_text()
        assert not [u for u in Page(text).fetched if urlsplit(u).netloc], page
        assert 'class="mermaid"' not in text, f"{page}: the theme would fetch mermaid from a host of its own"
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//[^)]*", sheet.read_text()), sheet


def test_what_a_page_names_is_there(site: Path) -> None:
    pages = {page: Page(page.read_text()) for page in site.rglob("*.html") if page.name != "404.html"}
    for page, found in pages.items():
        for target in found.fetched | found.links:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            file = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            file = file / "index.html" if file.is_dir() else file
            assert file.is_file(), f"{page.relative_to(site)}: {target}"
            if parts.fragment and file in pages:
                assert unquote(parts.fragment) in pages[file].anchors, f"{page.relative_to(site)}: {target}"


def test_the_reference_has_every_public_name_and_every_key(site: Path) -> None:
    anchors = Page((site / "reference.html").read_text()).anchors
    assert {f"irkd_dist.{name}" for name in irkd_dist.__all__} <= anchors | {
        a.replace("irkd_dist.api.", "irkd_dist.") for a in anchors
    }
    text = reference.page()
    assert reference.PAGE.read_text() == text, "run: python pages/reference.py"
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    silent = [row[0] for row in rows if len(row) != 5 or not row[4].strip(" |")]
    assert not silent, f"no remark at {silent} in irkd_dist/config.py"
    assert [row[1:4] for row in rows if row[0] == "| `data.batch`"] == [
        ["integer > 0 and ≤ 2^20", "`128`", "semantic"]
    ]
    assert next(row[2:4] for row in rows if row[0] == "| `engine`") == ['`"auto"`', "operational"]
    assert [row[3] for row in rows if row[0] == "| `track.panels`"] == ["operational"]
