"""The teacher's numbers over gRPC against plain transformers forwards, one rollout at a time, in float64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import PIL.Image
import pytest
import torch

from services.teacher.engine import GroupEngine
from tests.support.models import tiny_vlm
from tests.support.teacher import TeacherInProcess, drawing, question, teacher_in_process, token_request
from vaopd.client import SyncTeacherClient
from vaopd.degradation import pixelate
from vaopd.payloads import decode, to_torch
from vaopd.types import Degradation, GroupScore, ScoreRequest
from vaopd.vlm import chat


@pytest.fixture(scope="module")
def teacher() -> Iterator[TeacherInProcess]:
    with teacher_in_process(tiny_vlm()) as running:
        yield running


def score(target: str, *requests: ScoreRequest, with_token_texts: bool = False, **options: object) -> list[GroupScore]:
    """The scores in the order of the requests."""
    with SyncTeacherClient(target, **options) as client:  # type: ignore[arg-type]
        results = {r.group_id: r for r in client.score(requests, with_token_texts=with_token_texts)}
    scores = [results[request.group_id] for request in requests]
    assert all(isinstance(result, GroupScore) for result in scores), scores
    return scores  # type: ignore[return-value]


def plain_logits(pictures: list[PIL.Image.Image], text: str, response_ids: np.ndarray) -> torch.Tensor:
    """(T, V) float64: the processor's own output, the model's own forward with full logits, one row."""
    vlm = tiny_vlm()
    rendered = vlm.processor.apply_chat_template(
        chat(question(text, [image_of(p) for p in pictures])), tokenize=False, add_generation_prompt=True
    )
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


def image_of(picture: PIL.Image.Image):  # noqa: ANN201
    from tests.support.teacher import encoded

    return encoded(picture)


def plain_logprobs(pictures: list[PIL.Image.Image], text: str, response_ids: np.ndarray) -> np.ndarray:
    logprobs = plain_logits(pictures, text, response_ids).log_softmax(-1)
    return logprobs.gather(-1, torch.from_numpy(response_ids.astype(np.int64))[:, None]).squeeze(-1).numpy()


def test_both_views_equal_plain_forwards(teacher: TeacherInProcess) -> None:
    picture, text = drawing(1), "What is the perimeter?"
    request = token_request(tiny_vlm(), "g", pictures=[picture], text=text)
    (scored,) = score(teacher.target, request)
    for k, ids in enumerate(request.responses):
        original = plain_logprobs([picture], text, ids)
        degraded = plain_logprobs([pixelate(picture, 0.1)], text, ids)
        np.testing.assert_allclose(scored.teacher_logprobs[k], original, atol=1e-4)
        np.testing.assert_allclose(scored.degraded_logprobs[k], degraded, atol=1e-4)
        np.testing.assert_allclose(scored.visual_advantage[k], np.maximum(original - degraded, 0), atol=2e-4)
    assert scored.prompt_tokens == len(request.prompt_token_ids)
    assert max(va.max() for va in scored.visual_advantage) > 0
