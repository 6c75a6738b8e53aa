"""Whatever a client sends, the teacher scores it or refuses it by name: requests drawn at random, and mutated bytes.

Never UNKNOWN, never INTERNAL, never a number that isn't finite, and the same answer to a known request all the while.
`make fuzz` looks for longer, led by the coverage of the code.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from tests.support.models import tiny_vlm
from tests.support.teacher import TeacherInProcess, drawing, encoded, question, teacher_in_process, token_request
from vaopd import images
from vaopd.errors import InvalidInput, LimitExceeded
from vaopd.pb import common_pb2, teacher_pb2_grpc
from vaopd.pb import teacher_pb2 as pb
from vaopd.types import (
    EncodedImage,
    PolicyVersion,
    Rollout,
    RolloutGroup,
    RolloutRequest,
    SamplingSettings,
    TeacherLimits,
)
from vaopd.wire.common import image_to_pb, tensor_from_pb
from vaopd.wire.queue import (
    policy_version_from_bytes,
    policy_version_to_bytes,
    rollout_group_from_bytes,
    rollout_group_to_bytes,
    rollout_request_from_bytes,
    rollout_request_to_bytes,
)
from vaopd.wire.teacher import score_request_to_pb

LIMITS = TeacherLimits(max_groups_per_request=4, max_rollouts_per_group=4)
PICTURES = [encoded(drawing(seed), kind) for seed, kind in ((1, "PNG"), (2, "JPEG"), (3, "WEBP"))]
CODE = grpc.StatusCode
REFUSALS = {CODE.INVALID_ARGUMENT, CODE.RESOURCE_EXHAUSTED, CODE.FAILED_PRECONDITION, CODE.NOT_FOUND}
SOUND = {CODE.OK, *REFUSALS}
MUTATIONS = 300
EXAMPLES = int(os.environ.get("VAOPD_FUZZ_EXAMPLES", "100"))


@pytest.fixture(scope="module")
def teacher() -> Iterator[TeacherInProcess]:
    with teacher_in_process(tiny_vlm(), limits=LIMITS) as running:
        yield running


@pytest.fixture(scope="module")
def channel(teacher: TeacherInProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(teacher.target) as channel:
        teacher_pb2_grpc.TeacherStub(channel).PutImages(iter(map(image_to_pb, PICTURES)))
        yield channel


def good_request() -> pb.ScoreGroupsRequest:
    return score_request_to_pb(
        [token_request(tiny_vlm(), f"g{n}", pictures=[drawing(1)]) for n in range(2)],
        job="test",
        payload="top_k",
        top_k=4,
        tokenizer_fingerprint=tiny_vlm().fingerprint,
        with_token_texts=True,
    )


def score(method: Any, request: Any) -> tuple[grpc.StatusCode, list[Any]]:
    """The call's status and what came before it."""
    call = method(request, timeout=60)
    answers: list[Any] = []
    with contextlib.suppress(grpc.RpcError):
        answers.extend(call)
    return call.code(), answers


