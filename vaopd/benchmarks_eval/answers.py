"""Samples a benchmark's answers and keeps each question and sample exactly once, through `kill -9`.

In: the evaluator's questions, an endpoint. Out: answers.jsonl, one line per question and sample. A line is appended and
synced; what a kill cut off is dropped at the next start, and its question is asked again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

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


Ask = Callable[[Question, int], tuple[str, bool]]
"""Question, seed -> text, whether it was cut off. Called by several threads at once."""


def read_questions(path: Path) -> list[Question]:
    """Reads the evaluator's questions. Raises InvalidInput for a malformed or repeated one, or for none."""
    questions: dict[str, Question] = {}
    for place, line in read_json_lines(path, limit_bytes=None):
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
    """answers.jsonl, written by one process; the caller holds the folder's lock and closes `file`."""

    def __init__(self, path: Path) -> None:
        """Reads the answers and cuts off a line that was not completed. Raises InvalidInput for a repeated answer."""
        self.done: dict[tuple[str, int], bool] = {}
        """Question and sample -> whether the answer was cut off."""
        path.touch()
        self.file = path.open("r+b", buffering=0)
        size = path.read_bytes().rfind(b"\n") + 1
        self.file.truncate(size)
        self.file.seek(size)
        for place, line in read_json_lines(path, limit_bytes=None):
            key = (line["question"], line["sample"])
            if key in self.done:
                raise InvalidInput(f"{place}: question {key[0]!r}, sample {key[1]} is there twice; remove one line")
            self.done[key] = line["cut_off"]

    def add(self, answer: Answer) -> None:
        """Appends an answer; it is on disk when this returns."""
        line = memoryview((json.dumps(asdict(answer)) + "\n").encode())
        while line:  # a full disk may take a part; the rest raises OSError, and the torn line is dropped later
            line = line[self.file.write(line) :]
        os.fsync(self.file.fileno())
        self.done[answer.question, answer.sample] = answer.cut_off

    def list_open(self, questions: Sequence[Question], *, samples: int) -> Iterator[tuple[Question, int]]:
        """Yields the questions and samples that have no answer yet."""
        pairs = ((question, sample) for question in questions for sample in range(samples))
        return (pair for pair in pairs if (pair[0].id, pair[1]) not in self.done)


def sample_answers(
    todo: Sequence[tuple[AnswerFile, Question, int]],
    ask: Ask,
    *,
    seed: int,
    concurrency: int,
    check: Callable[[], None],
    on_progress: Callable[[int], None],
) -> None:
    """Asks and stores what is open, `concurrency` at a time.

    check: called at least twice a second; its exceptions end the sampling, as do those of `ask`. Answers that are
    complete by then are stored first. on_progress: called with the number done.
    """
    remaining = iter(todo)
    running: dict[Future[tuple[str, bool]], tuple[AnswerFile, Question, int]] = {}
    done = 0
    with ThreadPoolExecutor(concurrency) as pool:
        while True:
            while len(running) < concurrency and (entry := next(remaining, None)):
                _, question, sample = entry
                running[pool.submit(ask, question, make_seed(seed, question.id, sample))] = entry
            if not running:
                return
            finished, _ = wait(running, timeout=CHECK_EVERY_S, return_when=FIRST_COMPLETED)
            good = [future for future in finished if future.exception() is None]
            for future in good:
                file, question, sample = running.pop(future)
                file.add(make_answer(question, sample, *future.result()))
            done += len(good)
            on_progress(done)
            for future in finished:
                future.result()
            check()


def make_seed(seed: int, question: str, sample: int) -> int:
    """Returns the seed of one answer, the same at every start and different for every question and sample."""
    digest = hashlib.sha256(f"{seed}\0{question}\0{sample}".encode()).digest()
    return int.from_bytes(digest[:4]) >> 1


def make_answer(question: Question, sample: int, text: str, cut_off: bool) -> Answer:
    """Makes an answer of a model's text."""
    found = committed_answer(text)
    committed, answer = found is not None, text if found is None else found
    return Answer(question=question.id, sample=sample, text=text, answer=answer, committed=committed, cut_off=cut_off)
