"""The engine on the 8B, both views of a group, against its floor, and against two plain implementations."""

from __future__ import annotations

import time
from collections.abc import Callable

import competitors
import floor
import groups
import numpy as np
import timing
import torch

from benchmarks.gpu.measure import PEAK_FLOPS, Check, measure_peak, measure_s
from benchmarks.gpu.models import BATCH_TOKENS, TEXT_TOKENS, make_engine, make_group, score
from vaopd.vlm.model import Vlm

# (P, R, K) -> target and goal in ms: 45 % and 65 % of 989 TFLOP/s.
TARGETS_MS = {
    (650, 128, 4): (90, 62),
    (400, 500, 4): (171, 118),
    (650, 1000, 4): (338, 234),
    (1500, 4000, 4): (1376, 952),
    (650, 1000, 16): (1191, 825),
    (4150, 1000, 4): (820, 568),
} if timing.ON_GPU else {(100, 16, 4): (0, 0)}  # fmt: skip


def run(check: Check) -> None:
    start = time.perf_counter()
    vlm = check.models.teacher()
    timing.synchronise()
    size = sum(p.numel() for p in vlm.model.parameters()) / 1e9
    check.tell("model made", f"{time.perf_counter() - start:.1f} s, {size:.2f} B parameters")
    for shape in TARGETS_MS:
        if check.has_time("P {}, R {}, K {}".format(*shape), 12):
            compare(check, vlm, *shape)


@torch.inference_mode()
def compare(check: Check, vlm: Vlm, prompt: int, response: int, rollouts: int) -> None:
    engine = make_engine(vlm)
    fitting = BATCH_TOKENS // (2 * (prompt + rollouts * response))
    together = max(1, min(4, fitting)) if timing.ON_GPU else 1  # groups in a forward
    new = [make_group(vlm, prompt, [response] * rollouts, seed=i) for i in range(together)]
    known = [make_group(vlm, prompt, [response] * rollouts, seed=i, key=f"k{i}") for i in range(together)]
    with measure_peak() as peak:
        first = score(engine, new)
    new_s = measure_s(lambda: score(engine, new), warm=0) / together
    known_s = measure_s(lambda: score(engine, known), repeats=2) / together
    counted = {
        side: floor.count_scoring_cost(
            floor.Model(vlm.config.to_dict()),
            side,
            prompt=prompt,
            image_tokens=prompt - TEXT_TOKENS,
            lengths=[response] * rollouts,
        ).flops
        for side in floor.SIDES
    }
    rate = counted["engine"] / new_s
    target, goal = TARGETS_MS[prompt, response, rollouts]
    name = f"P {prompt}, R {response}, K {rollouts}"
    check.tell(
        name,
        f"{1e3 * new_s:.0f} ms a group, {1e3 * known_s:.0f} with a known image ({together} a forward), "
        f"{rate / 1e12:.0f} TFLOP/s = {rate / PEAK_FLOPS:.0%} of the peak, +{peak.extra_gib:.1f} GiB",
        target=f"≤ {target} ms, goal {goal}" if timing.ON_GPU else "",
        ok=1e3 * new_s <= target if timing.ON_GPU else None,
        ms=1e3 * new_s,
        known_ms=1e3 * known_s,
        tflops=rate / 1e12,
        gib=peak.extra_gib,
    )
    sides: dict[str, Callable[[], np.ndarray]] = {
        "careful": lambda: competitors.score_careful(
            vlm.model, new[0], share_image=False, vocab_size=vlm.vocab_size
        ),
        "usual": lambda: competitors.score_usual(vlm.model, new[0], vocab_size=vlm.vocab_size),
    }  # fmt: skip
    for side, run_side in sides.items():
        if not check.has_time(f"   {side}", 5):
            continue
        try:
            with measure_peak() as peak:
                found = run_side()
            seconds = measure_s(run_side, repeats=2, warm=0)
        except torch.OutOfMemoryError:
            check.tell(f"   {side}", "out of memory")
            torch.cuda.empty_cache()
            continue
        difference = np.abs(found - groups.logprobs(first[:1]))
        factor, expected = seconds / new_s, counted[side] / counted["engine"]
        check.tell(
            f"   {side}",
            f"{1e3 * seconds:.0f} ms = {factor:.2f} × of {expected:.2f} counted, +{peak.extra_gib:.1f} GiB; log-probs "
            f"differ by {difference.mean():.1e} in the mean, {difference.max():.1e} at most",
            target="≥ 0.9 of the factor, mean ≤ 0.02 nats" if timing.ON_GPU else "",
            ok=bool(factor >= 0.9 * expected and difference.mean() <= 0.02) if timing.ON_GPU else None,
            ms=1e3 * seconds,
            factor=factor,
            counted_factor=expected,
            mean_nats=float(difference.mean()),
            max_nats=float(difference.max()),
        )
