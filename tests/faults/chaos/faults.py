"""Which faults, how many, and when: a seeded plan that is tied to the run's progress.

A share of the faults belongs to each step, and comes due at random moments after that step has begun. So a slow machine
has its faults later, none has more than a few between two checkpoints, and all have had theirs at the end.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "kill worker",
    "kill trainer",
    "kill teacher",
    "stop worker",
    "stop trainer",  # for longer than its lease; a second trainer takes over, then it wakes
    "stop teacher",
    "kill redis",
    "cut power of redis",  # SIGKILL, and the end of its append-only file is gone
    "empty redis",  # SIGKILL, and all of its append-only file is gone
    "stop redis",
    "fill redis",
    "fill disk of trainer",
    "cut network",
    "lose replies",
    "slow network",
]
# Of 10 000 groups. SIGKILLs: 105 and those that the killer groups cause; SIGSTOPs: 22; Redis dies 8 times.
NUMBERS: dict[Kind, int] = {
    "kill worker": 60,
    "kill trainer": 25,
    "kill teacher": 12,
    "stop worker": 12,
    "stop trainer": 4,
    "stop teacher": 4,
    "kill redis": 6,
    "cut power of redis": 1,
    "empty redis": 1,
    "stop redis": 2,
    "fill redis": 3,
    "fill disk of trainer": 3,
    "cut network": 4,
    "lose replies": 6,
    "slow network": 3,
}


@dataclass(frozen=True, kw_only=True)
class Fault:
    kind: Kind
    step: int
    delay_s: float
    """After the step has begun."""


def plan(seed: int, *, steps: int, share: float) -> list[Fault]:
    """`share`: of NUMBERS, at least one of each kind. The first and the last step are left in peace."""
    dice = random.Random(f"plan {seed}")
    kinds = [kind for kind, number in NUMBERS.items() for _ in range(max(1, round(number * share)))]
    dice.shuffle(kinds)
    spread = [1 + index * (steps - 2) // len(kinds) for index in range(len(kinds))]
    return [
        Fault(kind=kind, step=step, delay_s=dice.uniform(0.0, 0.4)) for kind, step in zip(kinds, spread, strict=True)
    ]
