"""Counts the recipe's step on one H100: decoding by its memory traffic, scoring by the teacher's target.

`python benchmarks/rollout_timeline_counted.py`, in a second or two on a CPU. Left out: prompts (about 5 ms a group),
loading of weights, and the trainer. *batch* is the worker that answered 16 groups and then the next 16.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np
import tables

BYTES_PER_S = 0.7 * 3.35e12
WEIGHTS_BYTES = 2 * 1.72e9
"""Of Qwen3-VL-2B's language model, bfloat16, with the tied head."""
KV_BYTES = 2 * 28 * 8 * 128 * 2
"""Of a token: keys and values, 28 layers, 8 heads of 128, bfloat16."""
STEP_S = 1e-3
"""Launches and sampling of a decoding step."""
PROMPT, GROUPS, ROLLOUTS, LONGEST = 650, 16, 4, 4096
TOKENS_IN_FLIGHT, REQUESTS = 524_288, 64
HELD_OUT, SAMPLES = 200, 8
TRAIN_S = GROUPS * 0.199
"""Forward and backward of the step, 1000 tokens per response."""


def score_s(lengths: Sequence[int]) -> float:
    """Seconds of an 8B teacher for a group, both views: 90 ms at 128 tokens per response, 338 ms at 1000."""
    return 0.054 + 0.284e-3 * float(np.mean(lengths))


def decode(groups: Sequence[Sequence[int]], *, batch: bool) -> list[float]:
    """Returns when each group has ended, in seconds; `groups` are the lengths of their rollouts, in queue order."""
    ends = [0.0] * len(groups)
    now, next_group = 0.0, 0
    running: dict[int, int] = {}  # group -> steps it has had
    while next_group < len(groups) or running:
        if not batch or not running:
            bound = 16 if batch else REQUESTS
            while next_group < len(groups) and len(running) < bound:
                held = sum(length > had for index, had in running.items() for length in groups[index])
                held += len(groups[next_group])
                beside_training = next_group >= GROUPS and any(index < GROUPS for index in running)
                if not batch and held * LONGEST > TOKENS_IN_FLIGHT * (0.25 if beside_training else 1):
                    break
                running[next_group] = 0
                next_group += 1
        # Until the next rollout ends, the set of rollouts stays as it is: one sum for all these steps.
        left = [length - had for index, had in running.items() for length in groups[index] if length > had]
        steps = min(left)
        context = sum(PROMPT + had + steps / 2 for i, had in running.items() for length in groups[i] if length > had)
        now += steps * (STEP_S + (WEIGHTS_BYTES + KV_BYTES * context) / BYTES_PER_S)
        for index in list(running):
            running[index] += steps
            if running[index] >= max(groups[index]):
                ends[index] = now
                del running[index]
    if batch:
        for start in range(0, len(groups), 16):
            ends[start : start + 16] = [max(ends[start : start + 16])] * len(ends[start : start + 16])
    return ends


def follow(step: list[list[int]], evaluation: list[list[int]], *, batch: bool) -> dict[str, float]:
    """Returns when things happen, seconds since the first request. Before, training began after the evaluation."""
    ends = decode([*step, *evaluation], batch=batch)
    done = 0.0
    scored = []
    for end, group in sorted(zip(ends, step, strict=False)):
        done = max(done, end) + score_s(group)
        scored.append(done)
    alone = decode(step, batch=batch)
    without = 0.0
    for end, group in sorted(zip(alone, step, strict=True)):
        without = max(without, end) + score_s(group)
    trained = max(ends) + sum(map(score_s, step)) + TRAIN_S if batch else max(scored[-1] + TRAIN_S, max(ends))
    return {
        "half of the groups scored": scored[GROUPS // 2 - 1],
        "the last of the step's groups sampled": max(ends[:GROUPS]),
        "the step trained, no evaluation due": without + TRAIN_S,
        "the step trained, evaluation due": trained,
        "evaluation ended": max(ends),
    }


def draw(rng: np.random.Generator, groups: int, rollouts: int) -> list[list[int]]:
    """Lengths with median 500 and a long tail: 1 % reach the limit of 4096."""
    return [
        [int(min(LONGEST, 1 + length)) for length in rng.lognormal(np.log(500), 0.9, rollouts)] for _ in range(groups)
    ]


def count() -> dict[str, dict[str, dict[str, float]]]:
    rng = np.random.default_rng(0)
    long_tail = [(draw(rng, GROUPS, ROLLOUTS), draw(rng, HELD_OUT, SAMPLES)) for _ in range(9)]
    one_long = [[102] * ROLLOUTS for _ in range(GROUPS)]
    one_long[0][0] = LONGEST
    cases = {
        "one rollout 40 × as long as 63 others": [(one_long, [[102] * SAMPLES] * HELD_OUT)],
        "long tail": long_tail,
    }
    found: dict[str, dict[str, dict[str, float]]] = {}
    for case, steps in cases.items():
        sides = {}
        for side in ("batch", "stream"):
            runs = [follow(step, evaluation, batch=side == "batch") for step, evaluation in steps]
            sides[side] = {what: statistics.median(run[what] for run in runs) for what in runs[0]}
        found[case] = sides
        rows = [
            (what, f"{old:.1f} s", f"{sides['stream'][what]:.1f} s", f"{old / sides['stream'][what]:.1f} ×")
            for what, old in sides["batch"].items()
        ]
        tables.table(
            f"The recipe on one H100, counted: {case}", ("since the first request", "batch", "stream", ""), rows
        )
    return found


if __name__ == "__main__":
    count()
