"""The paper's recipe a second time: plain Python, numpy and float64, from the specification alone (arXiv 2605.21924).

It imports nothing of vaopd. `test_3_recipe` compares it with what the product does. Log-probs are lists or arrays (T,)
of one rollout, in nats; a group is a list of K rollouts.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import PIL.Image
import torch

SETTINGS = {
    "run.seed": 42,
    "data.instruction": "",
    "data.max_prompt_tokens": 8192,
    "data.min_pixels": 262_144,
    "data.max_pixels": 4_194_304,
    "student.model": "Qwen/Qwen3-VL-2B-Instruct",
    "student.dtype": "bfloat16",
    "student.train_vision_tower": True,
    "teacher.payload": "hidden",
    "degradation.kind": "pixelate",
    "degradation.strength": 0.1,
    "objective.variant": "va_opd",
    "objective.temperature": 1.0,
    "objective.high_fraction": 0.2,
    "objective.high_weight": 0.5,
    "rollout.temperature": 0.7,
    "rollout.top_p": 0.95,
    "rollout.max_new_tokens": 4096,
    "trainer.prompts_per_step": 16,
    "trainer.rollouts_per_prompt": 4,
    "trainer.learning_rate": 1e-6,
    "trainer.betas": (0.9, 0.95),
    "trainer.weight_decay": 0.1,
    "trainer.max_grad_norm": 1.0,
    "trainer.max_policy_lag": 0,
    "evaluation.every": 50,
    "evaluation.prompts": 200,
    "evaluation.samples": 8,
    "evaluation.temperature": 1.0,
}
EPOCHS = 5
PROBLEMS = {"geometry3k": 2101, "virl39k": 38_870}
HELD_OUT = sorted(random.Random(42).sample(range(300), 200))
"""Geometry3K's validation problems that choose the checkpoint, for both training sets."""


def count_steps(problems: int, *, per_step: int = 16, epochs: int = EPOCHS) -> int:
    """An epoch drops its last, incomplete batch."""
    return problems // per_step * epochs


def learning_rate(step: int, *, steps: int, peak: float = 1e-6) -> float:
    """The rate of a step, counted from 0: linear over 5 % of the steps, rounded down, then half a cosine to 0."""
    warmup = math.floor(Fraction(5, 100) * steps)
    if step < warmup:
        return peak * step / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


# -- pictures ----------------------------------------------------------------------------------------------------------


