"""What the teacher refuses, with which status and words; and that it is the same teacher afterwards, bit for bit."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import PIL.Image
import pytest

from tests.support.models import tiny_vlm
from tests.support.teacher import TeacherInProcess, drawing, encoded, teacher_in_process, token_request
from vaopd import wire
from vaopd.pb import common_pb2, teacher_pb2_grpc
from vaopd.pb import teacher_pb2 as pb
from vaopd.types import Degradation, EncodedImage, TeacherLimits

LIMITS = TeacherLimits(max_groups_per_request=4, max_rollouts_per_group=3, max_image_bytes=200_000)
PICTURE = encoded(drawing(1))

IA, RE, FP = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.FAILED_PRECONDITION,
)


@pytest.fixture(scope="module")
def teacher() -> Iterator[TeacherInProcess]:
    with teacher_in_process(tiny_vlm(), limits=LIMITS) as running:
        yield running


@pytest.fixture(scope="module")
def channel(teacher: TeacherInProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(teacher.target) as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> teacher_pb2_grpc.TeacherStub:
    stub = teacher_pb2_grpc.TeacherStub(channel)
    stub.PutImages(iter([wire.image_to_pb(PICTURE)]))
    return stub


@pytest.fixture
def same_afterwards(stub: teacher_pb2_grpc.TeacherStub) -> Iterator[None]:
    """A known request has the same answer before and after the test, bit for bit."""
    before = list(stub.ScoreGroups(good_request()))
    yield
    assert list(stub.ScoreGroups(good_request())) == before


def good_request() -> pb.ScoreGroupsRequest:
    return wire.score_request_to_pb(
        [token_request(tiny_vlm(), name, pictures=[drawing(1)]) for name in ("good", "changed")],
        job="test",
        payload="hidden",
        top_k=4,
        degradation=Degradation(),
        tokenizer_fingerprint=tiny_vlm().fingerprint,
        revision="",
        with_token_texts=False,
    )


def set_responses(request: pb.ScoreGroupsRequest, ids: list[int]) -> None:
    request.groups[1].rollouts[0].response_ids[:] = ids


def set_prompt(request: pb.ScoreGroupsRequest, change: Callable[[list[int]], list[int]]) -> None:
    tokens = request.groups[1].tokens.token_ids
    tokens[:] = change(list(tokens))


def vocab() -> int:
    return tiny_vlm().vocab_size


def token(text: str) -> int:
    return tiny_vlm().tokenizer.convert_tokens_to_ids(text)


def without_placeholders(ids: list[int]) -> list[int]:
    return [i for i in ids if i != token("<|image_pad|>")]


CALLS = {
    "no groups": (lambda r: r.ClearField("groups"), IA, "no groups"),
    "too many groups": (lambda r: r.groups.extend([r.groups[0]] * 3), RE, "5 groups, the limit is 4"),
    "two groups of one name": (lambda r: setattr(r.groups[1], "group_id", "good"), IA, "'good' stands twice"),
    "a group without a name": (lambda r: setattr(r.groups[1], "group_id", ""), IA, "empty group_id"),
    "another tokenizer": (lambda r: setattr(r, "tokenizer_fingerprint", "f" * 64), FP, "ffffffffffff"),
    "another revision": (lambda r: setattr(r, "revision", "e" * 64), FP, "eeeeeeeeeeee"),
    "an unknown payload": (lambda r: setattr(r, "payload", 17), FP, "payload 17"),
    "an unknown degradation": (lambda r: setattr(r.degradation, "kind", 99), IA, "degradation 99"),
    "pixelation with ratio 0": (lambda r: setattr(r.degradation, "strength", 0.0), IA, r"\(0, 1\], got 0.0"),
    "pixelation with ratio NaN": (lambda r: setattr(r.degradation, "strength", float("nan")), IA, "got nan"),
    "top-k of nothing": (lambda r: (setattr(r, "payload", 3), setattr(r, "top_k", 0)), IA, "top_k = 0"),
    "top-k above the vocabulary": (lambda r: (setattr(r, "payload", 3), setattr(r, "top_k", 480)), IA, r"\[1, 479\]"),
}


@pytest.mark.parametrize(("change", "status", "words"), CALLS.values(), ids=CALLS.keys())
@pytest.mark.usefixtures("same_afterwards")
def test_a_fault_of_the_envelope_fails_the_call(
    stub: teacher_pb2_grpc.TeacherStub, change: Callable, status: grpc.StatusCode, words: str
) -> None:
    request = good_request()
    change(request)
    with pytest.raises(grpc.RpcError, match=words) as caught:
        list(stub.ScoreGroups(request))
    assert caught.value.code() is status  # type: ignore[attr-defined]


GROUPS = {
    "no rollouts": (lambda r: r.groups[1].ClearField("rollouts"), IA, "no rollouts"),
    "too many rollouts": (lambda r: r.groups[1].rollouts.extend([pb.RolloutTokens()] * 2), RE, "4 rollouts.*is 3"),
    "two rollouts of one name": (lambda r: setattr(r.groups[1].rollouts[1], "rollout_id", "0"), IA, "'0' stands twice"),
    "no prompt": (lambda r: r.groups[1].ClearField("tokens"), IA, "no prompt"),
    "an empty token prompt": (lambda r: r.groups[1].tokens.ClearField("token_ids"), IA, "placeholder|empty"),
    "an empty message prompt": (lambda r: r.groups[1].messages.SetInParent(), IA, "empty prompt"),
    "an unknown role": (lambda r: r.groups[1].messages.messages.add(role="robot"), IA, "'robot'"),
    "an empty response": (lambda r: set_responses(r, []), IA, "response is empty"),
    "a response with ids and a text": (
        lambda r: setattr(r.groups[1].rollouts[0], "response_text", "12"),
        IA,
        "ids and a text",
    ),
    "a negative response id": (lambda r: set_responses(r, [-1]), IA, r"response token id -1 .*\[0, 479\)"),
    "the first id above the vocabulary": (lambda r: set_responses(r, [vocab()]), IA, "response token id 479"),
    "the largest of all ids": (lambda r: set_responses(r, [2**63 - 1]), IA, "9223372036854775807"),
    "a prompt id out of range": (lambda r: set_prompt(r, lambda ids: [-7, *ids]), IA, "prompt token id -7"),
    "an image inside a response": (lambda r: set_responses(r, [token("<|image_pad|>")]), IA, "vision placeholder"),
    "a video inside a response": (lambda r: set_responses(r, [token("<|video_pad|>")]), IA, "vision placeholder"),
    "a vision start in a response": (lambda r: set_responses(r, [token("<|vision_start|>")]), IA, "vision"),
    "a vision end in a response": (lambda r: set_responses(r, [token("<|vision_end|>")]), IA, "vision"),
    "a vision pad in a response": (lambda r: set_responses(r, [token("<|vision_pad|>")]), IA, "vision"),
    "too long a response": (lambda r: set_responses(r, [1] * 1020), IA, "the limit is 1024"),
    "too long a prompt": (lambda r: set_prompt(r, lambda ids: ids + [1] * 1020), IA, "the limit is 1024"),
    "an image without its placeholder": (lambda r: set_prompt(r, without_placeholders), IA, r"runs of \[\].*\[9\]"),
    "a placeholder without its image": (
        lambda r: r.groups[1].tokens.ClearField("image_sha256"),
        IA,
        r"runs of \[9\].*\[\]",
    ),
    "a run that doesn't fit the grid": (
        lambda r: set_prompt(r, lambda ids: [token("<|image_pad|>"), *ids]),
        IA,
        r"runs of \[1, 9\].*\[9\]",
    ),
    "an image that isn't stored": (
        lambda r: r.groups[1].tokens.image_sha256.__setitem__(0, "ab" * 32),
        grpc.StatusCode.NOT_FOUND,
        "abababab.*PutImages",
    ),
    "a path where an image belongs": (
        lambda r: r.groups[1].tokens.image_sha256.__setitem__(0, "/etc/passwd"),
        IA,
        "'/etc/passwd' is no SHA-256",
    ),
}


@pytest.mark.parametrize(("change", "status", "words"), GROUPS.values(), ids=GROUPS.keys())
@pytest.mark.usefixtures("same_afterwards")
def test_a_fault_of_one_group_leaves_the_others_alone(
    stub: teacher_pb2_grpc.TeacherStub, change: Callable, status: grpc.StatusCode, words: str
) -> None:
    request = good_request()
    change(request)
    answers = list(stub.ScoreGroups(request))
    (error,) = [answer.error for answer in answers if answer.HasField("error")]
    assert error.group_id == "changed"
    assert error.code == status.value[0]
    assert re.search(words, error.message), error.message
    assert [answer.score.group_id for answer in answers if answer.HasField("score")] == ["good"]


def png(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("L", size).save(buffer, "PNG")
    return buffer.getvalue()


def gif() -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("P", (32, 32)).save(buffer, "GIF")
    return buffer.getvalue()


IMAGES = {
    "empty": (b"", IA),
    "one byte": (b"\x89", IA),
    "a text": (b"this is no image", IA),
    "a URL": (b"https://example.org/image.png", IA),
    "random bytes": (np.random.default_rng(0).bytes(500), IA),
    "a cut PNG": (PICTURE.data[: len(PICTURE.data) // 2], IA),
    "a PNG with a flipped byte": (PICTURE.data[:900] + b"\xff\x00" + PICTURE.data[902:], IA),
    "a cut JPEG": (encoded(drawing(1), "JPEG").data[:300], IA),
    "a GIF": (gif(), IA),
    "an SVG": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', IA),
    "too many pixels": (png((8000, 8000)), IA),
    "an extreme aspect ratio": (png((2010, 10)), IA),
    "too many bytes": (b"\x89PNG" + bytes(200_001), RE),
}


@pytest.mark.parametrize(("data", "status"), IMAGES.values(), ids=IMAGES.keys())
@pytest.mark.usefixtures("same_afterwards")
def test_a_bad_image_is_refused_where_it_is_sent_and_not_kept(
    stub: teacher_pb2_grpc.TeacherStub, data: bytes, status: grpc.StatusCode
) -> None:
    image = EncodedImage(data=data)
    with pytest.raises(grpc.RpcError, match=image.sha256[:12]) as caught:
        stub.PutImages(iter([wire.image_to_pb(image)]))
    assert caught.value.code() is status  # type: ignore[attr-defined]
    assert "0x" not in caught.value.details()  # type: ignore[attr-defined]
    assert list(stub.MissingImages(pb.MissingImagesRequest(sha256=[image.sha256])).sha256) == [image.sha256]


@pytest.mark.usefixtures("same_afterwards")
def test_an_image_under_a_false_digest_is_refused(stub: teacher_pb2_grpc.TeacherStub) -> None:
    with pytest.raises(grpc.RpcError, match="declared as aaaa") as caught:
        stub.PutImages(iter([common_pb2.EncodedImage(sha256="a" * 64, data=PICTURE.data)]))
    assert caught.value.code() is IA  # type: ignore[attr-defined]


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x0a\x02\xff\xfe", b"\x12\x7f"], ids=["noise", "UTF-8", "cut"])
@pytest.mark.usefixtures("same_afterwards")
def test_bytes_that_are_no_message_are_the_senders_fault(channel: grpc.Channel, data: bytes) -> None:
    with pytest.raises(grpc.RpcError, match=f"{len(data)} bytes are not a ScoreGroupsRequest") as caught:
        list(channel.unary_stream("/vaopd.v1.Teacher/ScoreGroups")(data))
    assert caught.value.code() is IA  # type: ignore[attr-defined]


@pytest.mark.usefixtures("same_afterwards")
def test_a_message_above_the_limit_is_refused(stub: teacher_pb2_grpc.TeacherStub) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.PutImages(iter([common_pb2.EncodedImage(data=bytes(LIMITS.max_message_bytes + 1))]))
    assert caught.value.code() is RE  # type: ignore[attr-defined]


@pytest.mark.usefixtures("same_afterwards")
def test_the_head_of_another_revision_is_refused(stub: teacher_pb2_grpc.TeacherStub) -> None:
    with pytest.raises(grpc.RpcError, match="eeeeeeeeeeee") as caught:
        list(stub.GetHead(pb.GetHeadRequest(revision="e" * 64)))
    assert caught.value.code() is FP  # type: ignore[attr-defined]
