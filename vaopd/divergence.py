"""Per-token divergences between student and teacher over the logical vocabulary, at temperature 1.

`reverse_kl` is the plain reference. The fused functions apply the LM heads to hidden states in chunks of tokens: a
(tokens, vocabulary) matrix never exists beyond one chunk. What the student is compared with is a `Target`: the
teacher's whole distribution, its top k with a bucket for the rest, or its log-prob of the sampled token.

`fused_loss` is for training: the weights are known beforehand, so each chunk's logits give the divergence and its
gradient at once (in the manner of a fused linear cross-entropy), and the backward pass only scales what is there.
`fused_divergence` gives a differentiable (M,) and has to compute the logits again in its backward pass.

Shapes: M response tokens, m of them in a chunk, V logical vocabulary, D_S and D_T hidden sizes. Results are (M,), in
nats. Matrix products run in autocast's precision, or else the inputs'; everything after them in float32 (float64 for
float64 inputs), sums over chunks included.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from vaopd.errors import InvalidInput

CHUNK_LOGITS = 2**25
"""Logits of a chunk when nobody says otherwise: 128 MiB in float32, of which a chunk needs up to three."""


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, *, vocab_size: int | None = None) -> Tensor:
    """KL_t = KL(p_S ‖ p_T) over the first `vocab_size` ids (default: all): (..., V) -> (...)."""
    student = torch.log_softmax(_widened(student_logits[..., :vocab_size]), dim=-1)
    teacher = torch.log_softmax(_widened(teacher_logits[..., :vocab_size].detach()), dim=-1)
    return (student.exp() * (student - teacher)).sum(-1)


def fused_loss(
    student_hidden: Tensor, student_head: Tensor, target: Target, weights: Tensor, *, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Σ weights·divergence in one pass over the heads: (M, D_S), (V, D_S), target of M tokens, (M,) -> (), (M,).

    Gradients flow from the loss into the student's hidden states and head; the (M,) divergences and the weights are
    detached. The gradients are computed with the loss and wait for the backward pass: V·D_S numbers for the head.
    """
    job = _Job.of(student_hidden, student_head, target, chunk_tokens)
    if weights.shape != (len(student_hidden),):
        raise InvalidInput(f"weights have shape {tuple(weights.shape)}, expected one per token, ({len(target)},)")
    weights = weights.detach().to(student_hidden.device, job.wide)
    loss, divergence = _Loss.apply(student_hidden, student_head, weights, job, torch.is_grad_enabled())
    return loss, divergence


def fused_divergence(
    student_hidden: Tensor, student_head: Tensor, target: Target, *, chunk_tokens: int | None = None
) -> Tensor:
    """The divergence of each token, differentiable: (M, D_S), (V, D_S), target of M tokens -> (M,)."""
    job = _Job.of(student_hidden, student_head, target, chunk_tokens)
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
    """`reverse_kl` from hidden states (M, D_S), (M, D_T) and LM heads (V, D_S), (V, D_T), in chunks: -> (M,).

    Heads may be padded to different widths when `vocab_size` is given. Gradients flow into the student only.
    """
    target = FullTarget(hidden=teacher_hidden, head=teacher_head[:vocab_size])
    return fused_divergence(student_hidden, student_head[:vocab_size], target, chunk_tokens=chunk_tokens)


def token_logprobs(hidden: Tensor, head: Tensor, token_ids: Tensor, *, chunk_tokens: int | None = None) -> Tensor:
    """log p(y_t) of the given ids (M,) from hidden states (M, D) and a head (V, D), float32: -> (M,)."""
    if torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad):
        return fused_divergence(hidden, head, _LogProb(token_ids=token_ids), chunk_tokens=chunk_tokens)
    length = _chunk_length(len(hidden), len(head), chunk_tokens)
    chunks = zip(hidden.split(length), token_ids.long().split(length), strict=True)
    return torch.cat([_token_logprobs(rows, head, ids[:, None]) for rows, ids in chunks])


def _token_logprobs(hidden: Tensor, head: Tensor, ids: Tensor) -> Tensor:
    """Of one chunk, ids (m, 1) -> (m,). A function of its own, so that its logits are gone before the next ones."""
    logits = _widened(hidden @ head.T)
    chosen, largest = logits.gather(-1, ids), logits.amax(-1, keepdim=True)
    return (chosen - largest - logits.sub_(largest).exp_().sum(-1, keepdim=True).log())[:, 0]


