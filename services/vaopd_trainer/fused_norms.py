"""Lets a model's RMS norms compute by torch's one kernel in mixed precision, and hand on what the products take.

Under autocast the student's weights and residual stream are float32. transformers normalises it in six passes over
memory, and returns float32, which each of the products that follow (query, key, value; gate, up) rounds to bfloat16
for itself. Here one pass reads, computes in float32, and rounds once. Without autocast, the module's own code runs.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def fuse_norms(model: nn.Module) -> int:
    """Replaces the forward of each RMS norm whose weight is a plain factor, in place; returns their number."""
    norms: list[Any] = [
        module
        for module in model.modules()
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
    ]
    for norm in norms:
        norm.forward = MethodType(_normalise, norm)
    return len(norms)


def _normalise(self: Any, hidden_states: Tensor) -> Tensor:
    """As LlamaRMSNorm.forward and its copies, rounded once, at the end, to autocast's precision."""
    kind = hidden_states.device.type
    if not torch.is_autocast_enabled(kind) or hidden_states.dtype == torch.float64:
        own: Tensor = type(self).forward(self, hidden_states)
        return own
    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        weight = self.weight.float()
        return F.rms_norm(hidden_states.float(), weight.shape, weight, self.variance_epsilon).to(dtype)
