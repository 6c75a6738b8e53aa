"""Computes divergences from hidden states and LM heads, in chunks of tokens: no (tokens, vocabulary) matrix beyond one.

`fused_loss` is for training: the weights are known beforehand, so each chunk's logits give the divergence and its
gradient at once (in the manner of a fused linear cross-entropy), and the backward pass only scales what is there.
`fused_divergence` gives a differentiable (M,) and has to compute the logits again in its backward pass.

Matrix products run in autocast's precision, or else the inputs'; everything after them in float32 (float64 for float64
inputs), sums over chunks included.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from vaopd.divergence.head import choose_product_dtype, count_ids, head_logits, is_padded, pad_head
from vaopd.divergence.products import add_product, multiply
from vaopd.divergence.targets import FullTarget, LogProbTarget, Target
from vaopd.errors import InvalidInput

CHUNK_LOGITS = 2**25
"""Logits of a chunk unless `chunk_tokens` is given: 128 MiB in float32, of which a chunk needs up to three."""


def fused_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    target: Target,
    weights: Tensor,
    *,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns Σ weights·divergence, in one pass over the heads: (M, D_S), (V, D_S), target of M, (M,) -> (), (M,).

    Gradients flow from the loss into the student's hidden states and head; the (M,) divergences and the weights are
    detached. The gradients are computed with the loss and wait for the backward pass: V·D_S numbers for the head.
    vocab_size: V, where the head has rows of padding beyond it; give the padded parameter, not a view of it, because
    a GPU's products are padded anyway and a view's gradient is copied. chunk_tokens: the most tokens whose logits
    exist at once; None: as many as have `CHUNK_LOGITS` logits.

    Raises InvalidInput where numbers of tokens or vocabularies differ, and for a head that is spread over ranks.
    """
    loss, divergence, _ = fused_loss_and_logprobs(
        student_hidden, student_head, target, weights, None, vocab_size=vocab_size, chunk_tokens=chunk_tokens
    )
    return loss, divergence


