"""Four layers of the 8B in float32: the engine's log-probs against one plain forward per rollout."""

from __future__ import annotations

import competitors
import groups
import numpy as np
import timing
import torch

from benchmarks.gpu.measure import Check
from benchmarks.gpu.models import make_engine, make_group

SHAPES = [(650, [500] * 4), (650, [40, 200, 333, 500])] if timing.ON_GPU else [(100, [3, 9])]


def run(check: Check) -> None:
    vlm = check.models.make(check.models.teacher_size, torch.float32, layers=4)
    for prompt, lengths in SHAPES:
        name = f"P {prompt}, R {lengths}, float32"
        if not check.has_time(name, 3):
            continue
        group = make_group(vlm, prompt, lengths, seed=3)
        with torch.inference_mode():
            found = groups.logprobs(groups.score(make_engine(vlm), [group]))
            expected = competitors.score_usual(vlm.model, group, vocab_size=vlm.vocab_size)
        error = float(np.abs(found - expected).max())
        check.tell(name, f"largest difference {error:.1e} nats", target="≤ 1e-4", ok=error <= 1e-4, nats=error)
