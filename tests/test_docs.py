"""The documentation site: it builds strictly, every page opens in a browser, and no page is wider than a phone."""

from __future__ import annotations

import functools
import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.browser import headless_chromium

ROOT = Path(__file__).resolve().parents[1]
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a broken link, an unknown anchor or a bad docstring of the API fails."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def _pages(site: Path) -> list[str]:
    return sorted(str(path.relative_to(site)) for path in site.rglob("*.html") if path.name != "404.html")


def test_generated_parts_are_filled_in(site: Path) -> None:
    for name in _pages(site):
        text = (site / name).read_text()
        assert not re.search(r"&lt;!-- (table|file):|<!-- (table|file):", text), name
    assert "INT8 tensor cores" in (site / "hardware.html").read_text()
    assert "w4a4-g64" in (site / "recipes.html").read_text()
    assert "export_key" in (site / "artifact.html").read_text()
    assert "--average-bits" in (site / "commands.html").read_text()
    for name in ("export_model", "plan_schedule", "inspect_export", "from_pretrained"):
        assert name in (site / "api.html").read_text()


def test_every_error_class_is_listed_with_remedies(site: Path) -> None:
    from dvdquant import errors

    text = (site / "errors.html").read_text()
    for name in errors.__all__:
        assert name == "DvdquantError" or f'id="{name.lower()}"' in text
    assert "download the model again" in text


def test_no_page_asks_for_anything_from_elsewhere(site: Path) -> None:
    for name in _pages(site):
        text = (site / name).read_text()
        loaded = re.findall(
            r'<(?:script|img|iframe)[^>]+src="([^"]+)"|<link[^>]+rel="stylesheet"[^>]+href="([^"]+)"', text
        )
        assert [url for pair in loaded for url in pair if url.startswith(("http:", "https:", "//"))] == [], name


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from headless_chromium()


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """The site served on the loopback interface."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scripts", "largest"), [(True, 6), (False, None), pytest.param(True, None, marks=pytest.mark.stress)]
)
def test_pages_fit_a_phone_and_show_no_fault(
    scripts: bool, largest: int | None, browser: Any, address: str, site: Path
) -> None:
    """All pages as they are laid out, and the largest, which have every kind of part, as the scripts of the site leave them."""
    page = browser.new_page(viewport=PHONE, java_script_enabled=scripts)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("response", lambda response: faults.append(response.url) if response.status >= 400 else None)
    pages = sorted(_pages(site), key=lambda name: (site / name).stat().st_size, reverse=True)[:largest]
    try:
        for name in pages:
            page.goto(f"{address}/{name}")
            widest = page.evaluate("document.documentElement.scrollWidth")
            assert widest <= PHONE["width"], f"{name} is {widest} pixels wide"
            assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)"), name
        assert faults == []
        assert pages
    finally:
        page.close()


@pytest.mark.slow
def test_a_reader_clicks_from_page_to_page(browser: Any, address: str) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    try:
        page.goto(f"{address}/index.html")
        for name in ("Quickstart", "What runs on which GPU", "The method", "Status"):
            page.locator(".md-nav--primary").get_by_role("link", name=name, exact=True).first.click()
            page.wait_for_load_state()
            assert page.locator("h1").first.is_visible()
        page.goto(f"{address}/index.html")
        page.get_by_role("link", name="RTX card at home").first.click()
        page.wait_for_url("**/for/rtx.html")
        page.locator(".md-search__input").fill("switching")
        page.wait_for_selector(".md-search-result__item")
        assert page.locator(".md-search-result__item").count() > 0
    finally:
        page.close()
