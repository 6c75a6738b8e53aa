"""Attention over a packed row against dense attention with an explicit mask, in float64."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.support.kernels import reference_kernel
from tests.support.tolerance import assert_noticed, assert_within, gamma
from vaopd.errors import ConfigError
from vaopd.vlm import shared_attention
from vaopd.vlm.shared_attention import BUCKET_FILL, Layout, attend
from vaopd.vlm.varlen_attention import _Gather, choose_kernel

pytestmark = pytest.mark.numeric

SEGMENTS = [(5, (3, 3, 3)), (7, (9, 2, 0, 8)), (4, ()), (3, (1,))]
HEADS, KV_HEADS, DIM = 4, 2, 8


def may_see(segments: list[tuple[int, tuple[int, ...]]], window: int | None = None) -> Tensor:
    """(length, length) bool, written from the rule: own segment, prompt or same sibling, not ahead, within reach."""
    tokens = []  # (segment, sibling or None, place in the sibling's own sequence)
    for s, (prompt, responses) in enumerate(segments):
        tokens += [(s, None, i) for i in range(prompt)]
        tokens += [(s, k, prompt + i) for k, length in enumerate(responses) for i in range(length)]
    return torch.tensor(
        [
            [s == s2 and k2 in (None, k) and i2 <= i and (window is None or i - i2 < window) for s2, k2, i2 in tokens]
            for s, k, i in tokens
        ]
    )


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """softmax(q·k / √d)·v, (1, length, heads, d)"""
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scores = (query @ key.mT / math.sqrt(DIM)).masked_fill(~mask, -math.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def states(length: int, *, kv_heads: int = KV_HEADS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int) -> Tensor:
        return torch.randn((1, heads, length, DIM), generator=generator, dtype=torch.float64).requires_grad_()

    return draw(HEADS), draw(kv_heads), draw(kv_heads)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_forward_and_gradients_equal_dense_attention(window: int | None, kv_heads: int) -> None:
    layout = Layout(SEGMENTS)
    inputs = states(layout.length, kv_heads=kv_heads)
    shared, _ = attend(torch.nn.Module(), *inputs, None, layout=layout, scaling=DIM**-0.5, sliding_window=window)
    expected = dense(*inputs, may_see(SEGMENTS, window))
    torch.testing.assert_close(shared, expected, rtol=1e-6, atol=1e-10)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad(shared, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-10)


def test_under_autocast_mixed_precisions_meet_in_the_lower_one() -> None:
    """A query norm with float32 weights leaves float32 beside values in bfloat16."""
    layout = Layout(SEGMENTS)
    query, key, value = (tensor.detach().float() for tensor in states(layout.length))
    with torch.autocast("cpu", torch.bfloat16):
        shared, _ = attend(torch.nn.Module(), query, key, value.bfloat16(), None, layout=layout, scaling=DIM**-0.5)
    assert shared.dtype == torch.bfloat16
    mask, scale = may_see(SEGMENTS), DIM**-0.5
    expected = dense(query, key, value, mask)
    # In bfloat16 are rounded: both factors of the products that make a score, the weights, the values, the result.
    keys, values = (tensor.repeat_interleave(HEADS // KV_HEADS, dim=1) for tensor in (key, value))
    p = (scale * query @ keys.mT).masked_fill(~mask, -math.inf).softmax(-1)
    of_scores = (scale * gamma(3, torch.bfloat16) * (query.abs() @ keys.abs().mT)).masked_fill(~mask, 0)
    of_p = p * (of_scores + (p * of_scores).sum(-1, keepdim=True) + gamma(2, torch.bfloat16))
    error = (of_p + gamma(3, torch.bfloat16) * p) @ values.abs()
    assert_within(shared, expected, error.transpose(1, 2))
    ahead = mask | mask.roll(1, dims=1)  # every token sees the one after the last that it may see
    assert_noticed(dense(query, key, value, ahead), expected, error.transpose(1, 2))


def test_equal_siblings_need_one_call_and_no_gathering() -> None:
    (segment,) = Layout([(5, (3, 3, 3))]).buckets_on(torch.device("cpu")).segments
    (bucket,) = segment.buckets
    assert (bucket.count, bucket.longest, bucket.start) == (3, 3, 5)


def test_ragged_siblings_are_padded_within_buckets_of_like_length_only() -> None:
    lengths = (100, 10, 80, 74, 9, 75)
    (segment,) = Layout([(5, lengths)]).buckets_on(torch.device("cpu")).segments
    # 75 = 0.75 · 100 still shares the longest one's call; 74 begins the next, and 10 one more.
    assert [(bucket.count, bucket.longest) for bucket in segment.buckets] == [(3, 100), (1, 74), (2, 10)]
    computed = sum(bucket.count * bucket.longest for bucket in segment.buckets)
    assert computed <= sum(lengths) / BUCKET_FILL


def test_what_it_cannot_do_is_refused_by_name() -> None:
    layout = Layout([(3, (2,))])
    with pytest.raises(ConfigError, match="softcap"):
        attend(torch.nn.Module(), *states(layout.length), None, layout=layout, softcap=50.0)


# ------------------------------------------------------------------ one call of a kernel for sequences of any lengths


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets the reference kernel compute rows in place of a GPU's; holds the sequences of each call."""
    seen: list[int] = []

    def kernel(*args: Any, **options: Any) -> Tensor:
        seen.append(len(args[3]) - 1)
        return reference_kernel(*args, **options)

    monkeypatch.setattr(shared_attention, "choose_kernel", lambda *_: kernel)
    return seen


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_one_kernel_call_equals_dense_attention_forward_and_backward(calls: list[int], kv_heads: int) -> None:
    layout = Layout(SEGMENTS)
    inputs = states(layout.length, kv_heads=kv_heads)
    packed, _ = attend(torch.nn.Module(), *inputs, None, layout=layout, scaling=DIM**-0.5)
    expected = dense(*inputs, may_see(SEGMENTS))
    torch.testing.assert_close(packed, expected, rtol=1e-6, atol=1e-10)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad(packed, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-10)
    assert calls == [4 + 3 + 3 + 1]  # the prompts and the responses that aren't empty, in one call


