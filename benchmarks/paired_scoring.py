"""Compares the group engine with plain implementations of paired scoring, in time and memory.

`python benchmarks/paired_scoring.py` prints tables. Every side scores the same prompt group in both views and must
compute the same log-probs. *engine* is the teacher's `GroupEngine` on a new image, *known image* the same with the
image's features in its cache; the others are those of `competitors.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import competitors
import floor
import groups
import numpy as np
import tables
import timing
import torch
from groups import HEADLINE, QUICK, Shape

from vaopd.vlm.families import PreparedImage
from vaopd.vlm.model import Segment, Vlm
from vaopd_teacher.engines.engine import PreparedGroup
from vaopd_teacher.engines.transformers_engine import GroupEngine
from vaopd_teacher.engines.vision_cache import VisionCache

SHAPES = [
    HEADLINE,
    Shape(prompt=150, response=128, rollouts=4),
    Shape(prompt=1500, response=128, rollouts=4),
    Shape(prompt=150, response=512, rollouts=4),
    Shape(prompt=650, response=512, rollouts=4),
    Shape(prompt=650, response=512, rollouts=4, ragged=True),
    Shape(prompt=650, response=128, rollouts=8),
]
TOLERANCE = {"float32": 2e-4, "bfloat16": 0.25}
"""Allowed difference of log-probs, in nats: in bfloat16, the kernels depend on the batch's shape."""


def make_sides(vlm: Vlm, plain: Any, engine: GroupEngine, shape: Shape) -> dict[str, Callable[[], np.ndarray]]:
    """Returns every side for one shape, by name. Images without a key are new to the engine each time."""
    group = groups.group(vlm, shape)
    known = groups.with_images(group, [replace(i, key=f"{shape}:{n}") for n, i in enumerate(images_of(group))])
    return {
        "usual": lambda: competitors.score_usual(plain, group),
        "careful": lambda: competitors.score_careful(plain, group, share_image=False),
        "shared image": lambda: competitors.score_careful(plain, group, share_image=True),
        "engine": lambda: groups.logprobs(groups.score(engine, [group])),
        "known image": lambda: groups.logprobs(groups.score(engine, [known])),
    }


def images_of(group: PreparedGroup) -> list[PreparedImage]:
    return [*group.original.images, *group.degraded.images]


def compare(vlm: Vlm, plain: Any, shapes: Sequence[Shape], repeats: int) -> list[dict[str, Any]]:
    engine = groups.engine_for(vlm)
    model = floor.Model.of(vlm.config)
    matmul = timing.matmul_flops_per_s()
    found: list[dict[str, Any]] = []
    for run in make_sides(vlm, plain, engine, QUICK).values():
        run()  # warm-up of kernels and thread pools
    for shape in shapes:
        seconds, results = timing.interleaved(make_sides(vlm, plain, engine, shape), repeats=repeats)
        difference = max(float(np.abs(result - results["engine"]).max()) for result in results.values())
        if difference > TOLERANCE[timing.DTYPE]:
            raise SystemExit(f"{shape}: log-probs differ by {difference:.2g} nats; the sides don't do the same work")
        counted = {
            name: floor.count_scoring_cost(
                model, name, prompt=shape.prompt, image_tokens=groups.image_tokens(shape), lengths=shape.lengths
            ).flops
            for name in floor.SIDES
        }
        found.append(
            {
                "shape": str(shape),
                "seconds": seconds,
                "difference": difference,
                "operations": counted,
                "matmul_flops_per_s": matmul,
            }
        )
    rows = []
    for entry in found:
        seconds, marked = entry["seconds"], entry["shape"] == str(HEADLINE)
        operations = entry["operations"]
        factors = {
            name: f"{seconds[name] / seconds['engine']:.2f} × of {operations[name] / operations['engine']:.2f}"
            for name in ("usual", "careful", "shared image")
        }
        rows.append(
            [
                entry["shape"],
                f"{1000 * seconds['engine']:.0f} ms",
                factors["usual"] + (" (≥ 4)" if marked else ""),
                factors["careful"] + (" (≥ 2.5)" if marked else ""),
                factors["shared image"],
                f"{1000 * seconds['known image']:.0f} ms",
                f"{operations['engine'] / seconds['engine'] / matmul:.0%}",
                f"{entry['difference']:.1e}",
            ]
        )
    tables.table(
        "Paired scoring: one group, both views",
        ("shape", "engine", "usual", "careful", "careful, image shared", "engine, known image",
         "engine's operations at matmul's rate", "largest difference, nats"),
        rows,
        "Factors: the other side's time over the engine's, on an image that is new to both, 'of' the factor by counted "
        f"operations (benchmarks/floor.py). A matrix product alone reaches {matmul / 1e9:.0f} GFLOP/s here.",
    )  # fmt: skip
    return found