def mostly(sound: st.SearchStrategy[Any], anything: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Sound nine times out of ten: one fault would hide all that come after it."""
    return st.integers(0, 9).flatmap(lambda number: anything if number == 9 else sound)


def any_request() -> st.SearchStrategy[pb.ScoreGroupsRequest]:
    """Requests of every shape, sound ones among them. Made when it is first drawn from, since it loads the model."""
    vocab = tiny_vlm().vocab_size
    good_prompt = list(good_request().groups[0].tokens.token_ids)
    words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)  # protobuf has no lone surrogates
    names = st.text("abc", min_size=1, max_size=4)
    text_token = st.integers(0, vocab - 9)
    token = text_token | st.integers(vocab - 8, vocab + 2) | st.integers(-(2**63), 2**63 - 1)
    stored = st.sampled_from([image.sha256 for image in PICTURES])
    digest = mostly(stored, words | st.just("ab" * 32))
    part = st.builds(common_pb2.ContentPart, text=words) | st.builds(common_pb2.ContentPart, image_sha256=digest)
    role = mostly(st.sampled_from(["system", "user", "assistant"]), words)
    message = st.builds(common_pb2.ChatMessage, role=role, content=st.lists(part, max_size=3))
    prompt = mostly(
        st.one_of(
            st.just({"tokens": pb.TokenPrompt(token_ids=good_prompt, image_sha256=[PICTURES[0].sha256])}),
            st.lists(text_token, min_size=1, max_size=12).map(lambda ids: {"tokens": pb.TokenPrompt(token_ids=ids)}),
            st.lists(message, min_size=1, max_size=2).map(lambda m: {"messages": pb.MessagePrompt(messages=m)}),
        ),
        st.builds(
            lambda ids, images: {"tokens": pb.TokenPrompt(token_ids=ids, image_sha256=images)},
            st.just(good_prompt) | st.lists(token, max_size=12),
            st.lists(digest, max_size=2),
        )
        | st.just({}),
    )
    rollout = mostly(
        st.builds(pb.RolloutTokens, rollout_id=names, response_ids=st.lists(text_token, min_size=1, max_size=20)),
        st.builds(pb.RolloutTokens, rollout_id=words, response_ids=st.lists(token, max_size=4), response_text=words),
    )
    group = st.builds(
        lambda name, prompt, rollouts: pb.PromptGroup(group_id=name, rollouts=rollouts, **prompt),
        mostly(names, words),
        prompt,
        mostly(
            st.lists(rollout, min_size=1, max_size=4, unique_by=lambda item: item.rollout_id),
            st.lists(rollout, max_size=5),
        ),
    )
    return st.builds(
        pb.ScoreGroupsRequest,
        job=words,
        groups=mostly(
            st.lists(group, min_size=1, max_size=4, unique_by=lambda item: item.group_id), st.lists(group, max_size=5)
        ),
        payload=mostly(st.integers(0, 4), st.integers(0, 99)),
        top_k=mostly(st.integers(1, vocab), st.integers(0, 2**32 - 1)),
        degradation=st.builds(
            pb.Degradation,
            kind=mostly(st.integers(0, 5), st.integers(0, 99)),
            strength=mostly(st.floats(0.01, 1), st.floats()),
        ),
        tokenizer_fingerprint=mostly(st.sampled_from(["", tiny_vlm().fingerprint]), words),
        revision=mostly(st.just(""), words),
        with_token_texts=st.booleans(),
    )


@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
@given(request=st.deferred(any_request))
def test_every_group_of_any_request_is_scored_or_refused_by_name(
    channel: grpc.Channel, request: pb.ScoreGroupsRequest
) -> None:
    code, answers = score(teacher_pb2_grpc.TeacherStub(channel).ScoreGroups, request)
    event(code.name)
    assert code in SOUND
    if code is not CODE.OK:
        return
    ended = [getattr(answer, answer.WhichOneof("item")) for answer in answers if not answer.HasField("payload")]
    assert sorted(item.group_id for item in ended) == sorted(group.group_id for group in request.groups)
    for item in ended:
        event(type(item).__name__)
        if isinstance(item, pb.GroupError):
            assert item.code in {code.value[0] for code in REFUSALS}
            assert item.message
        else:
            for tensor in (item.teacher_logprobs, item.degraded_logprobs, item.visual_advantage):
                values = tensor_from_pb(tensor).numpy()
                assert values.shape == (sum(item.lengths),)
                assert np.isfinite(values).all()


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to four of: a flipped bit, another byte, a part cut out, a part doubled, the end cut off."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place, length = rng.randrange(len(changed) + 1), rng.randint(1, 16)
        match rng.randrange(5):
            case 0 if place < len(changed):
                changed[place] ^= 1 << rng.randrange(8)
            case 1 if place < len(changed):
                changed[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:
                del changed[place : place + length]
            case 3:
                changed[place:place] = changed[place : place + length]
            case _:
                del changed[place:]
    return bytes(changed)


def test_mutated_requests_are_scored_or_refused_and_change_nothing(channel: grpc.Channel) -> None:
    method = channel.unary_stream("/vaopd.v1.Teacher/ScoreGroups")
    good = good_request().SerializeToString()
    before = score(method, good)
    rng = random.Random(0)
    codes = {score(method, mutated(good, rng))[0] for _ in range(MUTATIONS)}
    assert {CODE.OK, CODE.INVALID_ARGUMENT} <= codes <= SOUND  # the mutations do reach what they are meant to
    assert score(method, good) == before


def test_mutated_uploads_are_stored_or_refused(channel: grpc.Channel) -> None:
    method = channel.stream_stream("/vaopd.v1.Teacher/PutImages")
    uploads = [image_to_pb(picture).SerializeToString() for picture in PICTURES]
    rng = random.Random(1)
    codes = {score(method, iter([mutated(uploads[n % 3], rng)]))[0] for n in range(MUTATIONS)}
    assert CODE.INVALID_ARGUMENT in codes
    assert codes <= SOUND


@pytest.mark.parametrize("picture", PICTURES, ids=["PNG", "JPEG", "WEBP"])
def test_a_mutated_image_is_decoded_or_refused_in_our_own_words(picture: EncodedImage) -> None:
    rng, refused = random.Random(2), []
    for _ in range(MUTATIONS):
        try:
            assert images.decode(EncodedImage(data=mutated(picture.data, rng)), max_pixels=100_000).mode == "RGB"
        except (InvalidInput, LimitExceeded) as error:
            refused.append(str(error))
    assert refused
    assert all(message.startswith("image ") and "0x" not in message for message in refused)


def queue_messages() -> dict[str, tuple[bytes, Callable[[bytes], object]]]:
    request = RolloutRequest(
        group_id="g",
        messages=question("What is the perimeter?", [PICTURES[1]]),
        images=(PICTURES[1],),
        num_rollouts=2,
        sampling=SamplingSettings(),
        policy_version=3,
    )
    rollout = Rollout(
        rollout_id="0",
        response_ids=np.arange(9, dtype=np.int32),
        rollout_logprobs=np.linspace(-2, 0, 9, dtype=np.float32),
        finish_reason="stop",
    )
    group = RolloutGroup(
        group_id="g",
        policy_version=3,
        policy_sha256="a" * 64,
        prompt_token_ids=np.arange(30, dtype=np.int32),
        rollouts=(rollout,),
        worker="w",
        generation_s=0.5,
    )
    policy = PolicyVersion(version=3, path="/runs/x/policy/3", sha256="a" * 64)
    return {
        "request": (rollout_request_to_bytes(request), rollout_request_from_bytes),
        "group": (rollout_group_to_bytes(group), rollout_group_from_bytes),
        "policy": (policy_version_to_bytes(policy), policy_version_from_bytes),
    }


@pytest.mark.parametrize("kind", ["request", "group", "policy"])
def test_a_mutated_queue_message_is_read_or_refused(kind: str) -> None:
    data, read = queue_messages()[kind]
    rng, refused = random.Random(3), 0
    for _ in range(MUTATIONS):
        try:
            read(mutated(data, rng))
        except InvalidInput:
            refused += 1
    assert refused  # nearly all: an image goes with its digest, and a shape with its bytes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"response_ids": np.zeros(0, np.int32)}, "0 response ids and 9 log-probs; they must be as many"),
        ({"response_ids": np.arange(8, dtype=np.int32)}, "8 response ids and 9 log-probs; they must be as many"),
        ({"rollout_logprobs": np.full(9, np.nan, np.float32)}, "not finite or above 0"),
        ({"rollout_logprobs": np.full(9, -np.inf, np.float32)}, "not finite or above 0"),
        ({"rollout_logprobs": np.full(9, 0.5, np.float32)}, "not finite or above 0"),
        ({"finish_reason": "tired"}, "'tired'; use stop or length"),
    ],
    ids=["no ids", "lengths that don't match", "NaN", "-Inf", "a positive log-prob", "an unknown end"],
)
def test_rollouts_that_cant_be_trained_on_are_refused_when_they_are_read(change: dict[str, Any], words: str) -> None:
    """Where log-probs cross a boundary: on their way from a worker to the trainer."""
    group = rollout_group_from_bytes(queue_messages()["group"][0])
    broken = replace(group, rollouts=(replace(group.rollouts[0], **change),))
    with pytest.raises(InvalidInput, match=words):
        rollout_group_from_bytes(rollout_group_to_bytes(broken))
