"""Reads a run's text files: JSON Lines, also while they are being written. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vaopd.errors import InvalidInput, NotFound


def read_text(path: Path) -> str:
    """Reads a file of a run's folder; raises NotFound when it can't be read."""
    try:
        return path.read_text()
    except OSError as error:
        raise NotFound(f"{path} can't be read ({error.strerror}); RUN is a run's folder, e.g. runs/demo-…") from None


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields "FILE:LINE" and the object there for every complete line; raises InvalidInput on one that is no JSON."""
    lines = read_text(path).split("\n")
    # The rest after the last newline is empty, or a line that is just being written.
    for number, line in enumerate(lines[:-1], 1):
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            raise InvalidInput(f"{path}:{number} is not a JSON object") from None
        yield f"{path}:{number}", value
