"""Samples a benchmark's answers and keeps each question and sample exactly once, through `kill -9`.

In: the evaluator's questions, an endpoint. Out: answers.jsonl, one line per question and sample. A line is appended by
one write and synced; what a kill cut off is dropped at the next start, and its question is asked again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from vaopd.errors import InvalidInput
from vaopd.grading.commitment import committed_answer
from vaopd.run.json_lines import read_json_lines

CHECK_EVERY_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question with the benchmark's own prompt.

    parts: in the order of the prompt, e.g. ({"type": "image", "value": "/data/1.png"}, {"type": "text", "value": "…"}).
    """

    id: str
    parts: Sequence[dict[str, str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One sampled answer.

    answer: the first committed one, else all of `text`, unchanged, as in the paper's code. cut_off: at the token limit.
    """

    question: str
    sample: int
    text: str
    answer: str
    committed: bool
    cut_off: bool


class Endpoint(Protocol):
    """Samples from a model."""

    def ask(self, question: Question, *, seed: int) -> tuple[str, bool]:
        """Returns the text, and whether it was cut off. Called by several threads at once."""


def read_questions(path: Path) -> list[Question]:
    """Reads the evaluator's questions. Raises InvalidInput for a malformed or repeated one, or for none."""
    questions: dict[str, Question] = {}
    for place, line in read_json_lines(path):
        try:
            question = Question(id=str(line["id"]), parts=[dict(part) for part in line["parts"]])
        except (KeyError, TypeError, ValueError):
            raise InvalidInput(f"{place}: a question needs `id` and `parts`, got {sorted(line)}") from None
        if question.id in questions:
            raise InvalidInput(f"{place}: question {question.id!r} is there twice; delete {path} to export it again")
        questions[question.id] = question
    if not questions:
        raise InvalidInput(f"{path} has no question; check the evaluator's data and delete the file")
    return list(questions.values())


class AnswerFile:
    """answers.jsonl, opened for appending by one process; the caller holds the folder's lock."""

    def __init__(self, path: Path) -> None:
        """Reads what is there and cuts off a line that was not completed. Raises InvalidInput for a repeated answer."""
        self.done: dict[tuple[str, int], Answer] = {}
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        content = path.read_bytes()
        os.ftruncate(self._file, content.rfind(b"\n") + 1)
        for place, line in read_json_lines(path):
            answer = Answer(**line)
            key = (answer.question, answer.sample)
            if key in self.done:
                raise InvalidInput(f"{place}: question {key[0]!r}, sample {key[1]} is there twice; remove one line")
            self.done[key] = answer

    def add(self, answer: Answer) -> None:
        """Appends an answer; it is on disk when this returns."""
        line = memoryview((json.dumps(asdict(answer), ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass"))
        while line:  # a full disk may take a part; the rest raises OSError, and the torn line is dropped later
            line = line[os.write(self._file, line) :]
        os.fsync(self._file)
        self.done[answer.question, answer.sample] = answer

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        os.close(self._file)


def list_open(questions: Sequence[Question], file: AnswerFile, *, samples: int) -> Iterator[tuple[Question, int]]:
    """Yields the questions and samples that have no answer yet."""
    for question in questions:
        for sample in range(samples):
            if (question.id, sample) not in file.done:
                yield question, sample


def sample_answers(
    todo: Sequence[tuple[Question, int]],
    file: AnswerFile,
    endpoint: Endpoint,
    *,
    seed: int,
    concurrency: int,
    check: Callable[[], None],
    on_progress: Callable[[int], None],
) -> None:
    """Asks and stores what is open, `concurrency` at a time.

    check: called at least twice a second; its exceptions end the sampling, as do those of the endpoint. Answers that
    are complete by then are stored first. on_progress: called with the number done.
    """
    remaining = iter(todo)
    running: dict[Future[tuple[str, bool]], tuple[Question, int]] = {}
    done = 0
    with ThreadPoolExecutor(concurrency) as pool:
        while True:
            while len(running) < concurrency and (pair := next(remaining, None)):
                question, sample = pair
                running[pool.submit(endpoint.ask, question, seed=make_seed(seed, question.id, sample))] = pair
            if not running:
                return
            finished, _ = wait(running, timeout=CHECK_EVERY_S, return_when=FIRST_COMPLETED)
            failed: list[BaseException] = []
            for future in finished:
                question, sample = running.pop(future)
                if error := future.exception():
                    failed.append(error)
                    continue
                file.add(_make_answer(question, sample, *future.result()))
                done += 1
            on_progress(done)
            if failed:
                raise failed[0]
            check()


def make_seed(seed: int, question: str, sample: int) -> int:
    """Returns the seed of one answer, the same at every start and different for every question and sample."""
    digest = hashlib.sha256(f"{seed}\0{question}\0{sample}".encode()).digest()
    return int.from_bytes(digest[:4]) >> 1


def _make_answer(question: Question, sample: int, text: str, cut_off: bool) -> Answer:
    answer = committed_answer(text)
    fields: dict[str, Any] = {"answer": text if answer is None else answer, "committed": answer is not None}
    return Answer(question=question.id, sample=sample, text=text, cut_off=cut_off, **fields)
