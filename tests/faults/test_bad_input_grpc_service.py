"""Refusals that depend on who asks and when: keys, jobs, quotas, a teacher that is full, loading, draining or broken.

The rows of the table that test_bad_input_grpc.py leaves; with statuses as any gRPC client reads them.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.models import save_untrained, tiny_vlm
from tests.support.teacher import TeacherInProcess, teacher_in_process, token_request
from tests.support.waiting import wait_until
from vaopd.access.keys import add_key
from vaopd.config import KeysConfig, QuotasConfig, SharingConfig, TeacherServiceConfig
from vaopd.errors import VaopdError
from vaopd.pb import teacher_pb2 as pb
from vaopd.pb import teacher_pb2_grpc
from vaopd.vlm.model import Vlm
from vaopd.wire.common import tensor_from_pb
from vaopd.wire.teacher import score_request_to_pb
from vaopd_teacher.engines.engine import EngineResult, PreparedGroup
from vaopd_teacher.engines.transformers_engine import GroupEngine

CODE = grpc.StatusCode
Metadata = tuple[tuple[str, str], ...]


def request(*names: str, job: str = "geometry") -> pb.ScoreGroupsRequest:
    return score_request_to_pb(
        [token_request(tiny_vlm(), name, responses=["12"]) for name in names], job=job, payload="none"
    )


@contextmanager
def stub_of(teacher: TeacherInProcess) -> Iterator[teacher_pb2_grpc.TeacherStub]:
    with grpc.insecure_channel(teacher.target) as channel:
        yield teacher_pb2_grpc.TeacherStub(channel)


def refusal(
    stub: teacher_pb2_grpc.TeacherStub, message: pb.ScoreGroupsRequest, metadata: Metadata = ()
) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.ScoreGroups(message, metadata=metadata, timeout=30))
    return caught.value


def retry_delay_s(error: Any) -> float:
    packed = dict(error.trailing_metadata())["grpc-status-details-bin"]
    (hint,) = [
        error_details_pb2.RetryInfo.FromString(detail.value)
        for detail in status_pb2.Status.FromString(packed).details
        if detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR)
    ]
    return hint.retry_delay.ToMilliseconds() / 1000


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """ "file", and keys by name: of two jobs, of one with a small quota, and one that has expired."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    made = {name: add_key(file, name) for name in ("geometry", "other", "small", "expired")}
    content = json.loads(file.read_text())
    content["keys"][-1]["expires"] = (datetime.now(UTC) - timedelta(minutes=1)).isoformat()
    file.write_text(json.dumps(content))
    return {"file": str(file), **made}


@pytest.fixture(scope="module")
def guarded(keys: dict[str, str]) -> Iterator[TeacherInProcess]:
    service = TeacherServiceConfig(keys=KeysConfig(file=Path(keys["file"])), quotas=QuotasConfig(jobs={"small": 2}))
    with teacher_in_process(tiny_vlm(), service=service) as teacher:
        yield teacher


@pytest.fixture
def same_afterwards(guarded: TeacherInProcess, keys: dict[str, str]) -> Iterator[None]:
    metadata = bearer(keys["geometry"])
    with stub_of(guarded) as stub:
        before = list(stub.ScoreGroups(request("golden"), metadata=metadata))
        yield
        assert list(stub.ScoreGroups(request("golden"), metadata=metadata)) == before


def bearer(key: str) -> Metadata:
    return (("authorization", f"Bearer {key}"),)


WITHOUT_A_VALID_KEY = {
    "no key": (lambda keys: (), "send `authorization: Bearer KEY`"),
    "another scheme": (lambda keys: (("authorization", "Basic dTpw"),), "send `authorization: Bearer KEY`"),
    "a malformed key": (lambda keys: bearer("geometry"), "malformed.*copy all of it"),
    "a key that is not known": (lambda keys: bearer(keys["geometry"][:-4] + "AAAA"), "not known here; ask"),
    "an expired key": (lambda keys: bearer(keys["expired"]), "is expired; ask .* for a new one"),
}


