"""The viewer page in a real headless Chromium, served by the API in front of a real teacher."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, expect

from tests.support.api import Api, start_api, with_keys
from tests.support.models import model_folder, tiny_vlm
from tests.support.teacher import TeacherInProcess, teacher_in_process
from tests.support.viewer import Viewer, serious_findings, viewer
from vaopd.access.keys import add_key
from vaopd_api.app import PAGE

VIEWS = ("#compare .original", "#compare .degraded")
EXAMPLES = json.loads((PAGE / "examples" / "examples.json").read_text())


@pytest.fixture
def seen(browser: Browser, api: Api) -> Iterator[Viewer]:
    """The page, just opened. Whatever a test does: nothing is asked of another host, and nothing fails unseen."""
    with viewer(browser, str(api.http.base_url)) as opened:
        opened.open()
        yield opened
        hosts = {urlsplit(response.url).netloc for response in opened.responses if response.url.startswith("http")}
        assert hosts == {urlsplit(str(api.http.base_url)).netloc}
        assert [text for text in opened.complaints if "Failed to load resource" not in text] == []


def test_a_newcomer_sees_a_scored_example_after_one_click(seen: Viewer) -> None:
    seen.score_example()
    assert "".join(seen.tokens()).replace("␣", " ") == EXAMPLES[0]["responses"][0] + "<|im_end|>"
    expect(seen.page.locator(".rollout")).to_have_count(len(EXAMPLES[0]["responses"]))
    # Said aloud by a screen reader, without anybody's looking for it.
    expect(seen.page.locator("[role=status]")).to_contain_text("The top 10 % carry")
    weights = [float(text.split()[-1]) for text in seen.page.locator(".weight:has(.meter)").all_inner_texts()]
    assert sum(weights) == pytest.approx(1, abs=0.02)


def test_the_page_is_light(seen: Viewer) -> None:
    """With a scored example, in bytes as sent: under a tenth of what the page may weigh."""
    seen.score_example()
    files = [response for response in seen.responses if "/v1/" not in response.url and response.url.startswith("http")]
    assert 0 < sum(len(response.body()) for response in files) < 100_000


def test_hovering_a_token_tells_what_the_api_said_of_it(seen: Viewer) -> None:
    with seen.page.expect_response("**/v1/score") as answer:
        seen.score_example()
    rollout = answer.value.json()["rollouts"][0]
    at = max(range(len(rollout["tokens"])), key=lambda t: rollout["visual_advantage"][t])
    seen.page.locator(".tokens").first.locator(".token").nth(at).hover()
    details = seen.details()
    assert details["visual advantage"] == f"{rollout['visual_advantage'][at]:.3f} nats"
    assert details["log p, original"].startswith(f"{rollout['teacher_logprobs'][at]:.3f}".replace("-", "−"))
    assert details["log p, degraded"].startswith(f"{rollout['degraded_logprobs'][at]:.3f}".replace("-", "−"))
    assert details["rank"] == str(rollout["ranks"][at])
    assert details["group"].startswith("high")
    expected = [alternative["text"].replace(" ", "␣") for alternative in rollout["alternatives"][at]]
    expect(seen.page.locator("#details tbody th")).to_have_text(expected)
    expect(seen.page.locator(".tokens").first.locator(".token.high")).to_have_count(sum(rollout["high_group"]))


def test_the_colours_can_show_the_view_divergence(seen: Viewer) -> None:
    with seen.page.expect_response("**/v1/score") as answer:
        seen.score_example()
    rollouts = answer.value.json()["rollouts"]
    tokens = seen.page.locator("#rollouts .token")

    def shown() -> list[float]:
        return tokens.evaluate_all("all => all.map(token => parseFloat(token.style.getPropertyValue('--a')))")

    def expected(scores: list[float]) -> Any:
        """The root of a score, in per cent of the largest one's or of 1 nat's, with one decimal."""
        scale = max(1, *scores)
        return pytest.approx([100 * (score / scale) ** 0.5 for score in scores], abs=0.051)

    by_va = [va for rollout in rollouts for va in rollout["visual_advantage"]]
    by_divergence = [nats for rollout in rollouts for nats in rollout["columns"]["view_divergence_nats"]]
    assert shown() == expected(by_va)
    seen.page.click("#by-divergence")
    expect(seen.page.locator("#heat-title")).to_have_text("Tokens by view divergence")
    assert shown() == expected(by_divergence)
    assert shown() != expected(by_va)
    tokens.nth(4).hover()
    assert seen.details()["view divergence"] == f"{by_divergence[4]:.3f} nats"
    assert serious_findings(seen) == []
    seen.page.click("#by-va")
    assert shown() == expected(by_va)


def test_everything_can_be_reached_by_keyboard(seen: Viewer) -> None:
    page = seen.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("!!document.activeElement.closest('#examples')"):
            break
    page.keyboard.press("Enter")
    page.wait_for_selector("#rollouts .token")
    seen.wait_until_idle()
    for _ in range(40):  # through the form and the views, into the one token that Tab reaches
        if page.evaluate("document.activeElement.classList.contains('token')"):
            break
        page.keyboard.press("Tab")
    tokens = seen.tokens()
    expect(page.locator("#details .big")).to_have_text(tokens[0])
    page.keyboard.press("ArrowRight")
    expect(page.locator("#details .big")).to_have_text(tokens[1])
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")  # over the edge: the next response
    expect(page.locator("#details .big")).to_have_text(seen.tokens(1)[0])
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.closest('.rollout').ariaLabel") == "Response 1"
    page.keyboard.press("Escape")
    expect(page.locator("#details.idle")).to_have_count(1)


def test_running_text_and_single_tokens(seen: Viewer) -> None:
    seen.score_example()
    first = seen.page.locator(".tokens").first
    expect(first).to_have_text(EXAMPLES[0]["responses"][0] + " end", use_inner_text=True)
    tokens = seen.tokens()
    seen.page.click("#as-tokens")
    assert seen.tokens() == tokens
    expect(first).to_contain_text("The\n·sides\n·are", use_inner_text=True)


def test_the_weights_are_explained(seen: Viewer) -> None:
    """By hand: z is a mean's distance from the mean of all, over their standard deviation; weights are its softmax."""
    with seen.page.expect_response("**/v1/score") as answer:
        seen.score_example()
    means = [rollout["mean_visual_advantage"] for rollout in answer.value.json()["rollouts"]]
    z = [(mean - statistics.fmean(means)) / statistics.pstdev(means) for mean in means]
    seen.page.locator(".weight").first.hover()
    rows = [row.split() for row in seen.page.locator("#details tbody tr").all_inner_texts()]
    assert [float(row[2].replace("−", "-")) for row in rows] == pytest.approx(z, abs=0.006)
    weights = [math.exp(each) / sum(map(math.exp, z)) for each in z]
    assert [float(row[4]) for row in rows] == pytest.approx(weights, abs=0.006)


