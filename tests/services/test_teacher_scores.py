"""The teacher's numbers over gRPC against plain transformers forwards, one rollout at a time, in float64.

Where the payload allows, of `either` backend: transformers within 1e-4 nats, vLLM, whose kernels are others, 1e-3.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import PIL.Image
import pytest
import torch

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
from vaopd.client import SyncTeacherClient
from vaopd.config import load_config
from vaopd.degradation import pixelate
from vaopd.errors import Mismatch
from vaopd.payloads import decode, to_torch
from vaopd.types import Degradation, GroupScore, ScoreRequest
from vaopd.vlm.model import Vlm
from vaopd.vlm.prompts import chat

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


@pytest.fixture
def atol(either: TeacherInProcess) -> float:
    return 1e-4 if "hidden" in either.description.payloads else 1e-3


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


def plain_logprobs(pictures: list[PIL.Image.Image], response_ids: np.ndarray) -> np.ndarray:
    logprobs = plain_logits(pictures, response_ids).log_softmax(-1)
    return logprobs.gather(-1, torch.from_numpy(response_ids.astype(np.int64))[:, None]).squeeze(-1).numpy()


@pytest.mark.parametrize("sizes", [[(96, 96)], [(128, 64), (96, 96)], []], ids=["one image", "two images", "no image"])
def test_both_views_equal_plain_forwards(either: TeacherInProcess, atol: float, sizes: list[tuple[int, int]]) -> None:
    pictures = [drawing(seed, size) for seed, size in enumerate(sizes)]
    request = token_request(tiny_vlm(), "g", pictures=pictures, text=QUESTION)
    (scored,) = score(either.target, request, payload="sampled")
    for k, ids in enumerate(request.responses):
        assert isinstance(ids, np.ndarray)
        original = plain_logprobs(pictures, ids)
        degraded = plain_logprobs([pixelate(picture, 0.1) for picture in pictures], ids)
        np.testing.assert_allclose(scored.teacher_logprobs[k], original, atol=atol)
        np.testing.assert_allclose(scored.degraded_logprobs[k], degraded, atol=atol)
        np.testing.assert_allclose(scored.visual_advantage[k], np.maximum(original - degraded, 0), atol=2 * atol)
    assert request.prompt_token_ids is not None
    assert scored.prompt_tokens == len(request.prompt_token_ids)


def test_what_the_image_shows_has_an_advantage_over_the_blurred_view(either: TeacherInProcess) -> None:
    (scored,) = score(either.target, token_request(tiny_vlm(), "g", pictures=[drawing(1)]), payload="none")
    assert max(advantage.max() for advantage in scored.visual_advantage) > 0.001


@pytest.mark.slow
def test_vllm_refuses_a_column_that_it_can_t_compute(on_vllm: TeacherInProcess) -> None:
    with (
        SyncTeacherClient(on_vllm.target, payload="none") as client,
        pytest.raises(Mismatch, match="can't compute column 'teacher_entropy_nats'; on request it computes none"),
    ):
        list(client.score([token_request(tiny_vlm(), "g")], columns=["teacher_entropy_nats"]))


def test_pixelation_with_ratio_1_has_no_advantage_at_all(teacher: TeacherInProcess) -> None:
    request = token_request(tiny_vlm(), "g", pictures=[drawing(1)])
    (scored,) = score(teacher.target, request, degradation=Degradation(strength=1.0))
    for k in range(2):
        assert np.array_equal(scored.teacher_logprobs[k], scored.degraded_logprobs[k])
        assert (scored.visual_advantage[k] == 0).all()


@pytest.mark.parametrize("kind", ["blur", "mean_colour", "black", "noise"])
def test_every_other_degradation_is_served_and_repeats_itself(teacher: TeacherInProcess, kind: str) -> None:
    request = token_request(tiny_vlm(), "g", pictures=[drawing(1)])
    degradation = Degradation(kind=kind, strength=0.2)  # type: ignore[arg-type]
    first, second = (score(teacher.target, request, degradation=degradation)[0] for _ in range(2))
    assert not np.array_equal(first.teacher_logprobs[0], first.degraded_logprobs[0])
    assert np.array_equal(first.degraded_logprobs[0], second.degraded_logprobs[0])


def test_one_image_in_many_views_is_never_taken_for_another(either: TeacherInProcess, atol: float) -> None:
    """Token ids are the same in all of them, so a cache that goes by these alone would answer with the first."""
    vlm, picture = tiny_vlm(), drawing(6)
    request = token_request(vlm, "g", pictures=[picture], text=QUESTION, responses=["The sides are 3, 4 and 5."])
    (ids,) = request.responses
    assert isinstance(ids, np.ndarray)
    for ratio in (0.1, 0.5, 0.1, 0.2, 0.5):
        (scored,) = score(either.target, request, payload="none", degradation=Degradation(strength=ratio))
        np.testing.assert_allclose(scored.teacher_logprobs[0], plain_logprobs([picture], ids), atol=atol)
        expected = plain_logprobs([pixelate(picture, ratio)], ids)
        np.testing.assert_allclose(scored.degraded_logprobs[0], expected, atol=atol)


def test_a_score_does_not_depend_on_what_else_is_in_the_batch(either: TeacherInProcess, atol: float) -> None:
    vlm = tiny_vlm()
    alone = token_request(vlm, "a", pictures=[drawing(1)])
    others = [
        token_request(vlm, "b", pictures=[drawing(2, (160, 128)), drawing(3)], responses=["It is 7."] * 5),
        token_request(vlm, "c", text="Say it all again, from the first word on, and say it slowly, please."),
        token_request(vlm, "d", pictures=[drawing(1)], responses=["12"]),
    ]
    (by_itself,) = score(either.target, alone, payload="none")
    among_others = score(either.target, *others[:2], alone, others[2], payload="none")[2]
    for k in range(2):
        np.testing.assert_allclose(among_others.teacher_logprobs[k], by_itself.teacher_logprobs[k], atol=atol / 10)
        np.testing.assert_allclose(among_others.degraded_logprobs[k], by_itself.degraded_logprobs[k], atol=atol / 10)


def test_a_group_that_is_larger_than_a_forward_is_scored_in_several() -> None:
    request = token_request(tiny_vlm(), "g", pictures=[drawing(1)], responses=["It is 12.", "12", "It is 13."])
    with teacher_in_process(tiny_vlm(), batch_tokens=50) as one_row_at_a_time:
        (small,) = score(one_row_at_a_time.target, request)
    with teacher_in_process(tiny_vlm()) as all_rows_at_once:
        (large,) = score(all_rows_at_once.target, request)
    for k in range(3):
        np.testing.assert_allclose(small.degraded_logprobs[k], large.degraded_logprobs[k], atol=1e-5)
    np.testing.assert_allclose(decode(small.payload)["hidden"], decode(large.payload)["hidden"], atol=1e-4)


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
    request = token_request(tiny_vlm(), "g", pictures=[picture])
    (scored,) = score(teacher.target, request)
    with SyncTeacherClient(teacher.target) as client:
        logits = decode(scored.payload)["hidden"] @ to_torch(client.head()).T
    expected = torch.cat([plain_logits([picture], ids) for ids in request.responses])  # type: ignore[arg-type]
    torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=0)


def test_top_k_and_the_tail_are_a_distribution(either: TeacherInProcess, atol: float) -> None:
    picture = drawing(4)
    request = token_request(tiny_vlm(), "g", pictures=[picture])
    (scored,) = score(either.target, request, payload="top_k", top_k=8)
    payload = decode(scored.payload)
    assert payload["token_ids"].dtype == torch.int32
    total = payload["logprobs"].double().exp().sum(-1) + payload["tail_logprobs"].double().exp()
    # float32 log-probs from logits of about 20 are exact to about 20 · 2^-24 = 1e-6 each.
    torch.testing.assert_close(total, torch.ones_like(total), atol=atol / 10, rtol=0)
    expected = torch.cat([plain_logits([picture], ids) for ids in request.responses]).log_softmax(-1)  # type: ignore[arg-type]
    torch.testing.assert_close(payload["logprobs"].double(), expected.topk(8).values, atol=atol, rtol=0)
    rest = expected.scatter(-1, expected.topk(8).indices, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(payload["tail_logprobs"].double(), rest, atol=10 * atol, rtol=0)


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
    for payload in ("hidden", "hidden_int8"):
        with pytest.raises(Mismatch, match=f"can't send payload {payload}; it has none, top_k, sampled"):
            score(on_vllm.target, request, payload=payload)
    with SyncTeacherClient(on_vllm.target) as client, pytest.raises(Mismatch, match="can't send its head"):
        client.head()


def test_messages_and_texts_are_the_same_as_their_tokens(either: TeacherInProcess, atol: float) -> None:
    vlm, picture = tiny_vlm(), drawing(5)
    texts = ("The sides are 3, 4 and 5.", "It is 12.")
    tokens = token_request(vlm, "tokens", pictures=[picture], text=QUESTION, responses=texts)
    image = encoded(picture)
    ad_hoc = ScoreRequest(group_id="texts", responses=texts, images=(image,), messages=question(QUESTION, [image]))
    from_tokens, from_texts = score(either.target, tokens, ad_hoc, with_token_texts=True, payload="none")
    for k, text in enumerate(texts):
        assert from_texts.response_ids is not None
        assert np.array_equal(from_texts.response_ids[k], tokens.responses[k])
        np.testing.assert_allclose(from_texts.teacher_logprobs[k], from_tokens.teacher_logprobs[k], atol=atol / 10)
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
    rebuilt = (hidden @ head.T).float().log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1).numpy()
    np.testing.assert_allclose(np.concatenate(scored.teacher_logprobs), rebuilt, atol=1e-4)
