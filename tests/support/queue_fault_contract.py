"""What holds when trainers and workers die, hang or come back late: a part of `queue_contract`."""

from __future__ import annotations

from typing import Protocol

import pytest

from tests.support.groups import a_request, an_answer, answer, collect_one, take_one
from tests.support.waiting import wait_until
from vaopd.errors import LeaseLost, Mismatch
from vaopd.queue import TrainerEnd, WorkerEnd
from vaopd.types import PolicyVersion
from vaopd.wire.queue import rollout_group_to_bytes, rollout_request_from_bytes, rollout_request_to_bytes

SHORT_S = 0.15

FOREIGN = {
    "no key, no body": ({"colour": "blue"}, "a rollout request needs a group_id"),
    "key of no form": ({"key": b"\xff@@", "body": rollout_request_to_bytes(a_request("g9"))}, "filed under"),
    "another's body": ({"key": "g8@0", "body": rollout_request_to_bytes(a_request("g9"))}, "holds 'g9@0'"),
}


class QueueJob(Protocol):
    """One job on one implementation."""

    def trainer(self, *, owner: str | None = None, lease_s: float = 30.0, acquire: bool = True) -> TrainerEnd: ...

    def worker(self, name: str, *, lease_s: float = 30.0) -> WorkerEnd: ...

    def trainer_dies(self) -> None:
        """Its lease has run out."""

    def comes_back_empty(self) -> None:
        """The queue has lost all that it had of the job."""

    def put_raw(self, stream: str, key: str, body: bytes) -> None:
        """A body that no trainer or worker would write."""

    def put_fields(self, stream: str, fields: dict[str, str | bytes]) -> None:
        """An entry that no trainer or worker would write."""


