"""Runs inside vLLM's worker processes (`worker_extension_cls`); its method is called through `collective_rpc`."""

from __future__ import annotations

from typing import Any

import torch

from vaopd.vlm.torchvision_compat import ensure_torchvision

# vLLM imports this module early in each of its worker processes, which may import a processor later on.
ensure_torchvision()

_ROWS = 64
"""Whose exponentials are alive at once."""


class TeacherExtension:
    """What vLLM's worker must do beyond its own, for log-probs that are a distribution over the logical vocabulary."""

    model_runner: Any  # vLLM's worker, whose base class this becomes, has it

    def tell_log_probs(self, vocab_size: int) -> None:
        """From now on the model's logits are log-probs, for `logprobs_mode="raw_logits"` to hand out as they are."""
        model = self.model_runner.get_model()
        compute_logits = model.compute_logits

        def narrowed(*args: Any, **kwargs: Any) -> torch.Tensor | None:
            logits = compute_logits(*args, **kwargs)
            # None on tensor-parallel ranks that don't sample.
            return None if logits is None else log_probs(logits, vocab_size)

        model.compute_logits = narrowed


def log_probs(logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """(N, V') -> (N, V') float32 log-probs over the first `vocab_size` ids, minus infinity in the padding.

    Each is rounded once: relative to the likeliest first, then less the log of a sum in float64. log_softmax would give
    all of a row the same error of 1e-6, as much as the whole tail of a peaked distribution.
    """
    wide = logits.float()
    wide[..., vocab_size:] = -torch.inf
    wide -= wide.amax(-1, keepdim=True)
    for rows in wide.split(_ROWS):
        rows -= rows.exp().sum(-1, keepdim=True, dtype=torch.float64).log().float()
    return wide
