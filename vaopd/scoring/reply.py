"""Turns the teacher's answer into the API's reply, which `vaopd score --json` prints too. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vaopd.errors import NumericalError, VaopdError
from vaopd.http_types import Alternative, DegradationModel, RolloutScore, ScoreReply, Token, one_by_one
from vaopd.scoring.weights import HIGH_FRACTION, high_group, rollout_weights, va_share_of_top
from vaopd.types import GroupScore, TeacherDescription


def make_reply(
    score: GroupScore, description: TeacherDescription, *, degradation: DegradationModel, top_k: int
) -> ScoreReply:
    """Returns the reply of the group's score. Arguments and errors are those of `dump_reply`."""
    return ScoreReply.model_validate_json(dump_reply(score, description, degradation=degradation, top_k=top_k))


def dump_reply(score: GroupScore, description: TeacherDescription, *, degradation: DegradationModel, top_k: int) -> str:
    """Returns the JSON of the reply, which is never in memory as a whole.

    top_k: the number of alternatives to name; above 0, the score needs a top_k payload of at least as many.

    Raises NumericalError for a score that is not finite, which JSON could not carry.
    """
    if score.response_ids is None or score.token_texts is None:
        raise VaopdError("the teacher sent no token texts; is it another version of vaopd?")
    for k in range(len(score.response_ids)):
        numbers = (score.teacher_logprobs, score.degraded_logprobs, score.visual_advantage, *score.columns.values())
        if not all(np.isfinite(rows[k]).all() for rows in numbers):
            raise NumericalError(f"the teacher's scores of response {k} are not all finite numbers")
    every_va = np.concatenate(score.visual_advantage)
    reply = ScoreReply.model_construct(
        model=description.model,
        revision=description.revision,
        prompt_tokens=score.prompt_tokens,
        degradation=degradation,
        high_fraction=HIGH_FRACTION,
        share_of_top_10=va_share_of_top(every_va, fraction=0.1),
        share_of_top_20=va_share_of_top(every_va, fraction=0.2),
        rollouts=one_by_one(_list_rollouts(score, top_k)),
    )
    return reply.dump_json()


def _list_rollouts(score: GroupScore, top_k: int) -> Iterator[RolloutScore]:
    assert score.response_ids is not None
    assert score.token_texts is not None
    weights_K = rollout_weights(score.mean_visual_advantage)
    expected = _Expected(score) if top_k else None
    for k, (ids_T, texts_T) in enumerate(zip(score.response_ids, score.token_texts, strict=True)):
        va_T = score.visual_advantage[k]
        yield RolloutScore.model_construct(
            tokens=one_by_one(Token(id=int(token), text=text) for token, text in zip(ids_T, texts_T, strict=True)),
            teacher_logprobs=score.teacher_logprobs[k].tolist(),
            degraded_logprobs=score.degraded_logprobs[k].tolist(),
            visual_advantage=va_T.tolist(),
            # Without any VA, the first tokens would be "high" by their place alone.
            high_group=(high_group(va_T) & bool(va_T.any())).tolist(),
            mean_visual_advantage=float(score.mean_visual_advantage[k]),
            rollout_weight=float(weights_K[k]),
            ranks=expected.list_ranks(k) if expected else None,
            alternatives=one_by_one(expected.list_alternatives(k, top_k)) if expected else None,
            columns={name: rows[k].tolist() for name, rows in score.columns.items()},
        )


class _Expected:
    """Reads the tokens that the teacher found most likely at each place from the top-k payload, (M, k)."""

    def __init__(self, score: GroupScore) -> None:
        assert score.response_ids is not None
        self._ids_Mk = score.payload.tensors["token_ids"].numpy()
        self._logprobs_Mk = score.payload.tensors["logprobs"].numpy()
        self._texts = score.payload_texts
        self._responses = score.response_ids
        self._edges = np.cumsum([0, *(len(ids) for ids in score.response_ids)]).tolist()

    def list_ranks(self, k: int) -> list[int | None]:
        """Returns the rank of each token of response k, from 1; None beyond the payload."""
        found_Tk = self._ids_Mk[self._slice_rows(k)] == self._responses[k][:, None]
        return [int(row.argmax()) + 1 if row.any() else None for row in found_Tk]

    def list_alternatives(self, k: int, count: int) -> Iterator[list[Alternative]]:
        """Yields the `count` most likely tokens at each place of response k, best first."""
        ids_Tk, logprobs_Tk = self._ids_Mk[self._slice_rows(k), :count], self._logprobs_Mk[self._slice_rows(k), :count]
        for ids, logprobs in zip(ids_Tk, logprobs_Tk, strict=True):
            yield [
                Alternative(id=int(token), text=self._texts.get(int(token), ""), logprob=float(logprob))
                for token, logprob in zip(ids, logprobs, strict=True)
            ]

    def _slice_rows(self, k: int) -> slice:
        return slice(self._edges[k], self._edges[k + 1])
