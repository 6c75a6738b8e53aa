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
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vaopd.benchmarks_eval.answers import AnswerFile, sample_answers
from vaopd.benchmarks_eval.catalogue import Benchmark
from vaopd.benchmarks_eval.endpoint import OpenAIEndpoint, serve
from vaopd.benchmarks_eval.evaluator import Evaluator, Judge
from vaopd.benchmarks_eval.results import BenchmarkResult, format_table, make_official, make_summary
from vaopd.errors import ConfigError, InvalidInput, Mismatch
from vaopd.files.durable import name_errors, write_atomic

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


Asked = Sequence[tuple[Benchmark, AnswerFile]]


def evaluate_benchmarks(
    plan: Plan,
    evaluator: Evaluator,
    judge: Judge | None,
    *,
    say: Callable[[str], None],
    make_report: Callable[[int], Callable[[int], None]],
) -> str:
    """Evaluates, and returns the table. Raises Mismatch when `out` holds the answers of other settings.

    make_report: makes a progress display of a number of answers.
    """
    plan.out.mkdir(parents=True, exist_ok=True)
    with _own(plan), ExitStack() as stack:
        exports = [(benchmark, plan.out / benchmark.name / "questions.jsonl") for benchmark in plan.benchmarks]
        for _, out in exports:
            out.parent.mkdir(exist_ok=True)
        evaluator.run([_make_task("questions", b, out) for b, out in exports if not out.exists()])
        asked = [(benchmark, AnswerFile(out.parent)) for benchmark, out in exports]
        for _, file in asked:
            stack.enter_context(file.file)
        _sample(plan, asked, say, make_report)
        results = _score(plan, evaluator, judge, asked)
        table = format_table(results, model=plan.model or str(plan.endpoint), samples=plan.samples)
        official = make_official(results, samples=plan.samples, judge_model=judge.model if judge else None)
        texts = {"table.md": table, "summary.json": make_summary(results), "results.json": official}
        for name, value in texts.items():
            write_atomic(plan.out / name, value if isinstance(value, str) else _to_json(value))
    return table


def _sample(
    plan: Plan, asked: Asked, say: Callable[[str], None], make_report: Callable[[int], Callable[[int], None]]
) -> None:
    todo = [entry for _, file in asked for entry in file.list_open(plan.samples)]
    if not todo:
        return
    with ExitStack() as stack:
        # Ends last: without a server and connections its requests end, too, and are not repeated.
        pool = stack.enter_context(ThreadPoolExecutor(plan.concurrency))
        url, name, check = plan.endpoint, plan.model, lambda: None
        if url is None:
            if plan.model is None:
                raise ConfigError("no model: give --model FOLDER, or --endpoint URL for one that is served")
            served = serve(plan.model, name=SERVED_NAME, logs=plan.out / "logs", say=say)
            url, supervisor = stack.enter_context(served)
            name, check = SERVED_NAME, supervisor.check
        endpoint = OpenAIEndpoint(url, model=name, max_tokens=plan.max_tokens, api_key=plan.api_key)
        stack.enter_context(closing(endpoint.http))
        report = make_report(len(todo))
        sample_answers(
            todo, endpoint.ask, pool, seed=plan.seed, concurrency=plan.concurrency, check=check, on_progress=report
        )


def _score(plan: Plan, evaluator: Evaluator, judge: Judge | None, asked: Asked) -> list[BenchmarkResult]:
    """Has every sample scored that isn't yet, or was by another judge."""
    outs: dict[str, list[Path]] = {}
    tasks = []
    for benchmark, _ in asked:
        used = judge if benchmark.judged else None
        folder = plan.out / benchmark.name
        samples = range(plan.samples if judge or not benchmark.judged else 0)
        outs[benchmark.name] = [folder / f"score-{sample}.json" for sample in samples]
        for sample, out in enumerate(outs[benchmark.name]):
            if (found := _load_score(out)) and found.get("judge_model") == (used.model if used else None):
                continue
            out.unlink(missing_ok=True)
            given = {"answers": str(folder / "answers.jsonl"), "sample": sample}
            asks = {"judge_url": used.url, "judge_model": used.model} if used else {}
            tasks.append(_make_task("score", benchmark, out, **given, **asks))
    evaluator.run(tasks)
    return [
        BenchmarkResult(
            benchmark=benchmark,
            runs=[_read_score(benchmark, out, len(file.questions)) for out in outs[benchmark.name]],
            questions=len(file.questions),
            cut_off=sum(file.done[question.id, s] for question in file.questions for s in range(plan.samples)),
        )
        for benchmark, file in asked
    ]


def _make_task(task: str, benchmark: Benchmark, out: Path, **more: Any) -> dict[str, Any]:
    return {"task": task, "dataset": benchmark.dataset, "split": benchmark.split, "out": str(out), **more}


def _read_score(benchmark: Benchmark, out: Path, questions: int) -> dict[str, float]:
    found = _load_score(out)
    if found.get("num_examples") != questions:
        raise InvalidInput(
            f"{out}: num_examples is {found.get('num_examples')}, and {questions} were answered; delete the file"
        )
    metrics = found.get("metrics")
    return benchmark.check(metrics if isinstance(metrics, dict) else {})


def _load_score(out: Path) -> dict[str, Any]:
    """Reads a score; empty where there is none, or a part of one: an evaluator may be killed while it writes."""
    try:
        found = json.loads(out.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def _own(plan: Plan) -> Iterator[None]:
    """Holds OUT/settings.json for one process, and writes what the answers depend on or compares it.

    The kernel frees it when the process is killed. Raises ConfigError, Mismatch.
    """
    folder = Path(plan.model or "")
    weights = sorted(folder.glob("*.safetensors")) if plan.model and plan.endpoint is None else []
    settings = {
        "model": plan.model,
        "endpoint": plan.endpoint,
        "weights": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in weights],
        "samples": plan.samples,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_tokens": plan.max_tokens,
        "seed": plan.seed,
    }
    with (plan.out / "settings.json").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another evaluation writes to {plan.out}; wait for its end or choose another --out"
            ) from None
        file.seek(0)
        text = file.read()
        if text.endswith("}\n"):
            before = json.loads(text)
            if differing := [key for key, value in settings.items() if before.get(key) != value]:
                names = ", ".join(differing)
                raise Mismatch(f"{plan.out} has answers with other settings ({names}); choose another --out")
        else:  # a new file, or one that a kill tore before there were answers
            with name_errors(file.name):
                file.truncate(0)
                file.write(_to_json(settings))
                file.flush()
                os.fsync(file.fileno())
        yield


def _to_json(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"
