"""Evaluates a model on benchmarks, from the questions to the table; every step continues where a killed one stopped.

questions   the evaluator exports each benchmark's own prompts       OUT/NAME/questions.jsonl
sampling    8 answers per question from the endpoint                 OUT/NAME/answers.jsonl
scoring     the evaluator scores each sample index on its own        OUT/NAME/score-S.json
results     means and standard errors over the runs                  OUT/table.md, summary.json, results.json
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vaopd.benchmarks_eval.answers import AnswerFile, Question, list_open, read_questions, sample_answers
from vaopd.benchmarks_eval.catalogue import Benchmark
from vaopd.benchmarks_eval.endpoint import OpenAIEndpoint, serve
from vaopd.benchmarks_eval.evaluator import Evaluator, Judge
from vaopd.benchmarks_eval.results import BenchmarkResult, format_table, make_official, make_summary
from vaopd.errors import ConfigError, Mismatch
from vaopd.files.durable import atomic_file

SERVED_NAME = "student"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What to evaluate, and how. model: a folder or hub id, or, with an endpoint, the name there (None: its only one).

    endpoint: URL up to /v1; None serves `model` with vLLM. max_tokens: of an answer.
    """

    benchmarks: Sequence[Benchmark]
    model: str | None
    endpoint: str | None
    out: Path
    samples: int
    max_tokens: int
    seed: int
    concurrency: int
    api_key: str | None = None


def evaluate_benchmarks(
    plan: Plan,
    evaluator: Evaluator,
    judge: Judge | None,
    *,
    say: Callable[[str], None],
    make_report: Callable[[str, int], Callable[[int], None]],
) -> str:
    """Evaluates, and returns the table. Raises Mismatch when `out` holds the answers of other settings.

    make_report: makes a progress display of a benchmark's name and number of answers.
    """
    plan.out.mkdir(parents=True, exist_ok=True)
    with _lock(plan.out), ExitStack() as files:
        _check_settings(plan)
        asked: list[tuple[Benchmark, list[Question], AnswerFile]] = []
        for benchmark in plan.benchmarks:
            folder = plan.out / benchmark.name
            folder.mkdir(exist_ok=True)
            if not (exported := folder / "questions.jsonl").exists():
                evaluator.export_questions(benchmark, exported)
            file = files.enter_context(AnswerFile(folder / "answers.jsonl"))
            asked.append((benchmark, read_questions(exported), file))
        _sample(plan, asked, say, make_report)
        results = [_score(plan, evaluator, judge, *entry) for entry in asked]
        name = plan.model or str(plan.endpoint)
        table = format_table(results, model=name, samples=plan.samples)
        used = judge.model if judge else None
        _write(plan.out / "table.md", table)
        _write_json(plan.out / "summary.json", make_summary(results))
        _write_json(plan.out / "results.json", make_official(results, samples=plan.samples, judge_model=used))
        return table


def _sample(
    plan: Plan,
    asked: Sequence[tuple[Benchmark, list[Question], AnswerFile]],
    say: Callable[[str], None],
    make_report: Callable[[str, int], Callable[[int], None]],
) -> None:
    todo = [(entry, list(list_open(entry[1], entry[2], samples=plan.samples))) for entry in asked]
    if not any(pairs for _, pairs in todo):
        return
    with ExitStack() as stack:
        url, name, check = plan.endpoint, plan.model, _nothing
        if url is None:
            if plan.model is None:
                raise ConfigError("no model: give --model FOLDER, or --endpoint URL for one that is served")
            served = serve(plan.model, name=SERVED_NAME, logs=plan.out / "logs", say=say)
            url, supervisor = stack.enter_context(served)
            name, check = SERVED_NAME, supervisor.check
        endpoint = OpenAIEndpoint(url, model=name, max_tokens=plan.max_tokens, api_key=plan.api_key)
        stack.enter_context(endpoint)
        for (benchmark, _, file), pairs in todo:
            sample_answers(
                pairs,
                file,
                endpoint,
                seed=plan.seed,
                concurrency=plan.concurrency,
                check=check,
                on_progress=make_report(benchmark.name, len(pairs)),
            )


def _score(
    plan: Plan,
    evaluator: Evaluator,
    judge: Judge | None,
    benchmark: Benchmark,
    questions: Sequence[Question],
    file: AnswerFile,
) -> BenchmarkResult:
    answers = [file.done[question.id, sample] for question in questions for sample in range(plan.samples)]
    runs = []
    for sample in range(plan.samples if judge or not benchmark.judged else 0):
        given = {answer.question: answer.answer for answer in answers if answer.sample == sample}
        out = plan.out / benchmark.name / f"score-{sample}.json"
        runs.append(evaluator.score(benchmark, given, out, sample=sample, judge=judge))
    cut_off = sum(answer.cut_off for answer in answers)
    return BenchmarkResult(benchmark=benchmark, runs=runs, questions=len(questions), cut_off=cut_off)


def _check_settings(plan: Plan) -> None:
    """Writes what the answers depend on, or compares it with what is there."""
    folder = Path(plan.model or "")
    weights = sorted(folder.glob("*.safetensors")) if plan.model and plan.endpoint is None else []
    settings: dict[str, Any] = {
        "model": plan.model,
        "endpoint": plan.endpoint,
        "weights": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in weights],
        "samples": plan.samples,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_tokens": plan.max_tokens,
        "seed": plan.seed,
    }
    path = plan.out / "settings.json"
    if not path.exists():
        _write_json(path, settings)
        return
    before = json.loads(path.read_text())
    if differing := [key for key, value in settings.items() if before.get(key) != value]:
        raise Mismatch(f"{plan.out} has answers with other settings ({', '.join(differing)}); choose another --out")


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Holds the folder for one process; the kernel frees it when that is killed."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ConfigError(f"another evaluation writes to {folder}; wait for its end or choose another --out") from None
    try:
        yield
    finally:
        os.close(handle)


def _nothing() -> None:
    pass


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


def _write_json(path: Path, value: object) -> None:
    _write(path, json.dumps(value, indent=2) + "\n")
