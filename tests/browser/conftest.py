"""A headless browser for the pages of displays: one process for the folder, one page for each test."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

BROWSER = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


# For the folder rather than the session: while Playwright runs, an event loop does, and no other test may meet it.
@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = BROWSER if BROWSER.exists() else shutil.which("chromium") or shutil.which("google-chrome")
    if not found:
        pytest.skip("no browser: install Debian's chromium (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=str(found), args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens HTML in a page of its own, in light or dark; fails if the page logged, threw or asked for anything."""
    opened, problems = [], []

    def open_html(html: str, scheme: str = "light") -> Any:
        page = browser.new_page(color_scheme=scheme, viewport={"width": 1100, "height": 900})
        page.set_default_timeout(10_000)
        page.on("console", lambda message: problems.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on("request", lambda request: problems.append(f"request: {request.url}"))
        page.set_content(html)
        opened.append(page)
        return page

    yield open_html
    for page in opened:
        page.close()
    assert problems == []
