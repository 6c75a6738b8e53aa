"""What the client does for its caller: uploads once, splits, gathers, and says in types what went wrong."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import PIL.Image
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.support.models import tiny_vlm
from tests.support.teacher import TeacherInProcess, drawing, encoded, question, teacher_in_process, token_request
from tests.support.waiting import wait_until
from vaopd.client import GroupFailure, SyncTeacherClient, TeacherClient
from vaopd.client.replicas import Replica
from vaopd.config import ImagesConfig, TeacherServiceConfig
from vaopd.errors import ImageRefused, InvalidInput, LimitExceeded, Mismatch, NotFound, Unavailable
from vaopd.payloads import to_torch
from vaopd.pb import teacher_pb2 as pb
from vaopd.pb import teacher_pb2_grpc
from vaopd.types import Degradation, EncodedImage, GroupScore, ScoreRequest, TeacherLimits
from vaopd.wire.errors import group_error_of


@pytest.fixture
async def client(teacher: TeacherInProcess) -> AsyncIterator[TeacherClient]:
    async with TeacherClient(teacher.target, timeout_s=30) as client:
        yield client


def request(group_id: str, seed: int = 1, **options: object) -> ScoreRequest:
    return token_request(tiny_vlm(), group_id, pictures=[drawing(seed)], **options)  # type: ignore[arg-type]


async def scored(client: TeacherClient, *groups: ScoreRequest) -> dict[str, GroupScore | GroupFailure]:
    return {result.group_id: result async for result in client.score(groups)}


async def test_the_teacher_describes_itself(client: TeacherClient) -> None:
    vlm = tiny_vlm()
    description = await client.describe()
    assert description.model == vlm.path.name
    assert description.tokenizer_fingerprint == vlm.fingerprint
    assert (description.vocab_size, description.hidden_size, description.dtype) == (479, 128, "float32")
    assert description.limits.max_tokens_per_rollout == 1024  # the model's positions, fewer than the service's limit
    assert "pixelate" in description.degradations
    assert "hidden" in description.payloads
    size = vlm.processor.image_processor.size
    assert description.pixel_bounds == (size["shortest_edge"], size["longest_edge"])


async def test_every_group_is_answered_once(client: TeacherClient) -> None:
    groups = [request(f"g{n}", seed=n % 3) for n in range(10)]
    results = [result.group_id async for result in client.score(groups)]
    assert sorted(results) == sorted(group.group_id for group in groups)


async def test_an_image_is_uploaded_once_and_by_one_client_for_all(
    teacher: TeacherInProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded: list[str] = []
    put = Replica._put

    async def counted(self: Replica, images: list[EncodedImage]) -> None:
        uploaded.extend(image.sha256 for image in images)
        await put(self, images)

    monkeypatch.setattr(Replica, "_put", counted)
    for _ in range(2):
        async with TeacherClient(teacher.target) as client:
            for name in ("a", "b"):
                results = await scored(client, request(name, seed=77), request(name + "'", seed=77))
                assert all(isinstance(result, GroupScore) for result in results.values())
    assert len(uploaded) == 1


async def test_an_image_that_the_teacher_dropped_is_uploaded_again() -> None:
    first, second = request("first", seed=1), request("second", seed=2)
    room_for_one = max(len(first.images[0].data), len(second.images[0].data)) + 100
    rooms = TeacherServiceConfig(images=ImagesConfig(encoded_bytes=room_for_one, prepared_bytes=1))
    with teacher_in_process(tiny_vlm(), service=rooms) as teacher:
        async with TeacherClient(teacher.target, timeout_s=30) as client:
            for group in (first, second, first):
                assert isinstance((await scored(client, group))[group.group_id], GroupScore)


async def test_an_image_that_nobody_has_is_not_found(client: TeacherClient) -> None:
    image = EncodedImage(data=b"never sent")
    group = ScoreRequest(group_id="g", responses=("12",), messages=question("How long?", [image]))
    failure = (await scored(client, group))["g"]
    assert isinstance(failure, GroupFailure)
    assert isinstance(failure.error, NotFound)
    assert image.sha256 in str(failure.error)


async def test_a_bad_image_fails_its_own_groups_only(client: TeacherClient) -> None:
    bad = replace(request("bad"), images=(EncodedImage(data=b"https://example.org/image.png"),))
    results = await scored(client, bad, request("good", seed=5))
    assert isinstance(results["good"], GroupScore)
    failure = results["bad"]
    assert isinstance(failure, GroupFailure)
    assert isinstance(failure.error, ImageRefused)  # its status says no more than "invalid", its details do
    assert "not a PNG, JPEG or WEBP" in str(failure.error)


async def test_an_image_above_the_limit_is_not_even_sent() -> None:
    with teacher_in_process(tiny_vlm(), limits=TeacherLimits(max_image_bytes=1000)) as teacher:
        async with TeacherClient(teacher.target, timeout_s=30) as client:
            failure = (await scored(client, request("g")))["g"]
    assert isinstance(failure, GroupFailure)
    assert isinstance(failure.error, LimitExceeded)
    assert "the limit is 1000" in str(failure.error)


async def test_a_request_above_the_limits_goes_in_several_calls() -> None:
    groups = [request(f"g{n}", seed=n) for n in range(7)]
    with teacher_in_process(tiny_vlm(), limits=TeacherLimits(max_groups_per_request=2)) as teacher:
        async with TeacherClient(teacher.target, timeout_s=30) as client:
            results = await scored(client, *groups)
    assert all(isinstance(results[group.group_id], GroupScore) for group in groups)


async def test_a_group_above_the_message_limit_fails_alone() -> None:
    large = token_request(tiny_vlm(), "large", responses=["12 " * 300] * 40)
    with teacher_in_process(tiny_vlm(), limits=TeacherLimits(max_message_bytes=30_000)) as teacher:
        async with TeacherClient(teacher.target, timeout_s=30) as client:
            results = await scored(client, large, token_request(tiny_vlm(), "small"))
    assert isinstance(results["small"], GroupScore)
    assert isinstance(results["large"], GroupFailure)
    assert "the limit of a message is 30000" in str(results["large"].error)


async def test_small_chunks_make_the_same_tensors(teacher: TeacherInProcess) -> None:
    group = request("g")
    with teacher_in_process(tiny_vlm(), chunk_bytes=700) as in_small_chunks:
        async with TeacherClient(in_small_chunks.target) as small, TeacherClient(teacher.target) as large:
            one, other = (await scored(small, group))["g"], (await scored(large, group))["g"]
            assert await small.head() == await large.head()
    assert isinstance(one, GroupScore)
    assert isinstance(other, GroupScore)
    assert one.payload == other.payload
    assert torch.equal(to_torch(one.payload.tensors["hidden"]), to_torch(other.payload.tensors["hidden"]))


async def test_two_groups_of_one_name_are_refused(client: TeacherClient) -> None:
    with pytest.raises(InvalidInput, match="same group_id"):
        await scored(client, request("g"), request("g"))


async def test_a_group_that_can_not_be_encoded_fails_alone(client: TeacherClient) -> None:
    results = await scored(client, ScoreRequest(group_id="neither", responses=("12",)), request("good"))
    assert isinstance(results["neither"], GroupFailure)
    assert "exactly one of" in str(results["neither"].error)
    assert isinstance(results["good"], GroupScore)


@pytest.mark.parametrize("response", [np.array([5.0]), np.array([[5, 6]]), np.array([True]), "\ud800"], ids=str)
async def test_a_response_that_protobuf_can_not_hold_fails_its_group(
    client: TeacherClient, response: np.ndarray | str
) -> None:
    wrong = replace(request("wrong"), responses=(response,))
    results = await scored(client, wrong, request("good"))
    assert isinstance(results["good"], GroupScore)
    assert isinstance(failure := results["wrong"], GroupFailure)
    assert isinstance(failure.error, InvalidInput)
    assert "group 'wrong' can't be sent" in str(failure.error)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"payload": "hiden"}, "payload"),
        ({"degradation": Degradation(kind="blurr")}, "degradation.kind"),  # type: ignore[arg-type]
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_k": 2**31}, "top_k"),
    ],
)
async def test_an_unknown_setting_is_named(teacher: TeacherInProcess, options: dict[str, Any], field: str) -> None:
    async with TeacherClient(teacher.target, **options) as client:
        with pytest.raises(InvalidInput, match=f"^{field} = ") as caught:
            await scored(client, request("g"))
    assert caught.value.field == field


async def test_the_longest_image_that_may_be_sent_is_scored(client: TeacherClient) -> None:
    """1×200 scaled up to the tiny teacher's bounds and floored would be above 200 to 1, which its processor refuses."""
    image = encoded(PIL.Image.new("RGB", (1, 200)))
    group = ScoreRequest(group_id="g", responses=("12",), images=(image,), messages=question("How long?", [image]))
    results = await scored(client, group)
    assert isinstance(results["g"], GroupScore)


