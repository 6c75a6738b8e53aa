"""Reads a run's text files: JSON Lines, also while they are being written. Torch-free.

A folder of runs may hold anything: a file is read within bounds, and whatever is wrong with it is one error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vaopd.errors import InvalidInput, NotFound
from vaopd.files.plain import MIB, open_plain, read_plain

METRICS_BYTES = 64 * MIB
"""Of one file of metrics, all of which is kept in memory: about 30 000 steps."""
LINE_BYTES = 32 * MIB
"""A line of samples.jsonl holds one rollout, with its images."""


def read_text(path: Path) -> str:
    """Reads a file of a run's folder; raises NotFound when it can't be read, InvalidInput for one that isn't UTF-8."""
    try:
        return read_plain(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from None


def read_json_lines(path: Path, *, limit_bytes: int | None = METRICS_BYTES) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields "FILE:LINE" and the object there for every complete line.

    limit_bytes: of the file; None: any. Raises NotFound when it can't be read, InvalidInput on a line that is no JSON
    object or longer than LINE_BYTES.
    """
    try:
        with open_plain(path, limit_bytes=limit_bytes) as file:
            number = 0
            while line := file.readline(LINE_BYTES):
                number += 1
                where = f"{path}:{number}"
                if not line.endswith(b"\n"):
                    if len(line) == LINE_BYTES:
                        raise InvalidInput(f"{where} is longer than {LINE_BYTES // MIB} MiB")
                    return  # a line that is just being written
                yield where, _parse(line, where)
    except OSError as error:
        raise _unreadable(path, error) from None


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError and numbers of thousands of digits included
        value = None
    if not isinstance(value, dict):
        raise InvalidInput(f"{where} is not a JSON object")
    return value


def _unreadable(path: Path, error: OSError) -> NotFound:
    return NotFound(f"{path} can't be read ({error.strerror}); RUN is a run's folder, e.g. runs/demo-…")
