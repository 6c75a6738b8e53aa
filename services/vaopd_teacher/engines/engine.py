"""The interface of the teacher's engines: `PreparedGroup` in, `EngineResult` out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from vaopd.errors import NumericalError, VaopdError
from vaopd.scoring.weights import visual_advantage
from vaopd.types import Payload, PayloadKind
from vaopd.vlm.model import Segment
from vaopd.vlm.prompts import PreparedPrompt

View = Literal["original", "degraded"]
VIEWS: tuple[View, View] = ("original", "degraded")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PreparedGroup:
    """A checked prompt group that waits for the device only; responses: K arrays (T_k,) int64.

    `columns`: names of the columns that were asked for, see `vaopd.columns.COLUMNS`.
    """

    group_id: str
    original: PreparedPrompt
    degraded: PreparedPrompt
    responses: tuple[np.ndarray, ...]
    payload: PayloadKind
    top_k: int
    columns: tuple[str, ...] = ()

    def prompt(self, view: View) -> PreparedPrompt:
        """Returns the prompt with the images of one view."""
        return self.original if view == "original" else self.degraded

    def segment(self, view: View) -> Segment:
        """Returns one view as the model reads it: the prompt and its responses."""
        return Segment(prompt=self.prompt(view), responses=self.responses)

    @property
    def tokens(self) -> int:
        """Counts the tokens that a forward computes for the group, the prompt once in each view."""
        return sum(self.segment(view).tokens for view in VIEWS)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EngineResult:
    """A scored group. `columns`: (M,) float32 by name, the K rollouts one after the other; VA is among them."""

    group: PreparedGroup
    columns: Mapping[str, np.ndarray]
    payload: Payload

    @property
    def group_id(self) -> str:
        """The id of the group."""
        return self.group.group_id


def finish(group: PreparedGroup, columns: Mapping[str, np.ndarray], payload: Payload) -> EngineResult | NumericalError:
    """Adds the visual advantage to an engine's columns, and returns an error when a number is not finite."""
    for name, column in columns.items():
        if bad := int((~np.isfinite(column)).sum()):
            return NumericalError(
                f"group {group.group_id!r}: {bad} of {column.size} numbers in {name} are not finite; check the "
                "teacher's weights and dtype"
            )
    advantage = visual_advantage(columns["teacher_logprobs"], columns["degraded_logprobs"])
    return EngineResult(group=group, columns={**columns, "visual_advantage": advantage}, payload=payload)


class Engine(Protocol):
    """An engine, as the scheduler uses it from one thread."""

    def score(self, groups: Sequence[PreparedGroup]) -> Iterator[EngineResult | VaopdError]:
        """Yields one result per group, in the order of the groups; an error concerns that group alone.

        Raises only when the engine can't continue at all.
        """
