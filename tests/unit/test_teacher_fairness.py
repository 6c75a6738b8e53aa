"""Start-time fair queueing: who is next, by tokens and weights. All orders are worked out by hand."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping

import pytest

from vaopd_teacher.line.fair_queue import JOBS_KNOWN, FairQueue


def queue_of(weights: Mapping[str, float] | None = None, **jobs: tuple[int, float]) -> FairQueue[tuple[str, float]]:
    """Each job with so many items of such a cost, pushed one after the other."""
    queue: FairQueue[tuple[str, float]] = FairQueue(weights or {})
    for job, (items, cost) in jobs.items():
        for _ in range(items):
            queue.push(job, (job, cost), cost=cost)
    return queue


def taken(queue: FairQueue[tuple[str, float]], count: int) -> str:
    """The first letters of the jobs that are served next."""
    return "".join(queue.pop()[0][0] for _ in range(count))


def test_a_job_that_floods_takes_turns_with_one_that_does_not() -> None:
    queue = queue_of(flood=(100, 10.0), light=(3, 10.0))
    assert taken(queue, 8) == "flflflff"


def test_weights_are_shares() -> None:
    queue = queue_of({"heavy": 3.0}, heavy=(40, 10.0), light=(40, 10.0))
    assert Counter(taken(queue, 40)) == {"h": 30, "l": 10}


def test_what_is_shared_are_tokens_not_items() -> None:
    queue = queue_of(big=(50, 30.0), small=(150, 10.0))
    assert Counter(taken(queue, 80)) == {"b": 20, "s": 60}


def test_a_job_that_comes_back_has_no_credit_for_its_pause() -> None:
    queue = queue_of(busy=(20, 10.0))
    assert taken(queue, 10) == "b" * 10
    for _ in range(5):
        queue.push("late", ("late", 10.0), cost=10.0)
    # The clock stands at the start of what was taken last: the newcomer is next, and from then on they take turns.
    assert taken(queue, 6) == "lblblb"


def test_a_job_can_not_escape_what_it_owes_by_leaving_for_a_moment() -> None:
    queue = queue_of(a=(1, 100.0), b=(3, 10.0))
    assert taken(queue, 1) == "a"
    queue.push("a", ("a", 100.0), cost=100.0)
    assert taken(queue, 4) == "bbba"


def test_what_was_withdrawn_costs_nothing() -> None:
    queue = queue_of(a=(1, 10.0), b=(5, 10.0))
    queue.push("a", ("a", 1000.0), cost=1000.0)
    queue.push("a", ("a", 10.0), cost=10.0)
    queue.remove(lambda item: item[1] == 1000.0)
    assert taken(queue, 4) == "abab"


def test_after_a_pause_of_the_device_nobody_owes_anything() -> None:
    queue = queue_of(a=(1, 1000.0))
    assert taken(queue, 1) == "a"
    queue.rest()
    for job in ("a", "b"):
        for _ in range(2):
            queue.push(job, (job, 10.0), cost=10.0)
    assert taken(queue, 4) == "abab"


def test_rest_forgets_nothing_while_work_waits() -> None:
    queue = queue_of(a=(2, 10.0), b=(2, 10.0))
    assert taken(queue, 1) == "a"
    queue.rest()
    assert taken(queue, 3) == "bab"


def test_an_empty_queue_has_no_head() -> None:
    queue = queue_of()
    assert not queue
    with pytest.raises(LookupError, match="nothing waits"):
        queue.pop()


def test_names_of_jobs_do_not_pile_up() -> None:
    queue: FairQueue[str] = FairQueue({})
    for number in range(3 * JOBS_KNOWN):
        queue.push(f"job-{number}", "x", cost=1.0)
        queue.pop()
    assert len(queue._lines) <= JOBS_KNOWN + 1


@pytest.mark.parametrize("seed", range(20))
def test_busy_jobs_differ_by_at_most_one_item_of_each(seed: int) -> None:
    """The theorem of the paper: |W_a / w_a − W_b / w_b| ≤ l_a / w_a + l_b / w_b, l being the largest item."""
    rng = random.Random(seed)
    weights = {job: rng.uniform(0.5, 4.0) for job in "abc"}
    largest = {job: rng.randint(1, 500) for job in "abc"}
    queue: FairQueue[tuple[str, float]] = FairQueue(weights)
    for job in "abc":
        for _ in range(2000):
            cost = float(rng.randint(1, largest[job]))
            queue.push(job, (job, cost), cost=cost)
    served: Counter[str] = Counter()
    for _ in range(500):
        job, cost = queue.pop()
        served[job] += cost  # type: ignore[assignment]
        for one, other in ("ab", "bc", "ac"):
            gap = abs(served[one] / weights[one] - served[other] / weights[other])
            assert gap <= largest[one] / weights[one] + largest[other] / weights[other]
