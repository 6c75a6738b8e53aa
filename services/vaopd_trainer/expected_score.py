"""Groups tokens by VA as it is expected of the student's own distribution (`objective.token_score = "expected"`).

In: the student's hidden states of a forward, and both views' of the teacher (payload hidden_pair). Out: each token's
score and weight. It comes before the fused divergence, in a pass of its own over the heads: a token's weight depends on
the scores of its whole rollout, and the divergence's gradient by the head sums over tokens with their weights. Without
the weights it could be kept only as large as (M, V).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vaopd import objective
from vaopd.config import TokenGroupsOnly, VaOpd
from vaopd.divergence import FullTarget


@torch.no_grad()
def score_tokens(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher: FullTarget,
    degraded_hidden: Tensor,
    *,
    vocab_size: int,
    chunk_tokens: int,
) -> Tensor:
    """Returns `objective.expected_advantage`: (M, D_S), (V, D_S), target of M, (M, D_T) -> (M,), in nats. Detached.

    Works on half of the divergence's chunk at a time, since five matrices of that size take less memory than the three
    of the divergence. The products run in autocast's precision, or else the inputs'.
    """
    kind = student_hidden.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    student = FullTarget(hidden=student_hidden, head=student_head, vocab_size=vocab_size).in_precision(autocast)
    original = teacher.in_precision(autocast)
    degraded = replace(original, hidden=degraded_hidden.to(original.hidden.dtype))
    step = max(1, chunk_tokens // 2)
    chunks = [slice(start, start + step) for start in range(0, len(student), step)]
    return torch.cat([_score_chunk(student, original, degraded, rows) for rows in chunks])


def _score_chunk(student: FullTarget, original: FullTarget, degraded: FullTarget, rows: slice) -> Tensor:
    """Computes one chunk. A function, so that its matrices are gone before the next one's are made."""
    return objective.expected_advantage(
        *(torch.log_softmax(side.compute_logits(rows), -1) for side in (student, original, degraded))
    )


def weigh_tokens(
    scores: Tensor, lengths: Sequence[int], rollout_weights: Tensor, grouping: VaOpd | TokenGroupsOnly
) -> Tensor:
    """Weights the tokens of N rollouts by their scores (M,), flat over rollouts, and rollout weights (N,): -> (M,).

    The weight of a token whose score is not finite is NaN, so that the step is skipped.
    """
    scores_NT, mask_NT = objective.pad_rows(scores.split(list(lengths)))
    weights_NT = objective.token_weights(
        scores_NT,
        mask_NT,
        rollout_weights.to(scores.device),
        high_fraction=grouping.high_fraction,
        high_weight=grouping.high_weight,
    )
    return torch.where(scores.isfinite(), weights_NT[mask_NT], torch.nan)