def fused_loss_and_logprobs(
    student_hidden: Tensor,
    student_head: Tensor,
    target: Target,
    weights: Tensor,
    token_ids: Tensor | None,
    *,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `fused_loss` and the student's log-probs of the given ids (M,), detached: -> (), (M,), (M,).

    Without ids, the log-probs are empty. Raises as `fused_loss`.
    """
    job = _Job.plan(student_hidden, student_head, target, vocab_size, chunk_tokens)
    for name, given in (("weights", weights), ("token ids", token_ids)):
        if given is not None and given.shape != (len(student_hidden),):
            raise InvalidInput(f"{name} have shape {tuple(given.shape)}, expected one per token, ({len(target)},)")
    weights = weights.detach().to(student_hidden.device, job.wide)
    ids = None if token_ids is None else token_ids.to(student_hidden.device).long()
    loss, divergence, logprobs = _Loss.apply(student_hidden, student_head, weights, ids, job, torch.is_grad_enabled())
    return loss, divergence, logprobs


def fused_divergence(
    student_hidden: Tensor,
    student_head: Tensor,
    target: Target,
    *,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Returns the divergence of each token, differentiable: (M, D_S), (V, D_S), target of M tokens -> (M,).

    vocab_size, chunk_tokens, errors: as in `fused_loss`.
    """
    job = _Job.plan(student_hidden, student_head, target, vocab_size, chunk_tokens)
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

    Heads may be padded to different widths when `vocab_size` is given. Gradients flow into the student only. In nats;
    chunk_tokens, errors: as in `fused_loss`.
    """
    target = FullTarget(hidden=teacher_hidden, head=teacher_head, vocab_size=vocab_size)
    return fused_divergence(student_hidden, student_head, target, vocab_size=vocab_size, chunk_tokens=chunk_tokens)


def token_logprobs(
    hidden: Tensor, head: Tensor, token_ids: Tensor, *, vocab_size: int | None = None, chunk_tokens: int | None = None
) -> Tensor:
    """Returns log p(y_t) of the given ids (M,), from hidden states (M, D) and a head (V, D): -> (M,) float32.

    vocab_size: V, where the head has rows of padding beyond it. Raises InvalidInput for another number of ids, and for
    a V beyond the head.
    """
    if len(token_ids) != len(hidden):
        raise InvalidInput(f"{len(hidden)} tokens have {len(token_ids)} ids; give one per token")
    if torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad):
        target = LogProbTarget(token_ids=token_ids)
        return fused_divergence(hidden, head, target, vocab_size=vocab_size, chunk_tokens=chunk_tokens)
    length = _choose_chunk(len(hidden), len(head), chunk_tokens)
    chunks = zip(hidden.split(length), token_ids.long().split(length), strict=True)
    return torch.cat([_compute_token_logprobs(rows, head, ids[:, None], vocab_size) for rows, ids in chunks])


def _compute_token_logprobs(hidden: Tensor, head: Tensor, ids: Tensor, vocab_size: int | None) -> Tensor:
    """Computes one chunk, ids (m, 1) -> (m,). A function, so that its logits are gone before the next ones are made."""
    logits = head_logits(hidden, head, vocab_size)
    if logits.dtype == torch.float32 and has_kernels(logits.device):
        from vaopd.divergence.kernels import compute_log_sums

        return logits.gather(-1, ids)[:, 0] - compute_log_sums(logits)
    chosen, largest = logits.gather(-1, ids), logits.amax(-1, keepdim=True)
    return (chosen - largest - logits.sub_(largest).exp_().sum(-1, keepdim=True).log())[:, 0]


@torch.no_grad()
def top_k_logprobs(
    hidden: Tensor, head: Tensor, k: int, *, vocab_size: int | None = None, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the k likeliest ids (M, k) int32, their log-probs (M, k), descending, and the tail's log-mass (M,).

    From hidden states (M, D) and a head (V, D). vocab_size: V, where the head has rows of padding beyond it. Raises
    InvalidInput for a k beyond V, and for a V beyond the head.
    """
    if not 1 <= k <= (vocabulary := count_ids(head, vocab_size)):
        raise InvalidInput(f"top_k = {k} is outside [1, {vocabulary}], the vocabulary")
    chunks = hidden.split(_choose_chunk(len(hidden), len(head), chunk_tokens))
    ids, values, tails = zip(*(_compute_top_k_logprobs(rows, head, k, vocab_size) for rows in chunks), strict=True)
    return torch.cat(ids), torch.cat(values), torch.cat(tails)


def _compute_top_k_logprobs(
    hidden: Tensor, head: Tensor, k: int, vocab_size: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes one chunk. The tail by its own log-sum-exp, in place: 1 minus the top k's mass would be rounding."""
    logits = head_logits(hidden, head, vocab_size)
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
    vocabulary: int
    chunk_tokens: int
    dtype: torch.dtype
    wide: torch.dtype

    @classmethod
    def plan(
        cls, hidden: Tensor, head: Tensor, target: Target, vocab_size: int | None, chunk_tokens: int | None
    ) -> _Job:
        if len(target) != len(hidden):
            raise InvalidInput(f"the student has {len(hidden)} response tokens, the teacher's payload {len(target)}")
        if isinstance(head, DTensor):
            raise InvalidInput("the student's head is spread over ranks; call this inside the module that FSDP wraps")
        vocabulary = count_ids(head, vocab_size, of="student's ")
        target.check(vocabulary)
        kind = hidden.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        dtype = choose_product_dtype(hidden, head, autocast)
        return cls(
            target=target.in_precision(autocast),
            vocabulary=vocabulary,
            chunk_tokens=_choose_chunk(len(hidden), vocabulary, chunk_tokens),
            dtype=dtype,
            wide=torch.promote_types(dtype, torch.float32),
        )

    def run(
        self,
        hidden: Tensor,
        head: Tensor,
        weights: Tensor | None,
        wanted: tuple[bool, bool] = (False, False),
        token_ids: Tensor | None = None,
    ) -> _Results:
        """Computes divergences, log-probs of the ids, and the gradients of Σ weights·divergence, where wanted."""
        # No autocast inside: everything has its precision, and autocast would only convert the heads once per chunk.
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            padded = (
                pad_head(head.to(self.dtype)) if is_padded(hidden.device) else head[: self.vocabulary].to(self.dtype)
            )
            found = _Results.allocate(self, hidden, max(len(padded), len(head)), wanted, token_ids)
            if found.by_head is not None:
                found.by_head[len(padded) if len(hidden) else 0 :] = 0  # the first chunk writes the others
            peak = None
            if weights is not None and self.dtype == torch.float16 and len(weights):
                # Weights of 1e-7 are 0 in float16, and a scaler multiplies the loss too late to help.
                peak = weights.abs().amax().clamp_min(torch.finfo(weights.dtype).tiny)
                weights = weights / peak
            for start in range(0, len(hidden), self.chunk_tokens):
                self._chunk(hidden, padded, weights, slice(start, start + self.chunk_tokens), token_ids, found)
            for gradient in (found.by_hidden, found.by_head):
                if gradient is not None and peak is not None:
                    gradient *= peak
        if found.by_head is not None:
            found.by_head = found.by_head[: len(head)]
        return found

    def _chunk(
        self,
        hidden: Tensor,
        head: Tensor,
        weights: Tensor | None,
        rows: slice,
        token_ids: Tensor | None,
        found: _Results,
    ) -> None:
        """Computes one chunk. A function, so that its matrices are gone before the next one's are made."""
        part = hidden[rows].to(self.dtype)
        ids = None if token_ids is None else token_ids[rows, None]
        found.values[rows], slope = self._compare(part, head, rows, ids, weights is not None, found.logprobs[rows])
        if weights is None or slope is None:
            return
        factors = weights[rows, None]
        if found.by_hidden is not None:
            torch.mul(multiply(slope, head, self.wide), factors, out=found.by_hidden[rows])
        if found.by_head is not None:
            scaled = (part * factors).to(self.dtype)  # the narrow side: m·D products instead of m·V
            add_product(found.by_head[: len(head)], slope.T, scaled, first=rows.start == 0)

    def _compare(
        self, part: Tensor, head: Tensor, rows: slice, ids: Tensor | None, differentiate: bool, logprobs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Returns divergence (m,) and its gradient by the logits, as wide as `head`; writes the ids' log-probs."""
        logits = head_logits(part, head, self.vocabulary)
        if (teacher := self._find_kernel_input(rows, logits)) is not None:
            from vaopd.divergence.kernels import compare_logits

            slope = part.new_empty(len(part), len(head)) if differentiate else None
            values, log_sum = compare_logits(logits, teacher, slope=slope)
            if ids is not None:
                torch.sub(logits.gather(-1, ids)[:, 0], log_sum, out=logprobs)
            return values, slope
        log_p = torch.log_softmax(logits, dim=-1, dtype=self.wide)
        del logits
        if ids is not None:
            logprobs.copy_(log_p.gather(-1, ids)[:, 0])
        values, by_logit = self.target.compare(log_p, rows, differentiate)
        if by_logit is None:
            return values, None
        slope = by_logit.to(self.dtype)
        missing = len(head) - self.vocabulary
        return values, F.pad(slope, (0, missing)) if missing else slope

    def _find_kernel_input(self, rows: slice, logits: Tensor) -> Tensor | None:
        """Returns the teacher's logits (m, V) where a kernel computes this divergence; None for the plain formulas."""
        target = self.target
        if not isinstance(target, FullTarget) or target.divergence != "reverse_kl" or self.wide != torch.float32:
            return None
        return target.compute_logits(rows) if has_kernels(logits.device) else None


@dataclass(kw_only=True, slots=True, eq=False)
class _Results:
    """What a pass computes: values (M,), logprobs (M,) or (0,), by_hidden (M, D), by_head, padded like the head."""

    values: Tensor
    logprobs: Tensor
    by_hidden: Tensor | None
    by_head: Tensor | None

    @classmethod
    def allocate(
        cls, job: _Job, hidden: Tensor, head_rows: int, wanted: tuple[bool, bool], token_ids: Tensor | None
    ) -> _Results:
        return cls(
            values=hidden.new_empty(len(hidden), dtype=job.wide),
            logprobs=hidden.new_empty(0 if token_ids is None else len(hidden), dtype=job.wide),
            by_hidden=torch.empty_like(hidden, dtype=job.wide) if wanted[0] else None,
            by_head=hidden.new_empty(head_rows, hidden.shape[1], dtype=job.wide) if wanted[1] else None,
        )


def has_kernels(device: torch.device) -> bool:
    """Whether Triton's kernels run there: on a GPU, with torch's CUDA builds; on a CPU in Triton's interpreter only."""
    wanted = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return wanted and importlib.util.find_spec("triton") is not None


class _Loss(torch.autograd.Function):
    """Computes the gradients with the loss; the backward pass multiplies them by the loss's own gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, weights: Tensor, ids: Tensor | None, job: _Job, differentiate: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted = ctx.needs_input_grad[:2] if differentiate else (False, False)
        found = job.run(hidden, head, weights if any(wanted) else None, wanted, ids)
        ctx.save_for_backward(found.by_hidden, found.by_head)
        ctx.dtypes = (hidden.dtype, head.dtype)
        ctx.mark_non_differentiable(found.values, found.logprobs)
        return (weights * found.values).sum(), found.values, found.logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # Not in place: the graph may be kept and walked again.
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        by_hidden, by_head = (None if g is None else (g * gradient).to(dtype) for g, dtype in pairs)
        return by_hidden, by_head, None, None, None, None


class _Divergence(torch.autograd.Function):
    """Keeps only its inputs; the backward pass computes each chunk again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, job: _Job) -> Tensor:
        ctx.save_for_backward(hidden, head)
        ctx.job = job
        return job.run(hidden, head, None).values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        found = ctx.job.run(*inputs, gradients, ctx.needs_input_grad[:2])
        pairs = zip((found.by_hidden, found.by_head), inputs, strict=True)
        by_hidden, by_head = (None if g is None else g.to(x.dtype) for g, x in pairs)
        return by_hidden, by_head, None


def _choose_chunk(tokens: int, vocabulary: int, chunk_tokens: int | None = None) -> int:
    """Returns the tokens of a chunk, at most `chunk_tokens`, so that all chunks are about equally long."""
    if chunk_tokens is not None and chunk_tokens < 1:
        raise InvalidInput(f"chunk_tokens = {chunk_tokens} must be at least 1")
    most = max(1, CHUNK_LOGITS // max(1, vocabulary)) if chunk_tokens is None else chunk_tokens
    chunks = max(1, -(-tokens // most))
    return max(1, -(-tokens // chunks))
