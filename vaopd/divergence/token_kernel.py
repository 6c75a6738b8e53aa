"""A Triton kernel for the log-normaliser of rows of logits, which it reads once; the plain formula takes six passes.

See `kernels` for how these are imported and tested.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


def compute_log_sums(logits: Tensor) -> Tensor:
    """Computes log Σ exp of each row: float32 logits (m, V), as `head_logits` returns them -> (m,) float32."""
    rows, vocabulary = logits.shape
    out = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        # Rows are read to their end in memory, because loads are wide only where the bound is a multiple of 16.
        _sum[(rows,)](logits, out, logits.stride(0), vocabulary, logits.stride(0), BLOCK=_BLOCK, num_warps=8)
    return out


@triton.jit
def _sum(logits, out, stride, vocabulary, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program per row: each lane keeps a maximum and a sum, rescaled as its maximum grows; merged at the end."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < width, other=float("-inf"))
        x = tl.where(column < vocabulary, x, float("-inf"))
        grown = tl.maximum(largest, x)
        # A lane that has seen nothing keeps 0: −∞ − (−∞) would be NaN.
        shrink = tl.where(largest == grown, 1.0, tl.exp(largest - grown))
        total = total * shrink + tl.where(x == float("-inf"), 0.0, tl.exp(x - grown))
        largest = grown
    top = tl.max(largest, 0)
    share = tl.where(largest == float("-inf"), 0.0, total * tl.exp(largest - top))
    tl.store(out + row, top + tl.log(tl.sum(share, 0)))
