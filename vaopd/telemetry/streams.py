"""Keeps a process alive whose log is on a full disk, or in an encoding of few characters."""

from __future__ import annotations

import errno
import io
import sys
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class _Dropping(io.FileIO):
    def write(self, data: ReadableBuffer, /) -> int:
        """Writes; what the disk doesn't take counts as written, or it would be tried again for ever."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            return memoryview(data).nbytes


def drop_when_full(name: Literal["stdout", "stderr"]) -> None:
    """Lets writing to a standard stream succeed on a full disk, and of text that its encoding hasn't got.

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
