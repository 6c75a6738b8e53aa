"""Where a forward of the engine spends the device's time, and how often the host waits for it. On a GPU only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import groups
import timing

from benchmarks.gpu.measure import Check, count_launches, count_waits, profile_s
from benchmarks.gpu.models import make_engine, make_group

KINDS = {
    "attention": ("flash", "fmha", "attention", "attn"),
    "products": ("gemm", "nvjet", "cutlass", "xmma"),
    "copies": ("memcpy", "memset"),
}


def run(check: Check) -> None:
    if not timing.ON_GPU:
        check.tell("a forward", "needs a GPU")
        return
    vlm = check.models.teacher()
    engine = make_engine(vlm)
    ragged = [make_group(vlm, 650, [32, 64, 96, 128], seed=i) for i in range(8)]
    cases = {
        "one group, P 1000, R 1000, K 4": [make_group(vlm, 1000, [1000] * 4, seed=9)],
        "8 ragged groups, P 650, R ≤ 128, K 4": ragged,
    }
    for name, asked in cases.items():
        if not check.has_time(name, 5):
            continue
        groups.score(engine, asked)
        report(check, name, lambda asked=asked: groups.score(engine, asked))


def report(check: Check, name: str, run: Callable[[], Any]) -> None:
    """Tells how a run spends the device's time. It has run once before."""
    wall_s, kernels, calls = profile_s(run)
    parts = dict.fromkeys((*KINDS, "other"), 0.0)
    for kernel, seconds in kernels.items():
        parts[find_kind(kernel)] += seconds
    busy = sum(parts.values())
    useful = (parts["products"] + parts["attention"]) / busy
    check.tell(
        name,
        f"wall {1e3 * wall_s:.0f} ms, device {1e3 * busy:.0f} ms ({busy / wall_s:.0%}): "
        + ", ".join(f"{kind} {1e3 * seconds:.0f}" for kind, seconds in parts.items())
        + f"; {count_launches(calls)} launches, the host waits {count_waits(calls)} times",
        target="device busy ≥ 90 %, products and attention ≥ 70 % of it",
        ok=busy / wall_s >= 0.9 and useful >= 0.7,
        wall_ms=1e3 * wall_s,
        busy_share=busy / wall_s,
        useful_share=useful,
    )
    longest = sorted((item for item in kernels.items() if find_kind(item[0]) == "other"), key=lambda item: -item[1])
    check.tell("   longest others", ", ".join(f"{1e3 * s:.1f} ms {kernel[:60]}" for kernel, s in longest[:5]))


def find_kind(kernel: str) -> str:
    name = kernel.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other")
