"""Measures the student's own VA on held-out answers: how much its predictions depend on the image.

In: one answer of the evaluated policy to each of some held-out problems. The student that is trained, which has that
policy's weights, reads it with the image and with the degraded image. Out: means for metrics.jsonl, and a record of
each answer in RUN/heldout.jsonl. Two forwards, without gradients, of `evaluation.student_va_prompts` answers.

The worker's log-probs don't serve as the original view: another engine's rounding would count as VA wherever it is
positive. So both views are of one forward here.
"""

from __future__ import annotations

import base64
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from vaopd.config import Config
from vaopd.grading import Verdict
from vaopd.scoring.weights import visual_advantage
from vaopd.types import Prompt, images_in_order
from vaopd.vlm.model import Vlm
from vaopd_trainer.records import JsonLines
from vaopd_trainer.step_numbers import describe_question, round_values
from vaopd_trainer.two_views import Views, compute_views, pack_views, read_views

log = logging.getLogger(__name__)

_IMAGES_SHOWN = 8  # so many problems are written with their image, at the first evaluation


class HeldOutAnswer(NamedTuple):
    """A policy's answer to the held-out problem `problem`: token ids of prompt (P,) and response (T,)."""

    problem: int
    prompt_token_ids: np.ndarray
    response_ids: np.ndarray
    verdict: Verdict


class OwnAdvantage(NamedTuple):
    """The student's own VA in nats: of its answer (T,), and of the first evaluation's answer, where that is known."""

    answer: np.ndarray
    first: np.ndarray | None


class StudentVa:
    """Measures one run's student. `problems` are the places of the held-out problems that it is measured on."""

    def __init__(self, *, student: Vlm, prompts: Sequence[Prompt], config: Config, file: JsonLines) -> None:
        self._student = student
        self._file = file
        self._degradation = config.degradation.as_degradation()
        self._half = config.student.dtype == "bfloat16"
        self._forward_tokens = config.trainer.forward_tokens
        self._chunk_tokens = config.trainer.chunk_tokens
        self._prompts = choose_prompts(prompts, most=config.evaluation.student_va_prompts)
        self.problems = frozenset(self._prompts)

    def measure(self, answers: Sequence[HeldOutAnswer], *, version: int, check: Callable[[], None]) -> dict[str, float]:
        """Returns the numbers of `step_numbers.EVALUATION_DESCRIPTIONS` that begin with student_va, and writes records.

        Nothing without an answer, for a student that is spread over ranks, which rank 0 can't run alone, and where
        memory runs out: a measurement must not end a run. `check` is called before each forward and may raise.
        """
        if not answers or any(isinstance(weight, DTensor) for weight in self._student.model.parameters()):
            return {}
        started = time.monotonic()
        first = self._read_first()
        try:
            found = list(self._compute(answers, first, check))
        except torch.OutOfMemoryError as failure:
            log.warning("the student's own VA at step %d is not measured: %s", version, failure)
            return {}
        for answer, own in zip(answers, found, strict=True):
            self._file.write({"step": version, **self._describe(answer, own, with_image=not first)})
        mean, error = average([own.answer for own in found])
        fixed = [own.first if first else own.answer for own in found]
        known = [row for row in fixed if row is not None]
        return {
            "student_va": mean,
            "student_va_error": error,
            **({"student_va_first_answers": average(known)[0]} if known else {}),
            "student_va_prompts": len(found),
            "student_va_s": time.monotonic() - started,
        }

    def _read_first(self) -> Mapping[int, np.ndarray]:
        """Returns problem -> response ids of the first evaluation on record; empty before it."""
        records = self._file.read()
        first = min((record["step"] for record in records), default=None)
        return {r["problem"]: np.array(r["response_ids"], np.int32) for r in records if r["step"] == first}

    def _compute(
        self, answers: Sequence[HeldOutAnswer], first: Mapping[int, np.ndarray], check: Callable[[], None]
    ) -> Iterator[OwnAdvantage]:
        read = (self._read(answer, first.get(answer.problem)) for answer in answers)
        for batch in pack_views(read, most_tokens=self._forward_tokens):
            check()
            computed = compute_views(self._student, batch, chunk_tokens=self._chunk_tokens, half=self._half)
            for (segment, _), (original, degraded) in zip(batch, computed, strict=True):
                own = visual_advantage(original.logprobs, degraded.logprobs)
                length = len(segment.responses[0])
                yield OwnAdvantage(own[:length], own[length:] if len(segment.responses) > 1 else None)

    def _read(self, answer: HeldOutAnswer, first: np.ndarray | None) -> Views:
        """Returns the problem with its answer, and the first one if there is one, in the original and degraded view."""
        prompt = self._prompts[answer.problem]
        responses = (answer.response_ids,) if first is None else (answer.response_ids, first)
        images = images_in_order(prompt.messages, prompt.images)
        return read_views(self._student, answer.prompt_token_ids, images, responses, self._degradation)

    def _describe(self, answer: HeldOutAnswer, own: OwnAdvantage, *, with_image: bool) -> dict[str, Any]:
        prompt, ids = self._prompts[answer.problem], answer.response_ids
        record: dict[str, Any] = {
            "problem": answer.problem,
            "question": describe_question(prompt),
            "answer": prompt.answer,
            "response_ids": ids.tolist(),
            "tokens": [self._student.tokenizer.decode([token]) for token in ids],
            "student_va": round_values(own.answer),
            "verdict": answer.verdict.value,
        }
        if own.first is not None:
            record["student_va_of_first"] = round_values(own.first)
        if with_image and sorted(self.problems).index(answer.problem) < _IMAGES_SHOWN:
            record["image_base64"] = base64.b64encode(prompt.images[0].data).decode()
        return record


def choose_prompts(prompts: Sequence[Prompt], *, most: int) -> dict[int, Prompt]:
    """Returns place -> prompt of at most so many problems with an image, spread evenly over all of them."""
    seen = [(place, prompt) for place, prompt in enumerate(prompts) if prompt.images]
    count = min(most, len(seen))
    return dict(seen[index * len(seen) // count] for index in range(count))


def average(rows: Sequence[np.ndarray]) -> tuple[float, float]:
    """Returns the mean over all tokens of the rows, (T,) each, and its standard error over rows.

    >>> average([np.array([1.0, 3.0]), np.array([0.0, 0.0])])
    (1.0, 0.7071067811865476)
    """
    sums = np.array([row.sum(dtype=np.float64) for row in rows])
    lengths = np.array([len(row) for row in rows])
    mean = float(sums.sum() / lengths.sum())
    return mean, float(np.sqrt(((sums - mean * lengths) ** 2).sum()) / lengths.sum())
