"""The teacher's numbers over gRPC against plain transformers forwards, one rollout at a time, in float64.

Where the payload allows, of `either` backend: transformers, or vLLM, whose kernels are others. Every comparison is of
two float32 forwards, whose errors `tolerance.forward` bounds.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import PIL.Image
import pytest
import torch

from tests.support import divergences, tolerance
from tests.support.models import model_folder, tiny_vlm
from tests.support.teacher import (
    TeacherInProcess,
    drawing,
    encoded,
    question,
    teacher_in_process,
    token_request,
    write_config,
)
from tests.support.tolerance import assert_noticed, assert_within
from vaopd.client import SyncTeacherClient
from vaopd.config import load_config
from vaopd.degradation import pixelate
from vaopd.errors import Mismatch
from vaopd.payloads import decode, to_torch
from vaopd.types import Degradation, GroupScore, ScoreRequest
from vaopd.vlm.model import Vlm
from vaopd.vlm.prompts import chat

pytestmark = pytest.mark.numeric

QUESTION = "What is the perimeter?"


@pytest.fixture(scope="module")
def on_vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeacherInProcess]:
    pytest.importorskip("vllm")
    from vaopd_teacher.engines.vllm_engine import load

    backend = load(load_config(write_config(tmp_path_factory.mktemp("vllm"))), {"max_num_batched_tokens": 512})
    try:
        with teacher_in_process(backend) as running:
            yield running
    finally:
        backend.close()


@pytest.fixture(params=["teacher", pytest.param("on_vllm", marks=pytest.mark.slow)])
def either(request: pytest.FixtureRequest) -> TeacherInProcess:
    return request.getfixturevalue(request.param)


def score(target: str, *requests: ScoreRequest, with_token_texts: bool = False, **options: object) -> list[GroupScore]:
    """The scores in the order of the requests."""
    with SyncTeacherClient(target, **options) as client:  # type: ignore[arg-type]
        results = {r.group_id: r for r in client.score(requests, with_token_texts=with_token_texts)}
    scores = [results[request.group_id] for request in requests]
    assert all(isinstance(result, GroupScore) for result in scores), scores
    return scores  # type: ignore[return-value]


def plain_logits(pictures: list[PIL.Image.Image], response_ids: np.ndarray) -> torch.Tensor:
    """(T, V) float64: the processor's own output, the model's own forward with full logits, one row."""
    vlm = tiny_vlm()
    messages = chat(question(QUESTION, [encoded(picture) for picture in pictures]))
    rendered = vlm.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = vlm.processor(text=[rendered], images=pictures or None, return_tensors="pt")
    prompt_tokens = inputs["input_ids"].shape[1]
    response = torch.from_numpy(response_ids.astype(np.int64))[None]
    inputs["input_ids"] = torch.cat((inputs["input_ids"], response), dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        kinds = torch.as_tensor(inputs["mm_token_type_ids"])
        inputs["mm_token_type_ids"] = torch.cat((kinds, torch.zeros_like(response)), dim=1)
    with torch.no_grad():
        logits = vlm.model(**inputs).logits[0, prompt_tokens - 1 : -1, : vlm.vocab_size]
    return logits.double()


class Plain:
    """What a plain forward says of one response, and how far another may be from that."""

    def __init__(self, pictures: list[PIL.Image.Image], response_ids: np.ndarray) -> None:
        self.logits = plain_logits(pictures, response_ids)
        self.ids = torch.from_numpy(response_ids.astype(np.int64))[:, None]
        self.logprobs = self.logits.log_softmax(-1)
        of_logits = tolerance.forward(tiny_vlm().config) * self.logits.abs().amax(-1, keepdim=True)
        self.logits_error = of_logits.expand_as(self.logits)
        self.logprobs_error = tolerance.log_softmax(self.logits, of_logits)

    @property
    def expected(self) -> torch.Tensor:
        """(T,) of the response's tokens."""
        return self.logprobs.gather(-1, self.ids)[:, 0]

    @property
    def error(self) -> torch.Tensor:
        """(T,)"""
        return self.logprobs_error.gather(-1, self.ids)[:, 0]

    @classmethod
    def of(cls, pictures: list[PIL.Image.Image], request: ScoreRequest) -> list[Plain]:
        """Of every response of a request."""
        return [cls(pictures, np.asarray(ids)) for ids in request.responses]


