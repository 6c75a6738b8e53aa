"""Compares two expressions with math-verify: a process of `vaopd.grading.pool`, which forks for each request.

Standard input is a socket: each message is a request with a pipe for its verdict, "1" or "0", or nothing if the limits
of time or memory cut it off. Ends with the socket's other end.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import resource
import signal
import socket
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NoReturn

from vaopd.grading.quantities import nearly_equal

MEMORY_BYTES = 400 * 2**20
"""Of one comparison, so that worker and child together stay below 512 MB."""
# Comparisons that fill the caches of parser and sympy before the first fork, in half a second.
WARM_UP = (
    ("45+45", "90"),
    (r"2\sqrt{3}\pi", r"\frac{1}{2}"),
    (r"\{1,2\}", "2,1"),
    ("(3,4)", "(4,3)"),
    ("y=2x", "y-2x=0"),
    (r"\frac{x^2-1}{x-1}", "x+1"),
    ("x^2+y^2=25", "x^2+y^2=5"),
)


class CutOff(BaseException):
    """Memory or stack was used up. No Exception, since math-verify takes any of those for "not equal"."""


def main() -> None:
    """Serves requests until the other end of the socket closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, which may judge on
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children need no wait
    requests = socket.socket(fileno=0)
    try:
        equal = load()
    except ImportError as error:
        requests.send(str(error).encode()[:4096])
        return
    for pair in WARM_UP:
        equal(*pair, False)
    gc.freeze()  # a child's garbage collection leaves these pages shared
    requests.send(b"ready")
    while True:
        serve(requests, equal)


def serve(requests: socket.socket, equal: Callable[[str, str, bool], bool]) -> None:
    """Waits for a request and forks a child that answers it; ends the process when there will be none."""
    message, pipes, _, _ = socket.recv_fds(requests, 2**20, 1)
    if not message:
        os._exit(0)
    if os.fork() == 0:
        deadline, *questions = json.loads(message)
        answer(deadline, questions, pipes[0], equal)
    os.close(pipes[0])


def answer(
    deadline: float, questions: list[tuple[str, str, bool]], pipe: int, equal: Callable[[str, str, bool], bool]
) -> NoReturn:
    """Writes the verdict of one request, within its limits, and ends the process."""
    try:
        os.close(0)  # the caller's end must not seem open when the worker has ended
        signal.setitimer(signal.ITIMER_REAL, max(0.001, deadline - time.monotonic()))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        verdict = any(equal(*question) for question in questions)
        os.write(pipe, b"1" if verdict else b"0")
    finally:
        os._exit(0)


def load() -> Callable[[str, str, bool], bool]:
    """Imports math-verify, replaces how it compares numbers, and returns the comparison of two texts."""
    import sympy
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import LatexExtractionConfig, grader, parse, parser, verify

    def compare_values(one: Any, other: Any) -> bool | None:
        """Whether two numbers are equal; None if simplifying must decide. math-verify takes all tiny ones for equal."""
        one, other = one.doit(), other.doit()
        if not (getattr(one, "is_number", False) and getattr(other, "is_number", False)):
            return None
        if one.is_Rational and other.is_Rational:
            return bool(one == other)
        x, y = one.evalf(30), other.evalf(30)
        if one.has(sympy.Float) or other.has(sympy.Float):
            if not (x.is_Float or x.is_Rational) or not (y.is_Float or y.is_Rational):
                return None
            return nearly_equal(*(Fraction(*sympy.Rational(value).as_numer_denom()) for value in (x, y)), rounded=True)
        if not (x.is_finite and y.is_finite):
            return bool(one == other)
        difference, size = abs(x - y), max(abs(x), abs(y))
        if difference <= 1e-25 * size:
            return True
        return False if difference > 1e-10 * size and min(abs(x), abs(y)) > 1e-25 else None

    def numeric_eq(one: Any, other: Any, *_: int) -> bool:
        if isinstance(one, sympy.MatrixBase) and isinstance(other, sympy.MatrixBase):
            return one.shape == other.shape and all(map(numeric_eq, one.flat(), other.flat()))
        percentages = [grader.get_pct_val(value) for value in (one, other)]
        if all(value is None for value in percentages) or None not in percentages:
            return bool(compare_values(one, other))
        (number,) = (value for value, percentage in zip((one, other), percentages, strict=True) if percentage is None)
        percentage = next(value for value in percentages if value is not None)
        return any(compare_values(value, number) for value in (percentage, percentage / 100))

    def symbolic_eq(one: Any, other: Any) -> bool:
        if (equal := compare_values(one, other)) is not None:
            return equal
        difference = sympy.simplify(one - other)
        return bool(getattr(difference, "is_zero_matrix", False) or difference.is_zero)

    parser.latex2sympy = noticing_cut_offs(parser.latex2sympy)
    grader.sympy_numeric_eq = noticing_cut_offs(numeric_eq, otherwise=False)
    grader.sympy_symbolic_eq = noticing_cut_offs(symbolic_eq, otherwise=False)
    logging.disable()  # it warns that it runs without its timeout
    whole = LatexExtractionConfig(
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
        )
    )

    def equal(given: str, wanted: str, extract: bool) -> bool:
        settings = {"parsing_timeout": None, "fallback_mode": "no_fallback"}
        gold = parse(f"${wanted}$", [whole], **settings)
        found = parse(given, **settings) if extract else parse(f"${given}$", [whole], **settings)
        return bool(gold and found and verify(gold, found, allow_set_relation_comp=True, timeout_seconds=None))

    return equal


def noticing_cut_offs(function: Callable[..., Any], **fallback: Any) -> Callable[..., Any]:
    """Wraps a function so that a lack of memory or stack raises CutOff; other errors return `otherwise`, if given."""

    def noticing(*arguments: Any, **keywords: Any) -> Any:
        try:
            return function(*arguments, **keywords)
        except (MemoryError, RecursionError):
            raise CutOff from None
        except Exception:
            if not fallback:
                raise
            return fallback["otherwise"]

    return noticing


if __name__ == "__main__":
    main()
