"""Keeps a process alive whose log is on a full disk, in an encoding of few characters, closed, or read no more."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_LOST = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE)


class _Dropping(io.FileIO):
    def write(self, data: ReadableBuffer, /) -> int:
        """Writes; what isn't taken counts as written, or it would be tried again for ever."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _LOST:
                raise
            return memoryview(data).nbytes


def replace_closed() -> None:
    """Opens /dev/null as each standard stream that was closed (`>&-`).

    The next files would get its number, and with it what libraries print.
    """
    for name in ("stdin", "stdout", "stderr"):  # in this order, since the lowest free number is taken
        if getattr(sys, name) is None:
            handle = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(handle, True)
            setattr(sys, name, open(handle, "r" if name == "stdin" else "w", closefd=False))  # noqa: SIM115


def drop_when_full(name: Literal["stdout", "stderr"]) -> None:
    """Lets writing to a standard stream succeed on a full disk, without a reader, and of characters it hasn't got.

    For what may be lost, never for results.
    """
    stream = getattr(sys, name)
    try:
        raw = _Dropping(stream.fileno(), "w", closefd=False)
    except (AttributeError, OSError):  # no such stream, or a test's that is no file
        return
    stream.flush()
    buffer = io.BufferedWriter(raw)
    text = io.TextIOWrapper(buffer, encoding=stream.encoding, errors="backslashreplace", line_buffering=True)
    setattr(sys, name, text)
