"""Targets: the teacher's side of a divergence, one class for each payload.

Shapes: M response tokens, m of them in a chunk, V logical vocabulary, D_T the teacher's hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol, Self

import torch
from torch import Tensor

from vaopd.divergence.head import choose_product_dtype, count_ids, head_logits, is_padded, pad_head
from vaopd.divergence.measures import DIVERGENCES, Divergence
from vaopd.errors import InvalidInput


class Target(Protocol):
    """The teacher's distribution at each of M tokens. Nothing in it gets a gradient."""

    def __len__(self) -> int:
        """Returns M."""

    def check(self, vocabulary: int) -> None:
        """Raises InvalidInput when the target is of another vocabulary."""

    def in_precision(self, autocast: torch.dtype | None) -> Self:
        """Returns the target with matrices in the precision of the products, converted once for all chunks."""

    def compare(self, log_p: Tensor, rows: slice, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        """Compares the student's log-probs (m, V) of these tokens: -> divergence (m,), gradient by the logits (m, V).

        The gradient is None unless `differentiate`. May overwrite log_p and return it: nothing else here is as large.
        """


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FullTarget:
    """The teacher's whole distribution, as hidden states (M, D_T) and LM head (V, D_T): the exact divergence.

    vocab_size: V, where the head has rows of padding beyond it (`head.pad_head`: what a GPU multiplies fast).
    """

    hidden: Tensor
    head: Tensor
    divergence: str = "reverse_kl"
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        _find(self.divergence)

    def __len__(self) -> int:
        return len(self.hidden)

    def check(self, vocabulary: int) -> None:
        """Raises InvalidInput when the heads' numbers of rows differ."""
        if vocabulary != (rows := count_ids(self.head, self.vocab_size, of="teacher's ")):
            raise InvalidInput(f"student's head has {vocabulary} rows, teacher's {rows}; give the shared vocab_size")

    def in_precision(self, autocast: torch.dtype | None) -> FullTarget:
        """Returns it with hidden states and head in the dtype of their product."""
        dtype = choose_product_dtype(self.hidden, self.head, autocast)
        head, vocabulary = self.head.detach().to(dtype), self.vocab_size or len(self.head)
        return replace(
            self,
            hidden=self.hidden.detach().to(dtype),
            head=pad_head(head) if is_padded(head.device) else head,
            vocab_size=vocabulary,
        )

    def compute_logits(self, rows: slice) -> Tensor:
        """Returns the teacher's logits (m, V) of these tokens, new and in float32 (float64 for float64)."""
        return head_logits(self.hidden[rows], self.head, self.vocab_size)

    def compare(self, log_p: Tensor, rows: slice, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        """Compares over the whole vocabulary."""
        log_q = torch.log_softmax(self.compute_logits(rows), dim=-1, dtype=log_p.dtype)
        return _find(self.divergence)(log_p, log_q, differentiate=differentiate)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TopKTarget:
    """The teacher's k ids (M, k), their log-probs (M, k), and the log-mass of all the others (M,): one bucket.

    Merging ids into a bucket never raises a KL (log-sum inequality), so this is never above the exact one.
    """

    token_ids: Tensor
    logprobs: Tensor
    tail_logprobs: Tensor
    divergence: str = "reverse_kl"

    def __post_init__(self) -> None:
        _find(self.divergence)

    def __len__(self) -> int:
        return len(self.token_ids)

    def check(self, vocabulary: int) -> None:
        """Raises InvalidInput when k exceeds the vocabulary, and for log-probs of another shape than the ids."""
        _check_shape("logprobs", self.logprobs, self.token_ids.shape)
        _check_shape("tail_logprobs", self.tail_logprobs, self.token_ids.shape[:1])
        if (k := self.token_ids.shape[-1]) > vocabulary:
            raise InvalidInput(f"the teacher's top k = {k} exceeds the student's vocabulary of {vocabulary}")

    def in_precision(self, autocast: torch.dtype | None) -> TopKTarget:
        """Returns it with ids as indices; there is no product."""
        ids = self.token_ids.long()
        return replace(self, token_ids=ids, logprobs=self.logprobs.detach(), tail_logprobs=self.tail_logprobs.detach())

    def compare(self, log_p: Tensor, rows: slice, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        """Compares over the k ids and the bucket of the others."""
        ids, log_q = self.token_ids[rows], self.logprobs[rows].to(log_p.dtype)
        log_q_tail = self.tail_logprobs[rows].to(log_p.dtype)
        log_p_top = log_p.gather(-1, ids)
        p_tail = log_p.scatter_(-1, ids, -torch.inf).exp_()
        mass = p_tail.sum(-1)
        # With k = V both tails are empty (−∞): they add nothing, and −∞ − −∞ must not become NaN.
        empty, lowest = mass == 0, torch.finfo(mass.dtype).min / 4
        log_p_tail = torch.where(empty, lowest, mass.log())
        log_q_tail = torch.where(empty, log_q_tail.clamp_min(lowest), log_q_tail)
        values, slope = _find(self.divergence)(
            torch.cat([log_p_top, log_p_tail[:, None]], dim=-1),
            torch.cat([log_q, log_q_tail[:, None]], dim=-1),
            differentiate=differentiate,
        )
        if slope is None:
            return values, None
        # An id of the tail moves its bucket by its share of it.
        by_id = p_tail.mul_((slope[:, -1] / torch.where(empty, 1.0, mass))[:, None])
        return values, by_id.scatter_(-1, ids, slope[:, :-1])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SampledTarget:
    """The sampled token (M,) and the teacher's log-prob of it (M,), for single-sample estimators of the reverse KL.

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
        """Raises InvalidInput for other than one log-prob per id; an id out of range is an error of the gather."""
        _check_shape("logprobs", self.logprobs, self.token_ids.shape)

    def in_precision(self, autocast: torch.dtype | None) -> SampledTarget:
        """Returns it with ids as indices; there is no product."""
        return replace(self, token_ids=self.token_ids.long(), logprobs=self.logprobs.detach())

    def compare(self, log_p: Tensor, rows: slice, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        """Estimates the reverse KL from the sampled token."""
        ids = self.token_ids[rows, None]
        log_ratio = log_p.gather(-1, ids)[:, 0] - self.logprobs[rows].to(log_p.dtype)
        r_minus_1 = torch.expm1(-log_ratio)
        values, factors = (log_ratio, log_ratio) if self.estimator == "k1" else (r_minus_1 + log_ratio, -r_minus_1)
        return values, _differentiate_logprob(log_p, ids, factors) if differentiate else None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LogProbTarget:
    """The given ids (M,): no divergence but their log p, which is computed alike."""

    token_ids: Tensor

    def __len__(self) -> int:
        return len(self.token_ids)

    def check(self, vocabulary: int) -> None:
        """Does nothing: a token outside the vocabulary is an error of the gather itself."""

    def in_precision(self, autocast: torch.dtype | None) -> LogProbTarget:
        """Returns it with ids as indices; there is no product."""
        return LogProbTarget(token_ids=self.token_ids.long())

    def compare(self, log_p: Tensor, rows: slice, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        """Returns log p of the ids."""
        ids = self.token_ids[rows, None]
        values = log_p.gather(-1, ids)[:, 0]
        return values, _differentiate_logprob(log_p, ids, torch.ones_like(values)) if differentiate else None


def _check_shape(name: str, values: Tensor, expected: torch.Size) -> None:
    """Refuses what would be cut or spread over tokens without an error."""
    if values.shape != expected:
        raise InvalidInput(f"the target's {name} have shape {tuple(values.shape)}, its ids ask for {tuple(expected)}")


def _find(divergence: str) -> Divergence:
    if divergence not in DIVERGENCES:
        raise InvalidInput(f"divergence {divergence!r} is unknown; use one of {', '.join(DIVERGENCES)}")
    return DIVERGENCES[divergence]


def _differentiate_logprob(log_p: Tensor, ids: Tensor, factors: Tensor) -> Tensor:
    """Returns factors (m,) times the gradient of log p(id) by the logits, which is onehot(id) − p."""
    return log_p.exp_().mul_(-factors[:, None]).scatter_add_(-1, ids, factors[:, None])
