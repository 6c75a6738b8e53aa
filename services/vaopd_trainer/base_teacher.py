"""The student's base model as the teacher: computed by the trainer, on the weights whose adapters it trains.

It answers as `SyncTeacherClient` does, from this process: each rank scores its own groups, between its steps.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np

from vaopd import payloads
from vaopd.config import Config
from vaopd.errors import NumericalError
from vaopd.scoring.weights import visual_advantage
from vaopd.types import GroupFailure, GroupScore, ScoreRequest, TeacherDescription, TeacherLimits, Tensor
from vaopd.vlm.adapters import adapters_off
from vaopd.vlm.model import Vlm
from vaopd.vlm.revision import compute_revision
from vaopd_trainer.two_views import ComputedView, Views, compute_views, pack_views, read_views


class BaseTeacher:
    """Scores with a student's base model. Several threads may ask; the student may not be trained meanwhile."""

    def __init__(self, student: Vlm, config: Config) -> None:
        self._student = student
        self._degradation = config.degradation.as_degradation()
        self._kind = config.teacher.payload
        self._top_k = config.teacher.make_payload_keywords().get("top_k", 0)
        self._forward_tokens = config.trainer.forward_tokens
        self._chunk_tokens = config.trainer.chunk_tokens
        self._lock = threading.Lock()
        self._description = TeacherDescription(
            model=config.teacher.model,
            revision=compute_revision(student.model),
            tokenizer_fingerprint=student.fingerprint,
            vocab_size=student.vocab_size,
            hidden_size=student.head.shape[1],
            dtype=str(student.head.dtype).removeprefix("torch."),
            limits=TeacherLimits(max_tokens_per_rollout=student.max_tokens),
            payloads=payloads.PAYLOADS,
            degradations=(self._degradation.kind,),
        )

    def describe(self) -> TeacherDescription:
        """Returns what a served teacher of the same weights and dtype says of itself, its limits apart."""
        return self._description

    def head(self) -> Tensor:
        """Returns the LM head, (V, D), which adapters leave as it is."""
        return payloads.from_torch(self._student.head)

    def score(
        self, groups: Sequence[ScoreRequest], *, columns: Sequence[str] = ()
    ) -> Iterator[GroupScore | GroupFailure]:
        """Yields the score of each group, whose prompts have to be token ids; `columns` has to be empty."""
        assert not columns, "the configuration refuses an objective that needs columns"
        with self._lock:
            scores: list[GroupScore | GroupFailure] = []
            for batch in pack_views(map(self._read, groups), most_tokens=self._forward_tokens):
                with adapters_off(self._student.model):
                    found = list(compute_views(self._student, batch, chunk_tokens=self._chunk_tokens))
                scores += [
                    self._make_score(request, original, degraded)
                    for request, (original, degraded) in zip(groups[len(scores) :], found, strict=False)
                ]
        yield from scores

    def close(self) -> None:
        """Ends nothing: a forward that is under way is finished."""

    def _make_score(
        self, request: ScoreRequest, original: ComputedView, degraded: ComputedView
    ) -> GroupScore | GroupFailure:
        assert request.prompt_token_ids is not None
        if not np.isfinite([original.logprobs, degraded.logprobs]).all():
            error = NumericalError(f"group {request.group_id!r}: the base model's log-probs are not all finite")
            return GroupFailure(group_id=request.group_id, error=error)
        tensors = payloads.compute(
            self._kind,
            original.hidden,
            self._student.padded_head.detach(),
            top_k=self._top_k,
            degraded_hidden=degraded.hidden,
            vocab_size=self._student.vocab_size,
            chunk_tokens=self._chunk_tokens,
        )
        ends = np.cumsum([len(response) for response in request.responses])[:-1]
        columns = (original.logprobs, degraded.logprobs, visual_advantage(original.logprobs, degraded.logprobs))
        teacher, without, va = (tuple(np.split(column, ends)) for column in columns)
        return GroupScore(
            group_id=request.group_id,
            teacher_logprobs=teacher,
            degraded_logprobs=without,
            visual_advantage=va,
            payload=payloads.pack(self._kind, tensors),
            prompt_tokens=len(request.prompt_token_ids),
        )

    def _read(self, request: ScoreRequest) -> Views:
        assert request.prompt_token_ids is not None
        responses = [np.asarray(ids, np.int32) for ids in request.responses]
        return read_views(self._student, request.prompt_token_ids, request.images, responses, self._degradation)
