"""The laboratory's worlds: handwritten digits to read, answers about them, and a teacher that knows both processes.

A world is one line of `table.WORLDS`. Worlds with answers of one form and length share a `Language`, so that their runs
can share a batch. The teacher isn't learnt, apart from its eye: it has the exact probability of every next token.

Shapes: R runs (or S seeds), N rollouts of a run, T response tokens, V vocabulary, m digits of a picture.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaopd.data.handwritten_geometry import load_scans

CELL_PX = 10
"""A scan of 8×8 px lies at one of nine places in a cell of 10×10; a picture is a row of m cells."""
_SHIFTS = 9
_EYE_FLOOR = 1e-3
"""The probability that the teacher leaves to every digit, however sure its eye is."""
PRIOR = (0.22, 0.17, 0.13, 0.11, 0.09, 0.08, 0.07, 0.05, 0.05, 0.03)
"""The student's habit: which digit it writes where it doesn't look."""


@dataclass(frozen=True, kw_only=True)
class World:
    """A teacher and the students' past. The student first learns to read, then, perhaps, to neglect the picture."""

    name: str
    meaning: str
    form: Literal["words", "phrases"] = "words"
    words: int = 12
    """Of form "words": words before each digit."""
    second_order: float = 0.6
    """Of form "words": how much of the next word depends on the word before the last one too."""
    same_habits: bool = False
    """Whether the student's second-order habits are the teacher's."""
    scans_per_digit: int | None = None
    """The student has seen so few scans of each digit, and misreads others with confidence. None: all of them."""
    reading_steps: int = 200
    """Pre-training on true digits, with an extra loss on them."""
    neglecting_steps: int = 100
    """Then so many steps in which most digits come from a prior."""
    neglect: float = 0.6
    """The share of digits that come from the prior in these steps."""
    learned_teacher: bool = False
    """Whether the teacher is a network that has learnt the process, in place of the process itself."""


class Draws:
    """Random numbers of several seeds, in [0, 1): a seed's do not depend on which other seeds are drawn."""

    def __init__(self, seeds: Sequence[int], purpose: int, device: torch.device) -> None:
        self._device = device
        self._generators = [torch.Generator().manual_seed(1_000_003 * purpose + seed) for seed in seeds]

    def uniform(self, *shape: int) -> Tensor:
        """Returns (S, *shape)."""
        drawn = torch.stack([torch.rand(shape, generator=generator) for generator in self._generators])
        return drawn.to(self._device)


class Pictures:
    """Draws pictures, rows of m cells, from the scans of one split."""

    def __init__(self, split: Literal["train", "validation", "test"], device: torch.device) -> None:
        scans = load_scans(split)
        stacked = torch.tensor(np.concatenate([scans[digit] for digit in range(10)]))
        self._labels = torch.tensor(np.repeat(np.arange(10), [len(scans[digit]) for digit in range(10)])).to(device)
        padded = F.pad(stacked, (2, 2, 2, 2))
        self._cells = torch.stack(
            [padded[:, 2 - y : 12 - y, 2 - x : 12 - x] for y, x in itertools.product(range(3), repeat=2)]
        ).to(device)

    def pool(self, seeds: Sequence[int], scans_per_digit: int | None) -> Tensor:
        """Chooses the scans that each seed's student has seen: (S, n) indices."""
        if scans_per_digit is None:
            return torch.arange(len(self._labels), device=self._labels.device).expand(len(seeds), -1)
        labels = self._labels.cpu().numpy()
        chosen = [
            np.concatenate([rng.choice(np.flatnonzero(labels == d), scans_per_digit, replace=False) for d in range(10)])
            for rng in map(np.random.default_rng, seeds)
        ]
        return torch.tensor(np.stack(chosen), device=self._labels.device)

    def draw(self, uniform: Tensor, pool: Tensor) -> tuple[Tensor, Tensor]:
        """Draws from numbers (S, B, m, 2) and a pool (S, n): -> cells (S, B, m, 10, 10) and digits (S, B, m)."""
        places = (uniform[..., 0] * pool.shape[1]).long().flatten(1)
        scans = pool.gather(1, places).view(uniform.shape[:-1])
        return self._cells[(uniform[..., 1] * _SHIFTS).long(), scans], self._labels[scans]


def pixelate(cells: Tensor) -> Tensor:
    """Pixelates whole pictures to 10 % of each side, as `vaopd.degradation` does: (..., m, 10, 10) -> the same."""
    m = cells.shape[-3]
    pictures = cells.transpose(-3, -2).reshape(-1, 1, CELL_PX, CELL_PX * m)
    small = F.interpolate(pictures, size=(1, m), mode="bilinear", antialias=True, align_corners=False)
    return small.view(*cells.shape[:-2], 1, 1).expand(cells.shape).contiguous()


class Eye(nn.Module):
    """The teacher's eye, trained on clear and on pixelated cells, so that it knows how little the latter show."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(CELL_PX**2, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        )

    def forward(self, cells: Tensor) -> Tensor:
        return self.layers((cells.flatten(-2) - 0.3) / 0.35)

    @torch.no_grad()
    def look(self, cells: Tensor) -> Tensor:
        """Returns the probability of each digit, (..., m, 10, 10) -> (..., m, 10)."""
        return (1 - 10 * _EYE_FLOOR) * self(cells).softmax(-1) + _EYE_FLOOR


def pick(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Draws one index of each row: (..., V), (...) -> (...); the probabilities need not sum to 1."""
    cumulated = probabilities.cumsum(-1)
    drawn = (cumulated <= uniform[..., None] * cumulated[..., -1:]).sum(-1)
    return drawn.clamp_max(probabilities.shape[-1] - 1)
