"""The rollout worker's loop on the queue in memory, with engines that compute nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest

from tests.support.groups import a_request, an_answer, collect_one
from tests.support.memory_jobs import MemoryJob
from vaopd.errors import InvalidInput, Mismatch
from vaopd.sampling.engine import Ended, Outcome
from vaopd.types import GroupId, PolicyVersion, RolloutRequest
from vaopd_rollout import worker
from vaopd_rollout.worker import HandBack, RolloutWorker, Stop

POLICIES = [PolicyVersion(version=version, path="/nowhere", sha256=f"{version:064d}") for version in range(2)]


class FakeEngine:
    """Loads anything; dies of a request named "poison", refuses one named "bad", and asks to stop after the rest."""

    def __init__(self, stop: Stop) -> None:
        self.policy: PolicyVersion | None = None
        self.calls: list[tuple[int, list[str]]] = []
        self._stop = stop

    def load_policy(self, policy: PolicyVersion) -> None:
        self.policy = policy

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Outcome]:
        assert self.policy is not None
        names = [request.group_id for request in requests]
        self.calls.append((self.policy.version, names))
        if "poison" in names:
            raise MemoryError("out of memory")
        if "last" in names:
            self._stop.request()
        return [
            InvalidInput("damaged") if name == "bad" else an_answer(r) for name, r in zip(names, requests, strict=True)
        ]

    def close(self) -> None: ...


class FakeStream(FakeEngine):
    """Takes one step per token: a request ends after `max_new_tokens` steps. `before_step` sees the number of steps."""

    capacity: int | None = None

    def __init__(self, stop: Stop, before_step: Callable[[int], None] = lambda number: None) -> None:
        super().__init__(stop)
        self.held: dict[str, tuple[RolloutRequest, int]] = {}  # key -> request, steps to go
        self.added: list[str] = []
        self.together: list[set[str]] = []  # ids in each step
        self._before_step = before_step

    @property
    def tokens_held(self) -> int:
        return sum(request.num_rollouts * request.sampling.max_new_tokens for request, _ in self.held.values())

    def load_policy(self, policy: PolicyVersion) -> None:
        assert not self.held, "weights change under groups in flight"
        super().load_policy(policy)

    def add(self, key: str, request: RolloutRequest) -> None:
        assert self.policy is not None
        assert request.policy_version == self.policy.version
        self.added.append(request.group_id)
        self.held[key] = request, request.sampling.max_new_tokens

    def step(self) -> list[Ended]:
        self._before_step(len(self.together))
        self.together.append({request.group_id for request, _ in self.held.values()})
        if "poison" in self.together[-1]:
            raise MemoryError("out of memory")
        self.held = {key: (request, left - 1) for key, (request, left) in self.held.items()}
        done = [key for key, (_, left) in self.held.items() if left == 0]
        return [Ended(key, an_answer(self.held.pop(key)[0])) for key in done]


def steps(name: str, tokens: int, *, version: int = 0) -> RolloutRequest:
    """A request of two rollouts that takes so many steps."""
    request = a_request(name, policy_version=version)
    return dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, max_new_tokens=tokens))


def test_requests_become_groups_of_the_policy_that_they_name(a_job: MemoryJob) -> None:
    trainer, stop = a_job.trainer(), Stop(drain_s=1)
    engine = FakeEngine(stop)
    for policy in POLICIES:
        trainer.publish_policy(policy)
    for name, version in (("last", 1), ("bad", 0), ("good", 0)):
        trainer.enqueue(a_request(name, policy_version=version))

    RolloutWorker(engine=engine, queue=a_job.worker("w1"), requests_per_batch=8, stop=stop).run()

    assert engine.calls == [(0, ["bad"]), (0, ["good"]), (1, ["last"])]
    assert [collect_one(trainer).group.group_id for _ in range(2)] == ["good", "last"]
    [letter] = trainer.dead_letters()
    assert (letter.group_id, letter.reason) == ("bad", "damaged")
    assert trainer.workers_alive() == []


def test_a_request_whose_policy_is_not_announced_is_handed_back(a_job: MemoryJob) -> None:
    trainer, stop = a_job.trainer(), Stop(drain_s=1)
    engine = FakeEngine(stop)
    trainer.publish_policy(POLICIES[0])
    trainer.enqueue(a_request("early", policy_version=1))
    trainer.enqueue(a_request("last", policy_version=0))

    RolloutWorker(engine=engine, queue=a_job.worker("w1"), requests_per_batch=8, stop=stop).run()

    assert engine.calls == [(0, ["last"])]
    [lease] = a_job.worker("w2").take(block_s=0)
    assert (lease.request.group_id, lease.deliveries) == ("early", 1)


def test_a_policy_that_is_withdrawn_while_it_is_loaded_is_no_fault(a_job: MemoryJob) -> None:
    """Any other error of loading ends the worker."""
    trainer, stop = a_job.trainer(), Stop(drain_s=1)
    trainer.publish_policy(POLICIES[0])
    trainer.publish_policy(POLICIES[1])
    trainer.enqueue(a_request("g1", policy_version=1))

    class Withdrawing(FakeEngine):
        def load_policy(self, policy: PolicyVersion) -> None:
            if withdraws:
                trainer.publish_policy(POLICIES[0])
            stop.request()
            raise Mismatch("no such snapshot")

    withdraws = False
    with pytest.raises(Mismatch, match="no such snapshot"):
        RolloutWorker(engine=Withdrawing(stop), queue=a_job.worker("w1"), requests_per_batch=8, stop=stop).run()
    withdraws, stop.requested = True, False
    RolloutWorker(engine=Withdrawing(stop), queue=a_job.worker("w2"), requests_per_batch=8, stop=stop).run()
    [lease] = a_job.worker("w3").take(block_s=0)
    assert lease.deliveries == 1


def test_a_request_that_kills_engines_counts_its_deliveries_and_the_others_are_handed_back(a_job: MemoryJob) -> None:
    trainer, stop = a_job.trainer(), Stop(drain_s=1)
    for policy in POLICIES:
        trainer.publish_policy(policy)
    trainer.enqueue(a_request("poison", policy_version=0))
    trainer.enqueue(a_request("innocent", policy_version=1))

    with pytest.raises(MemoryError):
        RolloutWorker(engine=FakeEngine(stop), queue=a_job.worker("w1"), requests_per_batch=8, stop=stop).run()

    other = a_job.worker("w2")
    delivered = {lease.request.group_id: lease.deliveries for lease in other.take(block_s=0, max_requests=8)}
    assert delivered == {"innocent": 1}
    [lease] = other.take(block_s=60)  # the lease of the poisonous request has run out by then
    assert (lease.request.group_id, lease.deliveries) == ("poison", 2)


# -- an engine that streams -------------------------------------------------------------------------------------------


def test_a_long_response_holds_up_no_other_group_and_new_requests_are_admitted_beside_it(a_job: MemoryJob) -> None:
    trainer, stop = a_job.trainer(), Stop(drain_s=1)
    collected: dict[str, int] = {}  # group -> number of steps taken when it had arrived

    def collect(number: int) -> None:
        for delivered in trainer.collect(block_s=0):
            collected[delivered.group.group_id] = number
            if delivered.group.group_id == "short":
                trainer.enqueue(steps("later", 1))
        if "later" in collected:
            raise HandBack

    engine = FakeStream(stop, collect)
    trainer.publish_policy(POLICIES[0])
    trainer.enqueue(steps("long", 100_000))
    trainer.enqueue(steps("short", 2))
    RolloutWorker(engine=engine, queue=a_job.worker("w1"), requests_per_batch=8, stop=stop).run()

    assert collected["short"] == 2
    assert engine.together[-1] == {"long", "later"}
    [lease] = a_job.worker("w2").take(block_s=0)
    assert (lease.request.group_id, lease.deliveries) == ("long", 1)  # interrupted, and handed back


def test_weights_change_once_the_groups_of_the_old_version_have_ended(a_job: MemoryJob) -> None:
    """Training goes before evaluation, whatever the order in the queue; `FakeStream` refuses a change in flight."""
    trainer, stop = a_job.trainer(), Stop(drain_s=1)
    for policy in POLICIES:
        trainer.publish_policy(policy)
    held_out = [str(GroupId(purpose="eval", step=0, index=index)) for index in range(2)]
    trained = [str(GroupId(purpose="train", step=step, index=0)) for step in range(2)]
    for name, tokens, version in ((held_out[0], 3, 0), (trained[1], 2, 1), (held_out[1], 1, 0), (trained[0], 5, 0)):
        trainer.enqueue(steps(name, tokens, version=version))

    def stop_after_four(number: int) -> None:
        if len(engine.added) == 4:
            stop.request()

    engine = FakeStream(stop, stop_after_four)
    RolloutWorker(engine=engine, queue=a_job.worker("w1"), requests_per_batch=8, stop=stop).run()

    assert engine.added == [trained[0], trained[1], *held_out]
    assert engine.together == [{trained[0]}] * 5 + [{trained[1]}] * 2 + [set(held_out)] + [{held_out[0]}] * 2
    assert [collect_one(trainer).group.group_id for _ in range(4)] == [*trained, held_out[1], held_out[0]]


def test_weights_that_are_announced_again_wait_for_the_groups_in_flight(
    a_job: MemoryJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a trainer that resumed: the same version with other weights."""
    monkeypatch.setattr(worker, "POLL_S", 0.0)
    trainer, stop = a_job.trainer(), Stop(drain_s=1)
    again = dataclasses.replace(POLICIES[0], sha256="f" * 64)

    def announce_again(number: int) -> None:
        if number == 2:
            trainer.publish_policy(again)
            trainer.enqueue(steps("new", 1))
        if "new" in engine.added:
            stop.request()

    engine = FakeStream(stop, announce_again)
    trainer.publish_policy(POLICIES[0])
    trainer.enqueue(steps("old", 5))
    RolloutWorker(engine=engine, queue=a_job.worker("w1"), requests_per_batch=8, stop=stop).run()

    assert engine.together == [{"old"}] * 5 + [{"new"}]
    assert engine.policy == again