def scaling(vlm: Vlm, engine: GroupEngine, shape: Shape, repeats: int) -> list[dict[str, Any]]:
    """Measures one group with K = 1 … 8 on a cached image, so that only text grows.

    The layers compute P + K·R tokens. The LM head is on responses only, so with it the time grows faster, with K·R.
    """
    images = groups.prepare(vlm, groups.both_views(shape, seed=3), key="scaling")
    cache = VisionCache(vlm, capacity_bytes=groups.VISION_CACHE_BYTES)
    model = floor.Model.of(vlm.config)
    sides: dict[str, Callable[[], Any]] = {}
    expected, counted = {}, {}
    for k in (1, 2, 4, 8):
        at = replace(shape, rollouts=k)
        group = groups.group(vlm, at, seed=3, images=images)
        segments = [Segment(prompt=prompt, responses=group.responses) for prompt in (group.original, group.degraded)]
        sides[f"score {k}"] = partial(groups.score, engine, [group])
        sides[f"layers {k}"] = partial(layers_only, vlm, segments, cache)
        expected[k] = (shape.prompt + k * shape.response) / (shape.prompt + shape.response)
        cost = floor.count_scoring_cost(
            model, "known image", prompt=shape.prompt, image_tokens=groups.image_tokens(shape), lengths=at.lengths
        )
        counted[k] = cost.flops
    for run in (sides["score 1"], sides["layers 1"]):
        run()  # the image is cached now
    seconds, _ = timing.interleaved(sides, repeats=repeats)
    found: list[dict[str, Any]] = []
    for k in expected:
        found.append(
            {
                "k": k,
                "seconds": seconds[f"score {k}"],
                "growth": seconds[f"score {k}"] / seconds["score 1"],
                "layers_growth": seconds[f"layers {k}"] / seconds["layers 1"],
                "expected": expected[k],
                "operations": counted[k] / counted[1],
            }
        )
    tables.table(
        f"Cost per group as K grows, P {shape.prompt}, R {shape.response}, image known; growth over K = 1",
        ("K", "(P + K·R) / (P + R)", "layers alone", "ratio (0.85 … 1.15)", "with the LM head", "operations counted",
         "ratio", "time with the LM head"),
        [
            [str(f["k"]), f"{f['expected']:.2f}", f"{f['layers_growth']:.2f}",
             f"{f['layers_growth'] / f['expected']:.2f}", f"{f['growth']:.2f}", f"{f['operations']:.2f}",
             f"{f['growth'] / f['operations']:.2f}", f"{1000 * f['seconds']:.0f} ms"]
            for f in found
        ],
    )  # fmt: skip
    return found


@torch.inference_mode()
def layers_only(vlm: Vlm, segments: Sequence[Segment], cache: VisionCache) -> torch.Tensor:
    return vlm.compute_response_hidden(segments, encode=cache.features)


def vision_runs(vlm: Vlm, engine: GroupEngine, shape: Shape) -> dict[str, int]:
    """Counts the vision tower's runs for a new image, and for another group with the same image."""
    runs = 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    images = groups.prepare(vlm, groups.both_views(shape, seed=5), key="repeated")
    hook = vlm.family.vision_tower(vlm.model).register_forward_hook(count)
    counts: dict[str, int] = {}
    for name, seed in (("first", 5), ("again", 6)):
        group = groups.group(vlm, shape, seed=seed, images=images)
        runs = 0
        groups.score(engine, [group])
        counts[name] = runs
    hook.remove()
    tables.table(
        f"Runs of the vision tower, {shape}",
        ("the image is", "runs", "target"),
        [["new", str(counts["first"]), ""], ["asked about again", str(counts["again"]), "0"]],
    )
    return counts


