"""Several jobs at one teacher: who is served when, what leaves the line unserved, and what images cost.

Fairness is asserted by the order in which a real server hands groups to its engine, never by time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2

from tests.support.models import tiny_vlm
from tests.support.teacher import TeacherInProcess, drawing, encoded, question, teacher_in_process, token_request
from tests.support.waiting import wait_until
from vaopd.client import GroupFailure, SyncTeacherClient
from vaopd.config import ImagesConfig, SharingConfig, TeacherServiceConfig
from vaopd.errors import LimitExceeded, VaopdError
from vaopd.pb import teacher_pb2_grpc
from vaopd.types import Degradation, GroupScore, ScoreRequest
from vaopd.wire.common import image_to_pb
from vaopd.wire.teacher import score_request_to_pb
from vaopd_teacher.engines.engine import EngineResult, PreparedGroup
from vaopd_teacher.engines.transformers_engine import GroupEngine
from vaopd_teacher.line.prepare_ahead import AT_ONCE, FEW_TOKENS

ONE_GROUP_A_FORWARD = 50


class NotingEngine:
    """The real engine; it notes what each forward holds, and holds the first one until it is let go."""

    def __init__(self) -> None:
        self._engine = GroupEngine(tiny_vlm(), batch_tokens=4096)
        self.batches: list[list[PreparedGroup]] = []
        self.go = threading.Event()

    def score(self, groups: Sequence[PreparedGroup]) -> Iterator[EngineResult | VaopdError]:
        self.batches.append(list(groups))
        assert self.go.wait(60)
        yield from self._engine.score(groups)

    @property
    def order(self) -> list[str]:
        return [group.group_id for batch in self.batches for group in batch]

    def tokens_of(self, job: str, *, first: int) -> int:
        """Of the first so many groups, those of a job."""
        groups = [group for batch in self.batches for group in batch][:first]
        return sum(group.tokens for group in groups if group.group_id.startswith(job))


@dataclass(frozen=True)
class HeldTeacher:
    """A teacher whose device is held by a first group, so that all that follows waits in line."""

    teacher: TeacherInProcess
    engine: NotingEngine
    pool: ThreadPoolExecutor

    def wait(self, job: str, count: int, *, rollouts: int = 2) -> None:
        """Adds that many calls of one group each to the line: "job0", "job1", ..."""
        for number in range(count):
            request = group(f"{job}{number}", rollouts=rollouts)
            before = self.teacher.server.scheduler.waiting_units
            self.pool.submit(results, self.teacher.target, request, job=job)
            wait_until("it waits in line", lambda before=before: self.waiting == before + 1)

    @property
    def waiting(self) -> int:
        return self.teacher.server.scheduler.waiting_units

    def serve(self) -> list[str]:
        """Lets the device go -> the groups in the order in which it took them, without the first."""
        expected = self.waiting + 1
        self.engine.go.set()
        wait_until("all are served", lambda: len(self.engine.order) == expected)
        return self.engine.order[1:]


@contextmanager
def held_teacher(
    *, batch_tokens: int = ONE_GROUP_A_FORWARD, sharing: SharingConfig = SharingConfig()
) -> Iterator[HeldTeacher]:
    engine = NotingEngine()
    service = TeacherServiceConfig(sharing=sharing)
    with (
        teacher_in_process(tiny_vlm(), batch_tokens=batch_tokens, engine=engine, service=service) as teacher,
        ThreadPoolExecutor(40) as pool,
    ):
        try:
            pool.submit(results, teacher.target, group("first"), job="first")
            wait_until("the first is on the device", lambda: engine.order == ["first"])
            yield HeldTeacher(teacher, engine, pool)
        finally:
            engine.go.set()


def group(name: str, rollouts: int = 2, seed: int = 1) -> ScoreRequest:
    return token_request(tiny_vlm(), name, pictures=[drawing(seed)], responses=["It is 12."] * rollouts)


def results(target: str, *groups: ScoreRequest, **options: object) -> dict[str, GroupScore | GroupFailure]:
    with SyncTeacherClient(target, **options) as client:  # type: ignore[arg-type]
        return {result.group_id: result for result in client.score(groups)}


def test_a_light_job_does_not_wait_behind_one_that_floods() -> None:
    with held_teacher() as held:
        held.wait("flood", 10)
        held.wait("light", 3)
        order = held.serve()
    assert order[:7] == ["flood0", "light0", "flood1", "light1", "flood2", "light2", "flood3"]


def test_weights_are_shares_of_the_tokens() -> None:
    with held_teacher(sharing=SharingConfig(weights={"heavy": 3.0})) as held:
        held.wait("heavy", 12)
        held.wait("light", 12)
        held.serve()
    # The first, then twelve of the two jobs: nine and three.
    assert held.engine.tokens_of("heavy", first=13) == 3 * held.engine.tokens_of("light", first=13)


def test_jobs_with_groups_of_different_size_get_the_same_tokens() -> None:
    with held_teacher() as held:
        held.wait("small", 12, rollouts=1)
        held.wait("large", 4, rollouts=8)
        held.serve()
    large, small = (held.engine.tokens_of(job, first=11) for job in ("large", "small"))
    one_of_each = sum(batch[0].tokens for batch in held.engine.batches if batch[0].group_id in ("large0", "small0"))
    assert abs(large - small) <= one_of_each


def test_a_forward_mixes_jobs() -> None:
    with held_teacher(batch_tokens=4096) as held:
        held.wait("a", 2)
        held.wait("b", 2)
        held.serve()
        batches = [[group.group_id for group in batch] for batch in held.engine.batches]
    assert batches == [["first"], ["a0", "b0", "a1", "b1"]]


def test_the_next_forward_is_ready_while_the_device_is_busy() -> None:
    with held_teacher() as held:
        held.pool.submit(results, held.teacher.target, *(group(f"g{n}") for n in range(6)), job="job")
        # The first group of another job is on the device; of this call two units are prepared, no more.
        wait_until("two units wait", lambda: held.waiting == 2)
        held.engine.go.set()
        wait_until("all are served", lambda: len(held.engine.order) == 7)
    assert held.engine.order[1:] == [f"g{n}" for n in range(6)]


def test_of_a_long_queue_little_is_prepared() -> None:
    with held_teacher() as held:
        requests = [group(f"g{n}", rollouts=64) for n in range(30)]
        for request in requests:
            held.pool.submit(results, held.teacher.target, request, job="flood")
        scheduler = held.teacher.server.scheduler
        wait_until("all are accepted", lambda: held.teacher.server.admission.waiting == 31)
        wait_until("enough is prepared", lambda: scheduler.waiting_tokens("flood") >= FEW_TOKENS)
        prepared = scheduler.waiting_tokens("flood")
        held.engine.go.set()
        wait_until("all are served", lambda: len(held.engine.order) == 31)
        tokens_of_all = held.engine.tokens_of("g", first=31)
    assert prepared <= FEW_TOKENS + AT_ONCE * tokens_of_all / 30
    assert tokens_of_all > 2 * prepared


def test_the_tokens_served_are_counted_by_job() -> None:
    with held_teacher() as held:
        held.wait("a", 2)
        held.wait("b", 1)
        held.serve()
        served = held.teacher.server.scheduler.served
        wait_until("the last is counted", lambda: served("a").groups + served("b").groups == 3)
        assert (served("a").groups, served("b").groups) == (2, 1)
        assert served("a").tokens == 2 * served("b").tokens == 2 * served("first").tokens


def test_work_whose_deadline_is_over_leaves_the_line() -> None:
    with held_teacher() as held, grpc.insecure_channel(held.teacher.target) as channel:
        image = encoded(drawing(1))
        stub = teacher_pb2_grpc.TeacherStub(channel)
        stub.PutImages(iter([image_to_pb(image)]))
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.ScoreGroups(score_request(group("late")), timeout=0.5))
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
        wait_until("nothing waits any more", lambda: held.waiting == 0)
        wait_until("its place is free", lambda: held.teacher.server.admission.waiting == 1)
        held.wait("next", 1)
        assert held.serve() == ["next0"]


def test_a_job_at_its_limit_is_told_when_to_come_back_and_the_others_get_in() -> None:
    with held_teacher(sharing=SharingConfig(max_waiting_groups_per_job=3)) as held:
        held.wait("greedy", 3)
        with pytest.raises(LimitExceeded, match=r"3 groups of job 'greedy' wait already, .* try again in"):
            results(held.teacher.target, group("one-more"), job="greedy", patience_s=0.0)
        held.wait("modest", 1)
        assert "modest0" in held.serve()
    assert "one-more" not in held.engine.order


def test_a_full_calls_hint_comes_in_the_details_of_its_status() -> None:
    with (
        held_teacher(sharing=SharingConfig(max_waiting_groups=1)) as held,
        grpc.insecure_channel(held.teacher.target) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        list(teacher_pb2_grpc.TeacherStub(channel).ScoreGroups(score_request(group("g"))))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]
    details = status_pb2.Status.FromString(dict(caught.value.trailing_metadata())["grpc-status-details-bin"])  # type: ignore[attr-defined]
    (hint,) = [detail for detail in details.details if detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR)]
    assert error_details_pb2.RetryInfo.FromString(hint.value).retry_delay.ToMilliseconds() == 1000


def test_a_request_of_several_forwards_repeats_itself_bit_for_bit_on_an_idle_teacher() -> None:
    groups = [group(f"g{n}", rollouts=1 + n % 3, seed=n % 4) for n in range(12)]
    with teacher_in_process(tiny_vlm(), batch_tokens=500) as teacher:
        first, second, third = (results(teacher.target, *groups) for _ in range(3))
        assert teacher.server.scheduler.forwards > 6
    for name, score in first.items():
        assert isinstance(score, GroupScore)
        for again in (second[name], third[name]):
            assert isinstance(again, GroupScore)
            assert again.payload == score.payload
            for k in range(len(score.teacher_logprobs)):
                assert np.array_equal(again.teacher_logprobs[k], score.teacher_logprobs[k])
                assert np.array_equal(again.degraded_logprobs[k], score.degraded_logprobs[k])


def test_an_image_is_decoded_once_for_both_views_at_its_upload(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = count_decodings(monkeypatch)
    with teacher_in_process(tiny_vlm()) as teacher:
        for name in ("a", "b"):
            results(teacher.target, group(name), group(name + "'"))
        views = teacher.server.prepared_images
        assert len(decoded) == 1
        assert (views.misses, views.hits) == (2, 8)


def test_another_degradation_decodes_once_more_and_is_expected_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = count_decodings(monkeypatch)
    with teacher_in_process(tiny_vlm()) as teacher:
        for number in range(2):
            results(teacher.target, group(f"g{number}"), degradation=Degradation(kind="black"))
        assert len(decoded) == 2
        results(teacher.target, group("other", seed=2), degradation=Degradation(kind="black"))
        assert len(decoded) == 3


def test_without_room_for_views_every_group_gets_the_same_answer() -> None:
    image = encoded(drawing(1))
    request = ScoreRequest(group_id="g", responses=("12",), images=(image,), messages=question("How long?", [image]))
    no_room = TeacherServiceConfig(images=ImagesConfig(prepared_bytes=1))
    with teacher_in_process(tiny_vlm()) as roomy, teacher_in_process(tiny_vlm(), service=no_room) as tight:
        kept, made_anew = (results(t.target, request)["g"] for t in (roomy, tight))
    assert isinstance(kept, GroupScore)
    assert isinstance(made_anew, GroupScore)
    assert np.array_equal(kept.teacher_logprobs[0], made_anew.teacher_logprobs[0])
    assert np.array_equal(kept.degraded_logprobs[0], made_anew.degraded_logprobs[0])


def count_decodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    from vaopd_teacher.intake import prepare

    decoded: list[int] = []
    decode = prepare.image_files.decode

    def counted(*args: object, **options: object) -> object:
        decoded.append(1)
        return decode(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(prepare.image_files, "decode", counted)
    return decoded


def score_request(*groups: ScoreRequest) -> object:
    return score_request_to_pb(groups, job="plain", payload="none")
