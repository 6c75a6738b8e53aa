"""Attention of a packed row by one kernel call: PyTorch's variable-length flash attention, where a GPU has it.

The queries of a row lie in the kernel's order already: each prompt and each response is a sequence of its own. Only
keys and values are gathered, a prompt's once more before each response, so that the causal rule, aligned at the last
key, lets a response see its prompt and itself. Heads of keys stay as few as they are. The gathering moves
4·K·(P + R) numbers per key head and channel, a tenth of the attention's time at P 650, R 1000, K 4 on an H100; merging
a prompt part and an own part by their log-sum-exp would move more unless P > 2·R, and needs a backward pass that
torch's kernel hasn't.

`choose_kernel` says whether it can be used; elsewhere `shared_attention` calls its buckets one by one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vaopd.vlm.transfer import upload

_CAUSAL, _FULL = (-1, 0), (-1, -1)
_HALVES = (torch.bfloat16, torch.float16)

Kernel = Callable[..., Tensor]
"""Attention over sequences of different lengths, one after the other, with the arguments of torch's `varlen_attn`:

query (queries, heads, d), key and value (keys, key heads, d), where each sequence starts, and the end, in queries and
in keys (sequences + 1,) int32, and the longest of each. window_size: (-1, -1) lets a query see all keys of its
sequence; (-1, 0) lets the last see all, the one before it all but the last. Returns (queries, heads, d).
"""


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """The places of a packed row's sequences, as a kernel wants them, on one device."""

    starts_q: Tensor
    starts_k: Tensor
    longest_q: int
    longest_k: int
    keys: Tensor | None
    """(keys,) int64: the place in the row of each gathered key; None if they are the row."""

    @classmethod
    def of(cls, segments: Sequence[tuple[int, Sequence[int]]], device: torch.device) -> Sequences:
        """Makes them from each prompt's length and its responses', and queues the copies to the device."""
        queries, lengths, keys = [], [], []
        at, gathered = 0, False
        for prompt, responses in segments:
            own = np.arange(at, at + prompt)
            queries.append(prompt)
            lengths.append(prompt)
            keys.append(own)
            at += prompt
            for length in responses:
                if length:  # a kernel's sequence needs a query
                    queries.append(length)
                    lengths.append(prompt + length)
                    keys += [own, np.arange(at, at + length)]
                    gathered = True
                at += length
        starts = torch.tensor(np.cumsum([[0, *queries], [0, *lengths]], axis=1), dtype=torch.int32)
        starts_q, starts_k = upload(starts, device)
        return cls(
            starts_q=starts_q,
            starts_k=starts_k,
            longest_q=max(queries, default=0),
            longest_k=max(lengths, default=0),
            keys=upload(torch.from_numpy(np.concatenate(keys)), device) if gathered else None,
        )


def attend_to_sequences(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float | None
) -> Tensor:
    """Computes a packed row's attention: (1, heads, length, d), twice (1, key heads, length, d) -> (1, length, …)."""
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if sequences.keys is not None:
        k, v = _Gather.apply(k, sequences.keys), _Gather.apply(v, sequences.keys)
    s = sequences
    return kernel(
        q, k, v, s.starts_q, s.starts_k, s.longest_q, s.longest_k, scale=scale, window_size=_CAUSAL
    ).unsqueeze(0)


def attend_to_images(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scale: float | None
) -> Tensor:
    """Computes attention within each image, (1, heads, length, d) -> (1, length, heads, d)."""
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return kernel(q, k, v, starts, starts, longest, longest, scale=scale, window_size=_FULL).unsqueeze(0)


class _Gather(torch.autograd.Function):
    """Gathers rows. A prompt's row is gathered several times; its gradients are summed in float32."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.length = len(rows)
        # Flat rows, since GPUs copy those of 16 · n bytes by their fast kernel.
        return rows.reshape(len(rows), -1).index_select(0, places).view(-1, *rows.shape[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        wide = torch.promote_types(gradient.dtype, torch.float32)
        total = gradient.new_zeros((ctx.length, *gradient.shape[1:]), dtype=wide)
        return total.index_add_(0, places, gradient.to(wide)).to(gradient.dtype), None


def choose_kernel(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Kernel | None:
    """Returns torch's kernel if it can compute this: two bytes a number, on a GPU of at least Ampere's generation."""
    usable = (
        query.device.type == "cuda"
        and torch.version.hip is None
        and query.dtype in _HALVES
        and query.dtype == key.dtype == value.dtype
        and query.shape[-1] == value.shape[-1]
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and dropout == 0.0
        and _has_flash(query.device)
    )
    return _find_kernel() if usable else None


@functools.cache
def _has_flash(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _find_kernel() -> Kernel | None:
    """Returns torch's kernel with the options of this version; None before 2.11, whose `scale` it needs."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    options = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= options.keys():
        return None
    # 2.11 takes fewer key heads than query heads as they are; later versions need the option.
    told: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in options else {}
    return cast(Kernel, partial(varlen_attn, **told))
