"""Scores a rank's groups as they arrive, while workers still sample others.

In: rollout groups and their prompts. Out: ScoredGroups, and a Refused with its reason for each group that can't be
trained on. Waits for the teacher.
"""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vaopd import images
from vaopd.errors import Busy, InvalidInput, Mismatch, NotFound, TlsRefused, Unavailable
from vaopd.telemetry import tracing
from vaopd.types import (
    GroupFailure,
    GroupId,
    GroupScore,
    Prompt,
    RolloutGroup,
    ScoreRequest,
    TeacherDescription,
    Tensor,
    images_in_order,
)
from vaopd.vlm.model import Vlm
from vaopd.vlm.prompts import PreparedPrompt
from vaopd_trainer.student_loss import ScoredGroup

log = logging.getLogger(__name__)

_CHECK_EVERY_S = 1.0
_TLS_AGAIN_S = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A group that the student's or the teacher's checks refuse. Trying again would not help."""

    group_id: str
    reason: str


class Teacher(Protocol):
    """What scores groups: `SyncTeacherClient`, or the student's own base model."""

    def describe(self) -> TeacherDescription:
        """Returns which model it is, and what it accepts."""

    def head(self) -> Tensor:
        """Returns its LM head, (V, D)."""

    def score(
        self, groups: Sequence[ScoreRequest], *, columns: Sequence[str] = ()
    ) -> Iterator[GroupScore | GroupFailure]:
        """Yields one answer per group."""

    def close(self) -> None:
        """Lets calls in progress end."""


class BusyTime:
    """Measures the seconds in which at least one of several threads was working."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._active = 0
        self._since = 0.0
        self._seconds = 0.0

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Counts the calling thread as working while its `with` block runs."""
        with self._lock:
            if self._active == 0:
                self._since = time.monotonic()
            self._active += 1
        try:
            yield
        finally:
            with self._lock:
                self._active -= 1
                if self._active == 0:
                    self._seconds += time.monotonic() - self._since

    def take(self) -> float:
        """Returns the seconds since the last `take`; no thread may be working now."""
        with self._lock:
            seconds, self._seconds = self._seconds, 0.0
        return seconds


@dataclass(kw_only=True, eq=False)
class GroupScorer:
    """Scores the groups of one rank on threads of its own."""

    teacher: Teacher
    student: Vlm
    find_prompt: Callable[[GroupId], Prompt]
    max_tokens: int
    columns: Sequence[str] = ()
    """The teacher's columns that the objective needs."""
    threads: int = 4

    def __post_init__(self) -> None:
        self.busy = BusyTime()
        """The time in which groups were being prepared or at the teacher."""
        self._closed = threading.Event()
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="score")
        self._futures: list[Future[list[ScoredGroup | Refused]]] = []

    def submit(self, groups: Sequence[RolloutGroup]) -> None:
        """Begins to score these groups in one call of the teacher, and returns at once."""
        if groups:
            # In the caller's context, so that the call belongs to the step's trace.
            context = contextvars.copy_context()
            self._futures.append(self._pool.submit(context.run, self._score, list(groups)))

    def wait_for_results(self, *, check: Callable[[], None]) -> Iterator[ScoredGroup | Refused]:
        """Yields the outcome of every group submitted since the last call; waits for them.

        Raises the error that ended a scoring call. `check` is called during the wait and may raise to end it.
        """
        futures, self._futures = self._futures, []
        for future in futures:
            while not wait([future], timeout=_CHECK_EVERY_S).done:
                check()
            yield from future.result()

    def close(self) -> None:
        """Ends at once, also while the teacher is away: its client is closed first, so that no thread waits for it."""
        self._closed.set()
        self.teacher.close()
        self._pool.shutdown(cancel_futures=True)

    def _score(self, groups: list[RolloutGroup]) -> list[ScoredGroup | Refused]:
        ids = [group.group_id for group in groups]
        with self.busy.measure(), tracing.span("score groups", groups=ids):
            return self._prepare_and_ask(groups)

    def _prepare_and_ask(self, groups: list[RolloutGroup]) -> list[ScoredGroup | Refused]:
        results: list[ScoredGroup | Refused] = []
        prepared: dict[str, tuple[int, PreparedPrompt, RolloutGroup]] = {}
        requests = []
        for group in groups:
            group_id = GroupId.parse(group.group_id)
            prompt = self.find_prompt(group_id)
            try:
                prepared[group.group_id] = (group_id.index, self._prepare(prompt, group), group)
            except (InvalidInput, Mismatch) as error:
                results.append(Refused(group_id=group.group_id, reason=str(error)))
                continue
            requests.append(
                ScoreRequest(
                    group_id=group.group_id,
                    responses=tuple(rollout.response_ids for rollout in group.rollouts),
                    images=images_in_order(prompt.messages, prompt.images),
                    prompt_token_ids=group.prompt_token_ids,
                )
            )
        for answer in ask_teacher(self.teacher, requests, closed=self._closed, columns=self.columns):
            if isinstance(answer, GroupFailure):
                # An answer that the teacher can't give now is not the group's fault: it ends the step, not the group.
                if not isinstance(answer.error, InvalidInput | Mismatch):
                    raise answer.error
                results.append(Refused(group_id=answer.group_id, reason=str(answer.error)))
                continue
            index, prepared_prompt, group = prepared[answer.group_id]
            results.append(ScoredGroup(index=index, group=group, prompt=prepared_prompt, score=answer))
        return results

    def _prepare(self, prompt: Prompt, group: RolloutGroup) -> PreparedPrompt:
        """Renders the prompt with the student's processor; raises Mismatch if the rollout engine read other tokens."""
        decoded = {
            image.sha256: self.student.prepare_image(self.student.scale_image(images.decode(image)))
            for image in prompt.images
        }
        rendered = self.student.render(prompt.messages, decoded)
        if not np.array_equal(rendered.token_ids, group.prompt_token_ids):
            raise Mismatch(
                f"group {group.group_id}: the rollout engine read a prompt of {len(group.prompt_token_ids)} tokens, "
                f"the trainer renders {len(rendered.token_ids)} others; use one model folder and equal pixel bounds"
            )
        for rollout in group.rollouts:
            self.student.check_response(rollout.response_ids, rendered, max_tokens=self.max_tokens)
        return rendered


def ask_teacher(
    teacher: Teacher,
    requests: Sequence[ScoreRequest],
    *,
    closed: threading.Event,
    columns: Sequence[str] = (),
) -> Iterator[GroupScore | GroupFailure]:
    """Yields one answer per request, however long the teacher is away; raises only once `closed` is set.

    As with rollout workers, waiting for the teacher loses nothing.
    """
    waiting = {request.group_id: request for request in requests}
    while waiting:
        try:
            for answer in teacher.score(list(waiting.values()), columns=columns):
                if isinstance(answer, GroupFailure) and isinstance(answer.error, NotFound) and not closed.is_set():
                    log.warning("group %s waits for the teacher: %s", answer.group_id, answer.error)
                    continue
                del waiting[answer.group_id]
                yield answer
        except (Unavailable, Busy) as error:
            if closed.is_set():
                raise
            log.warning("%d groups wait for the teacher: %s", len(waiting), error)
            if isinstance(error, TlsRefused):  # until its certificate is renewed
                closed.wait(_TLS_AGAIN_S)
