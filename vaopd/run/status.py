"""A run's status, RUN/status.json: written by `vaopd up` and the trainer; read by `watch`, reports, the API and `up`.

    starting ──► running ──► finished
        │           ├──────► stopped    by a signal; --resume continues it
        └───────────┴──────► failed     with the reason

A killed process writes nothing, so `read_status` also looks whether the writer still lives. A running trainer repeats
its status each time it renews its lease on the job: once the lease has run out, the run counts as failed. On the
writer's own host that shows at once: `up` and trainer hold a lock on RUN/status.lock, which ends with them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from vaopd.errors import InvalidInput, LeaseLost, VaopdError
from vaopd.files.durable import write_atomic
from vaopd.files.plain import read_plain

log = logging.getLogger(__name__)

State = Literal["starting", "running", "stopped", "failed", "finished"]
FILE = "status.json"
LOCK = "status.lock"
STATES = ("starting", "running", "stopped", "failed", "finished")
START_S = 1800.0
"""How long a start may be silent, seen from another host: a large model is downloaded and loaded meanwhile."""
_PROBES = 3
_PROBE_AGAIN_S = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatus:
    """A run's status. `step`: optimizer steps done; `reason`: of a failure; times in seconds since the epoch."""

    state: State
    step: int = 0
    reason: str = ""
    writer: str = ""
    """The process that wrote it, e.g. "trainer, process 812 on gpu-3"."""
    host: str = ""
    since_s: float = 0.0
    """When the state began."""
    seen_s: float = 0.0
    """When the writer last showed that it lives."""
    lease_s: float = START_S
    """How long the writer may be silent."""

    @property
    def alive(self) -> bool:
        """Whether processes of the run are at work."""
        return self.state in ("starting", "running")

    @property
    def label(self) -> str:
        """The state, and for a run that ended early at which step and why."""
        if self.state == "failed":
            return f"failed at step {self.step}: {self.reason}"
        return f"stopped at step {self.step}" if self.state == "stopped" else self.state


def read_status(folder: Path, *, now_s: float | None = None) -> RunStatus | None:
    """Returns the run's status; None for a run that has none yet, or of an earlier vaopd. Raises InvalidInput.

    A run whose writer is gone is "failed", with the time for which nothing was heard of it.
    """
    try:
        text = read_plain(folder / FILE)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{folder / FILE} can't be read ({error})") from None
    status = _parse(text, folder / FILE)
    if not status.alive:
        return status
    silent_s = (time.time() if now_s is None else now_s) - status.seen_s
    if status.host == socket.gethostname() and _is_free(folder / LOCK):
        reason = f"the {status.writer} ended without a word: killed, out of memory, or a power cut"
    elif silent_s > status.lease_s:
        reason = f"no sign of life of the {status.writer} for {silent_s:.0f} s, and its lease is {status.lease_s:g} s"
    else:
        return status
    return replace(status, state="failed", reason=reason)


def is_silent(folder: Path) -> bool:
    """Returns whether a run at work has shown no sign of life for longer than its lease."""
    try:
        status = _parse(read_plain(folder / FILE), folder / FILE)
    except (OSError, UnicodeDecodeError, InvalidInput):
        return False
    return status.alive and time.time() - status.seen_s > status.lease_s


