"""Attention over packed prompt groups: siblings read their prompt's keys and values instead of computing them again.

A packed row holds each prompt's tokens, followed by its responses': [prompt₁, resp₁₁ … resp₁ₖ, prompt₂, …], without
padding, so that every linear layer computes each token once. Only attention depends on the segments: a prompt sees
itself, a response sees its prompt and itself, all causally. `Layout` holds their places; it is passed as an argument
through the model's call, so that a layer recomputed in a backward pass gets the same one.

On a GPU, one kernel computes a row (`varlen_attention`). On a CPU, and where that kernel can't be used, siblings of
similar length share one call of PyTorch's scaled dot product attention each.

Load a text model with `attn_implementation=ATTENTION`. Without a layout it is transformers' own "sdpa".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from vaopd.errors import ConfigError
from vaopd.vlm.transfer import upload
from vaopd.vlm.varlen_attention import Sequences, attend_to_sequences, choose_kernel

ATTENTION = "vaopd_shared_prompt"
BUCKET_FILL = 0.75
"""Siblings of at least this share of the longest one's length are padded to it and share its attention call."""
_UNSUPPORTED = ("position_bias", "softcap", "s_aux")
"""Options that some families pass to attention; none of the families with an adapter does."""


@dataclass(frozen=True, slots=True, eq=False)
class Bucket:
    """Siblings of similar length."""

    count: int
    longest: int
    start: int | None
    """Their first place if all are equally long and contiguous, so that nothing needs to be gathered; else None."""
    rows: Tensor
    """(count, longest): places in the packed row; a shorter sibling repeats its last place."""


@dataclass(frozen=True, slots=True, eq=False)
class SegmentLayout:
    """One prompt and its siblings: its first place, its number of tokens, and the siblings' buckets."""

    start: int
    prompt: int
    buckets: tuple[Bucket, ...]


class Layout:
    """The places of prompts and responses in a packed row.

    segments: for each prompt its length and its responses' lengths, in the order of the row.

    >>> Layout([(5, (3, 3)), (4, (2,))]).length
    17
    """

    def __init__(self, segments: Sequence[tuple[int, Sequence[int]]]) -> None:
        self._lengths = [(prompt, tuple(responses)) for prompt, responses in segments]
        self.length = sum(prompt + sum(responses) for prompt, responses in self._lengths)
        self._buckets: dict[torch.device, Buckets] = {}
        self._sequences: dict[torch.device, Sequences] = {}

    def buckets_on(self, device: torch.device) -> Buckets:
        """Returns the row's buckets with their indices on `device`; made once for all layers."""
        if device not in self._buckets:
            self._buckets[device] = Buckets(self._lengths, device)
        return self._buckets[device]

    def sequences_on(self, device: torch.device) -> Sequences:
        """Returns the row's sequences with their indices on `device`; made once for all layers."""
        if device not in self._sequences:
            self._sequences[device] = Sequences.of(self._lengths, device)
        return self._sequences[device]


class Buckets:
    """The segments of a row, with siblings in buckets of similar length, indices on one device."""

    def __init__(self, lengths: Sequence[tuple[int, Sequence[int]]], device: torch.device) -> None:
        self.device = device
        self.segments: list[SegmentLayout] = []
        written: list[Tensor] = []  # places in the packed row, in the order in which attention computes them
        ragged = False
        at = 0
        for prompt, responses in lengths:
            start, at = at, at + prompt
            written.append(torch.arange(start, at))
            starts = []
            for length in responses:
                starts.append(at)
                at += length
            buckets: list[Bucket] = []
            for members in _group_by_length(responses):
                bucket = _make_bucket([(starts[k], responses[k]) for k in members])
                written.append(bucket.rows.flatten())
                ragged = ragged or bucket.start is None or bool(buckets)
                buckets.append(replace(bucket, rows=upload(bucket.rows, device)))
            self.segments.append(SegmentLayout(start, prompt, tuple(buckets)))
        # The index of each place's result among attention's results; None if they are in order.
        self._order = upload(_invert(torch.cat(written), at), device) if ragged else None
        self._masks: dict[tuple[int, int, int], Tensor] = {}

    def restore_order(self, computed: Tensor) -> Tensor:
        """Drops padding and puts each result at its token's place: (…, computed, heads, d) -> (…, length, heads, d)."""
        return computed if self._order is None else computed.index_select(1, self._order)

    def find_mask(self, queries: int, keys: int, window: int) -> Tensor:
        """Returns a mask (queries, keys), True where the query sees the key; cached, since all layers use the same."""
        wanted = queries, keys, window
        if wanted not in self._masks:
            ahead = torch.arange(keys) - torch.arange(keys - queries, keys)[:, None]
            self._masks[wanted] = upload((ahead <= 0) & (ahead > -window), self.device)
        return self._masks[wanted]


