"""A real Prometheus on a free port, for a test that queries it."""

from __future__ import annotations

import json
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.programs import find_program
from tests.support.waiting import wait_until
from vaopd.net.ports import free_port


def binary(name: str) -> str:
    """Returns the path of `prometheus` or `promtool`; without it, the test is skipped."""
    return find_program(name, package="prometheus")


@dataclass(frozen=True)
class Prometheus:
    url: str

    def get(self, path: str, **parameters: str) -> Any:
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}") as answer:
            return json.load(answer)["data"]

    def query(self, text: str) -> list[dict[str, Any]]:
        return self.get("query", query=text)["result"]

    def over(self, text: str, *, start: float, end: float, step_s: float = 1.0) -> list[dict[str, Any]]:
        """One series each, with its "metric" and its "values", pairs of time and text."""
        return self.get("query_range", query=text, start=str(start), end=str(end), step=str(step_s))["result"]


@contextmanager
def prometheus(folder: Path, *, config: str) -> Iterator[Prometheus]:
    """`config`: the whole prometheus.yml; relative paths in it start at `folder`."""
    executable = binary("prometheus")
    (folder / "prometheus.yml").write_text(config)
    port = free_port()
    command = [executable, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'tsdb'}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    running = Prometheus(f"http://127.0.0.1:{port}")

    def ready() -> bool:
        assert process.poll() is None, (folder / "prometheus.log").read_text()[-2000:]
        try:
            with urllib.request.urlopen(f"{running.url}/-/ready") as answer:
                return answer.status == 200
        except OSError:
            return False

    try:
        wait_until("Prometheus is ready", ready)
        yield running
    finally:
        process.terminate()
        process.wait()
