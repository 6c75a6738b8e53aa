"""What an engine of the teacher takes and gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from vaopd.errors import VaopdError
from vaopd.types import Payload, PayloadKind
from vaopd.vlm.prompts import PreparedPrompt

View = Literal["original", "degraded"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PreparedGroup:
    """A prompt group that only the device is missing for; responses: K arrays (T_k,) int64."""

    group_id: str
    original: PreparedPrompt
    degraded: PreparedPrompt
    responses: tuple[np.ndarray, ...]
    payload: PayloadKind
    top_k: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScoredGroup:
    """teacher_logprobs and degraded_logprobs (M,) float32: the K rollouts one after the other."""

    teacher_logprobs: np.ndarray
    degraded_logprobs: np.ndarray
    payload: Payload


class Engine(Protocol):
    """What the scheduler needs of an engine; the thread that calls it is always the same."""

    def score(self, groups: Sequence[PreparedGroup]) -> Iterator[ScoredGroup | VaopdError]:
        """One result per group, in the order of the groups; an error is that group's alone.

        Raises only when the engine can't go on at all.
        """
        ...
