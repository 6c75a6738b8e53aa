"""Runs child processes that live and die together: each in a session of its own, with a log and restarts.

In: `Child`s to start. Out: the exit code of the main child. Waits for: the main child's exit, a signal, or a child that
can't be kept alive. It knows nothing of teachers and trainers; `vaopd.launch.up` does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from vaopd.errors import ChildFailed, Interrupted
from vaopd.launch import orphan_guard
from vaopd.telemetry.visible import escape

POLL_S = 0.1
STEADY_S = 300.0  # a child that lived this long after a restart has its restarts forgiven
LOG_TAIL_LINES, LOG_TAIL_BYTES = 15, 2**16
SAY_EVERY_S = 10.0  # how often the children that are still starting are listed
SHOW_EVERY_S = 1.0  # the same in a terminal, where the line can be drawn over
ENDING_SILENT_S = 1.0  # an end that takes longer is listed in the same way
LAST_LINE_CHARACTERS = 70  # of the message in a log's last line
LOG_PREFIX = re.compile(r"^.*?\b(?:INFO|WARNING|ERROR)\b[\d:, -]*(?:\S+: |\[\S+:\d+\] )?")


@dataclass(frozen=True, kw_only=True)
class Child:
    """Says how to start a process, and whether to start it again."""

    name: str
    argv: tuple[str, ...]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    is_ready: Callable[[], bool] | None = None
    """Called until it returns True; a child that dies before that has a wrong set-up and is not restarted."""
    restarts: int = 5
    """How often in a row it is restarted after it was ready."""
    restart_argv: tuple[str, ...] | None = None
    """The command line of a restart, where it differs."""
    stop_order: int = 1
    """Children are ended in this order, those with the same number together."""
    grace_s: float | None = None
    """From SIGTERM to SIGKILL; None: the supervisor's."""
    to_terminal: bool = False
    """Whether its standard output goes to the terminal; standard error always goes to the log."""


@dataclass(kw_only=True)
class _Running:
    child: Child
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int
    started: float
    ready: bool
    restarts: int = 0
    restart_at: float | None = None


