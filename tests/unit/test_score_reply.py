"""The scoring API's reply, written from a score that is known by hand."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest

from vaopd.errors import NumericalError
from vaopd.http_types import DegradationModel
from vaopd.scoring.reply import dump_reply, make_reply
from vaopd.types import GroupScore, Payload, TeacherDescription, TeacherLimits, Tensor

TEACHER = TeacherDescription(
    model="t",
    revision="r",
    tokenizer_fingerprint="f",
    vocab_size=50,
    hidden_size=8,
    dtype="float32",
    limits=TeacherLimits(),
    payloads=("top_k",),
    degradations=("pixelate",),
)
VIEW = DegradationModel()


def score_of(*, rollouts: int, tokens: int, k: int, logprob: float = -0.25) -> GroupScore:
    """Every token is id 7, second among ids 6, 7, 8 …; its log-prob is `logprob` with the image and 1 less without."""

    def rows(value: float) -> tuple[np.ndarray, ...]:
        return (np.full(tokens, value, np.float32),) * rollouts

    places = rollouts * tokens
    tensors = {
        "token_ids": np.tile(np.arange(6, 6 + k, dtype=np.int32), (places, 1)),
        "logprobs": np.tile(-np.arange(k, dtype=np.float32), (places, 1)),
    }
    return GroupScore(
        group_id="g",
        teacher_logprobs=rows(logprob),
        degraded_logprobs=rows(logprob - 1),
        visual_advantage=rows(1),
        payload=Payload(kind="top_k", tensors={name: Tensor.from_numpy(each) for name, each in tensors.items()}),
        prompt_tokens=3,
        columns={"view_divergence_nats": rows(0.5)},
        response_ids=(np.full(tokens, 7, np.int32),) * rollouts,
        token_texts=(("seven",) * tokens,) * rollouts,
        payload_texts={6: "six", 7: "seven"},
    )


def test_a_reply_has_the_score_s_values() -> None:
    reply = make_reply(score_of(rollouts=2, tokens=5, k=3), TEACHER, degradation=VIEW, top_k=2)
    first, second = reply.rollouts
    assert first == second
    assert first.model_dump() == {
        "tokens": [{"id": 7, "text": "seven"}] * 5,
        "teacher_logprobs": [-0.25] * 5,
        "degraded_logprobs": [-1.25] * 5,
        "visual_advantage": [1] * 5,
        "high_group": [True] + [False] * 4,  # of equal ones, the first fifth
        "mean_visual_advantage": 1,
        "rollout_weight": 0.5,
        "ranks": [2] * 5,
        "alternatives": [[{"id": 6, "text": "six", "logprob": 0}, {"id": 7, "text": "seven", "logprob": -1}]] * 5,
        "columns": {"view_divergence_nats": [0.5] * 5},
    }
    assert (reply.model, reply.prompt_tokens, reply.share_of_top_20) == ("t", 3, 0.2)


def test_a_reply_is_never_in_memory_as_objects() -> None:
    """At once: its text, as bytes and as str, one place's alternatives, and one rollout's numbers, a tenth of the text.

    As objects, the 16 000 alternatives take more than ten times the text; their fragments stayed in the API for good.
    """
    for rollouts, tokens in ((40, 20), (1, 800)):
        score = score_of(rollouts=rollouts, tokens=tokens, k=20)
        dump_reply(score_of(rollouts=1, tokens=1, k=1), TEACHER, degradation=VIEW, top_k=1)
        tracemalloc.start()
        try:
            text = dump_reply(score, TEACHER, degradation=VIEW, top_k=20)
            assert tracemalloc.get_traced_memory()[1] < 3 * len(text)
        finally:
            tracemalloc.stop()
        assert sum(len(each) for rollout in json.loads(text)["rollouts"] for each in rollout["alternatives"]) == 16_000


def test_a_score_that_json_could_not_carry_is_refused() -> None:
    with pytest.raises(NumericalError, match="scores of response 0 are not all finite numbers"):
        dump_reply(score_of(rollouts=1, tokens=2, k=1, logprob=-np.inf), TEACHER, degradation=VIEW, top_k=0)
