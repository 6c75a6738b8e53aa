"""How far long work is: drawn over itself in a terminal, plain lines elsewhere, with the time left by hand."""

from __future__ import annotations

import io

from tests.support.terminal import Terminal
from vaopd.telemetry.progress_line import Progress, draw, format_duration


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_elsewhere_a_line_now_and_then_and_at_the_end() -> None:
    """64 of 256 after 10 s: three times as long is left."""
    stream, clock = io.StringIO(), Clock()
    progress = Progress("evaluating", total=256, unit="problems", stream=stream, clock=clock)
    for seconds, done in ((1, 8), (10, 64), (12, 80), (75, 256)):
        clock.now = 100.0 + seconds
        progress.report(done)
    assert stream.getvalue().splitlines() == [
        "evaluating: 64/256 problems, 0:30 left",
        "evaluating: 256/256 problems in 1:15",
    ]


def test_a_terminal_s_line_is_drawn_over_and_stays_at_the_end() -> None:
    stream, clock = Terminal(), Clock()
    progress = Progress("drawing", total=4, unit="problems", stream=stream, clock=clock)
    clock.now += 1
    progress.report(1, "so far so good")
    clock.now += 3
    progress.report(4)
    assert stream.getvalue() == (
        "\r\x1b[Kdrawing: 1/4 problems, 0:03 left  so far so good\r\x1b[Kdrawing: 4/4 problems in 0:04\n"
    )


def test_a_line_that_is_drawn_over_fits_the_terminal() -> None:
    """Cut at its width (80 where it doesn't say): what wrapped could not be drawn over."""
    stream = Terminal()
    draw(stream, "x" * 500, stays=False)
    assert "x" * 500 not in stream.getvalue()
    draw(stream, "y" * 500, stays=True)
    assert "y" * 500 in stream.getvalue()


def test_durations_as_people_read_them() -> None:
    assert [format_duration(seconds) for seconds in (0, 59.6, 65, 3671)] == ["0:00", "1:00", "1:05", "1:01:11"]
