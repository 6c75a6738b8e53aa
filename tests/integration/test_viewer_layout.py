"""The viewer as it looks: light and dark, on a phone, and to axe."""

from __future__ import annotations

import json

import pytest
from playwright.sync_api import Browser, expect

from tests.support.api import Api
from tests.support.viewer import PHONE, serious_findings, viewer
from vaopd_api.app import PAGE

VIEWS = ("#compare .original", "#compare .degraded")
EXAMPLES = json.loads((PAGE / "examples" / "examples.json").read_text())


def test_light_and_dark(browser: Browser, api: Api) -> None:
    """The system's choice holds until the user makes another, which is remembered."""
    ground = "getComputedStyle(document.body).backgroundColor"
    with viewer(browser, str(api.http.base_url), color_scheme="dark") as seen:
        seen.open()
        dark = seen.page.evaluate(ground)
        seen.page.click("#theme")
        light = seen.page.evaluate(ground)
        assert dark != light
        seen.open()
        assert seen.page.evaluate(ground) == light


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"color_scheme": "dark"}, PHONE], ids=["desktop", "dark", "phone"])
def test_no_serious_finding_of_axe(browser: Browser, api: Api, options: dict[str, object]) -> None:
    with viewer(browser, str(api.http.base_url), **options) as seen:
        seen.open()
        found = serious_findings(seen)
        seen.score_example()
        seen.page.locator("#tables summary").click()
        seen.page.locator("#rollouts .token").nth(4).click()
        found += serious_findings(seen)
        seen.open(path="/docs")
        found += serious_findings(seen)
        assert found == []


def test_it_fits_a_phone(browser: Browser, api: Api) -> None:
    with viewer(browser, str(api.http.base_url), **PHONE) as seen:
        seen.open()
        seen.score_example()
        assert seen.page.evaluate("document.documentElement.scrollWidth") == 360
        seen.page.locator("#rollouts .token").nth(4).tap()
        box = seen.page.locator("#details").bounding_box()
        assert box
        assert box["y"] + box["height"] <= 740
        seen.page.locator("#details .close").tap()
        expect(seen.page.locator("#details")).to_be_hidden()
