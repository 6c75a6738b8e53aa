"""More than fits: a call over the cap on tokens, and far more calls than the teacher has room for."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np
import PIL.Image
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.api import BODY, error_of, start_api
from tests.support.models import tiny_vlm
from tests.support.teacher import TeacherInProcess, drawing, encoded, teacher_in_process, token_request
from tests.support.waiting import wait_until
from vaopd.client import GroupFailure, SyncTeacherClient
from vaopd.config import ImagesConfig, SharingConfig, TeacherServiceConfig
from vaopd.errors import LimitExceeded, Unavailable
from vaopd.pb import common_pb2, teacher_pb2_grpc
from vaopd.pb import teacher_pb2 as pb
from vaopd.types import GroupScore, ScoreRequest, TeacherLimits, user_turn
from vaopd.wire.common import image_to_pb
from vaopd.wire.teacher import count_tokens, score_request_to_pb
from vaopd_teacher import server
from vaopd_teacher.intake import prepare

CODE = grpc.StatusCode
MAX_TOKENS = 200


def group(name: str, *, tokens: int = 20) -> ScoreRequest:
    """Without an image; its one response has so many tokens, the EOS included."""
    return token_request(tiny_vlm(), name, responses=["1" * (tokens - 1)])


def message(*groups: ScoreRequest) -> pb.ScoreGroupsRequest:
    return score_request_to_pb(groups, job="test", payload="none")


def answers(target: str, request: pb.ScoreGroupsRequest) -> list[pb.ScoreGroupsResponse]:
    with grpc.insecure_channel(target) as channel:
        return list(teacher_pb2_grpc.TeacherStub(channel).ScoreGroups(request))


@pytest.fixture(scope="module")
def capped() -> Iterator[TeacherInProcess]:
    with teacher_in_process(tiny_vlm(), limits=TeacherLimits(max_tokens_per_request=MAX_TOKENS)) as teacher:
        yield teacher


def test_what_counts_is_the_prompt_once_and_every_response() -> None:
    request = token_request(tiny_vlm(), "g", responses=["12", "345"])
    assert request.prompt_token_ids is not None
    assert count_tokens(message(request).groups[0]) == len(request.prompt_token_ids) + 3 + 4  # each with its EOS


def test_a_batch_over_the_token_cap_is_refused(capped: TeacherInProcess) -> None:
    golden = message(group("golden"))
    before = answers(capped.target, golden)
    request = message(*(group(f"g{n}", tokens=60) for n in range(4)))
    tokens = sum(map(count_tokens, request.groups))
    with pytest.raises(grpc.RpcError, match=f"holds {tokens} tokens, the limit is 200; split it") as caught:
        answers(capped.target, request)
    assert caught.value.code() is CODE.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]
    assert answers(capped.target, golden) == before


def test_the_client_splits_what_is_over_the_token_cap_and_names_the_group_that_can_not_be_split(
    capped: TeacherInProcess,
) -> None:
    with SyncTeacherClient(capped.target) as client:
        assert client.describe().limits.max_tokens_per_request == MAX_TOKENS
        groups = [*(group(f"g{n}", tokens=60) for n in range(4)), group("huge", tokens=300)]
        results = {result.group_id: result for result in client.score(groups)}
    huge = results.pop("huge")
    assert isinstance(huge, GroupFailure)
    assert isinstance(huge.error, LimitExceeded)
    assert "the limit of a call is 200; send fewer rollouts" in str(huge.error)
    assert len(results) == 4
    assert all(isinstance(result, GroupScore) for result in results.values())


def test_over_http_a_batch_over_the_token_cap_is_413(capped: TeacherInProcess, tmp_path: Path) -> None:
    sound = {"question": BODY["question"], "response": "It is 12."}
    for api in start_api(tmp_path, capped.target):
        before = api.score(**sound).content
        answer = api.score(question=BODY["question"], responses=[[5] * 50] * 5)
        assert (answer.status_code, error_of(answer)["code"]) == (413, "too_large")
        assert "the limit of a call is 200" in error_of(answer)["detail"]
        assert api.score(**sound).content == before


async def test_under_ten_times_the_load_every_call_is_answered_or_told_when_to_come_back() -> None:
    """How fast is measured by benchmarks/sharing.py."""
    service = TeacherServiceConfig(sharing=SharingConfig(max_waiting_groups=16, max_waiting_groups_per_job=8))
    golden = message(token_request(tiny_vlm(), "golden", pictures=[drawing(1)]))
    with teacher_in_process(tiny_vlm(), service=service, batch_tokens=400) as teacher:
        with SyncTeacherClient(teacher.target) as client:  # uploads the image
            list(client.score([token_request(tiny_vlm(), "golden", pictures=[drawing(1)])]))
        before = await asyncio.to_thread(answers, teacher.target, golden)
        async with grpc.aio.insecure_channel(teacher.target) as channel:
            stub = teacher_pb2_grpc.TeacherStub(channel)
            ends = Counter(await asyncio.gather(*(_end(stub, number) for number in range(160))))
            health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert ends.keys() == {"scored", "told when to come back"}
        assert ends["scored"] >= 16
        assert teacher.server.admission.refused == ends["told when to come back"]
        wait_until("every place is free", lambda: teacher.server.admission.waiting == 0)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        assert await asyncio.to_thread(answers, teacher.target, golden) == before


async def _end(stub: teacher_pb2_grpc.TeacherStub, number: int) -> str:
    """What came of a call of one group, which is not sent again."""
    request = message(group(f"g{number}"))
    request.job = f"job{number % 4}"
    try:
        items = [answer.WhichOneof("item") async for answer in stub.ScoreGroups(request)]
    except grpc.aio.AioRpcError as error:
        if error.code() is not CODE.RESOURCE_EXHAUSTED:
            return f"odd: {error}"
        packed = dict(error.trailing_metadata() or ())["grpc-status-details-bin"]
        details = status_pb2.Status.FromString(packed).details  # type: ignore[arg-type]
        (hint,) = (detail for detail in details if detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR))
        assert error_details_pb2.RetryInfo.FromString(hint.value).retry_delay.ToMilliseconds() > 0
        return "told when to come back"
    return "scored" if items == ["score"] else f"odd: {items}"


def test_a_text_that_can_not_fit_is_refused_before_it_is_tokenised(teacher: TeacherInProcess) -> None:
    """3 MB of text took seconds in which no other job's groups were prepared."""
    limit = 16 * tiny_vlm().max_tokens
    long = ScoreRequest(group_id="g", responses=("a" * (limit + 1),), messages=user_turn("?", []))
    prompt = ScoreRequest(group_id="p", responses=("a",), messages=user_turn("a" * (limit + 1), []))
    with SyncTeacherClient(teacher.target) as client:
        results = {result.group_id: result for result in client.score([long, prompt])}
    for name, place in (("g", "rollout"), ("p", "prompt")):
        found = results[name]
        assert isinstance(found, GroupFailure)
        assert isinstance(found.error, LimitExceeded)
        assert f"{place}" in str(found.error)
        assert f"has {limit + 1} characters, the limit is {limit}" in str(found.error)


