"""One small run of real processes that is watched by all means at once: JSON logs, traces, and a real Prometheus that
answers every query of the dashboard and of the alert rules."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.support.models import tiny_vlm
from tests.support.otlp import Collector, Span, collector
from tests.support.prometheus import Prometheus, binary, prometheus
from tests.support.system import Process, System
from tests.support.teacher import drawing, token_request
from tests.support.waiting import wait_until
from vaopd.client import SyncTeacherClient
from vaopd.errors import Mismatch

MONITORING = Path(__file__).parents[2] / "deploy" / "monitoring"
JOB = "watched"
GROUP = "train-000002-0001"
REQUEST = "the-request-of-the-test"
QUESTION = {"question": "What is the perimeter?", "response": "It is 12."}
CONFIG = """
global: {scrape_interval: 500ms}
rule_files: [alerts.yml]
scrape_configs:
  - job_name: vaopd
    file_sd_configs: [{files: [targets.json], refresh_interval: 1s}]
"""

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Watched:
    """What is left of the run, whose processes are gone; the Prometheus still runs."""

    logs: dict[str, list[dict[str, Any]]]
    spans: Collector
    prometheus: Prometheus | None
    started: float
    ended: float

    def asked(self) -> Prometheus:
        if self.prometheus is None:
            binary("prometheus")  # skips, or fails where one is required
        assert self.prometheus is not None
        return self.prometheus


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    with contextlib.ExitStack() as stack:
        spans = stack.enter_context(collector())
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in {
            "VAOPD_LOG_FORMAT": "json",
            "VAOPD_METRICS_ADDRESS": "127.0.0.1:0",
            **spans.environment,
        }.items():
            patch.setenv(name, value)
        asked = None
        if shutil.which("prometheus"):
            shutil.copy(MONITORING / "alerts.yml", folder)
            asked = stack.enter_context(prometheus(folder, config=CONFIG))
        started = time.time()
        with System(folder) as system:
            logs = run(system, asked)
        yield Watched(logs=logs, spans=spans, prometheus=asked, started=started, ended=time.time())


def run(system: System, asked: Prometheus | None) -> dict[str, list[dict[str, Any]]]:
    """A run of a few steps, two scores by way of the API and two calls that are refused -> each process's log lines."""
    api, address = system.start_api()
    processes = {"teacher": system.teacher, "api": api}
    job = system.job(JOB, trainer__steps=8, evaluation__every=4)
    processes["rollout"] = job.start_worker()
    processes["trainer"] = job.start_trainer()
    for name, process in processes.items():
        job.until(f"{name} serves metrics", lambda process=process: metrics_of(process), process)
    tell_prometheus(system.folder, processes)

    ask_api(address)
    be_refused(system)
    if asked is not None:  # a rate is told from two samples that differ
        wait_until("that is seen", lambda: asked.query("vaopd_teacher_refused_calls_total"))
        wait_until("that too", lambda: asked.query('vaopd_api_requests_total{route="/v1/score"}'))
    job.finished(processes["trainer"])
    ask_api(address)
    be_refused(system)
    if asked is not None:
        wait_until("the second time is seen", lambda: asked.query("vaopd_teacher_refused_calls_total > 1"))
    return {name: lines_of(process) for name, process in processes.items()}


def ask_api(address: str) -> None:
    answer = httpx.post(f"http://{address}/v1/score", json=QUESTION, headers={"X-Request-Id": REQUEST}, timeout=60)
    assert answer.status_code == 200, answer.text


def be_refused(system: System) -> None:
    """A call in whose envelope something is wrong: another vocabulary."""
    request = token_request(tiny_vlm(), "refused", pictures=[drawing(1)])
    with SyncTeacherClient(system.address, job=JOB, tokenizer_fingerprint="0" * 64) as client, pytest.raises(Mismatch):
        list(client.score([request]))


def metrics_of(process: Process) -> str | None:
    """host:port at which it serves its metrics, once it does."""
    found = re.search(r"metrics at http://([\d.:]+)/metrics", process.text())
    return found and found[1]


def tell_prometheus(folder: Path, processes: dict[str, Process]) -> None:
    targets = [
        {"targets": [metrics_of(process)], "labels": {"role": role, "process": role}}
        for role, process in processes.items()
    ]
    (folder / "targets.json").write_text(json.dumps(targets))


def lines_of(process: Process) -> list[dict[str, Any]]:
    """Standard error is JSON, line by line; standard output is not, and begins otherwise."""
    return [json.loads(line) for line in process.text().splitlines() if line.startswith("{")]


# -- logs -------------------------------------------------------------------------------------------------------------


def naming(lines: list[dict[str, Any]], group_id: str) -> list[dict[str, Any]]:
    return [line for line in lines if group_id in (line.get("group"), *line.get("groups", ()))]


