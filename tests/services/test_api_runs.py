"""The runs of a folder over HTTP: the list, and the report that follows a run while it goes on."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.api import Api, error_of, start_api, with_keys
from tests.support.broken import DAMAGES, FILES
from tests.support.runs import make_run
from vaopd.access.keys import add_key
from vaopd.http_client import ScoringClient
from vaopd.run.status import StatusWriter
from vaopd_api.runs import Runs


@pytest.fixture(scope="module")
def nobody() -> Iterator[str]:
    """Where no teacher is: reports need none."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "done", accuracies=(0.3, 0.5, 0.6), judged=True)
    make_run(folder / "begun", variant="standard", seed=3, steps=5, accuracies=(0.3,), judged=True)
    os.utime(folder / "done" / "metrics.jsonl", (1, 1))
    return folder


@pytest.fixture(scope="module")
def api(nobody: str, runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    yield from start_api(tmp_path_factory.mktemp("api"), nobody, "--runs", str(runs))


def test_the_runs_are_listed_the_one_that_changed_last_first(api: Api, runs: Path) -> None:
    (runs / "begun" / "metrics.jsonl").touch()
    begun, done = api.http.get("/v1/runs").json()["runs"]
    changed = begun.pop("changed")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", changed)
    assert begun == {
        "name": "begun",
        "objective": "standard",
        "seed": 3,
        "steps_done": 5,
        "steps_planned": 20,
        "finished": False,
        "state": "not finished",
        "reason": "",
        "accuracy_before": 0.3,
        "accuracy": 0.3,
        "judge_before": "1, by hand",
        "judge": "1, by hand",
    }
    assert (done["name"], done["finished"], done["accuracy"]) == ("done", True, 0.6)
    assert (done["judge_before"], done["judge"]) == ("1, by hand", "3, by hand")
    with ScoringClient(str(api.http.base_url)) as client:
        assert [run.name for run in client.runs()] == ["begun", "done"]


def test_a_report_is_the_page_that_the_command_writes(api: Api) -> None:
    answer = api.http.get("/runs/done/report")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "60.0 % ± 3.0<small>+30.0 points" in answer.text
    assert "data-again" not in re.sub(r"<script>.*", "", answer.text, flags=re.S)
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert '<body data-again="15">' in api.http.get("/runs/begun/report").text


def test_a_report_is_drawn_again_when_the_run_has_gone_on(api: Api, runs: Path) -> None:
    before = api.http.get("/runs/begun/report")
    same = api.http.get("/runs/begun/report", headers={"If-None-Match": before.headers["etag"]})
    assert (same.status_code, same.content) == (304, b"")
    line = {"kind": "eval", "step": 10, "accuracy": 0.9, "standard_error": 0.03, "prompts": 300, "samples": 1}
    with (runs / "begun" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    after = api.http.get("/runs/begun/report", headers={"If-None-Match": before.headers["etag"]})
    assert after.status_code == 200
    assert "90.0 % ± 3.0" in after.text


def test_a_run_s_name_is_never_a_path(api: Api, runs: Path) -> None:
    make_run(runs.parent / "outside")
    (runs / "link").symlink_to(runs.parent / "outside")
    (runs / "empty").mkdir(exist_ok=True)
    for name in ("..%2Foutside", "%2e%2e", ".", "link", "empty", "none", "a" * 200, "%00", f"{runs.parent}/outside"):
        answer = api.http.get(f"/runs/{name}/report")
        assert (answer.status_code, error_of(answer)["code"]) == (404, "not_found"), name
        assert str(runs.parent) not in error_of(answer)["detail"]
    assert {run["name"] for run in api.http.get("/v1/runs").json()["runs"]} == {"begun", "done"}


def test_a_broken_run_is_listed_with_the_reason_beside_the_others(api: Api, runs: Path) -> None:
    broken = make_run(runs / "broken")
    try:
        (broken / "metrics.jsonl").write_text("{\n")
        found = {run["name"]: run for run in api.http.get("/v1/runs").json()["runs"]}
        assert set(found) == {"begun", "done", "broken"}
        assert (found["broken"]["state"], found["broken"]["seed"], found["broken"]["steps_done"]) == (
            "broken",
            None,
            None,
        )
        assert found["broken"]["reason"] == "metrics.jsonl:1 is not a JSON object"
        answer = api.http.get("/runs/broken/report")
        assert (answer.status_code, error_of(answer)["code"]) == (500, "internal")
        assert str(runs) not in answer.text
        with ScoringClient(str(api.http.base_url)) as client:
            assert "broken" in {run.state for run in client.runs()}
    finally:
        shutil.rmtree(broken)


def test_whatever_lies_in_a_run_costs_no_other_run_its_place(api: Api, runs: Path) -> None:
    """The list doesn't read samples.jsonl, which is for the report alone."""
    listed = [file for file in FILES if file != "samples.jsonl"]
    names = {f"{file}-{index}": (file, damage) for file in listed for index, damage in enumerate(DAMAGES.values())}
    try:
        for name, (file, damage) in names.items():
            run = make_run(runs / name)
            (run / file).unlink(missing_ok=True)
            damage(run / file)
        found = {run["name"]: run for run in api.http.get("/v1/runs").json()["runs"]}
        assert set(found) == {"begun", "done", *names}
        for name, (file, _) in names.items():
            assert found[name]["state"] == "broken", name
            assert file in found[name]["reason"]
            assert str(runs) not in found[name]["reason"]
        assert api.http.get("/runs/done/report").status_code == 200
    finally:
        for name in names:
            shutil.rmtree(runs / name)


def test_several_runs_are_compared_in_one_page(api: Api) -> None:
    both = api.http.get("/runs/compare?run=done&run=begun")
    assert "<title>2 runs compared" in both.text
    again = api.http.get("/runs/compare?run=done&run=begun", headers={"If-None-Match": both.headers["etag"]})
    assert again.status_code == 304
    assert api.http.get("/runs/compare?run=done&run=none").status_code == 404
    assert error_of(api.http.get("/runs/compare"))["field"] == "query.run"
    many = error_of(api.http.get("/runs/compare?" + "&".join(["run=done"] * 17)))
    assert many["detail"] == "17 runs to compare, the limit is 16; choose fewer"


def test_with_keys_a_job_sees_its_own_run_only(nobody: str, runs: Path, tmp_path: Path) -> None:
    key = {"Authorization": f"Bearer {add_key(tmp_path / 'keys.json', 'done')}"}
    for api in start_api(tmp_path, nobody, "--runs", str(runs), *with_keys(tmp_path)):
        assert api.http.get("/runs").status_code == 200  # the page, in which a key can't be missing yet
        for path in ("/v1/runs", "/runs/done/report"):
            assert api.http.get(path).status_code == 401
        assert [run["name"] for run in api.http.get("/v1/runs", headers=key).json()["runs"]] == ["done"]
        assert api.http.get("/runs/done/report", headers=key).status_code == 200
        assert api.http.get("/runs/compare?run=done&run=begun", headers=key).status_code == 403
        others, none = (api.http.get(f"/runs/{name}/report", headers=key) for name in ("begun", "none"))
        assert others.status_code == none.status_code == 403
        assert error_of(others)["detail"] == error_of(none)["detail"]


def test_without_a_folder_there_are_none(nobody: str, tmp_path: Path) -> None:
    for api in start_api(tmp_path, nobody):
        assert api.http.get("/v1/runs").json() == {"runs": []}
        assert api.http.get("/runs/done/report").status_code == 404


async def test_the_event_loop_goes_on_while_a_report_is_drawn(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report is held back until the event loop, which waits for it, lets it go."""
    let_go = threading.Event()

    def report_html(*_: object, **__: object) -> str:
        return f"let go: {let_go.wait(60)}"

    monkeypatch.setattr("vaopd.report.report_html", report_html)
    asked = asyncio.create_task(Runs(runs).report(["done"], job=None))
    asyncio.get_running_loop().call_later(0, let_go.set)
    assert (await asked).html == b"let go: True"


def test_a_run_that_died_is_listed_as_failed_and_its_page_stops_updating(api: Api, runs: Path) -> None:
    """Nothing in its folder changes when it dies: what the API knows of its files is not enough."""

    def listed() -> tuple[str, str]:
        (found,) = [run for run in api.http.get("/v1/runs").json()["runs"] if run["name"] == "mortal"]
        return found["state"], found["reason"]

    folder = make_run(runs / "mortal", steps=5, accuracies=(0.3,))
    try:
        with StatusWriter(folder, role="trainer") as status:
            status.write("running", step=5, lease_s=600.0)
            assert listed() == ("running", "")
            page = api.http.get("/runs/mortal/report").text
            assert '<body data-again="15">' in page
            assert "The run is running." in page
        state, reason = listed()  # its lock is gone, as after kill -9
        assert state == "failed"
        assert "ended without a word" in reason
        page = api.http.get("/runs/mortal/report").text
        assert "<body>" in page
        assert "The run failed at step 5: the trainer, process" in page
    finally:
        shutil.rmtree(folder)
