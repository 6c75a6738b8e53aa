"""Shared-prompt attention of one layer of the 8B: its error, rate and kernels, and the bucketed calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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

        def attend(
            q: Tensor = query, k: Tensor = key, v: Tensor = value, layout: Layout = layout, window: int | None = None
        ) -> Tensor:
            options = {"layout": layout, "scaling": HEAD_DIM**-0.5, "sliding_window": window}
            return shared_attention.attend(torch.nn.Module(), q, k, v, None, **options)[0]

        with torch.inference_mode():
            found = attend()
            if layout.length < CHECKED_TOKENS:
                error = relative_error(found, compute_reference(query, key, value, prompt, lengths))
                check.tell(f"{name}: error", f"{error:.1e}", target="≤ 1e-2 of float32", ok=error < 1e-2, error=error)
            if timing.ON_GPU:
                measure(check, name, prompt, lengths, attend)
                # A window wider than the row changes nothing, but only the bucketed calls have windows.
                bucketed = partial(attend, window=layout.length + 1)
                seconds, error = measure_s(bucketed, repeats=5, warm=2), relative_error(bucketed(), found)
                check.tell(
                    "   one call for each bucket", f"{1e3 * seconds:.2f} ms, differs by {error:.1e}", ms=1e3 * seconds
                )


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
