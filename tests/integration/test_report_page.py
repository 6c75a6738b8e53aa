"""The runs' page and a run's report in a real headless Chromium, served by an API; its teacher may be anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from tests.support.api import Api, start_api, with_keys
from tests.support.runs import make_run
from tests.support.viewer import PHONE, serious_findings, viewer
from vaopd.access.keys import add_key


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "begun", steps=5, accuracies=(0.3,))
    (folder / "broken").mkdir()
    (folder / "broken" / "config.toml").write_text("[")
    hard = make_run(folder / ("long-name-" * 12)) / "samples.jsonl"
    texts = {"question": "מה ההיקף? " + 400 * "W", "answer": 200 * "9", "tokens": ["🤦🏽‍♂️", 300 * "x", "שלום"]}
    lines = [json.dumps(json.loads(line) | texts) for line in hard.read_text().splitlines()]
    hard.write_text("\n".join([*lines, ""]))
    return folder


@pytest.fixture(scope="module")
def api(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """Port 9 has no teacher: reports need none."""
    yield from start_api(tmp_path_factory.mktemp("api"), "127.0.0.1:9", "--runs", str(runs))


def test_a_report_follows_its_run_where_the_reader_is(browser: Browser, api: Api, runs: Path) -> None:
    with viewer(browser, str(api.http.base_url)) as seen:
        seen.page.clock.install()
        seen.open(path="/runs")
        seen.page.click("text=begun")
        expect(seen.page.locator("#live")).to_have_text("Running; this page updates every 15 s.")
        seen.page.locator("summary", has_text="Configuration").click()
        line = {"kind": "eval", "step": 10, "accuracy": 0.9, "standard_error": 0.03, "prompts": 300, "samples": 1}
        with (runs / "begun" / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        seen.page.clock.fast_forward(15_000)
        seen.wait_for("the new evaluation is shown", "document.body.innerText.includes('90.0 % ± 3.0')")
        expect(seen.page.locator("details[open] summary", has_text="Configuration")).to_have_count(1)
        expect(seen.page.locator("#live")).to_contain_text("Last change")
        assert seen.complaints == []


def test_a_token_s_numbers_by_click_and_by_keyboard(browser: Browser, api: Api) -> None:
    with viewer(browser, str(api.http.base_url)) as seen:
        seen.open(path="/runs/begun/report", ready="main")
        tokens = seen.page.locator(".rollout code").first.locator("span")
        tokens.first.click()
        expect(seen.page.locator("#details")).to_contain_text("VA 0.500")
        tokens.first.focus()
        seen.page.keyboard.press("ArrowRight")
        expect(seen.page.locator("#details")).to_contain_text("VA 0.000")
        seen.page.keyboard.press("Escape")
        expect(seen.page.locator("#details")).to_be_hidden()
        assert seen.complaints == []


def test_curves_show_their_numbers_and_can_be_zoomed(browser: Browser, api: Api) -> None:
    """Five steps of loss 0.5: a drag over the right half leaves the last ones in every curve."""
    with viewer(browser, str(api.http.base_url)) as seen:
        seen.open(path="/runs/begun/report", ready=".chart svg")
        loss = seen.page.locator(".chart", has_text="Loss")
        box = loss.locator("> svg").bounding_box()
        assert box
        middle, height = box["x"] + 0.55 * box["width"], box["y"] + box["height"] / 2
        seen.page.mouse.move(middle, height)
        expect(loss.locator(".tip")).to_have_text("step 2\nloss: 0.5", use_inner_text=True)
        before = seen.page.locator(".chart > svg text").count()
        seen.page.mouse.down()
        seen.page.mouse.move(box["x"] + box["width"] - 12, height)
        seen.page.mouse.up()
        loss.locator("> svg").focus()
        seen.page.keyboard.press("Home")
        expect(loss.locator(".tip")).to_have_text("step 3\nloss: 0.5", use_inner_text=True)
        seen.page.keyboard.press("Escape")
        expect(seen.page.locator(".chart > svg text")).to_have_count(before)
        assert seen.complaints == []


def test_the_rollouts_of_all_steps_can_be_filtered(browser: Browser, api: Api) -> None:
    """Steps 0, 5 and 10 with two rollouts each, of weights 0.75 and 0.25 and mean VA 9.5 / 3."""
    with viewer(browser, str(api.http.base_url)) as seen:
        seen.open(path="/runs/begun/report", ready=".browser .rollout")
        expect(seen.page.locator(".browser h4")).to_have_text(
            [
                "Before the first step: the initial student",
                "After 10 steps",
            ]
        )
        seen.page.locator("label", has_text="step").locator("select").select_option("all")
        expect(seen.page.locator(".browser h4")).to_have_count(3)
        seen.page.get_by_label("mean VA from").fill("3.2")
        expect(seen.page.locator(".browser .rollout")).to_have_count(0)
        seen.page.get_by_label("mean VA from").fill("3.1")
        expect(seen.page.locator(".browser .rollout")).to_have_count(6)


def test_runs_are_sorted_and_compared_by_ticking(browser: Browser, tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "better", accuracies=(0.3, 0.9))
    make_run(tmp_path / "runs" / "worse", accuracies=(0.3, 0.2), variant="standard")
    for api in start_api(tmp_path, "127.0.0.1:9", "--runs", str(tmp_path / "runs")):
        with viewer(browser, str(api.http.base_url)) as seen:
            seen.open(path="/runs")
            names = seen.page.locator("tbody th")
            seen.page.get_by_role("button", name="accuracy", exact=True).click()
            expect(names).to_have_text(["better", "worse"])
            seen.page.get_by_role("button", name="accuracy ↓").click()
            expect(names).to_have_text(["worse", "better"])
            for name in ("better", "worse"):
                seen.page.get_by_label(f"Compare {name}").check()
            seen.page.click("text=Compare 2 runs")
            seen.page.wait_for_selector(".chart svg")
            expect(seen.page.locator("h1")).to_have_text("2 runs compared")
            assert seen.complaints == []


def test_with_a_key_a_report_is_kept_as_a_file(browser: Browser, runs: Path, tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys.json", "begun")
    for api in start_api(tmp_path, "127.0.0.1:9", "--runs", str(runs), *with_keys(tmp_path)):
        with viewer(browser, str(api.http.base_url)) as seen:
            seen.open(path="/runs")
            expect(seen.page.locator("[role=alert]")).to_contain_text("key")
            seen.page.evaluate("key => sessionStorage.setItem('vaopd.key', key)", key)
            seen.open(path="/runs")
            with seen.page.expect_download() as download:
                seen.page.click("text=begun")
            download.value.save_as(tmp_path / "kept.html")
            assert "Held-out accuracy" in (tmp_path / "kept.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"color_scheme": "dark"}, PHONE], ids=["desktop", "dark", "phone"])
def test_no_serious_finding_of_axe_and_nothing_is_cut_off(browser: Browser, api: Api, options: dict[str, Any]) -> None:
    with viewer(browser, str(api.http.base_url), **options) as seen:
        for path, ready in (
            ("/runs", "section.card"),
            ("/runs/begun/report", "main"),
            (f"/runs/{'long-name-' * 12}/report", ".rollout"),
            (f"/runs/compare?run=begun&run={'long-name-' * 12}", ".chart svg"),
        ):
            seen.open(path=path, ready=ready)
            assert serious_findings(seen) == []
            assert seen.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            lefts = seen.page.locator(".chart text").evaluate_all("all => all.map(text => text.getBBox().x)")
            assert all(left >= 0 for left in lefts)
            cells = seen.page.locator("tr:has(.broken) td[data-label]:visible")
            boxes = [cells.nth(index).bounding_box() for index in range(cells.count())]
            assert all(box["x"] >= 40 for box in boxes if box)  # beside the column of ticks, on a phone too
