"""How long a client waits between attempts, and when it gives up."""

from __future__ import annotations

import math

import pytest

from vaopd.errors import Busy, Unavailable
from vaopd.net.backoff import Backoff

AWAY = Unavailable("nobody answers")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def backoff(clock: Clock, *, patience_s: float = 10.0, jitter: float = 1.0) -> Backoff:
    return Backoff(patience_s, first_s=0.1, longest_s=1.0, clock=clock, jitter=lambda: jitter)


def test_delays_double_up_to_the_longest() -> None:
    delays = backoff(Clock())
    assert [delays.delay_s(AWAY) for _ in range(6)] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0])


def test_jitter_takes_up_to_half_of_a_delay_away() -> None:
    assert backoff(Clock(), jitter=0.0).delay_s(AWAY) == pytest.approx(0.05)
    assert backoff(Clock(), jitter=0.5).delay_s(AWAY) == pytest.approx(0.075)


@pytest.mark.parametrize(("hint", "expected"), [(-5.0, 0.01), (0.0, 0.01), (math.nan, 0.05), (math.inf, 0.05)])
def test_a_hint_that_is_none_neither_hammers_nor_hangs(hint: float, expected: float) -> None:
    assert backoff(Clock(), jitter=0.0).delay_s(Busy("full", hint)) == pytest.approx(expected)


@pytest.mark.parametrize(("jitter", "expected"), [(0.0, 3.0), (1.0, 3.6)])
def test_a_hint_is_waited_for_in_full(jitter: float, expected: float) -> None:
    assert backoff(Clock(), jitter=jitter).delay_s(Busy("full", 3.0)) == pytest.approx(expected)


def test_the_error_is_raised_when_the_delay_would_end_after_the_patience() -> None:
    clock = Clock()
    delays = backoff(clock, patience_s=1.0)
    clock.now += 0.85
    assert delays.delay_s(AWAY) == pytest.approx(0.1)
    with pytest.raises(Unavailable) as caught:
        delays.delay_s(AWAY)
    assert caught.value is AWAY
    with pytest.raises(Busy):
        backoff(clock).delay_s(Busy("full", 11.0))


def test_a_success_starts_it_from_the_beginning() -> None:
    clock = Clock()
    delays = backoff(clock, patience_s=1.0)
    delays.delay_s(AWAY)
    clock.now += 5.0
    delays.renew()
    assert delays.delay_s(AWAY) == pytest.approx(0.1)
