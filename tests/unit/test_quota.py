"""A token bucket per client, with a clock set by hand: six units a minute are one every ten seconds."""

from __future__ import annotations

from vaopd.access import quota
from vaopd.access.quota import Balance, TokenBuckets


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_empties_and_refills_evenly() -> None:
    clock = Clock()
    buckets = TokenBuckets(clock=clock)
    assert buckets.take("a", 4, per_minute=6) == Balance(left=2, wait_s=0)
    assert buckets.take("a", 3, per_minute=6) == Balance(left=2, wait_s=10)  # one too many, and nothing is taken
    assert buckets.take("b", 6, per_minute=6) == Balance(left=0, wait_s=0)  # a client's bucket is its own
    clock.now = 10.0
    assert buckets.take("a", 3, per_minute=6) == Balance(left=0, wait_s=0)
    clock.now = 1000.0
    assert buckets.take("a", 1, per_minute=6) == Balance(left=5, wait_s=0)  # never more than a minute's worth


def test_clients_have_quotas_of_their_own() -> None:
    buckets = TokenBuckets(clock=Clock())
    assert buckets.take("small", 2, per_minute=2) == Balance(left=0, wait_s=0)
    assert buckets.take("small", 1, per_minute=2) == Balance(left=0, wait_s=30)
    assert buckets.take("large", 2, per_minute=60) == Balance(left=58, wait_s=0)


def test_the_client_that_was_silent_for_longest_is_forgotten() -> None:
    buckets = TokenBuckets(clock=Clock())
    for client in ("first", "second"):
        buckets.take(client, 1, per_minute=2)
    for number in range(quota.MAX_CLIENTS - 2):
        buckets.take(f"other {number}", 1, per_minute=2)
    assert buckets.take("first", 1, per_minute=2).left == 0  # still remembered, and now not the oldest
    buckets.take("one more", 1, per_minute=2)
    assert buckets.take("second", 1, per_minute=2).left == 1  # forgotten: its bucket is full again
    assert buckets.take("first", 1, per_minute=2).wait_s == 30
