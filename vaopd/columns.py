"""The numbers that the teacher computes for each response token: every column's name, unit and meaning.

A column has one name in the engine, on the wire, in `vaopd.types.GroupScore` and in the API's JSON. A new one takes a
line here (`on_request=True`), and a function in the teacher's `engines/columns.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A number that the teacher computes for each response token of a group: (M,), siblings one after the other.

    >>> COLUMNS["teacher_entropy_nats"].unit
    'nats'
    """

    name: str
    meaning: str
    unit: str = "nats"
    dtype: Literal["float32"] = "float32"
    on_request: bool = False
    """Computed and sent only when a request names it; the others are part of every score."""


COLUMNS: dict[str, Column] = {
    column.name: column
    for column in (
        Column(name="teacher_logprobs", meaning="log-prob of the token in the original view"),
        Column(name="degraded_logprobs", meaning="log-prob of the token in the degraded view"),
        Column(name="visual_advantage", meaning="max(teacher_logprobs − degraded_logprobs, 0)"),
        Column(
            name="teacher_entropy_nats",
            meaning="entropy of the teacher's next-token distribution, original view",
            on_request=True,
        ),
        Column(
            name="view_divergence_nats",
            meaning="KL of the teacher's next-token distribution, original view from degraded view",
            on_request=True,
        ),
    )
}
"""Every column by its name."""


def columns_on_request() -> tuple[str, ...]:
    """Names the columns that a request may ask for."""
    return tuple(name for name, column in COLUMNS.items() if column.on_request)
