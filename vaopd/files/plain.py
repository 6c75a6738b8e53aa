"""Reads files of a folder that may hold anything: bounded in time and memory, whatever lies in a file's place."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

MIB = 2**20


class UnfitFile(OSError):
    """A pipe, device or folder lies in a file's place, or the file is larger than what is read."""


def open_plain(path: Path, *, limit_bytes: int | None) -> BinaryIO:
    """Opens a regular file of at most `limit_bytes` for reading.

    Raises UnfitFile for a larger one, and for a pipe, device or folder: a pipe without a writer would never open.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise UnfitFile(errno.EINVAL, "not a regular file", str(path))
        if limit_bytes is not None and status.st_size > limit_bytes:
            reason = f"{status.st_size / MIB:.1f} MiB, more than the {limit_bytes / MIB:g} MiB that are read"
            raise UnfitFile(errno.EFBIG, reason, str(path))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_plain(path: Path, *, limit_bytes: int = MIB) -> str:
    """Returns the text of a regular file. Raises OSError as `open_plain`, UnicodeDecodeError if not UTF-8."""
    return read_plain_bytes(path, limit_bytes=limit_bytes).decode()


def read_plain_bytes(path: Path, *, limit_bytes: int = MIB) -> bytes:
    """Returns the content of a regular file. Raises OSError as `open_plain`."""
    with open_plain(path, limit_bytes=limit_bytes) as file:
        return file.read(limit_bytes)


def read_end(path: Path, *, most_bytes: int = MIB) -> str:
    """Returns the last bytes of a regular file of any size as text. Raises OSError."""
    with open_plain(path, limit_bytes=None) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - most_bytes))
        return file.read(most_bytes).decode(errors="replace")
