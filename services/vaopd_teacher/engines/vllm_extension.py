"""Runs inside vLLM's worker processes (`worker_extension_cls`); its method is called through `collective_rpc`."""

from __future__ import annotations

from typing import Any

import torch

from vaopd.vlm.torchvision_compat import ensure_torchvision

# vLLM imports this module early in each of its worker processes, which may import a processor later on.
ensure_torchvision()

_ROWS = 64
"""Rows with exponentials in memory at the same time."""


class TeacherExtension:
    """Extends vLLM's worker, so that log-probs are a distribution over the logical vocabulary."""

    model_runner: Any  # an attribute of vLLM's worker, which gets this class as a base

    def normalise_logits(self, vocab_size: int) -> None:
        """Makes the model return log-probs as logits, which `logprobs_mode="raw_logits"` passes on unchanged."""
        model = self.model_runner.get_model()
        compute_logits = model.compute_logits

        def compute_narrowed(*args: Any, **kwargs: Any) -> torch.Tensor | None:
            logits = compute_logits(*args, **kwargs)
            # None on tensor-parallel ranks that don't sample.
            return None if logits is None else log_probs(logits, vocab_size)

        model.compute_logits = compute_narrowed


def log_probs(logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Returns float32 log-probs over the first `vocab_size` ids, −∞ in the padding: (N, V') -> (N, V').

    Each is rounded once: the largest logit is subtracted first, then the log of a sum in float64. log_softmax would
    give all numbers of a row the same error of 1e-6, as much as the whole tail of a peaked distribution.
    """
    wide = logits.float()
    wide[..., vocab_size:] = -torch.inf
    wide -= wide.amax(-1, keepdim=True)
    for rows in wide.split(_ROWS):
        rows -= rows.exp().sum(-1, keepdim=True, dtype=torch.float64).log().float()
    return wide
