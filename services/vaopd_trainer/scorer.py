"""Scores a rank's groups as they arrive, beside the generation of the others.

In: rollout groups and their prompts. Out: ScoredGroups, or why one can't be trained on. Waits for: the teacher.
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

import numpy as np

from vaopd import images
from vaopd.client import GroupFailure, SyncTeacherClient
from vaopd.errors import Busy, InvalidInput, Mismatch, Unavailable
from vaopd.telemetry import tracing
from vaopd.types import GroupScore, Prompt, RolloutGroup, ScoreRequest, images_in_order
from vaopd.vlm.model import Vlm
from vaopd.vlm.prompts import PreparedPrompt
from vaopd_trainer.student_loss import ScoredGroup

log = logging.getLogger(__name__)

_CHECK_EVERY_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A group that the student's or the teacher's checks refuse; trying again would not help."""

    group_id: str
    reason: str


class BusyTime:
    """Seconds in which at least one of several threads was at it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._active = 0
        self._since = 0.0
        self._seconds = 0.0

    @contextmanager
    def measured(self) -> Iterator[None]:
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
        """The seconds since the last `take`; nobody may be at it now."""
        with self._lock:
            seconds, self._seconds = self._seconds, 0.0
        return seconds


class Scorer:
    """One per rank. `submit` returns at once; `results` waits for everything submitted since the last call."""

    def __init__(
        self,
        *,
        teacher: SyncTeacherClient,
        student: Vlm,
        prompt_of: Callable[[str], tuple[int, Prompt]],
        max_tokens: int,
        threads: int = 4,
    ) -> None:
        self.busy = BusyTime()
        """When groups were being prepared or at the teacher, beside the generation of the others and after it."""
        self._teacher = teacher
        self._student = student
        self._prompt_of = prompt_of
        self._max_tokens = max_tokens
        self._closed = threading.Event()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="score")
        self._futures: list[Future[list[ScoredGroup | Refused]]] = []

    def submit(self, groups: Sequence[RolloutGroup]) -> None:
        if groups:
            # With the context of here, so that the call belongs to the step's trace.
            context = contextvars.copy_context()
            self._futures.append(self._pool.submit(context.run, self._score, list(groups)))

    def results(self, *, check: Callable[[], None]) -> Iterator[ScoredGroup | Refused]:
        """Raises what ended a scoring call. `check` is called while it waits and may raise to end the wait."""
        futures, self._futures = self._futures, []
        for future in futures:
            while not wait([future], timeout=_CHECK_EVERY_S).done:
                check()
            yield from future.result()

    def close(self) -> None:
        """Ends at once, also while the teacher is away: its client goes first, so that nobody waits for an answer."""
        self._closed.set()
        self._teacher.close()
        self._pool.shutdown(cancel_futures=True)

    def _score(self, groups: list[RolloutGroup]) -> list[ScoredGroup | Refused]:
        ids = [group.group_id for group in groups]
        with self.busy.measured(), tracing.span("score groups", groups=ids):
            return self._scored(groups)

    def _scored(self, groups: list[RolloutGroup]) -> list[ScoredGroup | Refused]:
        results: list[ScoredGroup | Refused] = []
        prepared: dict[str, tuple[int, PreparedPrompt, RolloutGroup]] = {}
        requests = []
        for group in groups:
            index, prompt = self._prompt_of(group.group_id)
            try:
                prepared[group.group_id] = (index, self._prepare(prompt, group), group)
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
        for answer in answers(self._teacher, requests, closed=self._closed):
            if isinstance(answer, GroupFailure):
                # What the teacher can't answer now is not the group's fault: it ends the step, not the group.
                if not isinstance(answer.error, InvalidInput | Mismatch):
                    raise answer.error
                results.append(Refused(group_id=answer.group_id, reason=str(answer.error)))
                continue
            index, prepared_prompt, group = prepared[answer.group_id]
            results.append(ScoredGroup(index=index, group=group, prompt=prepared_prompt, score=answer))
        return results

    def _prepare(self, prompt: Prompt, group: RolloutGroup) -> PreparedPrompt:
        """The student's own reading of the prompt, which must be what the rollout engine read."""
        decoded = {image.sha256: self._student.prepare_image(images.decode(image)) for image in prompt.images}
        rendered = self._student.render(prompt.messages, decoded)
        if not np.array_equal(rendered.token_ids, group.prompt_token_ids):
            raise Mismatch(
                f"group {group.group_id}: the rollout engine read a prompt of {len(group.prompt_token_ids)} tokens, "
                f"the trainer renders {len(rendered.token_ids)} others; use one model folder and equal pixel bounds"
            )
        for rollout in group.rollouts:
            self._student.check_response(rollout.response_ids, rendered, max_tokens=self._max_tokens)
        return rendered


def answers(
    teacher: SyncTeacherClient, requests: Sequence[ScoreRequest], *, closed: threading.Event
) -> Iterator[GroupScore | GroupFailure]:
    """One per request, however long the teacher is away: as with rollout workers, waiting for it costs nothing."""
    waiting = {request.group_id: request for request in requests}
    while waiting:
        try:
            for answer in teacher.score(list(waiting.values())):
                del waiting[answer.group_id]
                yield answer
        except (Unavailable, Busy) as error:
            if closed.is_set():
                raise
            log.warning("%d groups wait for the teacher: %s", len(waiting), error)