@torch.no_grad()
def top_k_logprobs(
    hidden: Tensor, head: Tensor, k: int, *, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The k likeliest ids: (M, D), (V, D) -> ids (M, k) int32, log-probs (M, k) descending, tail log-mass (M,)."""
    if not 1 <= k <= len(head):
        raise InvalidInput(f"top_k = {k} is outside [1, {len(head)}], the vocabulary")
    chunks = hidden.split(_chunk_length(len(hidden), len(head), chunk_tokens))
    ids, values, tails = zip(*(_top_k_logprobs(rows, head, k) for rows in chunks), strict=True)
    return torch.cat(ids), torch.cat(values), torch.cat(tails)


def _top_k_logprobs(hidden: Tensor, head: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of one chunk. The tail's own log-sum-exp first, in place: what log-probs leave of 1 would be rounding."""
    logits = _widened(hidden @ head.T)
    values, ids = logits.topk(k, dim=-1)
    # A finite floor for k = V, where the tail is empty: its log-mass is −inf, not NaN.
    largest = logits.scatter_(-1, ids, -torch.inf).amax(-1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)
    tail = largest[:, 0] + logits.sub_(largest).exp_().sum(-1).log()
    total = torch.logaddexp(values.logsumexp(-1), tail)
    return ids.int(), values - total[:, None], tail - total


# --------------------------------------------------------------------------------------------------------- the targets


class Target(Protocol):
    """What the student's distribution is compared with at each of M tokens. Nothing in it gets a gradient."""

    def __len__(self) -> int:
        """M."""
        ...

    def check(self, vocabulary: int) -> None:
        """Raises InvalidInput when the target is of another vocabulary."""
        ...

    def in_precision(self, autocast: torch.dtype | None) -> Self:
        """With its matrices in the precision of the products, so that no chunk has to convert them again."""
        ...

    def compare(self, log_p: Tensor, rows: slice, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        """The student's log-probs (m, V) of these tokens -> divergence (m,), and its gradient by the logits (m, V).

        The gradient only to `differentiate`. May overwrite log_p and return it: nothing else here is as large.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FullTarget:
    """The teacher's whole distribution, as hidden states (M, D_T) and LM head (V, D_T): the exact reverse KL."""

    hidden: Tensor
    head: Tensor

    def __len__(self) -> int:
        return len(self.hidden)

    def check(self, vocabulary: int) -> None:
        if vocabulary != len(self.head):
            raise InvalidInput(
                f"student's head has {vocabulary} rows, teacher's {len(self.head)}; give the shared vocab_size"
            )

    def in_precision(self, autocast: torch.dtype | None) -> FullTarget:
        dtype = _product_dtype(self.hidden, self.head, autocast)
        return FullTarget(hidden=self.hidden.detach().to(dtype), head=self.head.detach().to(dtype))

    def compare(self, log_p: Tensor, rows: slice, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        # KL = Σ p·gap with gap = log p − log q, and ∂KL/∂z = p·(gap − KL).
        log_q = torch.log_softmax(self.hidden[rows] @ self.head.T, dim=-1, dtype=log_p.dtype)
        gap = torch.sub(log_p, log_q, out=log_q)
        p = log_p.exp_()
        slope = gap.mul_(p)
        kl = slope.sum(-1)
        return kl, slope.addcmul_(p, kl[:, None], value=-1) if differentiate else None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TopKTarget:
    """The teacher's k ids (M, k), their log-probs (M, k), and the log-mass of all the others (M,): one bucket.

    Merging ids into a bucket never raises a KL (log-sum inequality), so this is never above the exact one.
    """

    token_ids: Tensor
    logprobs: Tensor
    tail_logprobs: Tensor

    def __len__(self) -> int:
        return len(self.token_ids)

    def check(self, vocabulary: int) -> None:
        if (k := self.token_ids.shape[-1]) > vocabulary:
            raise InvalidInput(f"the teacher's top k = {k} exceeds the student's vocabulary of {vocabulary}")

    def in_precision(self, autocast: torch.dtype | None) -> TopKTarget:
        ids = self.token_ids.long()
        return replace(self, token_ids=ids, logprobs=self.logprobs.detach(), tail_logprobs=self.tail_logprobs.detach())

    def compare(self, log_p: Tensor, rows: slice, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        # KL = Σ P_b·gap_b over buckets b, and ∂KL/∂z_j = p_j·(gap of j's bucket − KL).
        ids = self.token_ids[rows]
        top = log_p.gather(-1, ids)
        p_tail = log_p.scatter_(-1, ids, -torch.inf).exp_()
        tail_mass = p_tail.sum(-1)
        # With k = V both tails are empty (−inf): they add nothing, and −inf − −inf must not become NaN.
        empty = tail_mass == 0
        tail_gap = torch.where(empty, 0.0, tail_mass.log() - self.tail_logprobs[rows].to(log_p.dtype))
        top_p, top_gap = top.exp(), top - self.logprobs[rows].to(log_p.dtype)
        kl = (top_p * top_gap).sum(-1) + tail_mass * tail_gap
        if not differentiate:
            return kl, None
        slope = p_tail.mul_((tail_gap - kl)[:, None])
        return kl, slope.scatter_(-1, ids, top_p * (top_gap - kl[:, None]))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SampledTarget:
    """The sampled token (M,) and the teacher's log-prob of it (M,), for single-sample estimators.

    k1 = log p_S − log p_T; its gradient is the score-function estimate (log p_S − log p_T)·∇log p_S of the reverse
    KL's, since the plain derivative has mean zero. k3 = r − 1 − log r with r = p_T / p_S, differentiated as it stands.
    Both are unbiased in value only for rollouts sampled at temperature 1.
    """

    token_ids: Tensor
    logprobs: Tensor
    estimator: Literal["k1", "k3"] = "k3"

    def __post_init__(self) -> None:
        if self.estimator not in ("k1", "k3"):
            raise InvalidInput(f"estimator {self.estimator!r} is unknown; use k1 or k3")

    def __len__(self) -> int:
        return len(self.token_ids)

    def check(self, vocabulary: int) -> None:
        """A token outside the vocabulary is an error of the gather itself."""

    def in_precision(self, autocast: torch.dtype | None) -> SampledTarget:
        return replace(self, token_ids=self.token_ids.long(), logprobs=self.logprobs.detach())

    def compare(self, log_p: Tensor, rows: slice, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        ids = self.token_ids[rows, None]
        log_ratio = log_p.gather(-1, ids)[:, 0] - self.logprobs[rows].to(log_p.dtype)
        r_minus_1 = torch.expm1(-log_ratio)
        values, factors = (log_ratio, log_ratio) if self.estimator == "k1" else (r_minus_1 + log_ratio, -r_minus_1)
        return values, _score_function(log_p, ids, factors) if differentiate else None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _LogProb:
    """No divergence, but computed alike: log p of the given ids (M,)."""

    token_ids: Tensor

    def __len__(self) -> int:
        return len(self.token_ids)

    def check(self, vocabulary: int) -> None:
        """A token outside the vocabulary is an error of the gather itself."""

    def in_precision(self, autocast: torch.dtype | None) -> _LogProb:
        return _LogProb(token_ids=self.token_ids.long())

    def compare(self, log_p: Tensor, rows: slice, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        ids = self.token_ids[rows, None]
        values = log_p.gather(-1, ids)[:, 0]
        return values, _score_function(log_p, ids, torch.ones_like(values)) if differentiate else None


def _score_function(log_p: Tensor, ids: Tensor, factors: Tensor) -> Tensor:
    """factors (m,) times the gradient of log p(id) by the logits, which is onehot(id) − p."""
    return log_p.exp_().mul_(-factors[:, None]).scatter_add_(-1, ids, factors[:, None])


# ----------------------------------------------------------------------------------------------------- chunk by chunk


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Job:
    """How to go through the tokens: `dtype` of the matrix products, `wide` for everything after them."""

    target: Target
    chunk_tokens: int
    dtype: torch.dtype
    wide: torch.dtype

    @classmethod
    def of(cls, hidden: Tensor, head: Tensor, target: Target, chunk_tokens: int | None) -> _Job:
        if len(target) != len(hidden):
            raise InvalidInput(f"the student has {len(hidden)} response tokens, the teacher's payload {len(target)}")
        if isinstance(head, DTensor):
            raise InvalidInput("the student's head is spread over ranks; call this inside the module that FSDP wraps")
        target.check(len(head))
        kind = hidden.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        dtype = _product_dtype(hidden, head, autocast)
        return cls(
            target=target.in_precision(autocast),
            chunk_tokens=_chunk_length(len(hidden), len(head), chunk_tokens),
            dtype=dtype,
            wide=torch.promote_types(dtype, torch.float32),
        )

    def run(
        self, hidden: Tensor, head: Tensor, weights: Tensor | None, wanted: tuple[bool, bool] = (False, False)
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Divergences (M,) and the gradients of Σ weights·divergence by hidden states and head, where wanted."""
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
        """A function of its own, so that one chunk's matrices are gone before the next one's are made."""
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
    """The gradients are there before the backward pass; it multiplies them by the loss's own gradient."""

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
    """Keeps nothing but its inputs; the backward pass computes each chunk again."""

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


def _chunk_length(tokens: int, vocabulary: int, chunk_tokens: int | None = None) -> int:
    """Tokens per chunk, at most `chunk_tokens`, all chunks about equally long."""
    most = max(1, CHUNK_LOGITS // max(1, vocabulary)) if chunk_tokens is None else chunk_tokens
    chunks = max(1, -(-tokens // most))
    return max(1, -(-tokens // chunks))


def _product_dtype(hidden: Tensor, head: Tensor, autocast: torch.dtype | None) -> torch.dtype:
    """As autocast does it, which leaves float64 alone."""
    dtype = torch.promote_types(hidden.dtype, head.dtype)
    return dtype if autocast is None or dtype == torch.float64 else autocast


def _widened(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