def test_one_kernel_call_holds_in_a_recomputed_layer(calls: list[int]) -> None:
    layout = Layout(SEGMENTS)
    inputs = states(layout.length)

    def layer(*tensors: Tensor) -> Tensor:
        return attend(torch.nn.Module(), *tensors, None, layout=layout, scaling=DIM**-0.5)[0]

    plain = torch.autograd.grad(layer(*inputs).square().sum(), inputs)
    again = torch.autograd.grad(checkpoint(layer, *inputs, use_reentrant=False).square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert len(calls) == 3  # the plain layer's, the checkpointed one's, and its own again in the backward pass


def test_a_row_of_prompts_needs_no_gathering(calls: list[int]) -> None:
    layout = Layout([(5, ()), (2, (0,))])
    assert layout.sequences_on(torch.device("cpu")).keys is None
    inputs = states(layout.length)
    packed, _ = attend(torch.nn.Module(), *inputs, None, layout=layout, scaling=DIM**-0.5)
    torch.testing.assert_close(packed, dense(*inputs, may_see([(5, ()), (2, (0,))])), rtol=1e-6, atol=1e-10)
    assert calls == [2]


def test_gradients_of_a_row_that_is_gathered_often_are_summed_in_float32() -> None:
    """In bfloat16 a sum of ones stops growing at 256; a CPU adds rows of two axes in float32 by itself."""
    row = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    (gradient,) = torch.autograd.grad(_Gather.apply(row, torch.zeros(512, dtype=torch.long)).sum(), row)
    assert gradient.item() == 512


def test_a_sliding_window_goes_by_the_buckets(calls: list[int]) -> None:
    layout = Layout(SEGMENTS)
    attend(torch.nn.Module(), *states(layout.length), None, layout=layout, scaling=DIM**-0.5, sliding_window=4)
    assert not calls


def test_the_indices_of_a_layout_are_made_once() -> None:
    layout, device = Layout(SEGMENTS), torch.device("cpu")
    assert layout.sequences_on(device) is layout.sequences_on(device)
    assert layout.buckets_on(device) is layout.buckets_on(device)


def test_without_a_gpu_there_is_no_kernel() -> None:
    assert choose_kernel(*(tensor.bfloat16() for tensor in states(4)), 0.0) is None


def test_torchs_kernel_takes_the_arguments_that_it_is_given() -> None:
    """The signature only, which differs from version to version: no CPU can run it."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    signature = inspect.signature(varlen.varlen_attn)
    bound = signature.bind(*range(7), scale=1.0, window_size=(-1, 0))
    named = list(bound.arguments)
    assert named[:3] == ["query", "key", "value"]
    assert [name[:8] for name in named[3:5]] == ["cu_seq_q", "cu_seq_k"]
    assert named[5:7] == ["max_q", "max_k"]
