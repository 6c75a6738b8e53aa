"""What a client does with a teacher's answer that can't be: it trusts none of it, and names what is wrong."""

from __future__ import annotations

import math
from dataclasses import fields

import httpx
import numpy as np
import pytest

from vaopd.client import SyncTeacherClient
from vaopd.client.answers import GroupAssembly, check_description
from vaopd.errors import Busy, ConfigError, Mismatch, NumericalError, TeacherFault
from vaopd.http_client import ScoringClient, _Events, _make_refusal
from vaopd.pb import teacher_pb2 as pb
from vaopd.types import GroupFailure, GroupScore, ScoreRequest, TeacherLimits
from vaopd.wire.teacher import columns_to_pb, description_from_pb

REQUEST = ScoreRequest(
    group_id="g", responses=(np.array([5, 6, 7], np.int32), np.array([8], np.int32)), prompt_token_ids=np.array([1])
)
SOUND = {
    "teacher_logprobs": [-0.1, -2.0, -3.0, 0.0],
    "degraded_logprobs": [-0.6, -1.0, -3.0, -0.25],
    "visual_advantage": [0.5, 0.0, 0.0, 0.25],
}


def message(**changed: list[float]) -> pb.GroupScore:
    columns = {name: np.array(values, np.float32) for name, values in (SOUND | changed).items()}
    found = pb.GroupScore(group_id="g", lengths=[3, 1], prompt_tokens=1)
    columns_to_pb(columns, found)
    return found


def result(answer: pb.GroupScore) -> GroupScore | GroupFailure:
    return GroupAssembly(answer, REQUEST, "none").make_result()


def described(**changed: object) -> pb.TeacherDescription:
    limits = {field.name: field.default for field in fields(TeacherLimits)}
    values: dict[str, object] = {"model": "m", "revision": "r", "vocab_size": 10, "hidden_size": 4, "dtype": "float32"}
    return pb.TeacherDescription(**(values | {"limits": pb.Limits(**limits)} | changed))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, None),
        ({"pixel_bounds": pb.PixelBounds(min_pixels=1, max_pixels=2**28)}, None),
        ({"vocab_size": 0}, "vocab_size = 0"),
        ({"vocab_size": 2**32 - 1}, "vocab_size = 4294967295"),
        ({"limits": pb.Limits()}, "max_groups_per_request = 0"),
        ({"pixel_bounds": pb.PixelBounds(min_pixels=2**40, max_pixels=2**41)}, "pixel_bounds = .1099511627776"),
        ({"pixel_bounds": pb.PixelBounds(min_pixels=9, max_pixels=8)}, "pixel_bounds = .9, 8"),
        ({"model": "m" * 2000}, "model of 2000 characters"),
    ],
)
def test_a_description_that_no_teacher_has_is_refused(changed: dict[str, object], words: str | None) -> None:
    found = description_from_pb(described(**changed))
    if words is None:
        check_description(found, "there")
    else:
        with pytest.raises(TeacherFault, match=f"the teacher at there describes itself with {words}"):
            check_description(found, "there")


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0xFF81], ids=["inf", "-inf", "NaN", "signalling NaN"])
@pytest.mark.parametrize("name", ["hidden", "scales", "logprobs"])
def test_a_payload_that_is_not_finite_fails_its_group(name: str, bits: int) -> None:
    """Column by column the scores are sound; -inf is a log-prob."""
    values = np.array([[0x3F80, 0xBF80]] * 3 + [[0x8000, bits]], np.uint32)  # 1, -1 and -0 in bfloat16
    if name == "hidden":
        dtype, data = "bfloat16", values.astype("<u2").tobytes()
    else:
        dtype, data = "float32", np.where(values == 0x3F80, 0xBF80, values).astype("<u4") << 16
    answer = message()
    answer.payload.add(name=name, dtype=dtype, shape=(4, 2))
    assembly = GroupAssembly(answer, REQUEST, "hidden")
    assembly.add(pb.TensorChunk(group_id="g", name=name, data=bytes(data)))
    found = assembly.make_result()
    if name == "logprobs" and bits == 0xFF80:
        assert isinstance(found, GroupScore)
    else:
        assert isinstance(found, GroupFailure)
        assert isinstance(found.error, NumericalError)
        assert name in str(found.error)


@pytest.mark.parametrize(("hint", "seconds"), [("7", 7.0), ("Fri, 27 Nov 2026 00:00:00 GMT", 1.0), ("", 1.0)])
def test_a_retry_hint_of_any_form_is_a_refusal(hint: str, seconds: float) -> None:
    answer = httpx.Response(429, headers={"Retry-After": hint}, request=httpx.Request("GET", "http://there/"))
    refused = _make_refusal(answer)
    assert isinstance(refused, Busy)
    assert refused.retry_after_s == seconds


