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
from benchmarks.gpu.models import BATCH_TOKENS, TEXT_TOKENS, make_engine, make_group
from vaopd.vlm.model import Vlm
from vaopd_teacher.engines.engine import PreparedGroup

# (P, R, K) -> target and goal in ms: 45 % and 65 % of 989 TFLOP/s.
TARGETS_MS = {
    (650, 128, 4): (90, 62),
    (400, 500, 4): (171, 118),
    (650, 1000, 4): (338, 234),
    (1500, 4000, 4): (1376, 952),
    (650, 1000, 16): (1191, 825),
    (4150, 1000, 4): (820, 568),
} if timing.ON_GPU else {(100, 16, 4): (0, 0)}  # fmt: skip

COMPARED_TOKENS = 4000
"""Log-probs of larger groups are not compared: their float32 logits would fill the card."""


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
        first = groups.score(engine, new)
    new_s = measure_s(lambda: groups.score(engine, new), repeats=2, warm=0) / together
    known_s = measure_s(lambda: groups.score(engine, known), repeats=1) / together
    counted = {
        side: floor.count_scoring_cost(
            floor.Model.of(vlm.config),
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
    if rollouts * response <= COMPARED_TOKENS:
        expected = score_plainly(vlm, new[0])
        spread = np.abs(expected - score_plainly(vlm, new[0], rows_at_once=1)).mean()
        difference = np.abs(expected - groups.logprobs(first[:1]))
        check.tell(
            "   log-probs against a plain forward with float32 logits",
            f"differ by {difference.mean():.1e} nats in the mean, {difference.max():.1e} at most; two plain forwards, "
            f"of all rows and row by row, by {spread:.1e}",
            target="mean ≤ 0.02, or what plain ones differ by",
            ok=difference.mean() <= max(0.02, 1.1 * spread),
            mean_nats=float(difference.mean()),
            max_nats=float(difference.max()),
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
                run_side()
            seconds = measure_s(run_side, repeats=1, warm=0)
        except torch.OutOfMemoryError:
            check.tell(f"   {side}", "out of memory")
            torch.cuda.empty_cache()
            continue
        factor, expected_factor = seconds / new_s, counted[side] / counted["engine"]
        check.tell(
            f"   {side}",
            f"{1e3 * seconds:.0f} ms = {factor:.2f} × of {expected_factor:.2f} counted, +{peak.extra_gib:.1f} GiB",
            target="≥ 0.9 of the factor" if timing.ON_GPU else "",
            ok=factor >= 0.9 * expected_factor if timing.ON_GPU else None,
            ms=1e3 * seconds,
            factor=factor,
            counted_factor=expected_factor,
        )


def score_plainly(vlm: Vlm, group: PreparedGroup, *, rows_at_once: int | None = None) -> np.ndarray:
    """Returns (2·M,) log-probs of transformers' own forward; logits in float32, since rounding them costs 0.03 nats."""
    rows = competitors.list_rows(group)
    size = rows_at_once or len(rows)
    hidden = torch.cat(
        [
            competitors.compute_response_hidden(vlm.model, *zip(*rows[at : at + size], strict=True), share_image=False)
            for at in range(0, len(rows), size)
        ]
    )
    responses = [response for _, response in rows]
    head = vlm.head.float()
    ids = torch.from_numpy(np.concatenate(responses)).to(hidden.device)
    parts = []
    for rows, chosen in zip(hidden.split(1024), ids.split(1024), strict=True):
        logits = rows.float() @ head.T
        parts.append(logits.gather(-1, chosen[:, None])[:, 0] - logits.logsumexp(-1))
    return torch.cat(parts).cpu().numpy()
