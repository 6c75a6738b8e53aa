"""The trainer's collector on the queue in memory: each wanted group once, whatever the queue delivers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.support.collectors import MakeCollector, a_policy, never
from tests.support.groups import a_request, an_answer, answer, take_one
from tests.support.memory_jobs import MemoryJob
from vaopd.run.ledger import audit
from vaopd.types import RolloutGroup, RolloutRequest
from vaopd_trainer.collector import Collector


def ask(
    collector: Collector, requests: Sequence[RolloutRequest], *, oldest_version: int, check: Callable[[], None] = never
) -> None:
    collector.enqueue(requests, oldest_version=oldest_version, step=0, check=check)


def collect(collector: Collector, *group_ids: str, check: Callable[[], None] = never) -> list[RolloutGroup]:
    return [group for groups in collector.wait_for_groups(group_ids, check=check) for group in groups]


def ids(groups: Sequence[RolloutGroup]) -> list[str]:
    return [group.group_id for group in groups]


def test_groups_come_as_they_are_finished_and_each_once(make_collector: MakeCollector, a_job: MemoryJob) -> None:
    queue, worker = a_job.trainer(), a_job.worker("w1")
    collector = make_collector(queue)
    ask(collector, [a_request("g1"), a_request("g2")], oldest_version=0)
    first, second = take_one(worker), take_one(worker)
    worker.complete(second, an_answer(second.request))
    worker.complete(first, an_answer(first.request))

    assert ids(collect(collector, "g1", "g2")) == ["g1", "g2"]  # both were there: then in the order asked for
    assert queue.requests_in_flight() == 0
    assert not collector.counts


def test_waiting_ends_when_the_check_says_so(make_collector: MakeCollector, a_job: MemoryJob) -> None:
    collector = make_collector(a_job.trainer())
    ask(collector, [a_request("g1")], oldest_version=0)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(collector, "g1", check=stop)


def test_a_stale_group_is_dropped_and_counted_and_its_prompt_asked_again(
    make_collector: MakeCollector, a_job: MemoryJob
) -> None:
    """As after a resume: a predecessor had asked for g1 with policy 1, this trainer wants policy 3, at most 1 older."""
    queue, worker = a_job.trainer(), a_job.worker("w1")
    queue.enqueue(a_request("g1", policy_version=1))
    answer(worker)
    collector = make_collector(queue)
    ask(collector, [a_request("g1", policy_version=3)], oldest_version=2)
    answer(worker)

    [group] = collect(collector, "g1")
    assert group.policy_version == 3
    assert collector.counts == {"stale": 1}


@pytest.mark.parametrize(("version", "is_used"), [(1, False), (2, True), (3, True)])
def test_the_lag_allowed_is_a_bound_that_is_still_good(
    make_collector: MakeCollector, a_job: MemoryJob, version: int, is_used: bool
) -> None:
    queue, worker = a_job.trainer(), a_job.worker("w1")
    queue.enqueue(a_request("g1", policy_version=version))
    answer(worker)
    collector = make_collector(queue)
    ask(collector, [a_request("g1", policy_version=3)], oldest_version=2)
    if version < 3:
        answer(worker)

    [group] = collect(collector, "g1")
    assert group.policy_version == (version if is_used else 3)


def test_a_second_group_of_the_same_id_is_dropped_and_counted(make_collector: MakeCollector, a_job: MemoryJob) -> None:
    queue, worker = a_job.trainer(), a_job.worker("w1")
    collector = make_collector(queue)
    ask(collector, [a_request("g1", policy_version=1)], oldest_version=0)
    queue.enqueue(a_request("g1", policy_version=0))
    answer(worker)
    answer(worker)
    [group] = collect(collector, "g1")
    assert group.policy_version == 1

    ask(collector, [a_request("g2", policy_version=1)], oldest_version=0)
    answer(worker)
    collect(collector, "g2")
    assert collector.counts == {"duplicate": 1}


def test_a_duplicate_stays_until_the_group_that_it_repeats_is_durable(
    make_collector: MakeCollector, a_job: MemoryJob
) -> None:
    """A power cut took the entry in use from Redis, its request was answered again, and then the trainer died."""
    queue, worker = a_job.trainer(), a_job.worker("w1")
    collector = make_collector(queue)
    ask(collector, [a_request("g1"), a_request("g2")], oldest_version=0)
    answer(worker)
    collect(collector, "g1")
    groups = a_job.broker.streams["groups"]
    [in_use] = groups
    a_job.put_raw("groups", "g1@0", groups.pop(in_use).body)
    answer(worker)
    collect(collector, "g2")
    assert collector.counts == {"duplicate": 1}
    a_job.trainer_dies()

    queue = a_job.trainer()
    successor = make_collector(queue)
    ask(successor, [a_request("g1"), a_request("g2")], oldest_version=0)
    assert ids(collect(successor, "g1", "g2")) == ["g1", "g2"]
    a_job.put_raw("groups", "g1@0", next(iter(groups.values())).body)
    ask(successor, [a_request("g3")], oldest_version=0)
    answer(worker)
    collect(successor, "g3")
    assert successor.counts == {"duplicate": 1}
    successor.acknowledge(["g1", "g2", "g3"])
    assert not groups  # the duplicate goes with the group


def test_only_what_is_acknowledged_leaves_the_queue(make_collector: MakeCollector, a_job: MemoryJob) -> None:
    queue, worker = a_job.trainer(), a_job.worker("w1")
    collector = make_collector(queue)
    ask(collector, [a_request("g1"), a_request("g2")], oldest_version=0)
    answer(worker)
    answer(worker)
    collect(collector, "g1", "g2")
    collector.acknowledge(["g1"])
    a_job.trainer_dies()

    successor = make_collector(a_job.trainer())
    ask(successor, [a_request("g2")], oldest_version=0)
    assert ids(collect(successor, "g2")) == ["g2"]


def test_what_was_trained_before_a_resume_is_dropped_when_it_comes_again(
    make_collector: MakeCollector, a_job: MemoryJob
) -> None:
    """The trainer died between its checkpoint and the acknowledgement."""
    queue, worker = a_job.trainer(), a_job.worker("w1")
    collector = make_collector(queue)
    ask(collector, [a_request("trained")], oldest_version=0)
    answer(worker)
    collect(collector, "trained")
    a_job.trainer_dies()

    successor = make_collector(a_job.trainer())
    successor.resume(1, ["trained"])
    ask(successor, [a_request("next", policy_version=1)], oldest_version=1)
    answer(worker)
    assert ids(collect(successor, "next")) == ["next"]
    assert successor.counts == {"duplicate": 1}


def test_groups_that_a_resumed_run_asks_for_later_wait_until_then(
    make_collector: MakeCollector, a_job: MemoryJob
) -> None:
    """The trainer died in step 1 and resumes at step 0: step 1's groups come at once, and come only once."""
    queue, worker = a_job.trainer(), a_job.worker("w1")
    collector = make_collector(queue)
    ask(collector, [a_request("step0")], oldest_version=0)
    answer(worker)
    collect(collector, "step0")
    ask(collector, [a_request("step1", policy_version=1)], oldest_version=1)
    answer(worker)
    collect(collector, "step1")
    a_job.trainer_dies()

    successor = make_collector(a_job.trainer())
    ask(successor, [a_request("step0")], oldest_version=0)
    assert ids(collect(successor, "step0")) == ["step0"]
    ask(successor, [a_request("step1", policy_version=1)], oldest_version=1)
    assert ids(collect(successor, "step1")) == ["step1"]
    assert not successor.counts


