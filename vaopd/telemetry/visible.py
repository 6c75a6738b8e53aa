"""Makes text of others safe for a terminal or a log: control characters are shown, not obeyed."""

from __future__ import annotations

import re

# C0, DEL, C1, and what turns or breaks a line invisibly: bidi controls, separators; surrogates can't be printed.
_CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escape(text: str) -> str:
    r"""Returns a text in one line, with its control characters as escapes.

    >>> escape("\x1b[31mred\x9b\u202e\n")
    '\\x1b[31mred\\x9b\\u202e\\n'
    """
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def escape_lines(text: str) -> str:
    r"""Returns a text of several lines so; those after the first are indented, so that none looks like one of its own.

    >>> escape_lines("refused\n2026-11-26 INFO all is well")
    'refused\n  2026-11-26 INFO all is well'
    """
    return "\n  ".join("\t".join(map(escape, line.split("\t"))) for line in text.split("\n"))


def escape_json(text: str) -> str:
    """Returns JSON with the control characters escaped that JSON lets through."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