def refusal_of(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()  # type: ignore[attr-defined]


def test_parts_of_two_bytes_are_counted_before_they_are_looked_at(
    teacher: TeacherInProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight million of them fit into a message, and stopped the event loop for seconds."""
    monkeypatch.setattr(prepare, "MAX_PARTS", 1000)
    many = 1001
    empty = {
        "rollouts": pb.PromptGroup(rollouts=[pb.RolloutTokens()] * many),
        "images": pb.PromptGroup(tokens=pb.TokenPrompt(image_sha256=[""] * many)),
        "messages": pb.PromptGroup(messages=pb.MessagePrompt(messages=[common_pb2.ChatMessage()] * many)),
        "parts": pb.PromptGroup(
            messages=pb.MessagePrompt(messages=[common_pb2.ChatMessage(content=[common_pb2.ContentPart()] * many)])
        ),
    }
    image = image_to_pb(encoded(drawing(1)))
    with grpc.insecure_channel(teacher.target) as channel:
        stub = teacher_pb2_grpc.TeacherStub(channel)
        for name, group in empty.items():
            code, told = refusal_of(lambda: list(stub.ScoreGroups(pb.ScoreGroupsRequest(groups=[group]))))  # noqa: B023
            assert (code, name in told, "the limit is 1000" in told) == (CODE.RESOURCE_EXHAUSTED, True, True)
        code, told = refusal_of(lambda: stub.MissingImages(pb.MissingImagesRequest(sha256=[""] * many)))
        assert (code, "the limit is 1000" in told) == (CODE.RESOURCE_EXHAUSTED, True)
        code, told = refusal_of(lambda: stub.PutImages(iter([image] * many)))
        assert (code, "the limit is 1000" in told) == (CODE.RESOURCE_EXHAUSTED, True)


def test_the_name_of_a_job_is_bounded_wherever_it_is_kept(teacher: TeacherInProcess) -> None:
    """The store has a share for each name: of megabytes each, they were charged to nobody."""
    long = "j" * 1_000_000
    with grpc.insecure_channel(teacher.target) as channel:
        stub = teacher_pb2_grpc.TeacherStub(channel)
        for call in (
            lambda: stub.PutImages(iter([image_to_pb(encoded(drawing(2)), job=long)])),
            lambda: stub.MissingImages(pb.MissingImagesRequest(sha256=["0" * 64], job=long)),
            lambda: list(stub.ScoreGroups(pb.ScoreGroupsRequest(job=long))),
        ):
            assert refusal_of(call) == (
                CODE.INVALID_ARGUMENT, "a job has 1000000 characters, the limit is 256; shorten it",
            )  # fmt: skip


def test_connections_to_the_teacher_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-open ones too: a client that only connects holds a place, and leaves it when it goes."""
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 3)
    with teacher_in_process(tiny_vlm()) as teacher:
        host, _, port = teacher.target.rpartition(":")
        with ExitStack() as stack:
            opened = [stack.enter_context(socket.create_connection((host, int(port)), timeout=60)) for _ in range(8)]
            closed = sum(connection.recv(1) == b"" for connection in opened[4:])
            assert closed == 4  # an accepted connection gets the server's settings
        wait_until("there is room again", lambda: bool(describe_or_none(teacher.target)))


def describe_or_none(target: str) -> object:
    try:
        with SyncTeacherClient(target, timeout_s=5) as client:
            return client.describe()
    except Unavailable:
        return None


def test_a_light_job_loses_no_group_beside_one_that_floods_a_small_store() -> None:
    """Its images, a third of the store, are uploaded again and again, and read while the flood goes on."""
    groups = [token_request(tiny_vlm(), f"g{n}", pictures=[drawing(n)], responses=["12"]) for n in range(4)]
    own_bytes = sum(len(image.data) for group in groups for image in group.images)
    rooms = ImagesConfig(encoded_bytes=3 * own_bytes, prepared_bytes=1)
    over = threading.Event()

    def flood(target: str) -> int:
        """Uploads distinct images of the size of the light job's, as fast as it can."""
        noise, count = np.random.default_rng(0), 0
        with grpc.insecure_channel(target) as channel:
            stub = teacher_pb2_grpc.TeacherStub(channel)
            while not over.is_set():
                pixels = noise.integers(0, 256, (40, own_bytes // 480, 3), dtype=np.uint8)
                stub.PutImages(iter([image_to_pb(encoded(PIL.Image.fromarray(pixels)), job="heavy")]))
                count += 1
        return count

    with (
        teacher_in_process(tiny_vlm(), service=TeacherServiceConfig(images=rooms)) as teacher,
        ThreadPoolExecutor(1) as pool,
    ):
        flooding = pool.submit(flood, teacher.target)
        try:
            for _ in range(5):
                with SyncTeacherClient(teacher.target, job="light", patience_s=30.0) as client:
                    assert all(isinstance(result, GroupScore) for result in client.score(groups))
            wait_until("the flood has dropped images", lambda: teacher.server.images.dropped > 0)
        finally:
            over.set()
        assert flooding.result() > 1
        assert teacher.server.images.find_missing(i.sha256 for g in groups for i in g.images) == []
