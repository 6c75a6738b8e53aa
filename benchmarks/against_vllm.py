"""Compares the group engine with vLLM's `prompt_logprobs`, both warm: same tokens and images, same log-probs.

`python benchmarks/against_vllm.py` prints one table. vLLM runs in this process with its defaults (chunked prefill,
prefix caching; a request for prompt log-probs never reads that cache). It gets all rollouts of both views at once and
is asked only for the given tokens' log-probs. Two cases: an image that is new to both, which both cut into patches and
encode, and one that is in both caches.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import groups
import numpy as np
import PIL.Image
import tables
import timing
import torch
from groups import HEADLINE, QUICK, Shape

from vaopd.vlm import vllm_start
from vaopd.vlm.model import Vlm
from vaopd_teacher.engines.transformers_engine import GroupEngine
from vaopd_teacher.engines.vllm_engine import collapse_images

SHAPES = [
    HEADLINE,
    Shape(prompt=150, response=128, rollouts=4),
    Shape(prompt=1500, response=128, rollouts=4),
    Shape(prompt=650, response=512, rollouts=4),
    Shape(prompt=650, response=128, rollouts=1),
    Shape(prompt=650, response=128, rollouts=8),
]
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}
"""Allowed difference of log-probs, in nats: the kernels differ, and in bfloat16 the rounding."""


def start_vllm(folder: Path, threads: int) -> Any:
    """Starts vLLM in this process, so that both sides have the same cores and the same clock."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if not timing.ON_GPU:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ["OMP_NUM_THREADS"] = str(threads)
    return vllm_start.start(
        str(folder),
        dtype=timing.DTYPE,
        options={"max_model_len": 4096, "limit_mm_per_prompt": {"image": 1}},
        min_pixels=None,
        max_pixels=None,
        extension="",
        logprobs_mode="raw_logprobs",
        seed=0,
    )


def score_with_vllm(
    llm: Any, prompt: Sequence[int], images: Sequence[PIL.Image.Image], responses: Sequence[np.ndarray]
) -> np.ndarray:
    """Scores with vLLM; returns the response tokens' log-probs (2·M,), original view first."""
    from vllm import SamplingParams

    requests = [
        {"prompt_token_ids": [*prompt, *response.tolist()], "multi_modal_data": {"image": image}}
        for image in images
        for response in responses
    ]
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate(requests, sampling, use_tqdm=False)
    parts = []
    for output, response in zip(outputs, [*responses, *responses], strict=True):
        told = output.prompt_logprobs[-len(response) :]
        parts.append([step[int(token)].logprob for step, token in zip(told, response, strict=True)])
    return np.concatenate(parts)


def measure(llm: Any, vlm: Vlm, engine: GroupEngine, shape: Shape, repeats: int) -> dict[str, Any]:
    group = groups.group(vlm, shape)
    prompt = collapse_images(vlm, group.original)
    seconds, difference = {}, 0.0
    for case in ("new", "known"):
        turns = repeats if case == "new" else 1
        pictures = [groups.both_views(shape, seed=10 + turn) for turn in range(turns)]
        vllm_turns, engine_turns = cycle(pictures), cycle(enumerate(pictures))
        kept = groups.prepare(vlm, pictures[0], key=f"{shape}:kept")

        def score_with_engine(case: str = case, turns: Any = engine_turns, kept: Any = kept) -> np.ndarray:
            turn, images = next(turns)
            # A known image's patches are cached, as in the server; a new image is cut into patches here.
            ready = kept if case == "known" else groups.prepare(vlm, images, key=f"{shape}:{turn}")
            return groups.logprobs(groups.score(engine, [groups.with_images(group, ready)]))

        def score_with_other(turns: Any = vllm_turns) -> np.ndarray:
            return score_with_vllm(llm, prompt, next(turns), group.responses)

        sides: dict[str, Callable[[], np.ndarray]] = {"vllm": score_with_other, "engine": score_with_engine}
        seconds[case], results = timing.interleaved(sides, repeats=repeats)
        difference = max(difference, float(np.abs(results["vllm"] - results["engine"]).max()))
    if difference > TOLERANCE[timing.DTYPE]:
        raise SystemExit(f"{shape}: log-probs differ by {difference:.2g} nats; the sides don't do the same work")
    return {"shape": str(shape), "seconds": seconds, "difference": difference}


def main() -> None:
    options = tables.parser(__doc__).parse_args()
    tables.apply(options)
    with groups.model_folder(32_000) as folder:
        llm = start_vllm(folder, options.threads)
        torch.set_num_threads(options.threads)
        vlm = groups.load(folder)
        measure(llm, vlm, groups.engine_for(vlm), QUICK, repeats=2)  # both are warm now
        shapes = tables.chosen(options, SHAPES, usual=1)
        found = [measure(llm, vlm, groups.engine_for(vlm), shape, options.repeats) for shape in shapes]
        vllm_start.stop(llm)
    rows = []
    for entry in found:
        new, known = entry["seconds"]["new"], entry["seconds"]["known"]
        target = " (≥ 2)" if entry["shape"] == str(HEADLINE) else ""
        rows.append(
            [
                entry["shape"],
                f"{1000 * new['engine']:.0f} ms",
                f"{new['vllm'] / new['engine']:.2f} ×{target}",
                f"{1000 * known['engine']:.0f} ms",
                f"{known['vllm'] / known['engine']:.2f} ×{target}",
                f"{entry['difference']:.1e}",
            ]
        )
    tables.table(
        "Against vLLM's prompt_logprobs: one group, both views, both warm",
        ("shape", "engine, new image", "vLLM", "engine, known image", "vLLM", "largest difference, nats"),
        rows,
        "vLLM's columns are its time over the engine's.",
    )
    tables.save(options.json, "against_vllm", {"speed": found})


if __name__ == "__main__":
    main()