@pytest.mark.parametrize("sizes", [[(96, 96)], [(128, 64), (96, 96)], []], ids=["one image", "two images", "no image"])
def test_both_views_equal_plain_forwards(either: TeacherInProcess, sizes: list[tuple[int, int]]) -> None:
    pictures = [drawing(seed, size) for seed, size in enumerate(sizes)]
    request = token_request(tiny_vlm(), "g", pictures=pictures, text=QUESTION)
    (scored,) = score(either.target, request, payload="sampled")
    originals = Plain.of(pictures, request)
    degraded = Plain.of([pixelate(picture, 0.1) for picture in pictures], request)
    for k, (one, other) in enumerate(zip(originals, degraded, strict=True)):
        assert_within(scored.teacher_logprobs[k], one.expected, one.error)
        assert_within(scored.degraded_logprobs[k], other.expected, other.error)
        advantage = (one.expected - other.expected).clamp_min(0)
        assert_within(scored.visual_advantage[k], advantage, one.error + other.error)
        if pictures:  # one view in the other's place, and the view of a hair's breadth more detail
            finer = Plain([pixelate(picture, 0.11) for picture in pictures], np.asarray(request.responses[k]))
            assert_noticed(one.expected, other.expected, other.error)
            assert_noticed(finer.expected, other.expected, other.error)
    assert request.prompt_token_ids is not None
    assert scored.prompt_tokens == len(request.prompt_token_ids)


def test_both_views_are_made_of_the_picture_scaled_to_the_pixel_bounds(teacher: TeacherInProcess) -> None:
    """The tiny processor's fewest pixels are 1024: 20×15 times √(1024/300) = 1.8475, floored, are 36×27 and 3×2 cells.

    The stored picture pixelated has 2×1 cells.
    """
    stored = drawing(3, (20, 15))
    scaled = stored.resize((36, 27))
    ids = np.array([17, 5, 44, 90], np.int32)
    request = ScoreRequest(
        group_id="g", messages=question(QUESTION, [encoded(stored)]), images=(encoded(stored),), responses=(ids,)
    )
    (scored,) = score(teacher.target, request, payload="none")
    original, degraded = Plain([scaled], ids), Plain([pixelate(scaled, 0.1)], ids)
    assert_within(scored.teacher_logprobs[0], original.expected, original.error)
    assert_within(scored.degraded_logprobs[0], degraded.expected, degraded.error)
    assert_noticed(Plain([pixelate(stored, 0.1)], ids).expected, degraded.expected, degraded.error)


def test_what_the_image_shows_has_an_advantage_over_the_blurred_view(either: TeacherInProcess) -> None:
    request = token_request(tiny_vlm(), "g", pictures=[drawing(1)], text=QUESTION)
    (scored,) = score(either.target, request, payload="none")
    error = torch.cat([plain.error for plain in Plain.of([drawing(1)], request)])
    assert_noticed(np.concatenate(scored.visual_advantage), 0.0, error)


@pytest.mark.slow
def test_vllm_refuses_a_column_that_it_can_t_compute(on_vllm: TeacherInProcess) -> None:
    with (
        SyncTeacherClient(on_vllm.target, payload="none") as client,
        pytest.raises(Mismatch, match="can't compute column 'teacher_entropy_nats'; on request it computes none"),
    ):
        list(client.score([token_request(tiny_vlm(), "g")], columns=["teacher_entropy_nats"]))


def test_pixelation_with_ratio_1_has_no_advantage_at_all(teacher: TeacherInProcess) -> None:
    request = token_request(tiny_vlm(), "g", pictures=[drawing(1)], text=QUESTION)
    (scored,) = score(teacher.target, request, degradation=Degradation(strength=1.0))
    for k, plain in enumerate(Plain.of([drawing(1)], request)):
        # The same forward for both, but two places in it: other places are other orders of summation.
        assert_within(scored.teacher_logprobs[k], scored.degraded_logprobs[k], plain.error)
        assert_within(scored.visual_advantage[k], 0.0, plain.error)


@pytest.mark.parametrize("kind", ["blur", "mean_colour", "black", "noise"])
def test_every_other_degradation_is_served_and_repeats_itself(teacher: TeacherInProcess, kind: str) -> None:
    request = token_request(tiny_vlm(), "g", pictures=[drawing(1)])
    degradation = Degradation(kind=kind, strength=0.2)  # type: ignore[arg-type]
    first, second = (score(teacher.target, request, degradation=degradation)[0] for _ in range(2))
    assert not np.array_equal(first.teacher_logprobs[0], first.degraded_logprobs[0])
    assert np.array_equal(first.degraded_logprobs[0], second.degraded_logprobs[0])