@pytest.mark.parametrize(
    ("process", "said"),
    [("trainer", "requested"), ("rollout", "sampled"), ("teacher", "0 refused"), ("trainer", "trained")],
)
def test_a_group_is_followed_through_every_process_by_its_id(watched: Watched, process: str, said: str) -> None:
    found = naming(watched.logs[process], GROUP)
    assert any(said in line["message"] for line in found)
    assert {line["process"] for line in found} == {process}
    assert {line["job"] for line in found} == {JOB}


def test_a_request_is_followed_from_the_api_to_the_teacher_by_its_id(watched: Watched) -> None:
    for process in ("api", "teacher"):
        found = [line["message"] for line in watched.logs[process] if line.get("request") == REQUEST]
        assert any("/v1/score" in message or "1 groups" in message for message in found)


def test_every_line_says_when_who_and_what(watched: Watched) -> None:
    for process, lines in watched.logs.items():
        assert lines
        for line in lines:
            assert line.keys() >= {"time", "level", "process", "logger", "message"}
            assert line["process"] == process
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])


def test_lines_hold_no_texts(watched: Watched) -> None:
    for lines in watched.logs.values():
        assert QUESTION["response"] not in json.dumps(lines)


# -- traces -----------------------------------------------------------------------------------------------------------


def of_group(spans: list[Span]) -> list[Span]:
    return [span for span in spans if GROUP in span.attributes.get("vaopd.groups", ())]


def test_a_step_s_trace_reaches_the_teacher_s_device(watched: Watched) -> None:
    (scoring,) = of_group(watched.spans.named("score groups"))
    (step,) = [span for span in watched.spans.named("train step") if span.span_id == scoring.parent_id]
    assert (step.service, step.attributes["vaopd.step"]) == ("vaopd-trainer", 2)
    batches = of_group(watched.spans.named("teacher batch"))
    calls = {span.span_id: span for span in watched.spans.named("/vaopd.v1.Teacher/ScoreGroups")}
    assert batches
    for batch in batches:
        assert batch.service == "vaopd-teacher"
        assert batch.trace_id == step.trace_id
        assert calls[batch.parent_id].parent_id == scoring.span_id


def test_a_worker_s_span_names_its_groups_since_no_trace_goes_through_redis(watched: Watched) -> None:
    (span,) = of_group(watched.spans.named("generate"))
    assert span.service == "vaopd-rollout"
    assert span.attributes["vaopd.policy_version"] == 2


def test_lines_name_the_trace_that_they_belong_to(watched: Watched) -> None:
    (scoring,) = of_group(watched.spans.named("score groups"))
    calls = naming(watched.logs["teacher"], GROUP)
    assert {line["trace_id"] for line in calls} == {scoring.trace_id}


# -- Prometheus -------------------------------------------------------------------------------------------------------


def dashboard_queries() -> list[tuple[str, str]]:
    dashboard = json.loads((MONITORING / "grafana" / "dashboards" / "vaopd.json").read_text())
    return [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel.get("targets", ())]


@pytest.mark.parametrize(("panel", "query"), dashboard_queries(), ids=lambda text: text[:60])
def test_each_query_of_the_dashboard_shows_something(watched: Watched, panel: str, query: str) -> None:
    query = query.replace("$job", ".*").replace("$__rate_interval", "60s")
    assert watched.asked().over(query, start=watched.started, end=watched.ended)


def test_no_alert_is_raised_by_a_run_that_is_well(watched: Watched) -> None:
    assert watched.asked().over('ALERTS{alertstate="firing"}', start=watched.started, end=watched.ended) == []


def test_rules_are_evaluated_without_an_error(watched: Watched) -> None:
    (group,) = watched.asked().get("rules")["groups"]
    assert {rule["name"] for rule in group["rules"]} == {
        rule["alert"] for rule in yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]
    }
    assert [rule["lastError"] for rule in group["rules"] if rule.get("lastError")] == []


def test_counters_agree_with_the_run(watched: Watched) -> None:
    """Eight steps of four groups of two."""

    def last(query: str) -> float:
        (series,) = watched.asked().over(query, start=watched.started, end=watched.ended)
        return float(series["values"][-1][1])

    assert last("max_over_time(vaopd_trainer_step[1h])") == 8
    assert last('max_over_time(vaopd_trainer_groups_total{fate="trained"}[1h])') == 32
    assert last("max_over_time(vaopd_trainer_rollouts_total[1h])") == 64
    assert last("max_over_time(vaopd_trainer_group_lag_versions_sum[1h])") == 0
    assert last(f'vaopd_teacher_groups_total{{vaopd_job="{JOB}"}}') == 32
    # Two held-out problems, asked before the first step, after four and after eight.
    assert last("vaopd_rollout_groups_total") == 32 + 3 * 2
