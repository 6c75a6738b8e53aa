"""The trainer's patience with its teacher."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from vaopd.client import GroupFailure
from vaopd.errors import InvalidInput, NotFound, Unavailable
from vaopd.types import ScoreRequest
from vaopd_trainer.scorer import ask_teacher


def a_request(group_id: str) -> ScoreRequest:
    return ScoreRequest(group_id=group_id, responses=(np.array([1], np.int32),))


class LongAway:
    """A teacher whose client gives up twice, once in the middle of a call."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.columns: list[list[str]] = []

    def score(self, groups: Sequence[ScoreRequest], *, columns: Sequence[str]) -> Iterator[GroupFailure]:
        self.columns.append(list(columns))
        self.asked.append([group.group_id for group in groups])
        if len(self.asked) == 1:
            raise Unavailable("it can't be reached")
        for number, group in enumerate(groups):
            if number == 1 and len(self.asked) == 2:
                raise Unavailable("it was silent for 300 s")
            yield GroupFailure(group_id=group.group_id, error=InvalidInput("no matter"))


def test_a_teacher_that_is_away_for_long_is_asked_again_for_what_is_missing() -> None:
    teacher = LongAway()
    requests = [a_request("a"), a_request("b")]
    columns = ["view_divergence_nats"]
    results = list(ask_teacher(teacher, requests, closed=threading.Event(), columns=columns))  # type: ignore[arg-type]
    assert [result.group_id for result in results] == ["a", "b"]
    assert teacher.asked == [["a", "b"], ["a", "b"], ["b"]]
    assert teacher.columns == [columns] * 3


class WithoutRoom:
    """A teacher that drops the images of its first call before it reads them."""

    def __init__(self) -> None:
        self.calls = 0

    def score(self, groups: Sequence[ScoreRequest], *, columns: Sequence[str]) -> Iterator[GroupFailure]:
        self.calls += 1
        error = NotFound("image is not stored here") if self.calls == 1 else InvalidInput("no matter")
        yield from (GroupFailure(group_id=group.group_id, error=error) for group in groups)


def test_images_that_found_no_room_end_no_run() -> None:
    results = list(ask_teacher(WithoutRoom(), [a_request("a")], closed=threading.Event()))  # type: ignore[arg-type]
    assert [type(result.error) for result in results if isinstance(result, GroupFailure)] == [InvalidInput]


def test_when_the_run_ends_nobody_waits_any_more() -> None:
    closed = threading.Event()
    closed.set()
    with pytest.raises(Unavailable):
        list(ask_teacher(LongAway(), [a_request("a")], closed=closed))  # type: ignore[arg-type]
