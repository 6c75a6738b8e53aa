"""Per-token divergences between student and teacher over the logical vocabulary, at temperature 1, in float32.

`reverse_kl` is the plain reference. The fused functions apply the LM heads to hidden states in chunks of tokens and
recompute each chunk in the backward pass: a (tokens, vocabulary) matrix never exists beyond one chunk, either way.
Shapes: M response tokens, V logical vocabulary, D_S and D_T hidden sizes. Results are (M,) in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vaopd.errors import InvalidInput


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, *, vocab_size: int | None = None) -> Tensor:
    """KL_t = KL(p_S ‖ p_T) over the first `vocab_size` ids (default: all): (..., V) -> (...)."""
    student = torch.log_softmax(student_logits[..., :vocab_size].float(), dim=-1)
    teacher = torch.log_softmax(teacher_logits[..., :vocab_size].float(), dim=-1)
    return (student.exp() * (student - teacher)).sum(-1)


def fused_reverse_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    vocab_size: int | None = None,
    chunk_tokens: int = 1024,
) -> Tensor:
    """`reverse_kl` from hidden states (M, D_S), (M, D_T) and LM heads (V, D_S), (V, D_T), in chunks: -> (M,).

    Heads may be padded to different widths when `vocab_size` is given. Gradients flow into the student only.
    """
    teacher_hidden, teacher_head = teacher_hidden.detach(), teacher_head.detach()
    if vocab_size is None and len(student_head) != len(teacher_head):
        raise InvalidInput(
            f"student's head has {len(student_head)} rows, teacher's {len(teacher_head)}; give the shared vocab_size"
        )

    def chunk(student: Tensor, head: Tensor, teacher: Tensor) -> Tensor:
        return reverse_kl(student @ head.T, teacher @ teacher_head[:vocab_size].T)

    return _in_chunks(chunk, student_hidden, student_head[:vocab_size], (teacher_hidden,), chunk_tokens)


def fused_top_k_reverse_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    token_ids: Tensor,
    logprobs: Tensor,
    tail_logprobs: Tensor,
    *,
    chunk_tokens: int = 1024,
) -> Tensor:
    """Reverse KL on the teacher's k ids (M, k) and one bucket for the rest, its log-mass (M,): -> (M,).

    Merging ids into a bucket never raises a KL (log-sum inequality), so this is never above `fused_reverse_kl`.
    """

    def chunk(student: Tensor, head: Tensor, ids: Tensor, teacher: Tensor, teacher_tail: Tensor) -> Tensor:
        log_p = torch.log_softmax((student @ head.T).float(), dim=-1)
        top = log_p.gather(-1, ids)
        tail = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
        kl = (top.exp() * (top - teacher)).sum(-1)
        # With k = V both tails are empty (−inf): they add nothing, and −inf − −inf must not become NaN.
        empty = tail.isneginf()
        gap = torch.where(empty, 0.0, tail) - torch.where(empty, 0.0, teacher_tail)
        return kl + torch.where(empty, 0.0, tail.exp()) * gap

    per_token = (token_ids.long(), logprobs.float(), tail_logprobs.float())
    return _in_chunks(chunk, student_hidden, student_head, per_token, chunk_tokens)


def fused_sampled_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    response_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    estimator: str = "k3",
    chunk_tokens: int = 1024,
) -> Tensor:
    """Single-sample estimators from the sampled token's teacher log-prob (M,): -> (M,).

    k1 = log p_S − log p_T; its gradient is the score-function estimate (log p_S − log p_T)·∇log p_S of the reverse
    KL's, since the plain derivative has mean zero. k3 = r − 1 − log r with r = p_T / p_S, differentiated as it stands.
    Both are unbiased in value only for rollouts sampled at temperature 1.
    """
    student = token_logprobs(student_hidden, student_head, response_ids, chunk_tokens=chunk_tokens)
    log_ratio = student - teacher_logprobs.detach().float()
    if estimator == "k1":
        return log_ratio.detach() * (1 + student - student.detach())
    if estimator == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise InvalidInput(f"estimator {estimator!r} is unknown; use k1 or k3")


def token_logprobs(hidden: Tensor, head: Tensor, token_ids: Tensor, *, chunk_tokens: int = 1024) -> Tensor:
    """log p(y_t) of the given ids (M,) from hidden states (M, D) and a head (V, D), float32: -> (M,)."""

    def chunk(hidden: Tensor, head: Tensor, ids: Tensor) -> Tensor:
        logits = (hidden @ head.T).float()
        return logits.gather(-1, ids[:, None]).squeeze(-1) - logits.logsumexp(-1)

    return _in_chunks(chunk, hidden, head, (token_ids.long(),), chunk_tokens)


@torch.no_grad()
def top_k_logprobs(hidden: Tensor, head: Tensor, k: int, *, chunk_tokens: int = 1024) -> tuple[Tensor, Tensor, Tensor]:
    """The k likeliest ids: (M, D), (V, D) -> ids (M, k) int32, log-probs (M, k) descending, tail log-mass (M,)."""
    if not 1 <= k <= len(head):
        raise InvalidInput(f"top_k = {k} is outside [1, {len(head)}], the vocabulary")
    parts = []
    for rows in hidden.split(chunk_tokens):
        log_p = torch.log_softmax((rows @ head.T).float(), dim=-1)
        top = log_p.topk(k, dim=-1)
        tail = log_p.scatter(-1, top.indices, -torch.inf).logsumexp(-1)
        parts.append((top.indices.int(), top.values, tail))
    ids, values, tails = (torch.cat(column) for column in zip(*parts, strict=True))
    return ids, values, tails


def _in_chunks(
    function: Callable[..., Tensor], hidden: Tensor, head: Tensor, per_token: Sequence[Tensor], chunk_tokens: int
) -> Tensor:
    """function(hidden, head, *per_token) over slices of tokens, whose intermediates live only meanwhile."""
    columns = zip(hidden.split(chunk_tokens), *(column.split(chunk_tokens) for column in per_token), strict=True)
    return torch.cat(
        [
            checkpoint(function, rows, head, *others, use_reentrant=False, preserve_rng_state=False)
            for rows, *others in columns
        ]
    )
