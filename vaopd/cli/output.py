"""Keeps standard output for a command's results: whatever libraries print goes to standard error.

vLLM logs to standard output, from several processes; `vaopd eval --json | jq` must see the JSON alone. So the file
descriptor is moved away for as long as a command runs, and only `emit` writes to it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from vaopd.files.durable import name_errors
from vaopd.telemetry.visible import escape

_STDOUT = "standard output"
_results: TextIO | None = None


@contextlib.contextmanager
def reserve_stdout() -> Iterator[None]:
    """Sends what this process and its children print to standard error, except for `emit`'s lines."""
    global _results
    own, moved = sys.stdout, None
    with contextlib.suppress(AttributeError, OSError):  # no standard output, or a test's that is no file
        if own.fileno() == 1:
            own.flush()
            moved = os.dup(1)
            os.dup2(2, 1)
    # A path of any bytes is printed as it is; what a terminal without UTF-8 lacks, such as the bars, becomes "?".
    errors = "surrogateescape" if str(own.encoding).lower().startswith("utf") else "replace"
    _results = own if moved is None else open(moved, "w", encoding=own.encoding, errors=errors)  # noqa: SIM115
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        try:
            with name_errors(_STDOUT):
                get_results().flush()
        finally:
            if moved is not None:
                os.dup2(moved, 1)
            _results = None


def emit(value: object, *, end: str = "\n", flush: bool = False, coloured: bool = False) -> None:
    """Prints a command's result to standard output; in a terminal with its control characters escaped.

    coloured: it has colours of ours, and its other control characters are escaped already.
    """
    stream, text = get_results(), str(value)
    if stream.isatty() and not coloured:
        text = "\n".join("\t".join(map(escape, line.split("\t"))) for line in text.split("\n"))
    with name_errors(_STDOUT):
        print(text, end=end, flush=flush, file=stream)


def get_results() -> TextIO:
    """Returns the stream of the results."""
    return sys.stdout if _results is None else _results


def say(line: str) -> None:
    """Prints on standard error what happens; in a terminal over a line that didn't stay."""
    from vaopd.telemetry.progress_line import draw

    for part in f"vaopd: {line}".split("\n"):
        draw(sys.stderr, part, stays=True)


def wants_colour(terminal: bool) -> bool:
    """Returns whether to colour the output: in a terminal that supports it, unless NO_COLOR is set (no-color.org)."""
    return terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, code: int, *, stream: Any = None) -> str:
    """Returns a text in one of the terminal's colours, e.g. 31 for red; plain where no colour is wanted.

    >>> import io
    >>> paint("MISS", 31, stream=io.StringIO())
    'MISS'
    """
    return f"\x1b[{code}m{text}\x1b[0m" if wants_colour((stream or get_results()).isatty()) else text