class WorkersThatFail:
    """Workers that die, hang or come back late, and entries that can't be used."""

    def test_a_silent_workers_request_is_taken_over_and_its_late_commit_refused(self, a_job: QueueJob) -> None:
        trainer = a_job.trainer()
        silent, other = a_job.worker("silent"), a_job.worker("other", lease_s=SHORT_S)
        trainer.enqueue(a_request("g1"))
        late = take_one(silent)

        lease = take_one(other)
        assert (lease.entry_id, lease.deliveries) == (late.entry_id, 2)
        with pytest.raises(LeaseLost, match="'silent' lost its lease on group 'g1'"):
            silent.complete(late, an_answer(late.request, worker="silent"))
        assert trainer.collect(block_s=0) == []

        assert other.complete(lease, an_answer(lease.request, worker="other"))
        with pytest.raises(LeaseLost):
            silent.complete(late, an_answer(late.request, worker="silent"))
        with pytest.raises(LeaseLost):
            silent.fail(late, "too late")
        assert collect_one(trainer).group.worker == "other"
        assert trainer.collect(block_s=0) == []

    def test_a_restarted_worker_of_the_same_name_does_not_commit_for_its_predecessor(self, a_job: QueueJob) -> None:
        trainer = a_job.trainer()
        trainer.enqueue(a_request("g1"))
        before, after = a_job.worker("w1"), a_job.worker("w1", lease_s=SHORT_S)
        old, new = take_one(before), take_one(after)
        with pytest.raises(LeaseLost):
            before.complete(old, an_answer(old.request))
        assert after.complete(new, an_answer(new.request))

    def test_renewing_returns_the_leases_that_are_lost(self, a_job: QueueJob) -> None:
        trainer = a_job.trainer()
        worker, other = a_job.worker("w1"), a_job.worker("w2", lease_s=SHORT_S)
        trainer.enqueue(a_request("g1"))
        lease = take_one(worker)
        assert worker.renew() == []
        take_one(other)
        assert worker.renew() == [lease]
        assert worker.held() == []

    def test_a_request_handed_back_can_be_taken_at_once_and_does_not_age(self, a_job: QueueJob) -> None:
        trainer, worker = a_job.trainer(), a_job.worker("w1", lease_s=3600)
        trainer.enqueue(a_request("g1"))
        for _ in range(7):  # more than max_deliveries
            lease = take_one(worker)
            assert lease.deliveries == 1
            worker.release(lease)
            assert worker.held() == []
        other = a_job.worker("w2", lease_s=3600)
        lease = take_one(other)
        assert worker.renew([lease]) == [lease]
        assert other.complete(lease, an_answer(lease.request))

    def test_a_request_whose_fifth_worker_dies_is_a_dead_letter(self, a_job: QueueJob) -> None:
        trainer, worker = a_job.trainer(), a_job.worker("w1", lease_s=0.02)
        trainer.enqueue(a_request("g1", policy_version=7))
        assert [take_one(worker).deliveries for _ in range(5)] == [1, 2, 3, 4, 5]
        wait_until(
            "the entry is given up", lambda: worker.take(block_s=0.03) == [] and trainer.requests_in_flight() == 0
        )

        [letter] = trainer.dead_letters()
        assert (letter.group_id, letter.policy_version, letter.stream, letter.deliveries) == ("g1", 7, "requests", 5)
        assert "5 deliveries without a commit" in letter.reason
        assert trainer.dead_letters(after=letter.entry_id) == []

    def test_a_request_that_kills_its_workers_does_not_draw_its_neighbours_with_it(self, a_job: QueueJob) -> None:
        """Each worker takes what it can get, and dies of "killer"; one that survives answers the rest."""
        trainer = a_job.trainer()
        for name in ("g1", "killer", "g2"):
            trainer.enqueue(a_request(name))
        answered: list[str] = []

        def all_settled() -> bool:
            worker = a_job.worker("w1", lease_s=0.02)  # each a new process
            leases = worker.take(block_s=0.03, max_requests=8)
            leases += worker.take(block_s=0, max_requests=8)  # as a worker that lingers for a fuller batch
            if "killer" not in [lease.request.group_id for lease in leases]:
                for lease in leases:
                    answered.append(lease.request.group_id)
                    worker.complete(lease, an_answer(lease.request))
            return trainer.requests_in_flight() == 0

        wait_until("every request is settled", all_settled)
        assert sorted(answered) == ["g1", "g2"]
        [letter] = trainer.dead_letters()
        assert (letter.group_id, letter.deliveries) == ("killer", 5)

    def test_a_request_that_two_workers_died_of_is_taken_alone_and_by_an_idle_worker(self, a_job: QueueJob) -> None:
        trainer = a_job.trainer()
        trainer.enqueue(a_request("innocent"))
        trainer.enqueue(a_request("suspect"))
        first, second, third = (a_job.worker(name, lease_s=SHORT_S) for name in ("w1", "w2", "w3"))
        assert len(first.take(block_s=10, max_requests=2)) == 2
        innocent, _ = second.take(block_s=10, max_requests=2)
        second.release(innocent)  # now one death behind it, and two behind the suspect
        assert trainer.collect(block_s=2 * SHORT_S) == []  # meanwhile the suspect's lease runs out

        [lease] = third.take(block_s=0, max_requests=8)
        assert (lease.request.group_id, lease.deliveries) == ("innocent", 2)
        third.complete(lease, an_answer(lease.request))
        third.release(take_one(third))  # the suspect: any worker can take it at once

        idle, busy = a_job.worker("w4"), a_job.worker("w5")
        lease = take_one(idle)
        assert (lease.request.group_id, lease.deliveries) == ("suspect", 3)
        trainer.enqueue(a_request("g3"))
        assert idle.take(block_s=0, max_requests=8) == []
        assert take_one(busy).request.group_id == "g3"
        idle.release(lease)
        assert busy.take(block_s=0.05, max_requests=8) == []
        assert idle.take(block_s=0, max_requests=8) == [lease]

    def test_a_request_that_no_worker_can_answer_is_a_dead_letter_at_once(self, a_job: QueueJob) -> None:
        trainer, worker = a_job.trainer(), a_job.worker("w1")
        trainer.enqueue(a_request("g1"))
        worker.fail(take_one(worker), "the prompt is longer than the model's limit")
        [letter] = trainer.dead_letters()
        assert letter.reason == "the prompt is longer than the model's limit"
        assert rollout_request_from_bytes(letter.body) == a_request("g1")
        assert trainer.requests_in_flight() == 0

    def test_corrupt_entries_are_dead_letters_and_hold_nothing_up(self, a_job: QueueJob) -> None:
        trainer, worker = a_job.trainer(), a_job.worker("w1")
        worker.take(block_s=0)
        a_job.put_raw("requests", "broken@0", b"\xff\xff")
        trainer.enqueue(a_request("g1"))
        a_job.put_raw("groups", "torn@0", b"\xff\xff")
        assert answer(worker).group_id == "g1"
        assert collect_one(trainer).group.group_id == "g1"
        letters = {letter.group_id: letter for letter in trainer.dead_letters()}
        assert letters["broken"].reason == "2 bytes are not a RolloutRequest message"
        assert letters["torn"].reason == "2 bytes are not a RolloutGroup message"
        assert letters["torn"].body == b"\xff\xff"

    @pytest.mark.parametrize("case", FOREIGN)
    def test_a_foreign_entry_is_a_dead_letter_and_holds_nothing_up(self, a_job: QueueJob, case: str) -> None:
        fields, complaint = FOREIGN[case]
        trainer, worker = a_job.trainer(), a_job.worker("w1", lease_s=SHORT_S)
        a_job.put_fields("requests", fields)
        trainer.enqueue(a_request("g1"))
        assert answer(worker).group_id == "g1"
        [letter] = trainer.dead_letters()
        assert complaint in letter.reason
        assert trainer.requests_in_flight() == 0

    def test_a_group_filed_under_another_ones_key_is_a_dead_letter(self, a_job: QueueJob) -> None:
        trainer = a_job.trainer()
        body = rollout_group_to_bytes(an_answer(a_request("g2")))
        a_job.put_fields("groups", {"key": "g1@0", "body": body})
        a_job.put_fields("groups", {"colour": "blue"})
        a_job.put_fields("groups", {"key": "g2@0", "body": body})
        assert collect_one(trainer).group.group_id == "g2"
        first, second = trainer.dead_letters()
        assert (first.key, first.reason) == ("g1@0", "it is filed under 'g1@0' and holds 'g2@0'")
        assert (second.group_id, second.policy_version) == ("", None)


