"""Lets the student's RMS norms hand on, in mixed precision, what the products after them take.

Under autocast the student's weights and residual stream are float32. A norm then returns float32, which each of the
products that follow (query, key, value; gate, up) rounds to bfloat16 for itself, and transformers computes the norms of
queries and keys, which are bfloat16, in six passes over memory. Here torch's one kernel computes every norm in float32
and the result is rounded once. Without autocast, the norm does what `vaopd.vlm.fused_norms` lets it do.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vaopd.vlm.fused_norms import is_rms_norm


def round_norms(model: nn.Module) -> int:
    """Replaces the forward of each RMS norm of the model, in place, and returns their number; may be repeated."""
    norms: list[Any] = [module for module in model.modules() if is_rms_norm(module)]
    for norm in norms:
        if getattr(norm.forward, "__func__", None) is not _normalise:
            norm._forward_without_autocast = norm.forward
            norm.forward = MethodType(_normalise, norm)
    return len(norms)


def _normalise(self: Any, hidden_states: Tensor) -> Tensor:
    kind = hidden_states.device.type
    if not torch.is_autocast_enabled(kind) or hidden_states.dtype == torch.float64:
        plain: Tensor = self._forward_without_autocast(hidden_states)
        return plain
    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        weight = self.weight.float()
        return F.rms_norm(hidden_states.float(), weight.shape, weight, self.variance_epsilon).to(dtype)