async def test_another_tokenizer_is_a_mismatch_that_names_both(teacher: TeacherInProcess) -> None:
    async with TeacherClient(teacher.target, tokenizer_fingerprint="f" * 64) as client:
        with pytest.raises(Mismatch, match=f"ffffffffffff.*{tiny_vlm().fingerprint[:12]}"):
            await scored(client, request("g"))


async def test_a_teacher_that_can_not_be_reached_is_unavailable() -> None:
    async with TeacherClient("127.0.0.1:1", timeout_s=0.5) as client:
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1 can't be reached"):
            await client.describe()


def test_the_synchronous_twin_gives_the_same(teacher: TeacherInProcess) -> None:
    group = request("g")
    with SyncTeacherClient(teacher.target, job="sync") as client:
        assert client.describe() == teacher.description
        (first,), (second,) = (list(client.score([group])) for _ in range(2))
    assert isinstance(first, GroupScore)
    assert isinstance(second, GroupScore)
    assert np.array_equal(first.teacher_logprobs[0], second.teacher_logprobs[0])
    assert first.payload == second.payload


def test_a_groups_error_names_the_field_as_a_calls_error_does(teacher: TeacherInProcess) -> None:
    twice = [pb.RolloutTokens(rollout_id="same", response_ids=[5, 6])] * 2
    group = pb.PromptGroup(group_id="g", tokens=pb.TokenPrompt(token_ids=[5, 6, 7]), rollouts=twice)
    with grpc.insecure_channel(teacher.target) as channel:
        (answer,) = teacher_pb2_grpc.TeacherStub(channel).ScoreGroups(pb.ScoreGroupsRequest(groups=[group]))
    error = group_error_of(answer.error)
    assert isinstance(error, InvalidInput)
    assert error.field == "rollouts[1].rollout_id"
    assert "stands twice" in str(error)


