"""The site: built without a warning, whole, of files of its own alone, and as wide as the window."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.docs.blocks import ROOT
from tests.report.test_page_browser import AXE, SERIOUS
from tests.report.test_page_browser import browser as browser

APART = Path(sys.prefix) / "docs"  # where `make setup` puts Sphinx and what it needs
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not APART.is_dir(), reason="Sphinx is not installed beside the environment; make setup does it"),
]
PAGES = sorted(path.stem for path in (ROOT / "docs").glob("*.md"))
WIDTHS = (390, 1280)
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "srcset", "object": "data", "video": "src", "audio": "src"}
KEPT = {"stylesheet", "icon", "preload", "manifest", "prefetch", "modulepreload"}


HERE = shutil.which("chromium") and shutil.which("chromedriver") and find_spec("selenium") and AXE
in_a_browser = pytest.mark.skipif(not HERE, reason="no chromium with its driver, selenium or axe-core here: `make setup` installs them")


class Read(HTMLParser):
    """What a page loads by itself, and where it leads."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.leads: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        said = {key: value or "" for key, value in attrs}
        if tag == "a":
            self.leads.add(said.get("href", "").partition("#")[0])
        if tag == "link" and KEPT & {*said.get("rel", "").split()}:
            self.loads.append(said["href"])
        if said.get(LOADED.get(tag, "")):
            self.loads.append(said[LOADED[tag]])


def built(source: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Build a site as ``make docs`` does; a warning is an error."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", *more, str(source), str(out)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{APART}"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the site."""
    out = tmp_path_factory.mktemp("site")
    done = built(ROOT / "docs", out / "html", "-d", str(out / "trees"))
    assert (done.returncode, done.stderr) == (0, "")
    return out / "html"


def test_it_is_built_as_make_does_it() -> None:
    said = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "-m sphinx -W --keep-going -q docs build/docs" in said
    assert "build/" in (ROOT / ".gitignore").read_text(encoding="utf-8").split()


def test_each_page_is_reached_from_the_first(site: Path) -> None:
    seen, ahead = set(), {"index.html"}
    while ahead:
        seen |= (now := ahead)
        ahead = {link for page in now for link in Read(site / page).leads if (site / link).is_file() and link.endswith(".html")} - seen
    assert seen >= {f"{page}.html" for page in PAGES}


def test_a_browser_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in site.glob("*.html"):
        for load in Read(page).loads:
            assert (site / load.partition("?")[0]).is_file(), f"{page.name}: {load}"
    for style in site.rglob("*.css"):
        told = style.read_text(encoding="utf-8")
        assert not re.search(r"@import|url\(\s*['\"]?(https?:)?//", told), style.name


def test_what_lies_outside_is_where_its_page_is(site: Path) -> None:
    assert "trial.html" in Read(site / "federation.html").leads
    assert not [link for page in site.glob("*.html") for link in Read(page).leads if link.endswith(".md")]


def test_a_link_that_leads_nowhere_stops_it(tmp_path: Path) -> None:
    (tmp_path / "index.md").write_text("# A\n\n[b](b.md#nowhere)\n\n```{toctree}\nb\n```\n")
    (tmp_path / "b.md").write_text("# B\n\n## There\n")
    done = built(tmp_path, tmp_path / "out", "-C", "-D", "extensions=myst_parser", "-D", "myst_heading_anchors=3")
    assert done.returncode != 0
    assert "'nowhere'" in done.stderr


@in_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("page", ["method_table", "concepts"])
def test_nothing_shuts_readers_out(site: Path, browser: Any, page: str, scheme: str) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get((site / f"{page}.html").as_uri())
    assert AXE is not None
    browser.execute_script((Path(str(AXE.origin)).parent / "axe.min.js").read_text("utf-8"))
    found = browser.execute_async_script("const done = arguments[0]; axe.run().then(each => done(each.violations))")
    assert [(each["id"], each["nodes"][0]["html"]) for each in found if each["impact"] in SERIOUS] == []


@in_a_browser
def test_no_page_is_wider_than_the_window_and_its_pictures_are_drawn(site: Path, browser: Any) -> None:
    wide = "return document.documentElement.scrollWidth"
    undrawn = "return [...document.images].filter(image => !image.complete || !image.naturalWidth).map(image => image.src)"
    for page, width in product(PAGES, WIDTHS):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get((site / f"{page}.html").as_uri())
        assert browser.execute_script(wide) <= width, f"{page} at {width}"
        assert browser.execute_script(undrawn) == [], page
