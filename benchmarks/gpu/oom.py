"""Out of memory in the engine: that group is refused or computed in parts, the next one is scored. On a GPU only."""

from __future__ import annotations

import timing
import torch

from benchmarks.gpu.measure import GIB, Check, free_memory
from benchmarks.gpu.models import make_engine, make_group

SPARE_GIB = 4


def run(check: Check) -> None:
    if not timing.ON_GPU:
        check.tell("out of memory", "needs a GPU")
        return
    vlm = check.models.teacher()
    free_memory()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + SPARE_GIB * GIB) / total)
    try:
        asked = [make_group(vlm, 1000, [8000] * 8, seed=1), make_group(vlm, 400, [50] * 2, seed=2)]
        results = [type(result).__name__ for result in make_engine(vlm, batch_tokens=10**6).score(asked)]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        free_memory()
    check.tell(
        f"a group of 65 000 tokens with {SPARE_GIB} GiB to spare, and a small one after it",
        ", ".join(results),
        target="LimitExceeded or EngineResult, then EngineResult",
        ok=results[0] in ("LimitExceeded", "EngineResult") and results[1] == "EngineResult",
    )