def test_one_image_in_many_views_is_never_taken_for_another(either: TeacherInProcess) -> None:
    """Token ids are the same in all of them, so a cache that goes by these alone would answer with the first."""
    vlm, picture = tiny_vlm(), drawing(6)
    request = token_request(vlm, "g", pictures=[picture], text=QUESTION, responses=["The sides are 3, 4 and 5."])
    (original,) = Plain.of([picture], request)
    views = {ratio: Plain.of([pixelate(picture, ratio)], request)[0] for ratio in (0.1, 0.2, 0.5)}
    for ratio in (0.1, 0.5, 0.1, 0.2, 0.5):
        (scored,) = score(either.target, request, payload="none", degradation=Degradation(strength=ratio))
        assert_within(scored.teacher_logprobs[0], original.expected, original.error)
        assert_within(scored.degraded_logprobs[0], views[ratio].expected, views[ratio].error)
    for ratio, view in views.items():
        for other in (original, *(views[r] for r in views if r != ratio)):
            assert_noticed(other.expected, view.expected, view.error)


def test_a_score_does_not_depend_on_what_else_is_in_the_batch(either: TeacherInProcess) -> None:
    vlm = tiny_vlm()
    alone = token_request(vlm, "a", pictures=[drawing(1)], text=QUESTION)
    others = [
        token_request(vlm, "b", pictures=[drawing(2, (160, 128)), drawing(3)], responses=["It is 7."] * 5),
        token_request(vlm, "c", text="Say it all again, from the first word on, and say it slowly, please."),
        token_request(vlm, "d", pictures=[drawing(1)], responses=["12"]),
    ]
    (by_itself,) = score(either.target, alone, payload="none")
    among_others = score(either.target, *others[:2], alone, others[2], payload="none")[2]
    views = Plain.of([drawing(1)], alone), Plain.of([pixelate(drawing(1), 0.1)], alone)
    for k in range(2):
        assert_within(among_others.teacher_logprobs[k], by_itself.teacher_logprobs[k], views[0][k].error)
        assert_within(among_others.degraded_logprobs[k], by_itself.degraded_logprobs[k], views[1][k].error)
    # Among all these a neighbour's picture would show.
    neighbour = Plain.of([drawing(2)], alone)[0]
    assert_noticed(neighbour.expected, views[0][0].expected, views[0][0].error)


def test_a_group_that_is_larger_than_a_forward_is_scored_in_several() -> None:
    request = token_request(
        tiny_vlm(), "g", pictures=[drawing(1)], text=QUESTION, responses=["It is 12.", "12", "It is 13."]
    )
    with teacher_in_process(tiny_vlm(), batch_tokens=50) as one_row_at_a_time:
        (small,) = score(one_row_at_a_time.target, request)
    with teacher_in_process(tiny_vlm()) as all_rows_at_once:
        (large,) = score(all_rows_at_once.target, request)
    for k, plain in enumerate(Plain.of([pixelate(drawing(1), 0.1)], request)):
        assert_within(small.degraded_logprobs[k], large.degraded_logprobs[k], plain.error)
    found, expected = (decode(result.payload)["hidden"] for result in (small, large))
    relative = tolerance.forward(tiny_vlm().config)
    assert_within((found - expected).norm(dim=-1), 0.0, relative * expected.norm(dim=-1))


def test_the_head_is_the_weights_over_the_logical_vocabulary_bit_for_bit(teacher: TeacherInProcess) -> None:
    vlm = tiny_vlm()
    with SyncTeacherClient(teacher.target) as client:
        head = client.head()
    weights = vlm.model.get_output_embeddings().weight
    assert head.shape == (vlm.vocab_size, vlm.hidden_size)
    assert len(weights) > vlm.vocab_size  # the padding rows stay at home
    assert torch.equal(to_torch(head), weights[: vlm.vocab_size])


def test_hidden_states_times_head_are_the_full_logits(teacher: TeacherInProcess) -> None:
    picture = drawing(4)
    request = token_request(tiny_vlm(), "g", pictures=[picture], text=QUESTION)
    (scored,) = score(teacher.target, request)
    with SyncTeacherClient(teacher.target) as client:
        logits = decode(scored.payload)["hidden"] @ to_torch(client.head()).T
    plain = Plain.of([picture], request)
    expected = torch.cat([p.logits for p in plain])
    assert_within(logits, expected, torch.cat([p.logits_error for p in plain]))
    assert_noticed(expected.roll(1, 0), expected, torch.cat([p.logits_error for p in plain]))  # one row further


