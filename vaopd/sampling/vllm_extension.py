"""Runs inside vLLM's worker processes (`worker_extension_cls`); its methods are called through `collective_rpc`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vaopd.vlm.torchvision_compat import ensure_torchvision

# vLLM imports this module early in each of its worker processes, which may import a processor later on.
ensure_torchvision()

from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead  # noqa: E402


class RolloutExtension:
    """Methods that rollouts add to vLLM's worker."""

    model_runner: Any  # vLLM makes this a base class of its worker, which has both
    reload_weights: Any

    def narrow_to_logical_vocabulary(self, vocab_size: int) -> None:
        """Narrows the model's output to the tokenizer's ids.

        LM heads are padded (Qwen3-VL: 151 936 rows for 151 669 ids). At minus infinity, padding is never sampled, and
        the raw log-probs are normalised over the logical vocabulary, as in the trainer. Here this costs one assignment
        per step; `allowed_token_ids` would send the whole vocabulary with every request, and `logit_bias` would leave
        the padding's mass in the log-probs.
        """
        model = self.model_runner.get_model()
        compute_logits = model.compute_logits

        def compute_narrowed(*args: Any, **kwargs: Any) -> torch.Tensor | None:
            logits = compute_logits(*args, **kwargs)
            # None on tensor-parallel ranks that don't sample.
            if logits is not None:
                logits[..., vocab_size:] = float("-inf")
            return logits

        model.compute_logits = compute_narrowed

    def load_snapshot(self, folder: str) -> None:
        """Replaces the weights in place, a tied LM head included."""
        self.reload_weights(weights_path=folder)
        self._pack_tied_head()

    def load_merged(self, base: str, adapter: str, dtype: str) -> None:
        """Replaces the weights by those of folder `base` with the adapters of folder `adapter` merged in."""
        from vaopd.vlm.adapters import merge_adapters

        merged = merge_adapters(Path(base), Path(adapter), dtype=getattr(torch, dtype))
        self.reload_weights(weights_iterator=iter(merged.items()))
        self._pack_tied_head()

    def _pack_tied_head(self) -> None:
        # On a CPU, vLLM computes with a packed copy of each matrix. A tied head is not in the snapshot, so reloading
        # does not change its copy: the new layers would be combined with the old head.
        for module in self.model_runner.get_model().modules():
            if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
                module.quant_method.process_weights_after_loading(module)
