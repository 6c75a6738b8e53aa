"""A real headless Chromium on the viewer page. `VAOPD_CHROMIUM` names another executable."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Response, expect, sync_playwright

from tests.support.programs import find_program
from tests.support.waiting import wait_until

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# A browser that is started asks its maker for updates and lists; only the page's own requests shall be seen.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


PATIENCE_S = 120.0
"""How long the page may take, beside any load: a browser reads files and answers after the call that began it."""
PHONE: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}


@contextmanager
def chromium() -> Iterator[Browser]:
    """Starts a browser; without one, the test is skipped."""
    executable = os.environ.get("VAOPD_CHROMIUM") or find_program(*NAMES, package="chromium")
    expect.set_options(timeout=1000 * PATIENCE_S)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Viewer:
    """One open page, and what it asked for and complained about."""

    page: Page
    base_url: str
    responses: list[Response] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def open(self, fragment: str = "", path: str = "/", *, ready: str | None = None) -> None:
        # Only the fragment would change: then the page is not loaded again.
        self.page.goto("about:blank")
        self.page.goto(f"{self.base_url}{path}{fragment}")
        self.page.wait_for_selector(ready or ("section.card" if path == "/docs" else "html[data-ready]"))

    def score_example(self, number: int = 0) -> None:
        self.page.locator("#examples button").nth(number).click()
        self.page.wait_for_selector("#rollouts .token")
        self.wait_until_idle()

    def wait_until_idle(self) -> None:
        self.wait_for("nothing is asked any more", "!document.querySelector('#score').disabled")

    def wait_for(self, description: str, script: str) -> None:
        """Playwright's own wait_for_function evaluates strings in the page, which its security policy forbids."""
        wait_until(description, lambda: self.page.evaluate(script), timeout_s=PATIENCE_S)

    def wait_for_error(self, words: str) -> None:
        wait_until(f"the page says {words!r}", lambda: words in self.error, timeout_s=PATIENCE_S)

    def tokens(self, response: int = 0) -> list[str]:
        labels = self.page.locator(".tokens").nth(response).locator(".token")
        return [label.split(", token ")[0] for label in labels.evaluate_all("all => all.map(b => b.ariaLabel)")]

    def details(self) -> dict[str, str]:
        terms = self.page.locator("#details dt").all_inner_texts()
        return dict(zip(terms, self.page.locator("#details dd").all_inner_texts(), strict=True))

    @property
    def error(self) -> str:
        return self.page.locator("#error").inner_text()


@contextmanager
def viewer(browser: Browser, base_url: str, **options: Any) -> Iterator[Viewer]:
    """`options` are those of Playwright's `new_context`: viewport, color_scheme and so on."""
    context = browser.new_context(**({"viewport": {"width": 1440, "height": 1000}} | options))
    try:
        context.set_default_timeout(1000 * PATIENCE_S)
        opened = Viewer(context.new_page(), base_url.rstrip("/"))
        opened.page.on("response", lambda response: opened.responses.append(response))
        opened.page.on("pageerror", lambda error: opened.complaints.append(str(error)))
        opened.page.on("console", lambda said: opened.complaints.append(said.text) if said.type == "error" else None)
        yield opened
    finally:
        context.close()


def serious_findings(seen: Viewer) -> list[str]:
    """What axe finds serious or critical in the page as it stands."""
    violations = Axe().run(seen.page).response["violations"]
    return [
        f"{each['id']}: {node['html']}"
        for each in violations
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]