def test_the_region_that_a_token_depends_on(seen: Viewer) -> None:
    seen.score_example()
    seen.page.locator(".tokens").first.locator(".token").nth(4).click()
    with seen.page.expect_response("**/v1/regions") as answer:
        seen.page.click("#find-regions")
    found = answer.value.json()
    assert found["tokens"][4]["text"] == "3"
    losses = [loss[4] for loss in found["losses"]]
    most = losses.index(max(losses))
    place = f"row {most // found['columns'] + 1}, column {most % found['columns'] + 1}"
    seen.page.wait_for_selector(".map")
    expect(seen.page.locator(".map i")).to_have_count(len(losses))
    said = seen.page.locator(".map figcaption").inner_text()
    assert max(losses) < 0.01 or said == f"Without the detail in {place} the token loses {max(losses):.2f} nats."
    assert serious_findings(seen) == []


def test_several_images_letters_of_several_tokens_and_no_image(seen: Viewer) -> None:
    page = seen.page
    seen.score_example()
    page.set_input_files("#more", PAGE / "examples" / "angle.png")
    expect(page.locator("#chosen li")).to_have_text(["1: triangle.png\n✕", "2: angle.png\n✕"], use_inner_text=True)
    page.fill("#responses textarea >> nth=0", "Größe")
    page.fill("#responses textarea >> nth=1", "ההיקף הוא 12")
    with page.expect_request("**/v1/score") as asked:
        page.click("#score")
    assert len(json.loads(asked.value.post_data or "")["images"]) == 2
    seen.wait_for("both pairs are shown", "document.querySelectorAll('#compare .two').length === 2")
    seen.wait_until_idle()
    assert seen.tokens()[:-1] == list("Größe")
    for part in (".tokens", "#responses textarea"):
        expect(page.locator(part).nth(0)).to_have_css("direction", "ltr")
        expect(page.locator(part).nth(1)).to_have_css("direction", "rtl")
    for _ in range(2):
        page.locator("#chosen button").first.click()
    page.click("#score")
    seen.wait_for("the page says so", "!document.querySelector('#no-va').hidden")
    expect(page.locator("#no-va")).to_contain_text("There is no image")
    expect(page.locator("#rollouts .token.high")).to_have_count(0)
    expect(page.locator("#views")).to_be_hidden()


