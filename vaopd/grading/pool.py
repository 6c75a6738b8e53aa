"""Asks math-verify in a process of its own, which forks for each comparison; time and memory of each are limited.

    any thread ── socket pair ──► worker: imports math-verify once, single-threaded
         ▲   a reply pipe with    │ fork: RLIMIT_AS, and an alarm at the deadline that ends the process
         └────── each request ◄── child: writes one byte, or is ended and writes none

A child inherits nothing from an earlier comparison, so a verdict doesn't depend on the order, and needs no restart. Not
forked from the caller, since a fork would break torch's and gRPC's threads. The worker ends with its caller, even a
killed one: the socket closes. A busy child's alarm ends it in time.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from vaopd.errors import Unavailable

BOUND_S = 2.0
"""A judgement takes no longer."""
_LATE_S = 0.41
"""The latest that a caller ran again after its deadline, at nice 5 beside 28 runnable processes on two cores."""
LIMIT_S = BOUND_S - 1.25 * _LATE_S
"""From the start of a judgement to its deadline, the start of the worker included if that leaves `LEAST_S`."""
LEAST_S = 1.0
START_S = 60.0
"""The worker's start: 0.9 s where the machine is idle."""
AT_ONCE = 4
"""Comparisons in flight, each of up to 400 MB; further callers wait, within `LIMIT_S`."""
_MARGIN_S = 0.1  # a child's alarm comes first
_END_S = 0.25  # a worker that has closed the verdict's pipe, dying, closes its socket within
_MAX_REQUEST_BYTES = 200_000
"""The kernel refuses messages of more than 212 992 bytes."""

_slots = threading.BoundedSemaphore(AT_ONCE)
_lock = threading.Lock()
_worker: _Worker | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """Whether two expressions are equal. extract: `given` is prose that holds one."""

    given: str
    wanted: str
    extract: bool = False


def ask(questions: Sequence[Question], *, began: float) -> bool | None:
    """Whether any of the questions has the answer yes; None if that was cut off.

    began: `time.monotonic()` at the start of the judgement. Raises Unavailable when the worker can't start.
    """
    if not _slots.acquire(timeout=max(0.0, began + LIMIT_S - time.monotonic())):
        return None
    try:
        for _ in range(2):  # a worker that was ended from outside is started again, once
            worker = _get_worker()
            deadline = max(began + LIMIT_S, worker.ready_at + LEAST_S) - _MARGIN_S
            request = json.dumps([deadline, *map(astuple, questions)], ensure_ascii=False).encode()
            if len(request) > _MAX_REQUEST_BYTES:
                return None
            with contextlib.suppress(OSError):
                return worker.ask(request, until=deadline + _MARGIN_S)
            close(worker)
        return None
    finally:
        _slots.release()


def prepare() -> None:
    """Starts the worker ahead of the first question, which then needn't wait for it."""
    _get_worker()


def close(worker: _Worker | None = None) -> None:
    """Ends the worker, if it is still this one; the next `ask` starts another."""
    global _worker
    with _lock:
        if _worker is not None and worker in (None, _worker):
            _worker.close()
            _worker = None


def _get_worker() -> _Worker:
    global _worker
    with _lock:
        if _worker is None:
            _worker = _Worker()
        return _worker


def _forget() -> None:
    """In a forked child: the worker belongs to the parent, and a lock may be held by a thread that isn't here."""
    global _worker, _lock, _slots
    if _worker is not None:
        _worker.socket.close()
    _worker, _lock, _slots = None, threading.Lock(), threading.BoundedSemaphore(AT_ONCE)


os.register_at_fork(after_in_child=_forget)
atexit.register(close)


class _Worker:
    """The worker process and this end of its socket."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(START_S)
        # No site-packages start-up, no variables: only the places where modules are, and this package's, which an
        # editable install finds by a hook. A fixed seed orders sympy's sets.
        path = os.pathsep.join([str(Path(__file__).parents[2]), *(entry or os.getcwd() for entry in sys.path)])
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-P", "-m", "vaopd.grading.worker"],
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={"PYTHONPATH": path, "PYTHONHASHSEED": "0", "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", "")},
        )
        theirs.close()
        try:
            problem = self.socket.recv(4096).decode()
        except TimeoutError:
            problem = f"no answer within {START_S:g} s"
        if problem != "ready":
            self.close()
            raise Unavailable(
                f"the judge's process could not start ({problem or 'it ended'}); install math-verify: vaopd[trainer]"
            )
        self.pid = self._process.pid
        self.ready_at = time.monotonic()

    def ask(self, request: bytes, *, until: float) -> bool | None:
        """Sends a request and waits for its verdict; raises ConnectionError when the worker is gone."""
        receiver, sender = os.pipe()
        try:
            try:
                # All threads' own; between two that set it at once, either's time will do.
                self.socket.settimeout(max(0.001, until - time.monotonic()))
                socket.send_fds(self.socket, [request], [sender])
            except TimeoutError:  # the worker is behind with earlier requests
                return None
            finally:
                os.close(sender)
            waiting = select.poll()  # select itself refuses descriptors beyond 1023
            waiting.register(receiver, select.POLLIN)
            ready = waiting.poll(max(0.0, until - time.monotonic()) * 1000)
            verdict = os.read(receiver, 1) if ready else b""
        finally:
            os.close(receiver)
        if not verdict and self._has_ended(by=min(until, time.monotonic() + _END_S)):
            raise ConnectionError
        return {b"1": True, b"0": False}.get(verdict)

    def _has_ended(self, *, by: float) -> bool:
        """Whether the other end of the socket is closed. The kernel closes a dying process's files in any order."""
        hung_up = select.poll()
        hung_up.register(self.socket, select.POLLHUP)
        return bool(hung_up.poll(max(0.0, by - time.monotonic()) * 1000))

    def close(self) -> None:
        """Ends the process; a comparison in it ends at its deadline."""
        self.socket.close()
        self._process.kill()
        self._process.wait()
