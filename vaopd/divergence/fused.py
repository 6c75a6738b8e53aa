"""Computes divergences from hidden states and LM heads, in chunks of tokens: no (tokens, vocabulary) matrix beyond one.

`fused_loss` is for training: the weights are known beforehand, so each chunk's logits give the divergence and its
gradient at once (in the manner of a fused linear cross-entropy), and the backward pass only scales what is there.
`fused_divergence` gives a differentiable (M,) and has to compute the logits again in its backward pass.

Matrix products run in autocast's precision, or else the inputs'; everything after them in float32 (float64 for float64
inputs), sums over chunks included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from vaopd.divergence.head import choose_product_dtype
from vaopd.divergence.measures import widen
from vaopd.divergence.targets import FullTarget, LogProbTarget, Target
from vaopd.errors import InvalidInput

CHUNK_LOGITS = 2**25
"""Logits of a chunk unless `chunk_tokens` is given: 128 MiB in float32, of which a chunk needs up to three."""


def fused_loss(
    student_hidden: Tensor, student_head: Tensor, target: Target, weights: Tensor, *, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Returns Σ weights·divergence, in one pass over the heads: (M, D_S), (V, D_S), target of M, (M,) -> (), (M,).

    Gradients flow from the loss into the student's hidden states and head; the (M,) divergences and the weights are
    detached. The gradients are computed with the loss and wait for the backward pass: V·D_S numbers for the head.
    """
    job = _Job.plan(student_hidden, student_head, target, chunk_tokens)
    if weights.shape != (len(student_hidden),):
        raise InvalidInput(f"weights have shape {tuple(weights.shape)}, expected one per token, ({len(target)},)")
    weights = weights.detach().to(student_hidden.device, job.wide)
    loss, divergence = _Loss.apply(student_hidden, student_head, weights, job, torch.is_grad_enabled())
    return loss, divergence


def fused_divergence(
    student_hidden: Tensor, student_head: Tensor, target: Target, *, chunk_tokens: int | None = None
) -> Tensor:
    """Returns the divergence of each token, differentiable: (M, D_S), (V, D_S), target of M tokens -> (M,)."""
    job = _Job.plan(student_hidden, student_head, target, chunk_tokens)
    result: Tensor = _Divergence.apply(student_hidden, student_head, job)
    return result


def fused_reverse_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Computes `reverse_kl` from hidden states (M, D_S), (M, D_T) and LM heads (V, D_S), (V, D_T): -> (M,).

    Heads may be padded to different widths when `vocab_size` is given. Gradients flow into the student only.
    """
    target = FullTarget(hidden=teacher_hidden, head=teacher_head[:vocab_size])
    return fused_divergence(student_hidden, student_head[:vocab_size], target, chunk_tokens=chunk_tokens)


def token_logprobs(hidden: Tensor, head: Tensor, token_ids: Tensor, *, chunk_tokens: int | None = None) -> Tensor:
    """Returns log p(y_t) of the given ids (M,), from hidden states (M, D) and a head (V, D): -> (M,) float32."""
    if torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad):
        return fused_divergence(hidden, head, LogProbTarget(token_ids=token_ids), chunk_tokens=chunk_tokens)
    length = _choose_chunk(len(hidden), len(head), chunk_tokens)
    chunks = zip(hidden.split(length), token_ids.long().split(length), strict=True)
    return torch.cat([_compute_token_logprobs(rows, head, ids[:, None]) for rows, ids in chunks])


def _compute_token_logprobs(hidden: Tensor, head: Tensor, ids: Tensor) -> Tensor:
    """Computes one chunk, ids (m, 1) -> (m,). A function, so that its logits are gone before the next ones are made."""
    logits = widen(hidden @ head.T)
    chosen, largest = logits.gather(-1, ids), logits.amax(-1, keepdim=True)
    return (chosen - largest - logits.sub_(largest).exp_().sum(-1, keepdim=True).log())[:, 0]


@torch.no_grad()
def top_k_logprobs(
    hidden: Tensor, head: Tensor, k: int, *, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the k likeliest ids (M, k) int32, their log-probs (M, k), descending, and the tail's log-mass (M,)."""
    if not 1 <= k <= len(head):
        raise InvalidInput(f"top_k = {k} is outside [1, {len(head)}], the vocabulary")
    chunks = hidden.split(_choose_chunk(len(hidden), len(head), chunk_tokens))
    ids, values, tails = zip(*(_compute_top_k_logprobs(rows, head, k) for rows in chunks), strict=True)
    return torch.cat(ids), torch.cat(values), torch.cat(tails)