def test_requests_of_the_loaded_version_run_beside_each_other_up_to_the_budget(a_job: MemoryJob) -> None:
    """Two rollouts of 10, 10 and 20 tokens; 59 tokens are too few for a third beside two of them."""
    trainer, stop = a_job.trainer(), Stop(drain_s=1)
    trainer.publish_policy(POLICIES[0])
    for name, tokens in (("a", 10), ("b", 10), ("c", 20), ("d", 40)):
        trainer.enqueue(steps(name, tokens))

    def stop_at_the_end(number: int) -> None:
        if "d" in engine.added:
            stop.request()

    engine = FakeStream(stop, stop_at_the_end)
    RolloutWorker(engine=engine, queue=a_job.worker("w1"), requests_per_batch=8, tokens_in_flight=59, stop=stop).run()

    assert engine.together == [{"a", "b"}] * 10 + [{"c"}] * 20 + [{"d"}] * 40  # 80 tokens are above the budget


def test_evaluation_has_a_quarter_of_the_budget_beside_training_and_all_of_it_alone(a_job: MemoryJob) -> None:
    """Of 160 tokens: 40 beside training, which takes 30; each of the evaluation's groups takes 10."""
    trainer, stop = a_job.trainer(), Stop(drain_s=1)
    trainer.publish_policy(POLICIES[0])
    held_out = [str(GroupId(purpose="eval", step=0, index=index)) for index in range(5)]
    for name in held_out:
        trainer.enqueue(steps(name, 5))
    trainer.enqueue(steps("train", 15))

    def stop_at_the_end(number: int) -> None:
        if len(engine.added) == 6:
            stop.request()

    engine = FakeStream(stop, stop_at_the_end)
    RolloutWorker(engine=engine, queue=a_job.worker("w1"), requests_per_batch=8, tokens_in_flight=160, stop=stop).run()

    first, second, third, *others = held_out
    beside = [{"train", first}] * 5 + [{"train", second}] * 5 + [{"train", third}] * 5
    assert engine.together == [*beside, *[set(others)] * 5]


