"""Samples answers and keeps each question and sample exactly once, through `kill -9`.

In: a benchmark's questions.jsonl, an endpoint. Out: answers.jsonl, one line per question and sample. A line is
appended and synced; what a kill cut off is dropped at the next start, and its question is asked again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from vaopd.errors import InvalidInput
from vaopd.files.durable import name_errors
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


class AnswerFile:
    """A benchmark's questions, and its answers.jsonl, which one process writes: the caller holds the folder's lock."""

    def __init__(self, folder: Path) -> None:
        """Reads both files and cuts off a line that was not completed. The caller closes `file`.

        Raises InvalidInput for a malformed or repeated question or answer, or for no question.
        """
        self.questions = list(_read_questions(folder / "questions.jsonl"))
        self.done: dict[tuple[str, int], bool] = {}
        """Question and sample -> whether the answer ended at the token limit."""
        path = folder / "answers.jsonl"
        path.touch()
        self.file = path.open("r+b", buffering=0)
        self.file.truncate(size := path.read_bytes().rfind(b"\n") + 1)
        self.file.seek(size)
        known = {question.id for question in self.questions}
        for place, line in read_json_lines(path, limit_bytes=None):
            question, sample, cut_off = (line.get(key) for key in ("question", "sample", "cut_off"))
            if not (isinstance(question, str) and type(sample) is int and type(cut_off) is bool and question in known):
                raise InvalidInput(
                    f"{place}: an answer needs `question`, one of questions.jsonl, `sample` and `cut_off`, got "
                    f"{question!r}, {sample!r} and {cut_off!r}; remove the line to ask again"
                )
            if (question, sample) in self.done:
                raise InvalidInput(f"{place}: question {question!r}, sample {sample} is there twice; remove one line")
            self.done[question, sample] = cut_off

    def add(self, question: str, sample: int, text: str, cut_off: bool) -> None:
        """Appends an answer; it is on disk when this returns.

        Its `answer` is the first committed one, else all of the text, unchanged, as in the paper's code.
        """
        found = committed_answer(text)
        answer = {"answer": text if found is None else found, "committed": found is not None, "cut_off": cut_off}
        line = memoryview((json.dumps({"question": question, "sample": sample, "text": text} | answer) + "\n").encode())
        with name_errors(self.file.name):
            while line:  # a full disk may take a part; the rest raises OSError, and the torn line is dropped later
                line = line[self.file.write(line) :]
        os.fsync(self.file.fileno())
        self.done[question, sample] = cut_off

    def list_open(self, samples: int) -> Iterator[tuple[AnswerFile, Question, int]]:
        """Yields the questions and samples that have no answer yet, with this file."""
        for question in self.questions:
            for sample in range(samples):
                if (question.id, sample) not in self.done:
                    yield self, question, sample


def _read_questions(path: Path) -> Iterator[Question]:
    if not path.read_bytes().endswith(b"\n"):  # a last line without its end would be left out
        raise InvalidInput(f"{path} is empty, or its last line has no end; delete it to export it again")
    seen = set()
    for place, line in read_json_lines(path, limit_bytes=None):
        try:
            parts = [{"type": part["type"], "value": part["value"]} for part in line["parts"]]
            question = Question(id=str(line["id"]), parts=parts)
        except (KeyError, TypeError):
            raise InvalidInput(
                f"{place}: a question needs `id` and `parts` of `type` and `value`, got {line}"
            ) from None
        if question.id in seen:
            raise InvalidInput(f"{place}: question {question.id!r} is there twice; delete {path} to export it again")
        seen.add(question.id)
        yield question


def sample_answers(
    todo: Sequence[tuple[AnswerFile, Question, int]],
    ask: Callable[[Question, int], tuple[str, bool]],
    pool: ThreadPoolExecutor,
    *,
    seed: int,
    concurrency: int,
    check: Callable[[], None],
    on_progress: Callable[[int], None],
) -> None:
    """Asks and stores what is open, `concurrency` at a time.

    ask: question, seed -> text, whether it was cut off; called by several threads. check: called at least twice a
    second; its exceptions end the sampling, as do those of `ask`. Answers that are complete by then are stored first.
    on_progress: called with the number done.
    """
    remaining = iter(todo)
    running: dict[Future[tuple[str, bool]], tuple[AnswerFile, Question, int]] = {}
    done = 0
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
            file.add(question.id, sample, *future.result())
        done += len(good)
        on_progress(done)
        for future in finished:
            future.result()
        check()


def make_seed(seed: int, question: str, sample: int) -> int:
    """Returns the seed of one answer, the same at every start and different for every question and sample."""
    digest = hashlib.sha256(f"{seed}\0{question}\0{sample}".encode()).digest()
    return int.from_bytes(digest[:4]) >> 1