class Supervisor:
    """Supervises children while its `with` block runs; its end, of any kind, ends them and all that they started."""

    def __init__(
        self,
        *,
        logs: Path,
        grace_s: float = 20.0,
        backoff_s: float = 1.0,
        say: Callable[[str], None],
        show: Callable[[str], None] | None = None,
    ) -> None:
        """logs: folder for NAME.log, which is appended to. grace_s: from SIGTERM to SIGKILL.

        backoff_s: before the first restart; each further one in a row waits twice as long. say: prints a line. show:
        the same in a terminal, of a line that the next one may be drawn over.
        """
        self._logs = logs
        self._grace_s = grace_s
        self._backoff_s = backoff_s
        self._say = say
        self._show = show
        self._running: dict[str, _Running] = {}
        self._signals: list[int] = []
        self._previous_handlers: dict[int, Any] = {}
        self._last_listed = time.monotonic()

    def __enter__(self) -> Supervisor:
        self._logs.mkdir(parents=True, exist_ok=True)
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", orphan_guard.__file__], stdin=subprocess.PIPE, start_new_session=True
        )
        # Only recorded here and handled in `check`: an exception in mid-start could lose a child.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._previous_handlers[number] = signal.signal(number, self._note_signal)
        return self

    def __exit__(self, *_: Any) -> None:
        try:
            self._stop_all()
        finally:
            assert self._guard.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._guard.stdin.close()
            self._guard.wait()
            for number, handler in self._previous_handlers.items():
                signal.signal(number, handler)

    def start(self, child: Child) -> int:
        """Starts a child and returns its process id."""
        self._running[child.name] = running = self._launch(child, child.argv)
        return running.process.pid

    def set_restart_argv(self, name: str, argv: Sequence[str]) -> None:
        """Sets the command line of a restart, for example with the port that the first run got."""
        running = self._running[name]
        running.child = dataclasses.replace(running.child, restart_argv=tuple(argv))

    def wait_ready(self, name: str, *, timeout_s: float) -> None:
        """Waits until the child is ready. Raises ChildFailed when it dies, or isn't ready in time."""
        deadline = time.monotonic() + timeout_s
        while not self._running[name].ready:
            self.check()
            if time.monotonic() > deadline:
                raise ChildFailed(f"{name} was not ready after {timeout_s:g} s\n{self.log_tail(name)}")
            time.sleep(POLL_S)

    def run_until_exit(self, name: str) -> int:
        """Keeps the other children alive until this one exits; returns its exit code, −n for a death by signal n."""
        while True:
            self.check(except_for=name)
            code = self._running[name].process.poll()
            if code is not None:
                return code
            time.sleep(POLL_S)

    def pause(self, seconds: float, *, except_for: str) -> None:
        """Waits, and keeps the other children alive meanwhile. Raises as `check`."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.check(except_for=except_for)
            time.sleep(POLL_S)

    def check(self, *, except_for: str | None = None) -> None:
        """Handles signals, readiness, deaths and due restarts once.

        Raises Interrupted after a signal, ChildFailed when a child other than `except_for` can't be kept alive.
        """
        if self._signals:
            raise Interrupted(self._signals[0])
        for name, running in self._running.items():
            if name == except_for:
                continue
            if running.restart_at is not None:
                self._restart_if_due(name, running)
            elif (code := running.process.poll()) is not None:
                self._handle_death(running, code)
            elif not running.ready and running.child.is_ready is not None and running.child.is_ready():
                running.ready = True
                self._say(f"{name} is ready after {time.monotonic() - running.started:.0f} s")
        self._list_starting()

    def _list_starting(self) -> None:
        if not self._is_time_to_list():
            return
        now = time.monotonic()
        starting = {
            name: running
            for name, running in self._running.items()
            if running.child.is_ready is not None and not running.ready
        }
        if starting and self._show:
            names = ", ".join(f"{name} {now - running.started:.0f} s" for name, running in starting.items())
            last = max(starting.values(), key=lambda running: running.log.exists() and running.log.stat().st_mtime)
            self._show(f"starting: {names}  {self._read_last_line(last)}")
        elif starting:
            names = ", ".join(f"{name} ({now - running.started:.0f} s)" for name, running in starting.items())
            self._say(f"still starting: {names}; logs in {self._logs}")

    def _list_ending(self, names: Sequence[str], seconds: float) -> None:
        if seconds > ENDING_SILENT_S and self._is_time_to_list():
            (self._show or self._say)(f"ending: {', '.join(names)} ({seconds:.0f} s)")

    def _is_time_to_list(self) -> bool:
        """Returns whether the last list is long enough ago, and takes this for the next one."""
        now = time.monotonic()
        if now - self._last_listed < (SHOW_EVERY_S if self._show else SAY_EVERY_S):
            return False
        self._last_listed = now
        return True

    def _read_last_line(self, running: _Running) -> str:
        """Returns the message that the child logged last, such as the progress of loading a model."""
        messages = (LOG_PREFIX.sub("", line).strip() for line in reversed(self._read_log(running)))
        return next((escape(message)[:LAST_LINE_CHARACTERS] for message in messages if message), "")

    def log_tail(self, name: str) -> str:
        """Returns the last lines that the child wrote since it was started, with the log's path."""
        running = self._running[name]
        lines = self._read_log(running)[-LOG_TAIL_LINES:] or ["(nothing: its disk may be full, or it was removed)"]
        return f"the end of {running.log}:\n" + "\n".join(f"  {escape(line)}" for line in lines)

    @staticmethod
    def _read_log(running: _Running) -> list[str]:
        """Returns the last lines that the child wrote since it was started; none when its log was removed."""
        try:
            with running.log.open("rb") as file:
                file.seek(max(running.log_start, os.fstat(file.fileno()).st_size - LOG_TAIL_BYTES))
                return file.read().decode(errors="replace").splitlines()
        except FileNotFoundError:
            return []

    def _launch(self, child: Child, argv: Sequence[str]) -> _Running:
        log = self._logs / f"{child.name}.log"
        try:
            with log.open("ab") as file:
                start = file.tell()
                process = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=None if child.to_terminal else file,
                    stderr=file,
                    env={**os.environ, **child.environment},
                    start_new_session=True,
                )
        except OSError as error:  # of the log, too
            raise ChildFailed(f"{child.name} can't be started: {str(error.filename)!r}: {error.strerror}") from None
        self._send_to_guard("+", process.pid)
        return _Running(
            child=child,
            process=process,
            log=log,
            log_start=start,
            started=time.monotonic(),
            ready=child.is_ready is None,
        )

    def _handle_death(self, running: _Running, code: int) -> None:
        child = running.child
        how = f"ended with code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        # A process that the dead child started (vLLM's engine) would keep its memory and its port.
        self._end_group(running.process.pid)
        if not running.ready and running.restarts == 0:
            raise ChildFailed(f"{child.name} {how} before it was ready; {self.log_tail(child.name)}")
        if time.monotonic() - running.started > STEADY_S:
            running.restarts = 0
        if running.restarts >= child.restarts:
            raise ChildFailed(
                f"{child.name} {how} and was restarted {running.restarts} times; {self.log_tail(child.name)}"
            )
        delay = self._backoff_s * 2**running.restarts
        running.restart_at = time.monotonic() + delay
        self._say(f"{child.name} {how}; it is restarted in {delay:g} s ({running.log})")

    def _restart_if_due(self, name: str, running: _Running) -> None:
        assert running.restart_at is not None
        if time.monotonic() < running.restart_at:
            return
        fresh = self._launch(running.child, running.child.restart_argv or running.child.argv)
        fresh.restarts = running.restarts + 1
        # It was ready once. The sign of it (an address file, a heartbeat) may still be the dead one's.
        fresh.ready = True
        self._running[name] = fresh

    def _stop_all(self) -> None:
        """Ends the children in their order: SIGTERM, then SIGKILL after the grace or at a second signal."""
        signals_before = len(self._signals)
        for order in sorted({running.child.stop_order for running in self._running.values()}):
            wave = [running for running in self._running.values() if running.child.stop_order == order]
            for running in wave:
                if running.process.poll() is None:
                    running.process.terminate()
            graces = (running.child.grace_s for running in wave)
            deadline = time.monotonic() + max(self._grace_s if grace is None else grace for grace in graces)
            began = time.monotonic()
            while left := [running.child.name for running in wave if running.process.poll() is None]:
                if time.monotonic() > deadline or len(self._signals) > signals_before:
                    break
                self._list_ending(left, time.monotonic() - began)
                time.sleep(POLL_S / 4)
            for running in wave:
                self._end_group(running.process.pid)
                running.process.wait()

    def _end_group(self, group: int) -> None:
        orphan_guard.signal_groups({group}, signal.SIGKILL)
        self._send_to_guard("-", group)

    def _send_to_guard(self, sign: str, group: int) -> None:
        assert self._guard.stdin is not None
        # Without its guard a run works as before; only a SIGKILL of the launcher would leave processes behind.
        with contextlib.suppress(BrokenPipeError):
            self._guard.stdin.write(f"{sign}{group}\n".encode())
            self._guard.stdin.flush()

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)
