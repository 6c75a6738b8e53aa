"""A proxy of the environment, HTTP_PROXY or grpc_proxy, is for hosts outside: no call to this host goes through it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.api import Api
from tests.support.http_server import Answer, http_server
from tests.support.teacher import TeacherInProcess
from vaopd.benchmarks_eval.endpoint import OpenAIEndpoint
from vaopd.cli import main
from vaopd.client import SyncTeacherClient
from vaopd.http_client import ScoringClient

HEALTH = Path(__file__).parents[2] / "deploy" / "health.py"
DEAD = "http://127.0.0.1:9"
METRICS = "# TYPE vaopd_teacher_tokens counter\n"
MODELS = '{"data": [{"id": "judge"}]}'


@pytest.fixture(autouse=True)
def _proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, DEAD)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_the_teacher_is_asked_directly(teacher: TeacherInProcess) -> None:
    with SyncTeacherClient(teacher.target, job="geometry", timeout_s=5) as client:
        assert client.describe().model
    subprocess.run([sys.executable, HEALTH, "grpc", teacher.target], check=True)


def test_so_are_apis_and_metrics_of_this_host(api: Api) -> None:
    with ScoringClient(str(api.http.base_url), patience_s=0) as client:
        assert client.teachers()
    subprocess.run([sys.executable, HEALTH, "http", f"{api.http.base_url}/healthz"], check=True)
    with http_server(Answer(body=METRICS)) as url:
        assert main(["usage", url.removeprefix("http://")]) == 0
    with http_server(Answer(body=MODELS)) as url:
        OpenAIEndpoint(f"{url}/v1", model=None, max_tokens=1, api_key=None).http.close()
