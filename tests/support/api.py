"""The scoring API as a process of its own, and a request that it answers."""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.support import preloaded
from tests.support.preloaded import Child
from tests.support.teacher import drawing, encoded, write_config
from tests.support.waiting import wait_until

IMAGE = encoded(drawing(1))
PNG = base64.b64encode(IMAGE.data).decode()
QUESTION = "What is the perimeter?"
BODY: dict[str, Any] = {"image": PNG, "question": QUESTION, "response": "It is 12."}


@dataclass(frozen=True)
class Api:
    http: httpx.Client
    process: Child
    log: Path

    def score(self, **body: Any) -> httpx.Response:
        return self.http.post("/v1/score", json=body)

    def known_answer(self) -> bytes:
        answer = self.score(**BODY)
        assert answer.status_code == 200, answer.text
        return answer.content


def service_file(folder: Path, text: str) -> tuple[str, str]:
    """The arguments that give a process this service file."""
    path = folder / "service.toml"
    path.write_text(text)
    return "--service", str(path)


def with_keys(folder: Path) -> tuple[str, str]:
    """The arguments of an API that asks for the keys in folder/keys.json."""
    return service_file(folder, '[api.keys]\nfile = "keys.json"\n')


def start_api(folder: Path, teacher: str, *arguments: str, **environment: str) -> Iterator[Api]:
    """`python -m vaopd_api` as a process of its own, on a free port, with these arguments and variables."""
    announce = folder / "api.address"
    announce.unlink(missing_ok=True)
    config = write_config(folder, model=folder, address=teacher)
    command = [sys.executable, "-m", "vaopd_api", "--config", str(config), "--set", "api.address=127.0.0.1:0"]
    command += [*arguments, "--announce", str(announce)]
    log = folder / "api.log"
    log.unlink(missing_ok=True)
    process = preloaded.start(command, log=log, environment=os.environ | environment)
    try:
        wait_until("the API listens", lambda: announce.exists() or process.poll() is not None)
        with httpx.Client(base_url=f"http://{announce.read_text()}", timeout=60) as http:
            yield Api(http, process, log)
    finally:
        process.kill()
        process.wait()


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The one error shape, problem details: exactly these keys, and words."""
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert set(problem) == {"type", "title", "status", "detail", "code", "field", "request_id"}
    assert problem["status"] == answer.status_code
    assert problem["type"] == f"urn:vaopd:problem:{problem['code']}"
    assert problem["request_id"] == answer.headers["x-request-id"]
    assert problem["title"]
    assert problem["detail"]
    return problem
