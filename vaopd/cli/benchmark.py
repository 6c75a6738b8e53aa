"""`vaopd eval --benchmark` and `--install`: the paper's benchmarks, with their official evaluators."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

from vaopd.cli.output import emit, say
from vaopd.cli.parser import Parser, bounded
from vaopd.errors import ConfigError, Interrupted
from vaopd.telemetry.progress_line import Progress

DATA = Path("~/.cache/vaopd/benchmarks").expanduser()
EVALUATOR = Path("~/.cache/vaopd/evaluator").expanduser()
JUDGE_MODEL = "gpt-4o-2024-08-06"


def add_arguments(parser: Parser) -> None:
    """Declares the options of the benchmarks."""
    group = parser.add_argument_group("benchmarks", "the paper's, with the official evaluators (docs/benchmarks.md)")
    group.add_argument("--benchmark", metavar="NAME,…", help='e.g. mathvista,ocrbench, or "all" eight')
    group.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible endpoint up to /v1 (default: run vLLM)")
    group.add_argument("--out", type=Path, help="the folder of answers and scores (default: MODEL/../benchmarks)")
    group.add_argument(
        "--judge-url", metavar="URL", help="an OpenAI-compatible judge up to /v1; its key: OPENAI_API_KEY"
    )
    group.add_argument("--judge-model", default=JUDGE_MODEL, help="default: %(default)s, the paper's")
    group.add_argument("--samples", type=bounded(int, 1), default=8, help="answers per question (default: %(default)s)")
    group.add_argument("--max-tokens", type=bounded(int, 1), default=8192, help="of an answer (default: %(default)s)")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument(
        "--concurrency", type=bounded(int, 1), default=64, help="requests at a time (default: %(default)s)"
    )
    group.add_argument("--benchmark-data", type=Path, default=DATA, metavar="FOLDER", help="the evaluator's data sets")
    group.add_argument("--evaluator", metavar="COMMAND", help="another program with the contract of docs/benchmarks.md")
    group.add_argument("--install", action="store_true", help="make the evaluator's own environment, and end")
    own = [option for action in group._group_actions for option in action.option_strings]
    parser.tie(*(option for option in own if option not in ("--benchmark", "--install")), to="--benchmark")
    parser.tie("--judge-model", to="--judge-url")
    general = ("--set", "--dry-run", "--split", "--allow-unasked", "--json")
    parser.tie(*general, to="--benchmark", apart=True)


def run_install() -> int:
    """Installs the evaluator."""
    from vaopd.benchmarks_eval.evaluator import install

    install(EVALUATOR, say=say)
    return 0


def run_benchmarks(arguments: argparse.Namespace) -> int:
    """Evaluates a model on benchmarks and prints the table."""
    from vaopd.benchmarks_eval.catalogue import find_benchmarks
    from vaopd.benchmarks_eval.evaluator import Evaluator, Judge, find_command
    from vaopd.benchmarks_eval.run import Plan, evaluate_benchmarks

    if arguments.config is not None:
        raise ConfigError(f"CONFIG {arguments.config} has no effect with --benchmark; leave it out, and give --model")
    out = arguments.out
    if out is None:
        if arguments.endpoint or not arguments.model or not Path(arguments.model).is_dir():
            raise ConfigError("--out FOLDER is missing: answers and scores are kept there, to continue after a kill")
        out = Path(arguments.model).resolve().parent / "benchmarks"
    plan = Plan(
        benchmarks=find_benchmarks(arguments.benchmark),
        model=arguments.model,
        endpoint=arguments.endpoint,
        out=out.resolve(),
        samples=arguments.samples,
        max_tokens=arguments.max_tokens,
        seed=arguments.seed,
        concurrency=arguments.concurrency,
        api_key=os.environ.get("VAOPD_ENDPOINT_KEY"),
    )
    evaluator = Evaluator(
        command=shlex.split(arguments.evaluator) if arguments.evaluator else find_command(EVALUATOR),
        data=arguments.benchmark_data.resolve(),
        logs=plan.out / "logs",
        say=say,
    )
    judge = Judge(url=arguments.judge_url, model=arguments.judge_model) if arguments.judge_url else None
    try:
        table = evaluate_benchmarks(
            plan,
            evaluator,
            judge,
            say=say,
            make_report=lambda total: Progress("vaopd: sampling", total=total, unit="answers").report,
        )
    except Interrupted as interrupted:
        say(f"{interrupted}; the same command continues")
        return interrupted.exit_code
    emit(table, end="")
    return 0
