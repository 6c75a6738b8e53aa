"""How many groups may wait, and what a refusal says about when to come back."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from vaopd.config import QuotasConfig, SharingConfig
from vaopd.errors import QueueFull
from vaopd_teacher.line.admission import Admission
from vaopd_teacher.line.scheduler import Served
from vaopd_teacher.rpc.access import Quotas


class Pace:
    """What Admission reads of a scheduler."""

    def __init__(self, seconds_per_token: float | None = None, **served: Served) -> None:
        self.seconds_per_token = seconds_per_token
        self._served = served
        self.weights: Mapping[str, float] = {}

    def served(self, job: str) -> Served:
        return self._served.get(job, Served())

    def served_by_job(self) -> dict[str, Served]:
        return self._served

    def weight(self, job: str) -> float:
        return self.weights.get(job, 1.0)


def admission(pace: Pace, *, total: int = 100, per_job: int = 100) -> Admission:
    sharing = SharingConfig(max_waiting_groups=total, max_waiting_groups_per_job=per_job)
    return Admission(sharing, pace, Quotas(QuotasConfig()))


def hint(admission: Admission, job: str, groups: int) -> float:
    with pytest.raises(QueueFull, match="try again in") as caught:
        admission.admit(job, groups)
    return caught.value.retry_after_s


def test_a_full_queue_takes_nobody_until_something_is_answered() -> None:
    queue = admission(Pace(), total=3)
    queue.admit("a", 3)
    hint(queue, "b", 1)
    queue.release("a")
    queue.admit("b", 1)
    assert (queue.waiting, queue.count_waiting_by_job(), queue.refused) == (3, {"a": 2, "b": 1}, 1)


def test_when_nobody_fits_a_call_needn_t_be_read_to_be_refused() -> None:
    queue = admission(Pace(), total=2)
    queue.admit("a", 1)
    queue.check_any_room()
    queue.admit("a", 1)
    with pytest.raises(QueueFull, match="2 groups wait already, with 1 more they are over the limit of 2; try again"):
        queue.check_any_room()


def test_a_job_at_its_own_limit_leaves_room_to_the_others() -> None:
    queue = admission(Pace(), total=10, per_job=2)
    queue.admit("a", 2)
    with pytest.raises(QueueFull, match="2 groups of job 'a' wait already"):
        queue.admit("a", 1)
    queue.admit("b", 2)


def test_the_hint_is_the_time_until_there_is_room() -> None:
    # 200 tokens a group at 1 ms each: the six groups too many are gone after 1.2 s.
    queue = admission(Pace(0.001, a=Served(groups=10, tokens=2000)), total=10)
    queue.admit("a", 10)
    assert hint(queue, "b", 6) == pytest.approx(1.2)


def test_a_jobs_own_hint_follows_its_share() -> None:
    # The job gets a quarter of the device while the other, three times as heavy, has work too: 2 groups of 200 tokens
    # at 1 ms take 4 · 0.4 s.
    pace = Pace(0.001, a=Served(groups=10, tokens=2000), b=Served(groups=10, tokens=90_000))
    pace.weights = {"b": 3.0}
    queue = admission(pace, per_job=5)
    queue.admit("a", 5)
    assert hint(queue, "a", 2) == pytest.approx(0.4)
    queue.admit("b", 1)
    assert hint(queue, "a", 2) == pytest.approx(1.6)


def test_before_anything_was_scored_the_hint_is_a_second() -> None:
    queue = admission(Pace(), total=1)
    queue.admit("a", 1)
    assert hint(queue, "a", 1) == 1.0


def test_a_hint_stays_within_what_a_client_can_wait_for() -> None:
    slow, fast = (admission(Pace(pace, a=Served(groups=1, tokens=1000)), total=1) for pace in (10.0, 1e-9))
    for queue in (slow, fast):
        queue.admit("a", 1)
    assert (hint(slow, "a", 1), hint(fast, "a", 1)) == (60.0, 0.05)