def test_what_a_predecessor_asked_for_and_nobody_will_is_forgotten(
    make_collector: MakeCollector, a_job: MemoryJob
) -> None:
    queue, worker = a_job.trainer(), a_job.worker("w1")
    queue.enqueue(a_request("never", policy_version=1))
    answer(worker)
    collector = make_collector(queue)
    ask(collector, [a_request("g2", policy_version=2)], oldest_version=2)
    answer(worker)
    collect(collector, "g2")
    collector.forget(before_version=2)
    a_job.trainer_dies()

    assert [d.group.group_id for d in a_job.trainer().collect(block_s=0.5)] == ["g2"]


def test_a_run_that_is_over_leaves_nothing_in_the_queue(make_collector: MakeCollector, a_job: MemoryJob) -> None:
    """Its predecessor died after the last checkpoint, before it had acknowledged that one's groups."""
    queue, worker = a_job.trainer(), a_job.worker("w1")
    collector = make_collector(queue)
    ask(collector, [a_request("trained"), a_request("evaluated")], oldest_version=0)
    answer(worker)
    answer(worker)
    collect(collector, "trained", "evaluated")
    a_job.trainer_dies()

    successor = make_collector(a_job.trainer())
    successor.resume(1, ["trained"])
    ask(successor, [a_request("last", policy_version=1)], oldest_version=1)
    answer(worker)
    collect(successor, "last")
    successor.finish(["last"], version=1)
    a_job.trainer_dies()
    assert a_job.trainer().collect(block_s=0.5) == []


def test_a_dead_letter_ends_the_waiting_for_its_group_only(make_collector: MakeCollector, a_job: MemoryJob) -> None:
    queue, worker = a_job.trainer(), a_job.worker("w1")
    collector = make_collector(queue)
    ask(collector, [a_request("bad"), a_request("good")], oldest_version=0)
    worker.fail(take_one(worker), "no such image")
    answer(worker)

    assert ids(collect(collector, "bad", "good")) == ["good"]
    assert collector.counts == {"dead": 1}