@pytest.mark.parametrize(("metadata", "words"), WITHOUT_A_VALID_KEY.values(), ids=WITHOUT_A_VALID_KEY.keys())
@pytest.mark.usefixtures("same_afterwards")
def test_without_a_valid_key_nobody_is_let_in(
    guarded: TeacherInProcess, keys: dict[str, str], metadata, words: str
) -> None:
    with stub_of(guarded) as stub:
        error = refusal(stub, request("g"), metadata(keys))
    assert error.code() is CODE.UNAUTHENTICATED
    with pytest.raises(grpc.RpcError, match=words):
        raise error


@pytest.mark.parametrize("job", ["other", "nobody", "../geometry", "GEOMETRY"])
@pytest.mark.usefixtures("same_afterwards")
def test_a_valid_key_opens_no_other_job_known_or_not(guarded: TeacherInProcess, keys: dict[str, str], job: str) -> None:
    with stub_of(guarded) as stub:
        error = refusal(stub, request("g", job=job), bearer(keys["geometry"]))
    assert error.code() is CODE.PERMISSION_DENIED
    told = f"the API key is not for job {job!r}; use that job's key, or leave the job's name out"
    assert error.details() == told


@pytest.mark.usefixtures("same_afterwards")
def test_a_used_up_quota_comes_with_a_retry_hint(guarded: TeacherInProcess, keys: dict[str, str]) -> None:
    with stub_of(guarded) as stub:
        list(stub.ScoreGroups(request("a", "b", job="small"), metadata=bearer(keys["small"])))
        error = refusal(stub, request("c", job="small"), bearer(keys["small"]))
    assert error.code() is CODE.RESOURCE_EXHAUSTED
    assert 20 < retry_delay_s(error) <= 30  # a group in 30 s is what two in a minute are


class HeldEngine:
    """The real engine, which waits to be let go before the first group."""

    def __init__(self) -> None:
        self._engine = GroupEngine(tiny_vlm(), batch_tokens=4096)
        self.reached: list[str] = []
        self.go = threading.Event()

    def score(self, groups: Sequence[PreparedGroup]) -> Iterator[EngineResult | VaopdError]:
        self.reached += [group.group_id for group in groups]
        assert self.go.wait(60)
        yield from self._engine.score(groups)


@pytest.fixture
def held() -> Iterator[tuple[TeacherInProcess, HeldEngine]]:
    """A teacher with room for two groups, one in a forward."""
    engine = HeldEngine()
    service = TeacherServiceConfig(sharing=SharingConfig(max_waiting_groups=2))
    with teacher_in_process(tiny_vlm(), batch_tokens=30, engine=engine, service=service) as teacher:
        try:
            yield teacher, engine
        finally:
            engine.go.set()


def test_a_full_queue_comes_with_a_retry_hint_and_a_cancelled_call_makes_room(
    held: tuple[TeacherInProcess, HeldEngine],
) -> None:
    teacher, engine = held
    with stub_of(teacher) as stub:
        first = stub.ScoreGroups(request("first"))
        wait_until("the first is on the device", lambda: engine.reached == ["first"])
        second = stub.ScoreGroups(request("second"))
        wait_until("the second waits", lambda: teacher.server.scheduler.waiting_units == 1)
        error = refusal(stub, request("third"))
        assert error.code() is CODE.RESOURCE_EXHAUSTED
        assert retry_delay_s(error) > 0
        second.cancel()
        assert second.code() is CODE.CANCELLED
        wait_until("its room is free", lambda: teacher.server.admission.waiting == 1)
        third = stub.ScoreGroups(request("third"))
        engine.go.set()
        assert [[answer.WhichOneof("item") for answer in call] for call in (first, third)] == [["score"], ["score"]]
    assert engine.reached == ["first", "third"]  # the cancelled work was dropped


