"""Triton kernels for whole rows of logits: on a GPU in place of the ten passes of `measures.DIVERGENCES`.

`compare_logits`: both sides' float32 logits of a chunk, each read twice -> the reverse KL and log-normaliser of each
token, and the KL's gradient by the student's logits in the precision of the next product. `compute_log_sums`: the
log-normaliser of logits that are read once; the plain formula takes six passes. The products stay with cuBLAS.

Shapes: m tokens, V logical vocabulary, V_pad ≥ V the width of the rows in memory, whose values beyond V are ignored.

Importing this module needs Triton, which comes with torch's CUDA builds. With TRITON_INTERPRET=1 the kernels run on a
CPU, which is how the tests compare them with the plain formulas.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
_WARPS = 8


def compare_logits(student: Tensor, teacher: Tensor, *, slope: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Computes KL(p_S ‖ p_T) and the student's log Σ exp of each token: logits (m, V) -> (m,), (m,), float32.

    The logits are `head.head_logits`', whose rows lie V_pad apart in memory of their own; they are read to the end,
    because loads are wide only where the bound is a multiple of 16. slope: (m, V_pad), overwritten with the KL's
    gradient by the student's logits, and with zeros beyond V.
    """
    rows, vocabulary = student.shape
    values, student_lse, teacher_lse = student.new_empty((3, rows), dtype=torch.float32)
    if rows == 0:
        return values, student_lse
    strides = (student.stride(0), teacher.stride(0))
    width = min(strides)
    options = {"BLOCK": _BLOCK, "num_warps": _WARPS}
    with torch.cuda.device_of(student):  # Triton launches on the thread's current device, wherever the tensors are
        _normalise[(rows,)](student, teacher, values, student_lse, teacher_lse, *strides, vocabulary, width, **options)
        if slope is not None:
            columns = slope.shape[1]
            _differentiate[(rows, triton.cdiv(columns, _BLOCK))](
                *(student, teacher, slope, values, student_lse, teacher_lse),
                *(*strides, slope.stride(0), vocabulary, min(width, columns), columns),
                **options,
            )
    return values, student_lse


def compute_log_sums(logits: Tensor) -> Tensor:
    """Computes log Σ exp of each row: float32 logits (m, V), as `head_logits` returns them -> (m,) float32."""
    rows, vocabulary = logits.shape
    out = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        # Rows are read to their end in memory, because loads are wide only where the bound is a multiple of 16.
        with torch.cuda.device_of(logits):
            _sum[(rows,)](logits, out, logits.stride(0), vocabulary, logits.stride(0), BLOCK=_BLOCK, num_warps=_WARPS)
    return out


@triton.jit
def _normalise(  # type: ignore[no-untyped-def]
    student,
    teacher,
    values,
    student_lse,
    teacher_lse,
    student_stride,
    teacher_stride,
    vocabulary,
    width,
    BLOCK: tl.constexpr,
):
    """One program per token. Both log Σ exp and Σ exp(s − max)·(s − t) in one pass, rescaled as the maximum grows.

    KL = Σ p·(s − t) − lse_S + lse_T.
    """
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    s_max = float("-inf")
    t_max = float("-inf")
    s_sum = 0.0
    t_sum = 0.0
    gaps = 0.0
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        s = tl.load(student + columns, mask=columns < width, other=0.0)
        t = tl.load(teacher + columns, mask=columns < width, other=0.0)
        gap = tl.where(inside, s - t, 0.0)
        s = tl.where(inside, s, float("-inf"))
        t = tl.where(inside, t, float("-inf"))
        s_new = tl.maximum(s_max, tl.max(s, 0))
        t_new = tl.maximum(t_max, tl.max(t, 0))
        p = tl.exp(s - s_new)
        shrink = tl.exp(s_max - s_new)
        s_sum = s_sum * shrink + tl.sum(p, 0)
        gaps = gaps * shrink + tl.sum(p * gap, 0)
        t_sum = t_sum * tl.exp(t_max - t_new) + tl.sum(tl.exp(t - t_new), 0)
        s_max = s_new
        t_max = t_new
    s_lse = s_max + tl.log(s_sum)
    t_lse = t_max + tl.log(t_sum)
    tl.store(values + row, gaps / s_sum - s_lse + t_lse)
    tl.store(student_lse + row, s_lse)
    tl.store(teacher_lse + row, t_lse)


@triton.jit
def _differentiate(  # type: ignore[no-untyped-def]
    student,
    teacher,
    slope,
    values,
    student_lse,
    teacher_lse,
    student_stride,
    teacher_stride,
    slope_stride,
    vocabulary,
    width,
    slope_width,
    BLOCK: tl.constexpr,
):
    """One program per token and block: ∂KL/∂s = p·(log p − log q − KL), zero beyond the vocabulary."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    s = tl.load(student + row * student_stride + columns, mask=columns < width, other=0.0)
    t = tl.load(teacher + row * teacher_stride + columns, mask=columns < width, other=0.0)
    log_p = s - tl.load(student_lse + row)
    log_q = t - tl.load(teacher_lse + row)
    found = tl.exp(log_p) * (log_p - log_q - tl.load(values + row))
    found = tl.where(columns < vocabulary, found, 0.0)
    tl.store(slope + row * slope_stride + columns, found.to(slope.dtype.element_ty), mask=columns < slope_width)


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
