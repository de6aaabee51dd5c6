"""Headless Chromium for tests that look at pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

__all__ = ["headless_chromium"]


def headless_chromium() -> Iterator[Any]:
    """The body of a fixture: Chromium driven by playwright; skips where one of the two is missing."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'dvdquant[test]'")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs Chromium on PATH: Debian's package chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()
