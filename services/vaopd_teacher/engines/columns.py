"""The columns that are computed on request only, from both views' distributions over the logical vocabulary.

A new column takes a line in `vaopd.columns.COLUMNS`, and here a function and its line in `COMPUTED`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vaopd.divergence.head import head_logits
from vaopd.objective import view_divergence
from vaopd_teacher.engines.engine import View

Logprobs = Mapping[View, Tensor]
"""For each view that a column reads: log p (m, V) float32 at temperature 1, over the logical vocabulary."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Computation:
    """How a column is computed from `views`: `of` takes their log-probs (m, V) of some tokens and returns (m,)."""

    views: tuple[View, ...]
    of: Callable[[Logprobs], Tensor]


def entropy(logprobs: Tensor) -> Tensor:
    """−Σ p·log p in nats: (m, V) -> (m,)."""
    return logprobs.exp().mul_(logprobs).sum(-1).neg_()


COMPUTED: dict[str, Computation] = {
    "teacher_entropy_nats": Computation(views=("original",), of=lambda p: entropy(p["original"])),
    "view_divergence_nats": Computation(
        views=("original", "degraded"), of=lambda p: view_divergence(p["original"], p["degraded"])
    ),
}
"""How each column on request is computed."""


def list_views(names: Iterable[str]) -> set[View]:
    """Returns the views that these columns need hidden states of."""
    return {view for name in names for view in COMPUTED[name].views}


def compute(
    names: Iterable[str],
    hidden: Mapping[View, Tensor],
    head: Tensor,
    *,
    vocab_size: int | None = None,
    chunk_tokens: int,
) -> dict[str, Tensor]:
    """Computes columns (M,) from each view's hidden states (M, D) and the LM head (V, D), on the head's device.

    Works on `chunk_tokens` tokens at a time, in the precision of `head_logits`. A view's log-probs are computed once
    for all columns that read them. vocab_size: V, where the head has rows of padding beyond it.
    """
    chunks: dict[str, list[Tensor]] = {name: [] for name in names}
    if not chunks:
        return {}
    views = {view: hidden[view].split(chunk_tokens) for view in list_views(chunks)}
    for index in range(min(map(len, views.values()))):
        logprobs = {
            view: torch.log_softmax(head_logits(rows[index], head, vocab_size), -1) for view, rows in views.items()
        }
        for name, done in chunks.items():
            done.append(COMPUTED[name].of(logprobs))
    return {name: torch.cat(done) for name, done in chunks.items()}
