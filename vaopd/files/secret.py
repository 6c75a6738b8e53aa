"""Reads files that hold secrets, and refuses those that other accounts may read or change, as SSH does."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from vaopd.errors import ConfigError
from vaopd.files.plain import MIB, open_plain

_OPEN = stat.S_IWGRP | stat.S_IROTH | stat.S_IWOTH
"""A group may read: containers get their secrets so."""


def read_secret(path: Path, *, what: str) -> bytes:
    """Returns a file's content. Raises ConfigError, with the chmod to do, for one that is open to others.

    Raises OSError as `open_plain` too: a service reads its keys again while it serves, and must not hang on a pipe.

    what: the file's part in messages, such as "key file".
    """
    with open_plain(path, limit_bytes=MIB) as file:
        mode = os.fstat(file.fileno()).st_mode
        if mode & _OPEN:
            raise ConfigError(
                f"{what} {str(path)!r} has mode {stat.S_IMODE(mode):04o} and may be read or written by others; "
                f"chmod go-w,o-r {path}"
            )
        return file.read(MIB)


def parse_api_key(content: bytes | str, *, origin: str) -> str:
    """Returns the key in a file's content: one word of visible ASCII, since it travels in a header.

    Raises ConfigError, naming `origin`, for any other content.
    """
    text = content if isinstance(content, str) else content.decode("latin-1")
    words = text.split()
    if len(words) != 1 or not words[0].isascii() or not words[0].isprintable():
        raise ConfigError(f"{origin} must hold one API key and nothing else; `vaopd keys add JOB` prints one")
    return words[0]
