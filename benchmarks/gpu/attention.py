"""Shared-prompt attention of one layer of the 8B: its error, rate and kernels; one varlen call beside it."""

from __future__ import annotations

from collections.abc import Callable

import timing
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.measure import Check, measure_s, profile_s
from benchmarks.gpu.models import DTYPE
from vaopd.vlm import shared_attention
from vaopd.vlm.shared_attention import Layout

HEADS, KV_HEADS, HEAD_DIM = (32, 8, 128) if timing.ON_GPU else (4, 2, 32)
SHAPES = [
    (1000, [1000] * 4), (650, [128] * 4), (650, [32, 64, 96, 128]), (1500, [4000] * 4), (4150, [1000] * 4),
    (650, [1000] * 16),
] if timing.ON_GPU else [(20, [5, 9])]  # fmt: skip
CHECKED_TOKENS = 6000
"""Longer rows are not compared: the reference has the whole mask in memory."""


def run(check: Check) -> None:
    for prompt, lengths in SHAPES:
        name = f"P {prompt}, R {lengths[0]}…{lengths[-1]}, K {len(lengths)}"
        if not check.has_time(name, 3):
            continue
        layout = Layout([(prompt, lengths)])
        query, key, value = (
            torch.randn(1, heads, layout.length, HEAD_DIM, device=timing.DEVICE, dtype=DTYPE)
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )

        def attend(q: Tensor = query, k: Tensor = key, v: Tensor = value, layout: Layout = layout) -> Tensor:
            module = torch.nn.Module()
            return shared_attention.attend(module, q, k, v, None, layout=layout, scaling=HEAD_DIM**-0.5)[0]

        with torch.inference_mode():
            found = attend()
            if layout.length < CHECKED_TOKENS:
                error = relative_error(found, compute_reference(query, key, value, prompt, lengths))
                check.tell(f"{name}: error", f"{error:.1e}", target="≤ 1e-2 of float32", ok=error < 1e-2, error=error)
            if timing.ON_GPU:
                measure(check, name, prompt, lengths, attend)
                compare_varlen(check, prompt, lengths, (query, key, value), found)


def measure(check: Check, name: str, prompt: int, lengths: list[int], attend: Callable[[], Tensor]) -> None:
    flops = count_flops(prompt, lengths)
    seconds = measure_s(attend, repeats=5, warm=2)
    _, kernels, _ = profile_s(attend)
    longest = sorted(kernels.items(), key=lambda item: -item[1])[:3]
    rate = flops / seconds / 1e12
    check.tell(
        name,
        f"{1e3 * seconds:.2f} ms, {rate:.0f} TFLOP/s; " + ", ".join(f"{1e3 * s:.2f} {k[:40]}" for k, s in longest),
        target="≥ 300 TFLOP/s" if lengths[0] >= 1000 else "",
        ok=rate >= 300 if lengths[0] >= 1000 else None,
        ms=1e3 * seconds,
        tflops=rate,
    )


def compare_varlen(
    check: Check, prompt: int, lengths: list[int], tensors: tuple[Tensor, Tensor, Tensor], found: Tensor
) -> None:
    """Measures one varlen call for prompt and siblings, whose keys include the prompt's; some torch lack it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        check.tell("   one varlen call", f"this torch has none: {error}")
        return
    query, key, value = (tensor[0].transpose(0, 1) for tensor in tensors)
    starts = [prompt + sum(lengths[:k]) for k in range(len(lengths))]
    rows = [torch.arange(prompt)]
    rows += [torch.cat((torch.arange(prompt), torch.arange(s, s + r))) for s, r in zip(starts, lengths, strict=True)]
    index = torch.cat(rows).to(query.device)
    key, value = key[index], value[index]
    query = query.contiguous()
    q_ends = torch.tensor([0, prompt, *(s + r for s, r in zip(starts, lengths, strict=True))], dtype=torch.int32)
    k_ends = torch.tensor([0, *(len(r) for r in rows)]).cumsum(0).int()
    q_ends, k_ends = q_ends.to(query.device), k_ends.to(query.device)
    longest_q, longest_k = max(prompt, *lengths), prompt + max(lengths)

    def one_call() -> Tensor:
        return varlen_attn(
            query, key, value, q_ends, k_ends, longest_q, longest_k, scale=HEAD_DIM**-0.5, window_size=(-1, 0),
            enable_gqa=True,
        )  # fmt: skip

    try:
        error = relative_error(one_call()[None], found)
        seconds = measure_s(one_call, repeats=5, warm=2)
    except (TypeError, RuntimeError) as problem:
        check.tell("   one varlen call", f"{type(problem).__name__}: {str(problem)[:90]}")
        return
    rate = count_flops(prompt, lengths) / seconds / 1e12
    check.tell("   one varlen call", f"{1e3 * seconds:.2f} ms, {rate:.0f} TFLOP/s, differs by {error:.1e}", tflops=rate)


def compute_reference(query: Tensor, key: Tensor, value: Tensor, prompt: int, lengths: list[int]) -> Tensor:
    """Computes the row with an explicit mask in float32."""
    tokens = prompt + sum(lengths)
    allowed = torch.zeros(tokens, tokens, dtype=torch.bool)
    allowed[:prompt, :prompt] = True
    at = prompt
    for length in lengths:
        allowed[at : at + length, :prompt] = True
        allowed[at : at + length, at : at + length] = True
        at += length
    allowed &= torch.ones_like(allowed).tril()
    key, value = (tensor.float().repeat_interleave(HEADS // KV_HEADS, 1) for tensor in (key, value))
    out = F.scaled_dot_product_attention(query.float(), key, value, attn_mask=allowed.to(query.device))
    return out.transpose(1, 2)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def count_flops(prompt: int, lengths: list[int]) -> float:
    pairs = prompt * (prompt + 1) // 2 + sum(r * (r + 1) // 2 + r * prompt for r in lengths)
    return 4 * HEADS * HEAD_DIM * pairs
