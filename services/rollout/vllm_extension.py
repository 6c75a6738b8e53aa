"""Runs inside vLLM's worker processes (`worker_extension_cls`): one method, called through `collective_rpc`."""

from __future__ import annotations

from typing import Any

import torch

from vaopd.torchvision_compat import ensure_torchvision

# vLLM imports this module early in each of its worker processes, which may import a processor later on.
ensure_torchvision()


class LogicalVocabulary:
    """Narrows a model's output to the tokenizer's ids.

    LM heads are padded (Qwen3-VL: 151 936 rows for 151 669 ids). With the padding at minus infinity it is never
    sampled, and the raw log-probs are normalised over the logical vocabulary, as the trainer's are. Doing it here costs one
    assignment per step; `allowed_token_ids` would cost a list of the whole vocabulary with every request, and
    `logit_bias` would leave the padding's mass in the log-probs.
    """

    model_runner: Any  # vLLM's worker, whose base class this becomes, has it

    def narrow_to_logical_vocabulary(self, vocab_size: int) -> None:
        model = self.model_runner.get_model()
        compute_logits = model.compute_logits

        def narrowed(*args: Any, **kwargs: Any) -> torch.Tensor | None:
            logits = compute_logits(*args, **kwargs)
            # None on tensor-parallel ranks that don't sample.
            if logits is not None:
                logits[..., vocab_size:] = float("-inf")
            return logits

        model.compute_logits = narrowed
