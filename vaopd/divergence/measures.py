"""The divergences, each a pure function of two distributions with an entry in `DIVERGENCES`.

A new one is one more function and entry: the targets hand it the whole vocabulary or, of a top-k payload, k ids and one
bucket for the rest. `reverse_kl` is the plain reference, from full logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from vaopd.errors import InvalidInput


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, *, vocab_size: int | None = None) -> Tensor:
    """Returns KL_t = KL(p_S ‖ p_T) over the first `vocab_size` ids (default: all): (..., V) -> (...).

    Gradients flow into the student only. In float32, or in float64 for float64 logits. An id of −∞ in the student's
    logits adds 0; of −∞ in the teacher's alone, ∞. Raises InvalidInput for shapes that differ.
    """
    student = torch.log_softmax(widen(student_logits[..., :vocab_size]), dim=-1)
    teacher = torch.log_softmax(widen(teacher_logits[..., :vocab_size].detach()), dim=-1)
    if student.shape != teacher.shape:
        raise InvalidInput(
            f"the student's logits have shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}; give the "
            "same tokens, and the shared vocab_size"
        )
    gap = (student - teacher).masked_fill(student.isneginf(), 0)  # 0·log 0 is 0
    return (student.exp() * gap).sum(-1)


class Divergence(Protocol):
    """Compares two distributions over b outcomes, for each of m tokens."""

    def __call__(self, log_p: Tensor, log_q: Tensor, *, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        """Compares log-probs (m, b), (m, b): -> divergence (m,), and its gradient by the student's logits (m, b).

        log_p is the student's, log_q the teacher's. The gradient is None unless `differentiate`. May overwrite both
        arguments and return one: nothing else here is as large. Where p is 0, log_p may be a large negative number in
        place of −∞, and must then give a finite result.
        """


def _compare_by_reverse_kl(log_p: Tensor, log_q: Tensor, *, differentiate: bool) -> tuple[Tensor, Tensor | None]:
    # KL = Σ p·gap with gap = log p − log q, and ∂KL/∂z = p·(gap − KL).
    gap = torch.sub(log_p, log_q, out=log_q)
    p = log_p.exp_()
    slope = gap.mul_(p)
    kl = slope.sum(-1)
    return kl, slope.addcmul_(p, kl[:, None], value=-1) if differentiate else None


DIVERGENCES: Mapping[str, Divergence] = {"reverse_kl": _compare_by_reverse_kl}
"""By the name that a target's `divergence` gives."""


def widen(values: Tensor) -> Tensor:
    """Returns them in float32, or in float64 if they are float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