def test_leaving_the_synchronous_iterator_early_leaves_the_client_usable(teacher: TeacherInProcess) -> None:
    with SyncTeacherClient(teacher.target) as client:
        for _ in client.score([request(f"g{n}") for n in range(20)]):
            break
        assert isinstance(next(iter(client.score([request("g")]))), GroupScore)


def test_a_client_that_is_never_closed_ends_its_thread(teacher: TeacherInProcess) -> None:
    client = SyncTeacherClient(teacher.target)
    client.describe()
    thread = client._loop._thread
    del client
    gc.collect()
    wait_until("the thread ends", lambda: not thread.is_alive())


def test_a_client_is_refused_in_a_forked_child() -> None:
    """The child lacks the client's thread: a call, and closing it, would wait for ever."""
    code = """if True:
        import os
        from vaopd.client import SyncTeacherClient
        from vaopd.errors import Unavailable
        with SyncTeacherClient("127.0.0.1:1") as client:
            if (child := os.fork()) == 0:
                try:
                    client.describe()
                except Unavailable as error:
                    print(error, flush=True)
            else:
                os.waitpid(child, 0)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "this client of the teacher belongs to process " in done.stdout


def test_reflection_and_health_are_the_standard_ones(teacher: TeacherInProcess) -> None:
    with grpc.insecure_channel(teacher.target) as channel:
        services = ProtoReflectionDescriptorDatabase(channel).get_services()
        assert {"vaopd.v1.Teacher", "grpc.health.v1.Health"} <= set(services)
        for name in ("", "vaopd.v1.Teacher"):
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
