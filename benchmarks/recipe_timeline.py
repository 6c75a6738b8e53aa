"""Computes one step of the recipe before and after the work on GPUs: one card each for teacher, worker and trainer.

`python benchmarks/recipe_timeline.py` prints the table of benchmarks/RESULTS.md; `--write` puts it there. Rates are
those that one H100 measured, sampling is counted by memory traffic, lengths are log-normal and cut as configured, and
preparing images was measured on one CPU core.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vaopd.config import Config, load_config
from vaopd.launch.estimate import (
    MEMORY_BYTES_PER_S,
    PEAK_FLOPS,
    SCORING_SHARE,
    TRAINING_SHARE,
    count_forward,
    count_pixels,
    count_prompt_tokens,
)
from vaopd.vlm import memory
from vaopd.vlm.memory import Model

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
BEGIN, END = "<!-- made by benchmarks/recipe_timeline.py --write -->", "<!-- its end -->"
MEDIAN, SIGMA, SEED = 500, 1.0, 42
PREPARING_S = 0.043
"""CPU: a megapixel image decoded, degraded and cut into patches, both views, one core."""


@dataclass(frozen=True, kw_only=True)
class Version:
    """How a version of the code takes a step; the figures are those of one H100 in benchmarks/RESULTS.md."""

    name: str
    streams: bool
    """Groups leave the worker as they end, and evaluation goes beside training."""
    scoring_share: float
    training_share: float
    """Both of the card's peak, by useful operations."""
    optimizer_s: float
    handing_over_s: float


BEFORE = Version(
    name="before",
    streams=False,
    scoring_share=SCORING_SHARE * 283 / 477,
    training_share=TRAINING_SHARE * 349 / 401,
    optimizer_s=0.096,
    handing_over_s=14.7,
)
AFTER = Version(
    name="after",
    streams=True,
    scoring_share=SCORING_SHARE,
    training_share=TRAINING_SHARE,
    optimizer_s=0.036,
    handing_over_s=4.6,
)


def draw_lengths(count: int, *, longest: int, seed: int = SEED) -> np.ndarray:
    """Draws response lengths (count,)."""
    drawn = np.random.default_rng(seed).lognormal(np.log(MEDIAN), SIGMA, count)
    return np.clip(drawn.round(), 1, longest).astype(int)


def sample(lengths: Sequence[int], model: Model, *, prompt: int, at_once: int) -> np.ndarray:
    """Returns when each response ends, in seconds; the next one is admitted when one ends.

    Each token of all takes the time in which the weights and the keys of those in progress pass through the memory.
    """
    waiting = list(range(len(lengths)))[::-1]
    running: list[tuple[int, int]] = []  # the token at which a response ends, and its number
    ends, now, token = np.zeros(len(lengths)), 0.0, 0
    held = 0.0  # the sum of the tokens in progress
    while waiting or running:
        while waiting and len(running) < at_once:
            number = waiting.pop()
            heapq.heappush(running, (token + lengths[number], number))
            held += prompt
        steps = running[0][0] - token
        tokens = steps * held + len(running) * steps * (steps + 1) / 2
        now += (steps * 2 * model.parameters + tokens * model.kv_bytes_per_token) / MEMORY_BYTES_PER_S
        token, held = running[0][0], held + steps * len(running)
        while running and running[0][0] == token:
            _, number = heapq.heappop(running)
            ends[number] = now
            held -= prompt + lengths[number]
    return ends


def compute_step(config: Config, version: Version, *, evaluates: bool = False) -> dict[str, float]:
    """Returns when things have happened, in seconds from the publishing of a policy; the keys are the table's rows.

    evaluates: its policy is evaluated, too. That used to come before the step; now it goes beside it, and ends before
    the weights change.
    """
    student, teacher = memory.find_model(config.student.model), memory.find_model(config.teacher.model)
    groups, siblings = config.trainer.prompts_per_step, config.trainer.rollouts_per_prompt
    prompt, pixels = count_prompt_tokens(config), count_pixels(config)
    longest = config.rollout.max_new_tokens
    lengths = draw_lengths(groups * siblings, longest=longest)
    held_out = draw_lengths(config.evaluation.prompts * config.evaluation.samples, longest=longest, seed=SEED + 1)
    at_once = config.rollout.tokens_in_flight // longest
    beside = held_out if evaluates and version.streams else held_out[:0]
    all_ends = sample(np.concatenate((lengths, beside)), student, prompt=prompt, at_once=at_once)
    ends = all_ends[: len(lengths)].reshape(groups, siblings).max(axis=1)
    evaluated = version.handing_over_s + (all_ends[len(lengths) :].max() if len(beside) else 0.0)
    first = 0.0
    if evaluates and not version.streams:
        batches = [held_out[at : at + at_once] for at in range(0, len(held_out), at_once)]
        first = sum(sample(batch, student, prompt=prompt, at_once=at_once).max() for batch in batches)
    mean = lengths.reshape(groups, siblings).mean(axis=1)

    def count(model: Model, response: float) -> float:
        return count_forward(model, prompt=prompt, response=round(response), siblings=siblings, pixels=pixels)

    arrived = version.handing_over_s + first + (ends if version.streams else np.full(groups, ends.max()))
    scored, free = [], 0.0
    for group in np.argsort(arrived, kind="stable"):
        begun = max(free, arrived[group] + PREPARING_S)
        free = begun + 2 * count(teacher, mean[group]) / (version.scoring_share * PEAK_FLOPS)
        scored.append(free)
    forward = sum(3 * count(student, length) / (version.training_share * PEAK_FLOPS) for length in mean)
    trained = max(scored[-1] + forward, evaluated) + version.optimizer_s
    return {
        "the worker has the weights": version.handing_over_s,
        "the first group has arrived": arrived.min(),
        "half of the groups are scored": scored[groups // 2 - 1],
        "all groups have arrived": arrived.max(),
        "all groups are scored": scored[-1],
        "the step is trained": trained,
    }


def make_table() -> str:
    """Makes the section's table in Markdown."""
    config = load_config(ROOT / "configs" / "geometry3k-8b.toml")
    before, after = (
        {
            **compute_step(config, version),
            "a step with an evaluation is trained": compute_step(config, version, evaluates=True)[
                "the step is trained"
            ],
        }
        for version in (BEFORE, AFTER)
    )
    lines = ["| seconds from a policy's publishing until | before | after | |", "| --- | --- | --- | --- |"]
    lines += [f"| {row} | {old:.1f} | {after[row]:.1f} | {old / after[row]:.1f} × |" for row, old in before.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/RESULTS.md")
    if not parser.parse_args().write:
        print(make_table())
        return
    text = RESULTS.read_text()
    head, tail = text[: text.index(BEGIN)], text[text.index(END) :]
    RESULTS.write_text(f"{head}{BEGIN}\n\n{make_table()}\n\n{tail}")


if __name__ == "__main__":
    main()
