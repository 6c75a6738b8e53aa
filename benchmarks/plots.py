"""Draws the benchmarks' results: `python benchmarks/plots.py`, from benchmarks/results/*.json into docs/images.

The numbers were written by `--json`; the H100's lower bounds are computed here, by benchmarks/floor.py.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import floor
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vaopd.report.plots import COLOURS, RC
from vaopd.vlm import memory

ROOT = Path(__file__).parents[1]
SIDE_COLOURS = {
    "engine": COLOURS["va_opd"],
    "known image": "#f3b26b",
    "shared": COLOURS["va_opd"],
    "shared image": COLOURS["token_groups"],
    "image shared": COLOURS["token_groups"],
    "careful": COLOURS["standard"],
    "per sequence": COLOURS["standard"],
    "usual": COLOURS["rollout_weights"],
    "vllm": COLOURS["masked"],
}
SIDE_NAMES = {
    "engine": "this engine",
    "known image": "this engine, image known",
    "shared": "prompt shared",
    "shared image": "careful, image shared",
    "image shared": "per sequence, image shared",
    "careful": "careful per sequence",
    "per sequence": "per sequence",
    "usual": "the usual way",
    "vllm": "vLLM prompt_logprobs",
}


@contextmanager
def figure(path: Path, *, columns: int = 1, size: tuple[float, float]) -> Iterator[Any]:
    with matplotlib.rc_context(RC):
        drawn = Figure(figsize=size, layout="constrained")
        yield drawn.subplots(1, columns)
        drawn.savefig(path, dpi=160)
    print(path)


def bars(axes: Axes, entries: list[dict[str, Any]], names: list[str], *, unit: str) -> None:
    """Draws bars grouped by entry; an entry has `values` by name and, for some names, `marks`."""
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        places = [index + (number - (len(names) - 1) / 2) * width for index in range(len(entries))]
        values = [entry["values"][name] for entry in entries]
        axes.bar(places, values, width * 0.92, color=SIDE_COLOURS[name], label=SIDE_NAMES[name])
        marks = [(x, entry["marks"][name]) for x, entry in zip(places, entries, strict=True) if name in entry["marks"]]
        if marks:
            label = None if number else "by counted operations"
            axes.plot(*zip(*marks, strict=True), "_", color="#444444", markersize=9, label=label)
    axes.set_xticks(range(len(entries)), [entry["label"] for entry in entries])
    axes.set_ylabel(unit)
    axes.grid(axis="x", visible=False)


def label(shape: str) -> str:
    """Breaks a shape such as 'P 650, R 128, K 4' into two lines."""
    prompt, response, rollouts = shape.split(", ")
    return f"{prompt}, {rollouts}\n{response}"


def draw_scoring(numbers: dict[str, Any], vllm: dict[str, Any] | None, images: Path) -> None:
    entries = []
    by_vllm = {f["shape"]: f["seconds"]["new"] for f in vllm["speed"]} if vllm else {}
    for found in numbers["speed"]:
        seconds, counted = found["seconds"], found["operations"]
        names = ("usual", "careful", "shared image")
        values = {name: seconds[name] / seconds["engine"] for name in names}
        if by_vllm:
            both = by_vllm.get(found["shape"])
            values["vllm"] = both["vllm"] / both["engine"] if both else float("nan")
        marks = {name: counted[name] / counted["engine"] for name in names}
        entries.append({"label": label(found["shape"]), "values": values, "marks": marks})
    with figure(images / "bench-scoring.png", size=(8.6, 3.6)) as axes:
        bars(axes, entries, list(entries[0]["values"]), unit="time over the engine's")
        axes.axhline(1, color="#888888", linewidth=0.8)
        axes.set_title("Scoring one group in both views, an image that is new: how many times longer", loc="left")
        axes.legend(ncols=2, fontsize=8)


def draw_scaling(numbers: dict[str, Any], images: Path) -> None:
    found = numbers["scaling"]
    k = [f["k"] for f in found]
    with figure(images / "bench-k-scaling.png", size=(4.6, 3.2)) as axes:
        expected = [f["expected"] for f in found]
        axes.plot(k, expected, color="#888888", linestyle="--", label="(P + K·R) / (P + R)")
        axes.fill_between(k, [0.85 * e for e in expected], [1.15 * e for e in expected], color="#888888", alpha=0.15)
        for key, colour, name in (
            ("layers_growth", COLOURS["va_opd"], "layers alone, measured"),
            ("growth", COLOURS["standard"], "with the LM head, measured"),
        ):
            axes.plot(k, [f[key] for f in found], color=colour, marker="o", markersize=4, label=name)
        counted = [f["operations"] for f in found]
        axes.plot(k, counted, color=COLOURS["standard"], linestyle=":", label="with the LM head, counted")
        axes.set(xlabel="K, rollouts per group", ylabel="time over that of K = 1", ylim=(0, None), xticks=k)
        axes.set_title("Cost per group, P 650, R 128, image known; band: ± 15 %", loc="left", fontsize=8)
        axes.legend()


def draw_memory(numbers: dict[str, Any], images: Path) -> None:
    sides = ["engine", "usual", "careful"]
    vocabularies = sorted({f["vocabulary"] for f in numbers["memory"]})
    with figure(images / "bench-memory.png", columns=len(vocabularies), size=(8.6, 3.2)) as both:
        for axes, vocabulary in zip([both] if len(vocabularies) == 1 else both, vocabularies, strict=True):
            found = [f for f in numbers["memory"] if f["vocabulary"] == vocabulary]
            entries = [
                {
                    "label": f"R {f['response']}",
                    "values": {name: f["bytes"].get(name, math.nan) / 2**20 for name in sides},
                    "marks": {},
                }
                for f in found
            ]
            bars(axes, entries, sides, unit="peak extra memory, MiB")
            axes.set_title(f"vocabulary {vocabulary}, P 650, K 4, both views", loc="left", fontsize=8)
            axes.legend(fontsize=8)


def draw_training(numbers: dict[str, Any], images: Path) -> None:
    entries = []
    for found in numbers["speed"]:
        seconds, counted = found["seconds"], found["operations"]
        names = ("per sequence", "image shared")
        entries.append(
            {
                "label": label(found["shape"]),
                "values": {name: seconds[name] / seconds["shared"] for name in names},
                "marks": {name: counted[name] / counted["shared"] for name in names},
            }
        )
    with figure(images / "bench-train-step.png", size=(6.4, 3.4)) as axes:
        bars(axes, entries, ["per sequence", "image shared"], unit="time over that with shared prompts")
        axes.axhline(1, color="#888888", linewidth=0.8)
        axes.set_title("Forward and backward of one group: how many times longer", loc="left")
        axes.legend(fontsize=8)


def draw_floor(images: Path) -> None:
    model = floor.Model(memory.MODELS["8B"])
    entries: list[dict[str, Any]] = []
    for prompt, response in floor.SETTINGS:
        costs = {side: floor.count_cost_at(model, side, (prompt, response), rollouts=4) for side in floor.SIDES}
        values = {side: 16 * cost.h100_s for side, cost in costs.items()}
        entries.append({"label": f"P {prompt}\nR {response}", "values": values, "marks": {}})
    with figure(images / "bench-floor-h100.png", size=(6.4, 3.4)) as axes:
        bars(axes, entries, list(floor.SIDES), unit="seconds")
        axes.set_title("Qwen3-VL-8B on one H100, 16 groups of K = 4, both views: floor of a step's scoring",
                       loc="left", fontsize=8)  # fmt: skip
        axes.legend(fontsize=8)


def draw_full(numbers: dict[str, Any], path: Path) -> None:
    """Draws the parts of a step, medians, as `make gpu-full` measured them."""
    lines = numbers["phases"].get("recipe", {}).get("lines", [])
    found = [line["numbers"] for line in lines if "step_s" in line["numbers"]]
    if not found:
        return
    parts = {name: found[0][f"{name}_s"] for name in ("publish", "wait", "score", "forward_backward")}
    with figure(path, size=(6.4, 1.8)) as axes:
        left = 0.0
        for (name, seconds), colour in zip(parts.items(), COLOURS.values(), strict=False):
            axes.barh(0, seconds, left=left, color=colour, label=f"{name.replace('_', ' ')} {seconds:.1f} s")
            left += seconds
        axes.set(yticks=[], ylim=(-0.5, 1.0), xlabel="seconds")  # the legend is above the bar
        axes.set_title(f"A step of the recipe on {numbers['phases']['recipe']['machine']['device']}", loc="left")
        axes.legend(ncols=4, fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images")
    options = parser.parse_args()

    def read(name: str) -> dict[str, Any] | None:
        path = options.results / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    draw_floor(options.images)
    if scoring := read("paired_scoring"):
        draw_scoring(scoring, read("against_vllm"), options.images)
        draw_scaling(scoring, options.images)
        draw_memory(scoring, options.images)
    if training := read("train_step"):
        draw_training(training, options.images)
    for path in sorted(options.results.glob("gpu-full-*.json")):
        draw_full(json.loads(path.read_text()), options.images / f"bench-{path.stem}.png")


if __name__ == "__main__":
    main()
