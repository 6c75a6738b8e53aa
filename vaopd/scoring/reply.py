"""Turns the teacher's answer into the API's reply, which `vaopd score --json` prints too. Torch-free."""

from __future__ import annotations

import numpy as np

from vaopd.errors import NumericalError, VaopdError
from vaopd.http_types import Alternative, DegradationModel, RolloutScore, ScoreReply, Token
from vaopd.scoring.weights import HIGH_FRACTION, high_group, rollout_weights, va_share_of_top
from vaopd.types import GroupScore, TeacherDescription


def make_reply(
    score: GroupScore, description: TeacherDescription, *, degradation: DegradationModel, top_k: int
) -> ScoreReply:
    """Returns the reply of the group's score.

    top_k: the number of alternatives to name; above 0, the score needs a top_k payload of at least as many.

    Raises NumericalError for a score that is not finite, which JSON could not carry.
    """
    weights_K = rollout_weights(score.mean_visual_advantage)
    if score.response_ids is None or score.token_texts is None:
        raise VaopdError("the teacher sent no token texts; is it another version of vaopd?")
    expected = _Expected(score) if top_k else None
    rollouts = []
    for k, ids in enumerate(score.response_ids):
        views = (score.teacher_logprobs[k], score.degraded_logprobs[k], score.visual_advantage[k])
        columns = {name: rows[k] for name, rows in score.columns.items()}
        if not all(np.isfinite(values).all() for values in (*views, *columns.values())):
            raise NumericalError(f"the teacher's scores of response {k} are not all finite numbers")
        rollouts.append(
            RolloutScore(
                tokens=[Token(id=int(token), text=text) for token, text in zip(ids, score.token_texts[k], strict=True)],
                teacher_logprobs=views[0].tolist(),
                degraded_logprobs=views[1].tolist(),
                visual_advantage=views[2].tolist(),
                # Without any VA, the first tokens would be "high" by their place alone.
                high_group=(high_group(views[2]) & bool(views[2].any())).tolist(),
                mean_visual_advantage=float(score.mean_visual_advantage[k]),
                rollout_weight=float(weights_K[k]),
                ranks=expected.list_ranks(k) if expected else None,
                alternatives=expected.list_alternatives(k, top_k) if expected else None,
                columns={name: values.tolist() for name, values in columns.items()},
            )
        )
    every_va = np.concatenate(score.visual_advantage)
    return ScoreReply(
        model=description.model,
        revision=description.revision,
        prompt_tokens=score.prompt_tokens,
        degradation=degradation,
        high_fraction=HIGH_FRACTION,
        share_of_top_10=va_share_of_top(every_va, fraction=0.1),
        share_of_top_20=va_share_of_top(every_va, fraction=0.2),
        rollouts=rollouts,
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

    def list_alternatives(self, k: int, count: int) -> list[list[Alternative]]:
        """Returns the `count` most likely tokens at each place of response k, best first."""
        ids_Tk, logprobs_Tk = self._ids_Mk[self._slice_rows(k), :count], self._logprobs_Mk[self._slice_rows(k), :count]
        return [
            [
                Alternative(id=int(token), text=self._texts.get(int(token), ""), logprob=float(logprob))
                for token, logprob in zip(ids, logprobs, strict=True)
            ]
            for ids, logprobs in zip(ids_Tk, logprobs_Tk, strict=True)
        ]

    def _slice_rows(self, k: int) -> slice:
        return slice(self._edges[k], self._edges[k + 1])
