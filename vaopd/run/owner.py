"""Keeps a second process off a run's folder: RUN/up.lock and RUN/trainer.lock, held for as long as their process lives.

The job's lease in Redis decides which trainer may train. These locks refuse a second one at once, before it has changed
a file, and whatever Redis says. A frozen owner (stopped by a signal, or running without a word for longer than its
lease) refuses no one: then the lease decides which of the two continues. A file system without locks leaves it to the
lease.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from vaopd.errors import ConfigError
from vaopd.files.durable import name_errors
from vaopd.files.plain import read_plain
from vaopd.run.status import is_silent

UP, TRAINER = "up.lock", "trainer.lock"
LAUNCHER = "VAOPD_LAUNCHER_PID"
"""Set by `vaopd up` for its processes, which share the folder with it."""


@contextlib.contextmanager
def own(folder: Path, name: str) -> Iterator[None]:
    """Owns RUN as UP or TRAINER during the block. Raises ConfigError, with the owner's words, if another process does.

    The folder must exist. A process that the owner of UP has started is no stranger to it.
    """
    with _guard(folder):
        # Both, since `up` and a trainer by hand are two on one run as well.
        for other in (UP, TRAINER):
            owner = None if other == name else _find_owner(folder / other)
            if owner is not None and str(owner.get("pid")) != os.environ.get(LAUNCHER):
                raise _refuse(folder, owner)
        handle = _lock(folder, name)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _lock(folder: Path, name: str) -> int | None:
    """Returns the locked file with this process's words; None on a file system without locks.

    Raises OSError where nothing can be written: without its lock a second process would be let in.
    """
    path = folder / name
    if (owner := _find_owner(path)) is not None:
        raise _refuse(folder, owner)
    # A file of its own: a frozen owner keeps the lock of the one before.
    aside = path.with_name(f".{name}.tmp-{os.getpid()}")
    with name_errors(path, aside), contextlib.ExitStack() as undo:
        handle = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        undo.callback(aside.unlink)
        undo.callback(os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # no locks here
            return None
        since = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        words = {"role": name.partition(".")[0], "pid": os.getpid(), "host": socket.gethostname(), "since": since}
        os.write(handle, json.dumps(words).encode())
        aside.replace(path)
        undo.pop_all()
        return handle


@contextlib.contextmanager
def _guard(folder: Path) -> Iterator[None]:
    """Lets one process at a time look and lock."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _find_owner(path: Path) -> dict[str, object] | None:
    """Returns the words of the process at work that holds a lock; None when it is free, or its owner is frozen."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = _read_words(path)
        return None if _is_frozen(owner) or is_silent(path.parent) else owner
    except OSError:
        return None
    finally:
        os.close(handle)
    return None


def _read_words(path: Path) -> dict[str, object]:
    try:
        words = json.loads(read_plain(path))
    except (OSError, ValueError, RecursionError):
        words = None
    return words if isinstance(words, dict) else {}


def _is_frozen(owner: dict[str, object]) -> bool:
    """Whether the owner, of this host, is stopped by a signal or a debugger."""
    if owner.get("host") != socket.gethostname():
        return False
    try:
        state = Path(f"/proc/{owner.get('pid')}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state in ("T", "t")


def _refuse(folder: Path, owner: dict[str, object]) -> ConfigError:
    role, pid, host, since = (owner.get(key, "unknown") for key in ("role", "pid", "host", "since"))
    role = "vaopd up" if role == "up" else role
    return ConfigError(
        f"run folder {folder} is in use by {role}, process {pid} on {host}, since {since}; `vaopd watch "
        f"{shlex.quote(str(folder))}` shows it. Stop that process first, or choose another run.name"
    )