def test_a_dead_letter_is_remembered_until_its_group_is_asked_for(
    make_collector: MakeCollector, a_job: MemoryJob
) -> None:
    """As above, but the letter is a predecessor's, and of a later step."""
    queue, worker = a_job.trainer(), a_job.worker("w1")
    queue.enqueue(a_request("step1", policy_version=1))
    worker.fail(take_one(worker), "no such image")
    collector = make_collector(queue)
    ask(collector, [a_request("step0")], oldest_version=0)
    answer(worker)
    collect(collector, "step0")
    ask(collector, [a_request("step1", policy_version=1)], oldest_version=1)
    assert collect(collector, "step1") == []


def test_a_group_that_can_not_be_trained_on_becomes_a_dead_letter_with_its_reason(
    make_collector: MakeCollector, a_job: MemoryJob
) -> None:
    queue, worker = a_job.trainer(), a_job.worker("w1")
    collector = make_collector(queue)
    ask(collector, [a_request("g1")], oldest_version=0)
    answer(worker)
    collect(collector, "g1")
    collector.dead_letter("g1", "its prompt is another one")

    [letter] = queue.dead_letters()
    assert (letter.group_id, letter.reason) == ("g1", "its prompt is another one")
    assert collector.counts == {"dead": 1}


# -- groups that are not what was asked for ----------------------------------------------------------------------------


def test_a_group_of_other_weights_with_the_same_number_is_dropped_and_asked_for_again(
    make_collector: MakeCollector, a_job: MemoryJob
) -> None:
    """A trainer died in step 1 and was resumed at step 0: its policy 1 need not be the successor's."""
    queue, worker = a_job.trainer(), a_job.worker("w1")
    queue.enqueue(a_request("g1", policy_version=1))
    lease = take_one(worker)
    worker.complete(lease, dataclasses.replace(an_answer(lease.request), policy_sha256="cd" * 32))
    collector = make_collector(queue)
    ask(collector, [a_request("g1", policy_version=1)], oldest_version=0)

    def serve() -> None:
        for lease in worker.take(block_s=0):
            worker.complete(lease, an_answer(lease.request))

    [group] = collect(collector, "g1", check=serve)
    assert group.policy_sha256 == a_policy(1).sha256
    assert collector.counts == {"other_weights": 1}
    collector.acknowledge(["g1"])
    assert queue.requests_in_flight() == 0


def test_a_group_of_an_older_policy_is_compared_with_the_weights_that_the_queue_knows(
    make_collector: MakeCollector, a_job: MemoryJob
) -> None:
    """With a lag allowed, after a resume: version 1 was published by the trainer before this one."""
    queue, worker = a_job.trainer(), a_job.worker("w1")
    collector = make_collector(queue)
    collector.forget(3)  # of its own record
    queue.publish_policy(a_policy(1, sha256="cd" * 32))
    queue.publish_policy(a_policy(2))
    queue.publish_policy(a_policy(3))
    ask(collector, [a_request("g1", policy_version=1), a_request("g2", policy_version=2)], oldest_version=0)
    answer(worker)
    answer(worker)
    assert [group.group_id for group in collect(collector, "g2")] == ["g2"]
    assert collector.counts == {"other_weights": 1}


def test_a_group_with_siblings_missing_is_a_dead_letter(
    make_collector: MakeCollector, a_job: MemoryJob, tmp_path: Path
) -> None:
    """The rollout weights need all of them."""
    queue, worker = a_job.trainer(), a_job.worker("w1")
    collector = make_collector(queue)
    ask(collector, [a_request("g1"), a_request("g2")], oldest_version=0)
    lease = take_one(worker)
    group = an_answer(lease.request)
    worker.complete(lease, dataclasses.replace(group, rollouts=group.rollouts[:1]))
    answer(worker)
    assert [group.group_id for group in collect(collector, "g1", "g2")] == ["g2"]
    [letter] = queue.dead_letters()
    assert (letter.group_id, letter.reason) == ("g1", "it holds 1 rollouts, 2 were asked for")
    [fate] = [fate for fate in audit(tmp_path).fates if fate.dead]
    assert fate.group_id == "g1"


def test_letters_without_a_readable_key_stop_nobody(make_collector: MakeCollector, a_job: MemoryJob) -> None:
    queue, worker = a_job.trainer(), a_job.worker("w1")
    a_job.put_fields("groups", {"colour": "blue"})
    a_job.put_raw("groups", "\x00@@", b"\xff")
    collector = make_collector(queue)
    ask(collector, [a_request("g1")], oldest_version=0)
    answer(worker)
    assert len(collect(collector, "g1")) == 1
