"""The contract of a GPU's kernels, on a CPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def reference_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    longest_q: int,
    longest_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
) -> Tensor:
    """The contract of `torch.nn.attention.varlen.varlen_attn`, sequence by sequence, with its checks of the arguments.

    A left window of −1 is open; a right one of 0 is causal, aligned at the last key.
    """
    assert starts_q.dtype == starts_k.dtype == torch.int32
    assert starts_q.device == query.device
    assert len(starts_q) == len(starts_k)
    assert query.shape[0] == starts_q[-1]
    assert key.shape == value.shape
    assert key.shape[0] == starts_k[-1]
    assert longest_q == starts_q.diff().max()
    assert longest_k == starts_k.diff().max()
    assert starts_q.diff().min() > 0
    assert all(tensor.stride(-1) == 1 for tensor in (query, key, value))
    assert window_size in ((-1, 0), (-1, -1))
    parts = []
    groups = query.shape[1] // key.shape[1]
    for q0, q1, k0, k1 in zip(
        starts_q[:-1].tolist(), starts_q[1:].tolist(), starts_k[:-1].tolist(), starts_k[1:].tolist(), strict=True
    ):
        keys, values = (tensor[k0:k1].repeat_interleave(groups, dim=1) for tensor in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[q0:q1], keys) * (scale or query.shape[-1] ** -0.5)
        if window_size == (-1, 0):
            seen = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril((k1 - k0) - (q1 - q0))
            scores = scores.masked_fill(~seen, -math.inf)
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    return torch.cat(parts)