def test_nothing_vanishes_while_the_teacher_is_down(seen: Viewer) -> None:
    """One message, which goes when the teacher answers again; pictures and tokens stay those of one score."""
    page = seen.page
    seen.score_example()
    tokens = seen.tokens()
    problem = {"status": 503, "title": "Service Unavailable", "detail": "the teacher is down", "code": "unavailable"}
    down = {"status": 503, "body": json.dumps(problem)}
    for path in ("**/v1/score", "**/v1/teachers"):
        page.route(path, lambda route: route.fulfill(**down))
    with page.expect_response("**/v1/teachers"):  # it looks again by itself
        page.select_option("#degradation", "black")
    seen.wait_for_error("The teacher is down")
    assert (seen.tokens(), page.locator("#error:visible").count()) == (tokens, 1)
    expect(page.locator(VIEWS[1])).to_have_attribute("alt", "The degraded view: pixelate 0.1")
    for path in ("**/v1/score", "**/v1/teachers"):
        page.unroute(path)
    page.wait_for_selector("#error", state="hidden")


def test_two_teachers_side_by_side(browser: Browser, teacher: TeacherInProcess, tmp_path: Path) -> None:
    with teacher_in_process(tiny_vlm("teacher-small"), model="other") as second:
        for api in start_api(tmp_path, teacher.target, "--teacher", second.target):
            with viewer(browser, str(api.http.base_url)) as seen:
                seen.open()
                seen.score_example()
                seen.page.select_option("#other", "other")
                seen.wait_for("both are shown", "document.querySelectorAll('.version').length === 6")
                seen.page.locator(".tokens").first.locator(".token").nth(4).hover()
                expect(seen.page.locator("#details .names span")).to_have_text(["tiny-teacher", "other"])
                expect(seen.page.locator("#details .va dd")).to_have_count(2)
                assert serious_findings(seen) == []


def test_original_and_degraded_view_side_by_side_and_under_a_slider(seen: Viewer) -> None:
    seen.score_example()
    original, degraded = (seen.page.locator(name).bounding_box() for name in VIEWS)
    assert original
    assert degraded
    assert degraded["x"] >= original["x"] + original["width"]
    seen.page.click("#as-slider")
    over, under = (seen.page.locator(name).bounding_box() for name in VIEWS)
    assert over == under
    seen.page.locator("#split").fill("75")
    assert seen.page.locator(VIEWS[0]).evaluate("e => getComputedStyle(e).clipPath") == "inset(0px 0px 0px 25%)"


def test_another_degradation_is_scored_at_once(seen: Viewer) -> None:
    seen.score_example()
    with seen.page.expect_response("**/v1/score") as answer:
        seen.page.select_option("#degradation", "black")
    assert answer.value.json()["degradation"]["kind"] == "black"
    expect(seen.page.locator("#strength")).to_be_disabled()
    seen.wait_for("the black view is shown", "document.querySelector('#compare .degraded').alt.endsWith('black')")
    seen.page.select_option("#degradation", "blur")
    seen.wait_for(
        "the blurred view is shown", "document.querySelector('#compare .degraded').alt.endsWith(': blur 0.1')"
    )
    expect(seen.page.locator("#strength")).to_be_enabled()
    assert "radius" in (seen.page.get_attribute("#strength", "title") or "")


def test_the_table_says_what_the_colours_say(seen: Viewer) -> None:
    with seen.page.expect_response("**/v1/score") as answer:
        seen.score_example()
    rollout = answer.value.json()["rollouts"][0]
    seen.page.locator("#tables summary").click()
    rows = seen.page.locator("#tables table").first.locator("tbody tr")
    expect(rows).to_have_count(len(rollout["tokens"]))
    cells = rows.nth(4).locator("th, td").all_inner_texts()
    assert cells[1] == rollout["tokens"][4]["text"]
    assert cells[4] == f"{rollout['visual_advantage'][4]:.3f}"


def test_a_link_brings_the_view_back(seen: Viewer) -> None:
    seen.score_example(1)
    seen.page.select_option("#degradation", "blur")
    seen.wait_for("the address follows", "location.hash.includes('blur')")
    seen.wait_until_idle()
    address, tokens = seen.page.url, seen.tokens()
    seen.open(fragment=f"#{urlsplit(address).fragment}")
    seen.page.wait_for_selector("#rollouts .token")
    assert seen.tokens() == tokens
    expect(seen.page.locator("#degradation")).to_have_value("blur")
    expect(seen.page.locator("#question")).to_have_value(EXAMPLES[1]["question"])