def test_top_k_and_the_tail_are_a_distribution(either: TeacherInProcess) -> None:
    picture = drawing(4)
    request = token_request(tiny_vlm(), "g", pictures=[picture], text=QUESTION)
    (scored,) = score(either.target, request, payload="top_k", top_k=8)
    payload = decode(scored.payload)
    assert payload["token_ids"].dtype == torch.int32
    plain = Plain.of([picture], request)
    expected, errors = torch.cat([p.logprobs for p in plain]), torch.cat([p.logprobs_error for p in plain])
    top = expected.topk(8)
    total = payload["logprobs"].double().exp().sum(-1) + payload["tail_logprobs"].double().exp()
    # Of one forward's own log-softmax: what float32 rounds in a log-prob is relative to the probability.
    own = torch.cat([tolerance.log_softmax(p.logits) for p in plain])
    assert_within(total, 1.0, (expected.exp() * own).sum(-1))
    assert_within(payload["logprobs"], top.values, errors.gather(-1, top.indices))
    rest = expected.scatter(-1, top.indices, -torch.inf).logsumexp(-1)
    # What transformers adds up by itself is for vLLM the rest of 1.
    error = errors.scatter(-1, top.indices, 0).amax(-1) + divergences.rest_error(expected, 8, 16)
    assert_within(payload["tail_logprobs"], rest, error)
    for wrong in (7, 9):
        ids = expected.topk(wrong).indices
        assert_noticed(expected.scatter(-1, ids, -torch.inf).logsumexp(-1), rest, error)


@pytest.mark.parametrize("kind", ["none", "sampled"])
def test_the_light_payloads_carry_log_probs_only(either: TeacherInProcess, kind: str) -> None:
    (scored,) = score(either.target, token_request(tiny_vlm(), "g"), payload=kind)
    assert scored.payload.kind == kind
    assert scored.payload.tensors == {}
    assert len(scored.teacher_logprobs) == 2


@pytest.mark.slow
def test_what_vllm_can_not_send_is_not_offered_and_refused_by_name(on_vllm: TeacherInProcess) -> None:
    assert on_vllm.description.payloads == ("none", "top_k", "sampled")
    request = token_request(tiny_vlm(), "g", pictures=[drawing(1)])
    for payload in ("hidden", "hidden_int8", "hidden_pair"):
        with pytest.raises(Mismatch, match=f"can't send payload {payload}; it has none, top_k, sampled"):
            score(on_vllm.target, request, payload=payload)
    with SyncTeacherClient(on_vllm.target) as client, pytest.raises(Mismatch, match="can't send its head"):
        client.head()


def test_messages_and_texts_are_the_same_as_their_tokens(either: TeacherInProcess) -> None:
    vlm, picture = tiny_vlm(), drawing(5)
    texts = ("The sides are 3, 4 and 5.", "It is 12.")
    tokens = token_request(vlm, "tokens", pictures=[picture], text=QUESTION, responses=texts)
    image = encoded(picture)
    ad_hoc = ScoreRequest(group_id="texts", responses=texts, images=(image,), messages=question(QUESTION, [image]))
    from_tokens, from_texts = score(either.target, tokens, ad_hoc, with_token_texts=True, payload="none")
    for k, text in enumerate(texts):
        assert from_texts.response_ids is not None
        assert np.array_equal(from_texts.response_ids[k], tokens.responses[k])
        plain = Plain([picture], np.asarray(tokens.responses[k]))
        assert_within(from_texts.teacher_logprobs[k], from_tokens.teacher_logprobs[k], plain.error)
        assert from_texts.token_texts is not None
        assert "".join(from_texts.token_texts[k]) == text + vlm.tokenizer.eos_token


def test_a_part_of_a_character_shows_as_the_replacement_character(teacher: TeacherInProcess) -> None:
    # The tiny tokenizer has no Chinese: 三 falls into its three bytes.
    (scored,) = score(teacher.target, token_request(tiny_vlm(), "g", responses=["三"]), with_token_texts=True)
    assert scored.token_texts == (("\ufffd", "\ufffd", "\ufffd", "<|im_end|>"),)


def test_a_bfloat16_teacher_sends_bfloat16_hidden_states_and_float32_log_probs() -> None:
    vlm = Vlm.load(model_folder("teacher"), dtype="bfloat16", device_map="cpu")
    with teacher_in_process(vlm) as teacher, SyncTeacherClient(teacher.target) as client:
        (scored,) = client.score([token_request(vlm, "g", pictures=[drawing(1)])])
        head = to_torch(client.head())
    assert isinstance(scored, GroupScore)
    assert teacher.description.dtype == "bfloat16"
    assert torch.equal(head, vlm.head)
    hidden = decode(scored.payload)["hidden"]
    assert hidden.dtype == torch.bfloat16
    assert scored.teacher_logprobs[0].dtype == np.float32
    ids = torch.from_numpy(np.concatenate(token_request(vlm, "g").responses)).long()  # type: ignore[arg-type]
    # A sum of D products of bfloat16 numbers, rounded to bfloat16 once on each side.
    logits = (hidden @ head.T).float()
    of_logits = 2 * (tolerance.gamma(1, torch.bfloat16) * logits.abs() + tolerance.product(hidden, head))
    error = tolerance.log_softmax(logits, of_logits).gather(-1, ids[:, None])
    rebuilt = logits.log_softmax(-1).gather(-1, ids[:, None])
    assert_within(np.concatenate(scored.teacher_logprobs)[:, None], rebuilt, error)