class StatusWriter:
    """Writes a run's status, and shows by a lock that this process lives.

    A full disk costs the status, not the run: it is logged once.
    """

    def __init__(self, folder: Path, *, role: str, clock: Callable[[], float] = time.time) -> None:
        """role: "vaopd up" or "trainer". The folder must exist."""
        self._folder = folder
        self._clock = clock
        self._warned = False
        host = socket.gethostname()
        self._status = RunStatus(state="starting", writer=f"{role}, process {os.getpid()} on {host}", host=host)
        self._lock: int | None = None
        self._before: RunStatus | None = None
        self._silent = False

    def __enter__(self) -> StatusWriter:
        with contextlib.suppress(InvalidInput):  # a damaged one is replaced
            self._before = read_status(self._folder)
        if self._before is not None:
            self._status = replace(self._status, step=self._before.step)
            # Another trainer is at work: not a word, unless this one gets the job's lease.
            self._silent = self._before.state == "running"
        # Shared: `up` and the trainer both live, and a trainer that replaces a frozen one must not wait for it.
        with contextlib.suppress(OSError):  # a file system without locks: then the lease alone decides
            self._lock = os.open(self._folder / LOCK, os.O_RDONLY | os.O_NONBLOCK | os.O_CREAT, 0o644)
            fcntl.flock(self._lock, fcntl.LOCK_SH)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def write(self, state: State, *, step: int | None = None, reason: str = "", lease_s: float = START_S) -> None:
        """Writes a state. step: that of the last write, unless given. lease_s: how long it may then be silent."""
        now_s = self._clock()
        step = self._status.step if step is None else step
        self._status = replace(
            self._status, state=state, step=step, reason=reason, since_s=now_s, seen_s=now_s, lease_s=lease_s
        )
        self._silent = self._silent and state != "running"
        self._put()

    def fail(self, reason: str) -> None:
        """Writes a failure. A finished run that was refused before it ran again stays finished."""
        self._end("failed", reason)

    def conclude(self, reason: str = "") -> None:
        """Writes the end of a run whose trainer could not: "failed" with a reason, else "stopped".

        For the launcher, once every process has ended. What a trainer wrote as its end stays; but "stopped" becomes
        "failed" with a reason: the launcher has stopped it, because another process couldn't be kept alive.
        """
        try:
            written = _parse(read_plain(self._folder / FILE), self._folder / FILE)
        except (OSError, UnicodeDecodeError, InvalidInput):
            written = self._status
        if not (written.alive or (reason and written.state == "stopped")):
            return
        self._status = replace(self._status, state=written.state, step=written.step)
        self._end("failed" if reason else "stopped", reason)

    @contextlib.contextmanager
    def record_failure(self) -> Iterator[None]:
        """Writes "failed", with the error as the reason, when the block raises."""
        try:
            yield
        except LeaseLost:  # the run is another trainer's, and so is its status
            raise
        except Exception as error:
            # A library's error may say nothing without its type.
            self.fail(str(error) if isinstance(error, VaopdError) else f"{type(error).__name__}: {error}")
            raise

    def beat(self) -> None:
        """Shows that this process lives and holds what it needs; with the step of `note_step`."""
        if self._status.alive:
            self._status = replace(self._status, seen_s=self._clock())
            self._put()

    def note_step(self, step: int) -> None:
        """Keeps the number of steps done for the next write."""
        self._status = replace(self._status, step=step)

    @property
    def step(self) -> int:
        """The number of steps done, as last noted."""
        return self._status.step

    def _end(self, state: State, reason: str) -> None:
        if self._status.state == "starting" and self._before is not None and self._before.state == "finished":
            self._status = self._before
            self._put()
        else:
            self.write(state, reason=reason)

    def _put(self) -> None:
        if self._silent:
            return
        try:
            write_atomic(self._folder / FILE, json.dumps(asdict(self._status), indent=1))
        except OSError as error:
            if not self._warned:
                log.warning("%s can't be written (%s); the run continues without it", self._folder / FILE, error)
            self._warned = True


def _parse(text: str, path: Path) -> RunStatus:
    """Returns the status in a file's text; keys of a newer vaopd are ignored. Raises InvalidInput."""
    try:
        values = json.loads(text)
        status = RunStatus(
            state=values["state"],
            step=int(values["step"]),
            reason=str(values["reason"]),
            writer=str(values["writer"]),
            host=str(values["host"]),
            since_s=float(values["since_s"]),
            seen_s=float(values["seen_s"]),
            lease_s=float(values["lease_s"]),
        )
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise InvalidInput(f"{path} is not a run's status ({error!r}); remove the file") from None
    if status.state not in STATES:
        raise InvalidInput(f"{path}: state is {status.state!r}, not one of {', '.join(STATES)}")
    return status


def _is_free(path: Path) -> bool:
    """Returns whether no process of this host holds the lock; False when that can't be known."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # it may be a pipe
    except OSError:
        return False
    try:
        # Another reader holds the lock for a moment, too.
        for attempt in range(_PROBES):
            if attempt:
                time.sleep(_PROBE_AGAIN_S)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            return True
        return False
    except OSError:
        return False
    finally:
        os.close(handle)