def test_a_request_that_a_worker_takes_over_from_itself_is_published_once(
    a_job: MemoryJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker slept until its lease had run out; both of its deliveries are in the engine then."""
    monkeypatch.setattr("vaopd_rollout.worker.POLL_S", 0.0)
    trainer, stop = a_job.trainer(), Stop(drain_s=60)
    trainer.publish_policy(POLICIES[0])
    trainer.enqueue(steps("g1", 5))

    def sleep_in_the_second_step(number: int) -> None:
        if number == 1:
            a_job.broker.clock.wait(31)
        if len(engine.held) == 2:
            stop.request()

    engine = FakeStream(stop, sleep_in_the_second_step)
    RolloutWorker(engine=engine, queue=a_job.worker("w1"), requests_per_batch=8, stop=stop).run()

    assert engine.added == ["g1", "g1"]
    assert collect_one(a_job.trainer()).group.group_id == "g1"
    assert trainer.requests_in_flight() == 0


def test_a_stop_lets_what_runs_end_and_hands_the_rest_back(a_job: MemoryJob) -> None:
    trainer, stop = a_job.trainer(), Stop(drain_s=60)
    for policy in POLICIES:
        trainer.publish_policy(policy)
    trainer.enqueue(steps("runs", 3))
    trainer.enqueue(steps("waits", 1, version=1))

    engine = FakeStream(stop, lambda number: stop.request())
    RolloutWorker(engine=engine, queue=a_job.worker("w1"), requests_per_batch=8, stop=stop).run()

    assert engine.together == [{"runs"}] * 3
    assert collect_one(trainer).group.group_id == "runs"
    [lease] = a_job.worker("w2").take(block_s=0)
    assert (lease.request.group_id, lease.deliveries) == ("waits", 1)


def test_all_that_was_in_an_engine_that_failed_counts_its_delivery(a_job: MemoryJob) -> None:
    trainer, stop = a_job.trainer(), Stop(drain_s=1)
    trainer.publish_policy(POLICIES[0])
    for name in ("beside", "poison"):
        trainer.enqueue(steps(name, 5))

    with pytest.raises(MemoryError):
        RolloutWorker(engine=FakeStream(stop), queue=a_job.worker("w1"), requests_per_batch=8, stop=stop).run()

    other = a_job.worker("w2")
    assert other.take(block_s=0, max_requests=8) == []
    delivered = {lease.request.group_id: lease.deliveries for lease in other.take(block_s=60, max_requests=8)}
    assert delivered == {"beside": 2, "poison": 2}
