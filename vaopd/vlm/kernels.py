"""Triton kernels for what a text layer does between its products: rotary positions with their norm, and SwiGLU.

transformers does each in some ten passes over memory that a GPU spends a fifth of a forward on. The kernels read and
write once, compute in float32 and round at the end. They have no backward pass: for inference only.

Importing this module needs Triton, which comes with torch's CUDA builds. With TRITON_INTERPRET=1 the kernels run on a
CPU, which is how the tests compare them with the plain formulas.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def rotate(
    values: Tensor, cos: Tensor, sin: Tensor, *, norm_weight: Tensor | None = None, epsilon: float = 0.0
) -> Tensor:
    """Applies rotary positions to heads, after an RMS norm of each head if it has a weight (d,).

    values: (length, heads, d), the last axis contiguous. cos, sin: (length, d), contiguous; the halves of a head are
    rotated against each other. Returns a contiguous tensor like `values`.
    """
    length, heads, d = values.shape
    out = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    if out.numel() == 0:
        return out
    half = triton.next_power_of_2(d // 2)
    block_heads = min(triton.next_power_of_2(heads), max(1, 2048 // half))
    with torch.cuda.device_of(values):  # Triton launches on the thread's current device, wherever the tensors are
        _rotate[(length, triton.cdiv(heads, block_heads))](
            *(values, cos, sin, values if norm_weight is None else norm_weight, out),
            *(values.stride(0), values.stride(1), heads, epsilon),
            D=d,
            HALF=half,
            HEADS=block_heads,
            NORMED=norm_weight is not None,
        )
    return out


def multiply_by_silu(gate: Tensor, up: Tensor) -> Tensor:
    """Computes silu(gate) · up of two contiguous tensors."""
    out = torch.empty_like(gate)
    if out.numel():
        with torch.cuda.device_of(gate):
            _multiply_by_silu[(triton.cdiv(out.numel(), _BLOCK),)](gate, up, out, out.numel(), BLOCK=_BLOCK)
    return out


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    values,
    cos,
    sin,
    weight,
    out,
    token_stride,
    head_stride,
    heads,
    epsilon,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    NORMED: tl.constexpr,
):
    """One program per token and block of heads."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, HALF)
    inside = column < D // 2
    mask = (head < heads)[:, None] & inside[None, :]
    place = values + token * token_stride + head[:, None] * head_stride + column[None, :]
    first = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(place + D // 2, mask=mask, other=0.0).to(tl.float32)
    if NORMED:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        scale = 1.0 / tl.sqrt(squares / D + epsilon)
        first = first * scale[:, None] * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        second = (
            second * scale[:, None] * tl.load(weight + D // 2 + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        )
    at = token * D + column
    cos_first = tl.load(cos + at, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_first = tl.load(sin + at, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos_second = tl.load(cos + at + D // 2, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_second = tl.load(sin + at + D // 2, mask=inside, other=0.0).to(tl.float32)[None, :]
    target = out + (token * heads + head[:, None]) * D + column[None, :]
    tl.store(target, (first * cos_first - second * sin_first).to(out.dtype.element_ty), mask=mask)
    tl.store(target + D // 2, (second * cos_second + first * sin_second).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _multiply_by_silu(gate, up, out, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program per block of numbers."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    x = tl.load(gate + place, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(up + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, (x / (1.0 + tl.exp(-x)) * y).to(out.dtype.element_ty), mask=mask)