def _group_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Returns the indices of the non-empty responses in buckets of similar length, each in the given order."""
    buckets: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[index] == 0:
            break
        if not buckets or lengths[index] < BUCKET_FILL * lengths[buckets[-1][0]]:
            buckets.append([])
        buckets[-1].append(index)
    return [sorted(bucket) for bucket in buckets]


def _make_bucket(members: Sequence[tuple[int, int]]) -> Bucket:
    longest = max(length for _, length in members)
    offsets = torch.arange(longest)
    rows = torch.stack([start + offsets.clamp(max=length - 1) for start, length in members])
    first = members[0][0]
    contiguous = all(start == first + k * longest and length == longest for k, (start, length) in enumerate(members))
    return Bucket(len(members), longest, first if contiguous else None, rows)


def _invert(written: Tensor, length: int) -> Tensor:
    """Returns for each place the first position in `written` that holds it; padding repeats a place later."""
    order = torch.empty(length, dtype=torch.long)
    order[written.flip(0)] = torch.arange(len(written)).flip(0)
    return order


@torch.compiler.disable  # the layers around it may be compiled (vaopd.vlm.compiled)
def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes attention within each segment; the signature is transformers' attention interface.

    query: (1, heads, length, d); key, value: the same with a divisor of the heads. Returns (1, length, heads, d), and
    None for the attention weights. Raises ConfigError for an option that isn't supported.
    """
    if layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if asked := [name for name in _UNSUPPORTED if kwargs.get(name) is not None]:
        raise ConfigError(f"{type(module).__name__} asks for {asked[0]}, which shared-prompt attention doesn't have")
    if torch.is_autocast_enabled(query.device.type):
        # As autocast does for the usual call; the kernels with lower-right causality bypass it.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    assert query.shape[2] == layout.length, (tuple(query.shape), layout.length)
    if sliding_window is None and (kernel := choose_kernel(query, key, value, dropout)) is not None:
        return attend_to_sequences(kernel, query, key, value, layout.sequences_on(query.device), scaling), None
    buckets = layout.buckets_on(query.device)
    options = {"dropout_p": dropout, "scale": scaling}
    parts = []
    for segment in buckets.segments:
        q, k, v = (tensor.narrow(2, segment.start, segment.prompt) for tensor in (query, key, value))
        parts.append(_attend_causally(q, k, v, sliding_window, buckets, options).transpose(1, 2))
        for bucket in segment.buckets:
            own_q, own_k, own_v = (_take(tensor, bucket) for tensor in (query, key, value))
            out = _attend_causally(
                own_q, _prepend_prompt(k, own_k), _prepend_prompt(v, own_v), sliding_window, buckets, options
            )
            parts.append(out.transpose(1, 2).flatten(0, 1).unsqueeze(0))
    return buckets.restore_order(torch.cat(parts, dim=1)), None


def _take(tensor: Tensor, bucket: Bucket) -> Tensor:
    """Gathers a bucket's rows: (1, heads, length, d) -> (count, heads, longest, d)."""
    if bucket.start is not None:
        taken = tensor.narrow(2, bucket.start, bucket.count * bucket.longest)
    else:
        taken = tensor.index_select(2, bucket.rows.flatten())
    return taken.unflatten(2, (bucket.count, bucket.longest)).squeeze(0).transpose(0, 1)


def _prepend_prompt(prompt: Tensor, own: Tensor) -> Tensor:
    """Puts the prompt's keys or values (1, heads, P, d) before each sibling's own (count, heads, R, d)."""
    return torch.cat((prompt.expand(len(own), -1, -1, -1), own), dim=2)


def _attend_causally(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, buckets: Buckets, options: dict[str, Any]
) -> Tensor:
    """Computes lower-right causal attention: the last query sees all keys, the one before it all but the last.

    window: the number of keys that a query sees at most.
    """
    queries, keys = query.shape[2], key.shape[2]
    if window is not None and window < keys:
        mask: Tensor | None = buckets.find_mask(queries, keys, window)
    elif queries == keys:
        mask = None
    elif query.device.type == "cpu":
        mask = buckets.find_mask(queries, keys, keys)
    else:
        mask = causal_lower_right(queries, keys)  # a flag for the kernels that support it, never a matrix there
    # With a mask, CUDA's fast kernels want as many key heads as query heads; the CPU's takes fewer.
    groups = query.shape[1] // key.shape[1]
    if repeat := groups > 1 and mask is not None and query.device.type != "cpu":
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=groups > 1 and not repeat, **options
    )


def register() -> None:
    """Registers `ATTENTION` with transformers; calling it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def make_empty_mask(device: torch.device) -> Tensor:
    """Returns an empty `attention_mask` to pass beside a layout.

    It has four axes, since transformers leaves such a mask as it is and builds none of its own.
    """
    return torch.empty((1, 1, 0, 0), device=device)