class TrainersThatFail:
    """Trainers that die, or come back after another one took their job."""

    def test_a_job_has_one_trainer(self, a_job: QueueJob) -> None:
        trainer, second = a_job.trainer(), a_job.trainer(owner="the-second", acquire=False)
        with pytest.raises(LeaseLost, match=rf"held by trainer '{trainer.owner}'"):
            second.acquire()
        trainer.release()
        second.acquire()
        with pytest.raises(LeaseLost, match="'the-second' holds it; nothing was committed"):
            trainer.enqueue(a_request())

    def test_a_resumed_trainer_first_gets_what_was_not_acknowledged(self, a_job: QueueJob) -> None:
        trainer, worker = a_job.trainer(), a_job.worker("w1")
        for name in ("g1", "g2", "g3", "g4"):
            trainer.enqueue(a_request(name))
            answer(worker)
        first, *_ = trainer.collect(block_s=1, max_groups=3)
        trainer.acknowledge([first.entry_id])  # in a durable checkpoint; g2 and g3 are not; g4 was never read

        a_job.trainer_dies()
        resumed = a_job.trainer()
        delivered = resumed.collect(block_s=1, max_groups=10) + resumed.collect(block_s=1, max_groups=10)
        assert [(d.group.group_id, d.deliveries) for d in delivered] == [("g2", 2), ("g3", 2), ("g4", 1)]
        assert resumed.collect(block_s=0) == []

    def test_a_trainer_that_lost_its_job_can_neither_take_nor_acknowledge(self, a_job: QueueJob) -> None:
        frozen, worker = a_job.trainer(), a_job.worker("w1")
        frozen.enqueue(a_request("g1"))
        answer(worker)
        late = collect_one(frozen)
        a_job.trainer_dies()
        resumed = a_job.trainer()
        for refused in (
            lambda: frozen.collect(block_s=0),
            lambda: frozen.acknowledge([late.entry_id]),
            lambda: frozen.enqueue(a_request("g2")),
            lambda: frozen.dead_letter(late.entry_id, "late"),
            lambda: frozen.ask_again(late.entry_id, late.group, a_request("g1")),
            lambda: frozen.publish_policy(PolicyVersion(version=1, path="/p", sha256="00")),
            lambda: frozen.forget(9),
            frozen.renew,
            frozen.release,
            frozen.purge,
        ):
            with pytest.raises(LeaseLost):
                refused()
        assert collect_one(resumed).group.group_id == "g1"
        assert resumed.requests_in_flight() == 0

    def test_a_lease_that_ran_out_is_taken_again_if_no_other_trainer_had_the_job(self, a_job: QueueJob) -> None:
        trainer = a_job.trainer()
        for call in (trainer.renew, lambda: trainer.enqueue(a_request("g1"))):
            a_job.trainer_dies()
            call()
        with pytest.raises(LeaseLost):
            a_job.trainer(acquire=False).acquire()
        assert trainer.requests_in_flight() == 1

    def test_a_lease_is_not_revived_once_another_trainer_had_the_job(self, a_job: QueueJob) -> None:
        """Though that one has died, or has given the job up."""
        trainer = a_job.trainer()
        a_job.trainer_dies()
        other = a_job.trainer()
        a_job.trainer_dies()
        for call in (trainer.renew, lambda: trainer.enqueue(a_request("g1"))):
            with pytest.raises(LeaseLost):
                call()
        other.release()
        with pytest.raises(LeaseLost):
            trainer.renew()
        trainer.acquire()
        assert trainer.enqueue(a_request("g1"))

    def test_a_dead_trainers_job_is_free_once_its_lease_has_run_out(self, a_job: QueueJob) -> None:
        a_job.trainer(lease_s=0.3)
        second = a_job.trainer(acquire=False)
        second.acquire(wait_s=10)
        second.renew()

    def test_a_group_that_kills_the_trainer_five_times_is_a_dead_letter(self, a_job: QueueJob) -> None:
        trainer = a_job.trainer()
        trainer.enqueue(a_request("g1"))
        answer(a_job.worker("w1"))
        for death in range(1, 6):
            assert collect_one(trainer).deliveries == death
            a_job.trainer_dies()
            trainer = a_job.trainer()
        assert trainer.collect(block_s=0) == []
        [letter] = trainer.dead_letters()
        assert (letter.group_id, letter.stream, letter.deliveries) == ("g1", "groups", 5)

    def test_clean_restarts_of_the_trainer_do_not_age_its_groups(self, a_job: QueueJob) -> None:
        trainer = a_job.trainer()
        trainer.enqueue(a_request("g1"))
        answer(a_job.worker("w1"))
        for _ in range(7):  # more than max_deliveries
            assert collect_one(trainer).deliveries == 1
            trainer.release()
            trainer = a_job.trainer()

    def test_a_group_can_be_given_up(self, a_job: QueueJob) -> None:
        trainer = a_job.trainer()
        trainer.enqueue(a_request("g1"))
        answer(a_job.worker("w1"))
        entry_id = collect_one(trainer).entry_id
        trainer.dead_letter(entry_id, "the teacher refuses it")
        trainer.dead_letter(entry_id, "again does no harm")
        assert [(x.group_id, x.stream, x.reason) for x in trainer.dead_letters()] == [
            ("g1", "groups", "the teacher refuses it")
        ]

    def test_a_queue_that_came_back_empty_is_noticed_and_filled_again(self, a_job: QueueJob) -> None:
        trainer, worker = a_job.trainer(), a_job.worker("w1")
        trainer.enqueue(a_request("g1"))
        lost = take_one(worker)
        a_job.comes_back_empty()

        with pytest.raises(LeaseLost):
            worker.complete(lost, an_answer(lost.request))
        assert worker.take(block_s=0.01) == []
        for call in (trainer.renew, lambda: trainer.collect(block_s=0), lambda: trainer.enqueue(a_request("g1"))):
            with pytest.raises(Mismatch, match="came back empty"):
                call()
        trainer.acquire()
        assert trainer.enqueue(a_request("g1"))
        assert answer(worker).group_id == "g1"
        assert collect_one(trainer).group.group_id == "g1"

    def test_purging_removes_everything(self, a_job: QueueJob) -> None:
        trainer, worker = a_job.trainer(), a_job.worker("w1")
        trainer.publish_policy(PolicyVersion(version=1, path="/p", sha256="00"))
        trainer.enqueue(a_request("g1"))
        trainer.enqueue(a_request("g2"))
        worker.fail(take_one(worker), "for a test")
        trainer.purge()
        with pytest.raises(Mismatch):
            trainer.renew()
        trainer.acquire()
        assert trainer.requests_in_flight() == 0
        assert trainer.dead_letters() == []
        assert worker.policy(1) is None
        assert trainer.enqueue(a_request("g1"))