@pytest.mark.parametrize("data", ["[" * 100_000, "{}", "no JSON", '{"index": "first"}'])
def test_a_batch_of_no_results_is_an_error_by_name(data: str) -> None:
    events = _Events(0)
    assert list(events.read("event: result")) == []
    with pytest.raises(Mismatch, match="no result of a batch"):
        list(events.read(f"data: {data}"))


def test_a_possible_answer_is_taken() -> None:
    found = result(message())
    assert isinstance(found, GroupScore)
    assert found.visual_advantage[1].tolist() == [0.25]
    # Rounding makes a certain token's log-prob a little positive, and VA another float32 difference.
    assert isinstance(result(message(teacher_logprobs=[-0.1, -2.0, -3.0, 2e-6])), GroupScore)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"teacher_logprobs": [0.5, -2.0, -3.0, 0.0]}, "teacher_logprobs has 0.5, and no log-prob is above 0"),
        ({"degraded_logprobs": [-0.6, 1.0, -3.0, -0.25]}, "degraded_logprobs has 1, and no log-prob is above 0"),
        ({"visual_advantage": [-0.5, 0.0, 0.0, 0.25]}, "advantage of token 0 is -0.5, its log-probs -0.1 and -0.6"),
        ({"visual_advantage": [0.5, 1.0, 0.0, 0.25]}, "advantage of token 1 is 1, its log-probs -2 and -1 make 0"),
        ({"teacher_logprobs": [math.nan, -2.0, -3.0, 0.0]}, "1 of the teacher's numbers are not finite"),
        ({"teacher_logprobs": [-math.inf, -2.0, -3.0, 0.0]}, "1 of the teacher's numbers are not finite"),
    ],
)
def test_an_impossible_number_fails_its_group_by_name(changed: dict[str, list[float]], words: str) -> None:
    failed = result(message(**changed))
    assert isinstance(failed, GroupFailure)
    assert isinstance(failed.error, NumericalError)
    assert words in str(failed.error)


@pytest.mark.parametrize("lengths", [[], [3], [3, 0, 1], [4, 0], [2, 2], [3, 2**31 - 1]])
def test_lengths_that_do_not_fit_the_responses_are_refused(lengths: list[int]) -> None:
    answer = message()
    answer.ClearField("lengths")
    answer.lengths.extend(lengths)
    with pytest.raises(Mismatch, match=r"responses of \[3, 1\] tokens were sent"):
        result(answer)


def test_a_text_of_no_tokens_is_refused() -> None:
    request = ScoreRequest(group_id="g", responses=("a", "b"), prompt_token_ids=np.array([1]))
    answer = message()
    answer.ClearField("lengths")
    answer.lengths.extend([4, 0])
    with pytest.raises(Mismatch, match=r"\[4, 0\] were scored"):
        GroupAssembly(answer, request, "none").make_result()


@pytest.mark.parametrize("shape", [[], [0, 8], [5, 8], [4, 2**40], [4, 0], [2**62, 2**62]])
def test_no_room_is_made_for_a_tensor_that_can_not_belong_to_the_answer(shape: list[int]) -> None:
    answer = message()
    answer.payload.append(pb.PayloadTensor(name="hidden", dtype="bfloat16", shape=shape))
    with pytest.raises(Mismatch, match="expected 4 rows of 1 to"):
        GroupAssembly(answer, REQUEST, "hidden")


def test_a_payload_s_log_probs_are_checked_too() -> None:
    answer = message()
    answer.payload.append(pb.PayloadTensor(name="logprobs", dtype="float32", shape=[4, 1]))
    assembly = GroupAssembly(answer, REQUEST, "top_k")
    values = np.array([[-0.5], [0.25], [-1], [-1]], np.float32).tobytes()
    assembly.add(pb.TensorChunk(group_id="g", name="logprobs", offset_bytes=0, data=values))
    failed = assembly.make_result()
    assert isinstance(failed, GroupFailure)
    assert "logprobs has 0.25" in str(failed.error)


@pytest.mark.parametrize("texts", [["a"], ["a"] * 5])
def test_token_texts_belong_to_the_tokens(texts: list[str]) -> None:
    answer = message()
    answer.token_texts.extend(texts)
    answer.response_ids.extend([5, 6, 7, 8])
    with pytest.raises(Mismatch, match=f"{len(texts)} token texts and 4 ids came for 4 tokens"):
        result(answer)


@pytest.mark.parametrize("seconds", [math.inf, math.nan, 1e10, 0.0, -1.0])
def test_a_time_limit_that_no_library_takes_is_refused(seconds: float) -> None:
    with pytest.raises(ConfigError, match=r"timeout_s = .* at most 604800 seconds"):
        SyncTeacherClient("127.0.0.1:1", timeout_s=seconds)
    with pytest.raises(ConfigError, match=r"timeout_s = .* at most 604800 seconds"):
        ScoringClient("http://127.0.0.1:1", timeout_s=seconds)