def test_what_is_shown_can_be_kept_as_png_and_json(seen: Viewer, tmp_path: Path) -> None:
    seen.score_example()
    with seen.page.expect_download() as download:
        seen.page.click("#save-json")
    download.value.save_as(tmp_path / "kept.json")
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert kept["question"] == EXAMPLES[0]["question"]
    assert len(kept["rollouts"]) == len(EXAMPLES[0]["responses"])
    with seen.page.expect_download() as download:
        seen.page.click("#save-png")
    download.value.save_as(tmp_path / "kept.png")
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")


def test_errors_are_told_in_words_where_they_belong(seen: Viewer, tmp_path: Path) -> None:
    page = seen.page
    page.click("#score")
    seen.wait_for_error("Type a question.")
    expect(page.locator("#question")).to_have_attribute("aria-invalid", "true")
    page.fill("#question", "What is the perimeter?")
    page.fill("#responses textarea", "It is 12. <|image_pad|>")
    page.click("#score")
    seen.wait_for_error("vision")
    (tmp_path / "notes.txt").write_text("no image")
    page.set_input_files("#file", tmp_path / "notes.txt")
    seen.wait_for_error("choose a PNG, JPEG or WEBP image")
    page.fill("#responses textarea", "It is 12.")
    page.route("**/v1/score", lambda route: route.abort())
    page.click("#score")
    seen.wait_for_error("reached")
    seen.wait_for_error("The API can't be reached. Is it still running")
    page.unroute("**/v1/score")
    page.click("#score")
    page.wait_for_selector("#rollouts .token")
    expect(page.locator("#error")).to_be_hidden()


def test_a_damaged_image_is_refused_in_words(seen: Viewer, tmp_path: Path) -> None:
    whole = (PAGE / "examples" / "triangle.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:-900])
    seen.page.set_input_files("#file", tmp_path / "cut.png")
    expect(seen.page.locator("#chosen li")).to_have_count(1)
    seen.page.fill("#question", "What is the perimeter?")
    seen.page.fill("#responses textarea", "It is 12.")
    seen.page.click("#score")
    seen.page.wait_for_selector("#error:not([hidden])")
    seen.wait_for_error("is damaged; re-encode it")


def test_a_page_opened_before_the_teacher_is_there_looks_again(browser: Browser, api: Api) -> None:
    loading = {
        "status": 503,
        "title": "Service Unavailable",
        "detail": "the teacher is starting",
        "code": "unavailable",
    }
    with viewer(browser, str(api.http.base_url)) as seen:
        answers = iter([json.dumps(loading)])
        seen.page.route(
            "**/v1/teachers",
            lambda route: route.fulfill(status=503, body=body) if (body := next(answers, None)) else route.continue_(),
        )
        seen.open()
        seen.wait_for_error("The teacher is starting")
        seen.page.wait_for_selector("#error", state="hidden")
        seen.score_example()


def test_an_api_with_keys_asks_for_one(browser: Browser, teacher: TeacherInProcess, tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys.json", "geometry")
    for api in start_api(tmp_path, teacher.target, *with_keys(tmp_path)):
        with viewer(browser, str(api.http.base_url)) as seen:
            seen.open()
            assert "an API key is needed" in seen.error.replace("An API", "an API")
            seen.page.fill("#key", "vaopd_wrong")
            seen.page.locator("#key").blur()
            seen.wait_for_error("malformed")
            seen.page.fill("#key", key)
            seen.page.locator("#key").blur()
            seen.page.wait_for_selector("#error", state="hidden")
            seen.score_example()
            assert key not in seen.page.url
            seen.open(path="/docs")  # the tab remembers the key


@pytest.mark.slow
def test_the_student_answers_and_is_scored(browser: Browser, teacher: TeacherInProcess, tmp_path: Path) -> None:
    for api in start_api(tmp_path, teacher.target, "--student", str(model_folder("student"))):
        with viewer(browser, str(api.http.base_url)) as seen:
            seen.open()
            seen.score_example()
            seen.page.select_option("#count", "2")
            with seen.page.expect_request("**/v1/score", timeout=120_000) as asked:  # the student is loaded first
                seen.page.click("#sample")
            sent = json.loads(asked.value.post_data or "")["responses"]
            assert [type(response) for response in sent] == [list, list]  # the very tokens that were sampled
            seen.wait_for("both answers are shown", "document.querySelectorAll('.rollout').length === 2")
            # Edited, it is a text again.
            seen.page.locator("#responses textarea").first.fill("It is 12.")
            with seen.page.expect_request("**/v1/score") as asked:
                seen.page.click("#score")
            assert json.loads(asked.value.post_data or "")["responses"][0] == "It is 12."
