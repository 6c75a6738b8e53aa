"""Starts the system's processes by forking one that has imported their libraries: most of a start is imports.

child = start([PYTHON, "-m", "vaopd_trainer", …], log=log, environment=variables)     # or [PYTHON, "-c", CODE, …]

A child runs as Python would run it: in a session of its own, with these variables, and with an end of its own. The one
that is forked, `python -m tests.support.preloaded FD`, starts with the first child; it has no threads, and computes
nothing. It ends with the tests, or when its socket is closed.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
LARGEST = 2**17
"""Bytes of a message; the environment is the most of it."""
LIBRARIES = (
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.processing_auto",
    "transformers.models.qwen3_vl.modeling_qwen3_vl",
    "transformers.models.qwen3_vl.processing_qwen3_vl",
    "vaopd.sampling.transformers_engine",
    "vaopd_api.app",
    "vaopd_rollout.worker",
    "vaopd_teacher.server",
    "vaopd_trainer.compose",
)
_own: list[_Parent] = []


class Child:
    """A forked process, with a Popen's methods."""

    def __init__(self, parent: _Parent, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._parent = parent

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._parent.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float = 600.0) -> int:
        wait_until(f"process {self.pid} ends", lambda: self.poll() is not None, timeout_s=timeout)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Parent:
    """The process that is forked, as seen from the tests."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "tests.support.preloaded", str(theirs.fileno())]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | QUIET, pass_fds=[theirs.fileno()], start_new_session=True
        )
        theirs.close()

    def ask(self, request: Mapping[str, Any]) -> Any:
        self._socket.send(json.dumps(request).encode())
        answer = self._socket.recv(LARGEST)
        assert answer, "the process to fork has ended; its error is above"
        return json.loads(answer)

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


def start(argv: Sequence[str], *, log: Path, environment: Mapping[str, str]) -> Child:
    """argv: Python, then -m and a module, or -c and code, then arguments. Both outputs are appended to `log`."""
    if not _own:
        _own.append(_Parent())
    how, what, *arguments = argv[1:]
    request = {how: what, "arguments": arguments, "log": str(log), "environment": dict(environment)}
    return Child(_own[0], _own[0].ask(request))


def close() -> None:
    """Ends the process that is forked; its children have ended before."""
    while _own:
        _own.pop().close()


def _preload() -> None:
    for name in LIBRARIES:
        importlib.import_module(name)


def _serve(requests: socket.socket) -> dict[str, Any] | None:
    """Forks until the socket is closed; returns what a child shall run, and None in the process itself."""
    while packet := requests.recv(LARGEST):
        request = json.loads(packet)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            led, leads = os.pipe()
            if not (answer := os.fork()):
                os.setsid()
                for descriptor in (requests.detach(), led, leads):
                    os.close(descriptor)
                return request
            os.close(leads)
            os.read(led, 1)  # returns when the child leads its session, and has closed the pipe
            os.close(led)
        requests.send(json.dumps(answer).encode())
    return None


def _run(request: dict[str, Any]) -> None:
    os.environ.clear()
    os.environ.update(request["environment"])
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    sys.argv = [request.get("-m", "-c"), *request["arguments"]]
    if "-m" in request:
        runpy.run_module(request["-m"], run_name="__main__", alter_sys=True)
    else:
        exec(request["-c"], {"__name__": "__main__"})


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as opened:
        _preload()
        child = _serve(opened)
    if child is not None:
        _run(child)