def _compute_top_k_logprobs(hidden: Tensor, head: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Computes one chunk. The tail by its own log-sum-exp, in place: 1 minus the top k's mass would be rounding."""
    logits = widen(hidden @ head.T)
    values, ids = logits.topk(k, dim=-1)
    # A finite floor for k = V, where the tail is empty: its log-mass is −inf, not NaN.
    largest = logits.scatter_(-1, ids, -torch.inf).amax(-1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)
    tail = largest[:, 0] + logits.sub_(largest).exp_().sum(-1).log()
    total = torch.logaddexp(values.logsumexp(-1), tail)
    return ids.int(), values - total[:, None], tail - total


# ----------------------------------------------------------------------------------------------------- chunk by chunk


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Job:
    """A pass over the tokens: `dtype` is of the matrix products, `wide` of everything after them."""

    target: Target
    chunk_tokens: int
    dtype: torch.dtype
    wide: torch.dtype

    @classmethod
    def plan(cls, hidden: Tensor, head: Tensor, target: Target, chunk_tokens: int | None) -> _Job:
        if len(target) != len(hidden):
            raise InvalidInput(f"the student has {len(hidden)} response tokens, the teacher's payload {len(target)}")
        if isinstance(head, DTensor):
            raise InvalidInput("the student's head is spread over ranks; call this inside the module that FSDP wraps")
        target.check(len(head))
        kind = hidden.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        dtype = choose_product_dtype(hidden, head, autocast)
        return cls(
            target=target.in_precision(autocast),
            chunk_tokens=_choose_chunk(len(hidden), len(head), chunk_tokens),
            dtype=dtype,
            wide=torch.promote_types(dtype, torch.float32),
        )

    def run(
        self, hidden: Tensor, head: Tensor, weights: Tensor | None, wanted: tuple[bool, bool] = (False, False)
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns divergences (M,), and the gradients of Σ weights·divergence by hidden and head, where wanted."""
        values = hidden.new_empty(len(hidden), dtype=self.wide)
        by_hidden = torch.empty_like(hidden, dtype=self.wide) if wanted[0] else None
        by_head = torch.zeros_like(head, dtype=self.wide) if wanted[1] else None
        # No autocast inside: everything has its precision, and autocast would only convert the heads once per chunk.
        with torch.autocast(hidden.device.type, enabled=False):
            head = head.to(self.dtype)
            for start in range(0, len(hidden), self.chunk_tokens):
                self._chunk(hidden, head, weights, slice(start, start + self.chunk_tokens), values, by_hidden, by_head)
        return values, by_hidden, by_head

    def _chunk(
        self,
        hidden: Tensor,
        head: Tensor,
        weights: Tensor | None,
        rows: slice,
        values: Tensor,
        by_hidden: Tensor | None,
        by_head: Tensor | None,
    ) -> None:
        """Computes one chunk. A function, so that its matrices are gone before the next one's are made."""
        part = hidden[rows].to(self.dtype)
        log_p = torch.log_softmax(part @ head.T, dim=-1, dtype=self.wide)
        values[rows], slope = self.target.compare(log_p, rows, weights is not None)
        if weights is None or slope is None:
            return
        slope, factors = slope.to(self.dtype), weights[rows, None]
        if by_hidden is not None:
            torch.mul(slope @ head, factors, out=by_hidden[rows])
        if by_head is not None:
            scaled = (part * factors).to(self.dtype)  # the narrow side: m·D products instead of m·V
            if self.dtype == self.wide:
                by_head.addmm_(slope.T, scaled)
            else:
                by_head += slope.T @ scaled


class _Loss(torch.autograd.Function):
    """Computes the gradients with the loss; the backward pass multiplies them by the loss's own gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, weights: Tensor, job: _Job, differentiate: bool
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[:2] if differentiate else (False, False)
        values, by_hidden, by_head = job.run(hidden, head, weights if any(wanted) else None, wanted)
        ctx.save_for_backward(by_hidden, by_head)
        ctx.dtypes = (hidden.dtype, head.dtype)
        ctx.mark_non_differentiable(values)
        return (weights * values).sum(), values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # Not in place: the graph may be kept and walked again.
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        by_hidden, by_head = (None if g is None else (g * gradient).to(dtype) for g, dtype in pairs)
        return by_hidden, by_head, None, None, None


class _Divergence(torch.autograd.Function):
    """Keeps only its inputs; the backward pass computes each chunk again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, job: _Job) -> Tensor:
        ctx.save_for_backward(hidden, head)
        ctx.job = job
        return job.run(hidden, head, None)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        _, *found = ctx.job.run(*inputs, gradients, ctx.needs_input_grad[:2])
        by_hidden, by_head = (None if g is None else g.to(x.dtype) for g, x in zip(found, inputs, strict=True))
        return by_hidden, by_head, None


def _choose_chunk(tokens: int, vocabulary: int, chunk_tokens: int | None = None) -> int:
    """Returns the tokens of a chunk, at most `chunk_tokens`, so that all chunks are about equally long."""
    most = max(1, CHUNK_LOGITS // max(1, vocabulary)) if chunk_tokens is None else chunk_tokens
    chunks = max(1, -(-tokens // most))
    return max(1, -(-tokens // chunks))