def memory(folder: Path, wide: Path, quick: bool) -> list[dict[str, Any]]:
    """Measures the peak extra memory of one group, each time in a new process."""
    cases = [(folder, QUICK)] if quick else [
        (folder, HEADLINE),
        (folder, replace(HEADLINE, response=512)),
        (folder, replace(HEADLINE, response=1024)),
        (wide, HEADLINE),
        (wide, replace(HEADLINE, response=512)),
    ]  # fmt: skip
    found: list[dict[str, Any]] = []
    names = ("engine", "usual", "careful")
    for model, shape in cases:
        vocabulary = 151_936 if model == wide else 32_000
        matrix = 4 * 2 * sum(shape.lengths) * vocabulary
        peaks: dict[str, int | None] = {}
        for name in names:
            if name == "careful" and 2.5 * matrix > timing.free_bytes():
                peaks[name] = None  # no figure is better than a system that kills processes
                continue
            rollouts = (
                1 if name == "usual" else shape.rollouts
            )  # run one after the other, so the peak doesn't depend on their number
            child = [str(model), str(shape.prompt), str(shape.response), str(rollouts), name]
            peaks[name] = timing.in_subprocess(__file__, child)["bytes"]
        found.append(
            {
                "shape": str(shape),
                "vocabulary": vocabulary,
                "response": shape.response,
                "bytes": {name: size for name, size in peaks.items() if size is not None},
                "matrix": matrix,
            }
        )
    rows = []
    for entry in found:
        sizes = [entry["bytes"].get(name) for name in names] + [entry["matrix"]]
        cells = ["more than is free" if size is None else f"{size / 2**20:.0f} MiB" for size in sizes]
        rows.append([str(entry["vocabulary"]), entry["shape"], *cells])
    tables.table(
        "Peak extra memory of scoring one group, both views",
        ("vocabulary", "shape", *names, "T × V in float32, T = 2·K·R"),
        rows,
        "Usual is one rollout at a time, which needs the least memory.",
    )
    return found


def measure_memory(arguments: Sequence[str]) -> None:
    """Prints the bytes as JSON; run in a child process."""
    folder, prompt, response, rollouts, name = arguments
    vlm = groups.load(Path(folder))
    plain = None if name == "engine" else groups.load_plain(Path(folder))
    engine = groups.engine_for(vlm)
    make_sides(vlm, plain, engine, QUICK)[name]()  # warm-up of libraries, thread pools and kernels
    run = make_sides(vlm, plain, engine, Shape(prompt=int(prompt), response=int(response), rollouts=int(rollouts)))[
        name
    ]
    print(json.dumps({"bytes": timing.peak_extra_bytes(run)}))


def main() -> None:
    arguments = tables.parser(__doc__)
    parts = ("speed", "scaling", "vision", "memory")
    arguments.add_argument("--only", choices=parts, nargs="+", default=parts)
    options = arguments.parse_args()
    tables.apply(options)
    if options.child:
        measure_memory(options.child)
        return
    shapes = tables.chosen(options, SHAPES, usual=2)
    headline = shapes[0]
    numbers: dict[str, Any] = {}
    with groups.model_folder(32_000) as folder, groups.model_folder(151_936) as wide:
        vlm = groups.load(folder)
        if "speed" in options.only:
            numbers["speed"] = compare(vlm, groups.load_plain(folder), shapes, options.repeats)
        if "scaling" in options.only:
            numbers["scaling"] = scaling(vlm, groups.engine_for(vlm), headline, options.repeats)
        if "vision" in options.only:
            numbers["vision"] = vision_runs(vlm, groups.engine_for(vlm), headline)
        if "memory" in options.only:
            numbers["memory"] = memory(folder, wide, options.quick)
    tables.save(options.json, "paired_scoring", numbers)


if __name__ == "__main__":
    main()