def test_a_full_teacher_reads_nothing_of_what_it_refuses(held: tuple[TeacherInProcess, HeldEngine]) -> None:
    """Bytes that are no message at all get the same answer: they are not even parsed."""
    teacher, _ = held
    with grpc.insecure_channel(teacher.target) as channel:
        waiting = teacher_pb2_grpc.TeacherStub(channel).ScoreGroups(request("one", "two"))
        wait_until("it is full", lambda: teacher.server.admission.waiting == 2)
        with pytest.raises(grpc.RpcError) as caught:
            list(channel.unary_stream("/vaopd.v1.Teacher/ScoreGroups")(b"\xff\xff", timeout=10))
        assert caught.value.code() is CODE.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]
        waiting.cancel()


def test_a_deadline_that_passes_drops_the_work(held: tuple[TeacherInProcess, HeldEngine]) -> None:
    teacher, engine = held
    with stub_of(teacher) as stub:
        first = stub.ScoreGroups(request("first"))
        wait_until("the first is on the device", lambda: engine.reached == ["first"])
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.ScoreGroups(request("late"), timeout=0.3))
        assert caught.value.code() is CODE.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
        wait_until("the late one left the line", lambda: teacher.server.admission.waiting == 1)
        engine.go.set()
        assert len(list(first)) == 1
    assert engine.reached == ["first"]


def test_a_draining_teacher_is_unavailable_and_says_so_to_balancers(held: tuple[TeacherInProcess, HeldEngine]) -> None:
    teacher, engine = held
    with grpc.insecure_channel(teacher.target) as channel:
        stub = teacher_pb2_grpc.TeacherStub(channel)
        watched = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watched).status == health_pb2.HealthCheckResponse.SERVING
        accepted = stub.ScoreGroups(request("accepted"))
        wait_until("it is on the device", lambda: engine.reached == ["accepted"])
        stopping = teacher.begin_stop()
        assert next(watched).status == health_pb2.HealthCheckResponse.NOT_SERVING
        wait_until("new calls are refused", lambda: refusal(stub, request("new")).code() is CODE.UNAVAILABLE)
        engine.go.set()
        assert [answer.WhichOneof("item") for answer in accepted] == ["score"]  # what was accepted is answered
        stopping.result(30)


def test_where_no_teacher_listens_yet_a_call_is_unavailable() -> None:
    with grpc.insecure_channel("127.0.0.1:1") as channel:
        error = refusal(teacher_pb2_grpc.TeacherStub(channel), request("g"))
    assert error.code() is CODE.UNAVAILABLE


def test_an_answer_that_is_not_finite_is_an_error_of_its_group(tmp_path: Path) -> None:
    vlm = Vlm.load(save_untrained(tmp_path / "broken"), device_map="cpu")
    (poisoned,) = vlm.tokenizer("@", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        vlm.model.get_input_embeddings().weight[poisoned] = float("nan")
    groups = [token_request(vlm, "bad", text="@", responses=["12"]), token_request(vlm, "good", responses=["12"])]
    message = request("any")
    message.ClearField("groups")
    message.groups.extend(
        pb.PromptGroup(
            group_id=group.group_id,
            tokens=pb.TokenPrompt(token_ids=group.prompt_token_ids),
            rollouts=[pb.RolloutTokens(rollout_id="0", response_ids=group.responses[0])],
        )
        for group in groups
    )
    with teacher_in_process(vlm) as teacher, stub_of(teacher) as stub:
        answers = {getattr(item, item.WhichOneof("item")).group_id: item for item in stub.ScoreGroups(message)}
    assert answers["bad"].error.code == CODE.INTERNAL.value[0]
    assert "not finite" in answers["bad"].error.message
    assert np.isfinite(tensor_from_pb(answers["good"].score.teacher_logprobs).numpy()).all()