def scaled_size(width: int, height: int, *, least: int, most: int) -> tuple[int, int]:
    """Both sides times one factor, floored: ⌊w·√(area / (w·h))⌋ is ⌊√(w·area / h)⌋, in whole numbers."""
    area = min(max(width * height, least), most)
    if area == width * height:
        return width, height
    return max(1, math.isqrt(width * area // height)), max(1, math.isqrt(height * area // width))


def may_fall_short(side: int, other: int, *, least: int, most: int) -> bool:
    """Whether the side is whole before it is floored: the paper's code, in binary, may lose a pixel then."""
    area = min(max(side * other, least), most)
    squared = Fraction(side * area, other)
    return squared.denominator == 1 and math.isqrt(squared.numerator) ** 2 == squared.numerator


def scale(picture: PIL.Image.Image, *, least: int, most: int) -> PIL.Image.Image:
    return picture.resize(scaled_size(*picture.size, least=least, most=most), PIL.Image.Resampling.BICUBIC)


def pixelate(picture: PIL.Image.Image) -> PIL.Image.Image:
    """To a tenth of each side and back, by Pillow."""
    small = (max(1, picture.width // 10), max(1, picture.height // 10))
    return picture.resize(small, PIL.Image.Resampling.BILINEAR).resize(picture.size, PIL.Image.Resampling.NEAREST)


def pixelate_by_formula(picture: PIL.Image.Image) -> np.ndarray:
    """The same in float64, without Pillow's rounding between its passes: (height, width, 3) in 0 … 255."""
    down, along = _average(picture.height), _average(picture.width)
    cells = np.einsum("ry,yxb,cx->rcb", down, np.array(picture, np.float64), along)
    return cells[_find_cells(picture.height)][:, _find_cells(picture.width)]


def _average(side: int) -> np.ndarray:
    """Bilinear shrinking is a triangle over twice a cell's length: each pixel's share of each cell, (cells, side)."""
    cells = max(1, side // 10)
    length = side / cells
    centres = (np.arange(cells) + 0.5) * length
    shares = np.maximum(0.0, 1 - np.abs(np.arange(side) + 0.5 - centres[:, None]) / length)
    return shares / shares.sum(-1, keepdims=True)


def _find_cells(side: int) -> list[int]:
    """The cell over each pixel's centre: ⌊(x + ½)·cells / side⌋, in whole numbers."""
    return [(2 * x + 1) * max(1, side // 10) // (2 * side) for x in range(side)]


def find_inner(side: int) -> list[int]:
    """The pixels whose centre is within a cell. One on an edge is whichever neighbour's, as binary rounding has it."""
    return [x for x in range(side) if (2 * x + 1) * max(1, side // 10) % (2 * side)]


# -- objective ---------------------------------------------------------------------------------------------------------


def visual_advantage(original: Sequence[float], degraded: Sequence[float]) -> list[float]:
    return [max(float(a) - float(b), 0.0) for a, b in zip(original, degraded, strict=True)]


def rollout_weights(advantages: Sequence[Sequence[float]]) -> list[float]:
    means = [math.fsum(a) / len(a) for a in advantages]
    mean = math.fsum(means) / len(means)
    deviation = math.sqrt(math.fsum((m - mean) ** 2 for m in means) / len(means))
    powers = [math.exp((m - mean) / (deviation + 1e-6)) for m in means]
    return [power / math.fsum(powers) for power in powers]


def token_weights(advantages: Sequence[Sequence[float]]) -> list[list[float]]:
    """What each token's KL is multiplied with in the loss of its group."""
    found = []
    for weight, a in zip(rollout_weights(advantages), advantages, strict=True):
        order = sorted(range(len(a)), key=lambda t: (-a[t], t))
        high = set(order[: -(-len(a) // 5)])
        low = len(a) - len(high)
        shares = (0.5, 0.5) if low else (1.0, 0.0)
        found.append([weight * (shares[0] / len(high) if t in high else shares[1] / low) for t in range(len(a))])
    return found


def reverse_kl(student_logprobs: torch.Tensor, teacher_logprobs: torch.Tensor) -> torch.Tensor:
    """KL(p_S ‖ p_T) over the whole vocabulary: (T, V), (T, V) -> (T,)."""
    return (student_logprobs.exp() * (student_logprobs - teacher_logprobs)).sum(-1)


# -- optimizer ---------------------------------------------------------------------------------------------------------


@dataclass
class AdamW:
    """Decoupled weight decay, bias-corrected moments, and the gradient clipped to norm 1 first."""

    weights: np.ndarray
    betas: tuple[float, float] = (0.9, 0.95)
    decay: float = 0.1
    eps: float = 1e-8
    steps: int = 0
    moments: list[np.ndarray] = field(default_factory=list)

    def step(self, gradient: np.ndarray, rate: float) -> None:
        gradient = gradient * min(1.0, 1.0 / (float(np.linalg.norm(gradient)) + 1e-6))
        self.moments = self.moments or [np.zeros_like(gradient), np.zeros_like(gradient)]
        self.steps += 1
        corrected = []
        for index, (beta, term) in enumerate(zip(self.betas, (gradient, gradient**2), strict=True)):
            self.moments[index] = beta * self.moments[index] + (1 - beta) * term
            corrected.append(self.moments[index] / (1 - beta**self.steps))
        self.weights = self.weights * (1 - rate * self.decay) - rate * corrected[0] / (np.sqrt(corrected[1]) + self.eps)


# -- answers -----------------------------------------------------------------------------------------------------------


def committed_answer(text: str) -> str | None:
    """The earliest of a balanced box and the sentence after a marker, or the box that follows the marker at once."""
    boxes = [
        (found.start(), box) for found in re.finditer(r"\\boxed(?=\{)", text) if (box := _read_box(text, found.end()))
    ]
    marker = re.search(r"(?:Final answer:|Answer:|The answer is|答案(?:是|为|：)) *", text, re.IGNORECASE)
    if marker and (not boxes or marker.start() < boxes[0][0]):
        rest = text[marker.end() :]
        return _read_box(rest, len("\\boxed")) if rest.startswith("\\boxed{") else re.split(r"\n|[.。](?!\d)", rest)[0]
    return boxes[0][1] if boxes else None


def _read_box(text: str, start: int) -> str | None:
    depth = 0
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + 1 : end]
    return None
