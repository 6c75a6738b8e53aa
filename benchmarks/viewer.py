"""Opens the viewer in headless Chromium: screenshots for the documentation, page size, time to the first score.

    python benchmarks/viewer.py            # prints the numbers
    python benchmarks/viewer.py --screenshots docs/images
    python benchmarks/viewer.py --screenshots docs/images --runs runs     # the runs' page and reports too

It starts a tiny teacher and the API on free ports and stops them at the end. A score is timed from the click on an
example until its tokens are painted: the first one after the start, then the median of ten.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from PIL import Image
from playwright.sync_api import Browser

from tests.support.api import start_api
from tests.support.models import model_folder, tiny_vlm
from tests.support.teacher import teacher_in_process
from tests.support.viewer import Viewer, chromium, viewer

PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True, "device_scale_factor": 2}
DESKTOP = {"viewport": {"width": 1440, "height": 1000}}
TIMED = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--screenshots", type=Path, metavar="FOLDER", help="write viewer-*.png there")
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="take pictures of the reports of these runs too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, teacher_in_process(tiny_vlm()) as teacher, chromium() as browser:
        runs = ("--runs", str(arguments.runs)) if arguments.runs else ()
        for api in start_api(Path(folder), teacher.target, "--student", str(model_folder("student")), *runs):
            url = str(api.http.base_url)
            measure(browser, url)
            if arguments.screenshots is not None:
                arguments.screenshots.mkdir(parents=True, exist_ok=True)
                take(browser, url, arguments.screenshots)
                names = [run["name"] for run in api.http.get("/v1/runs").json()["runs"] if run["steps_done"]]
                if names:
                    take_reports(browser, url, names, arguments.screenshots)
    return 0


def measure(browser: Browser, url: str) -> None:
    seconds = []
    for number in range(TIMED + 1):
        with viewer(browser, url, **DESKTOP) as seen:
            opened = time.perf_counter()
            seen.open()
            loaded = time.perf_counter()
            seen.score_example(number % 3)
            seconds.append(time.perf_counter() - loaded)
            if number == 0:
                files = [response for response in seen.responses if "/v1/" not in response.url]
                weight = sum(len(response.body()) for response in files if response.url.startswith("http"))
                print(f"page size, uncompressed, with three examples: {weight / 1000:.1f} kB in {len(files)} files")
                print(f"page loaded and teachers listed: {loaded - opened:.2f} s")
    print(f"first score: {seconds[0]:.2f} s after the click; median of {TIMED}: {statistics.median(seconds[1:]):.2f} s")


def take(browser: Browser, url: str, folder: Path) -> None:
    with viewer(browser, url, **DESKTOP) as seen:
        seen.open()
        scored(seen)
        save(seen, folder / "viewer-desktop.png")
    with viewer(browser, url, color_scheme="dark", **DESKTOP) as seen:
        seen.open()
        scored(seen, example=1)
        save(seen, folder / "viewer-dark.png")
    with viewer(browser, url, **PHONE) as seen:
        seen.open()
        seen.score_example()
        seen.page.locator("#rollouts .token").nth(4).tap()
        save(seen, folder / "viewer-phone.png")


def scored(seen: Viewer, example: int = 0) -> None:
    seen.score_example(example)
    seen.page.locator("#rollouts .token").nth(4).click()
    seen.page.click("#find-regions")
    seen.page.wait_for_selector(".map")
    seen.page.mouse.move(0, 0)


def take_reports(browser: Browser, url: str, names: list[str], folder: Path) -> None:
    """Takes the list, the last run's report, the same on a phone, and the two last ones compared."""
    report = f"/runs/{names[0]}/report"
    with viewer(browser, url, **DESKTOP) as seen:
        seen.open(path="/runs")
        save(seen, folder / "runs.png")
        seen.open(path=report, ready=".chart svg")
        seen.page.locator(".chart > svg").nth(1).hover()
        save(seen, folder / "report.png")
    with viewer(browser, url, color_scheme="dark", **DESKTOP) as seen:
        seen.open(path="/runs/compare?" + "&".join(f"run={name}" for name in names[:2]), ready=".chart svg")
        save(seen, folder / "report-comparison.png")
    with viewer(browser, url, **PHONE) as seen:
        seen.open(path=report, ready=".browser .rollout")
        seen.page.locator(".browser h4").first.scroll_into_view_if_needed()
        seen.page.locator(".rollout code").first.locator("span").nth(3).tap()
        save(seen, folder / "report-phone.png")


def save(seen: Viewer, path: Path) -> None:
    """Writes what the window shows, with 256 colours: a third of the bytes."""
    Image.open(io.BytesIO(seen.page.screenshot())).convert("RGB").quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
