"""`vaopd eval`: measures a model's held-out accuracy, without a run; `--benchmark` is in `vaopd.cli.benchmark`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from vaopd.cli import benchmark
from vaopd.cli.common import (
    Needs,
    Subparsers,
    add_config_arguments,
    dry_run,
    find_problems,
    make_progress,
)
from vaopd.cli.output import emit, say
from vaopd.errors import ConfigError
from vaopd.telemetry.progress_line import Progress

# The data are checked question by question: a bad one is not asked.
NEEDS: tuple[Needs, ...] = ("student", "data folders")
SHOWN = 20
"""So many questions that can't be asked are named; all are counted."""


def add_parsers(subparsers: Subparsers) -> None:
    """Adds `vaopd eval`."""
    evaluate = subparsers.add_parser(
        "eval",
        help="measure a model's held-out accuracy (avg@n) on a configuration's data, or on the paper's benchmarks",
    )
    add_config_arguments(evaluate, optional=True)
    evaluate.add_argument(
        "--model", metavar="MODEL", help="a folder or hub id, e.g. runs/NAME/model (default: student.model)"
    )
    evaluate.add_argument("--split", help="the split of the data (default: data.validation_split)")
    evaluate.add_argument(
        "--allow-unasked",
        action="store_true",
        help="exit with 0 even if some questions could not be asked; they never count as wrong",
    )
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    benchmark.add_arguments(evaluate)
    evaluate.set_defaults(command=_evaluate, extra="trainer")


def _evaluate(arguments: argparse.Namespace) -> int:
    if arguments.install:
        return benchmark.run_install()
    if arguments.benchmark:
        return benchmark.run_benchmarks(arguments)
    from vaopd.config import load_config

    if arguments.config is None:
        raise ConfigError("nothing to evaluate on: give CONFIG, for its data, or --benchmark NAME,…")
    overrides = list(arguments.overrides)
    overrides += [f"student.model={json.dumps(arguments.model)}"] if arguments.model else []
    overrides += [f"data.validation_split={json.dumps(arguments.split)}"] if arguments.split else []
    config = load_config(arguments.config, overrides)
    if arguments.dry_run:
        return dry_run(config, NEEDS)
    if problems := list(find_problems(config, NEEDS)):
        raise ConfigError("\n  ".join(["the model can't be evaluated:", *problems]))
    from vaopd.data.problems import check_held_out
    from vaopd.evaluation import describe_unasked
    from vaopd.sampling.evaluate import evaluate_model

    held_out = check_held_out(config, make_report=make_progress)
    for fault in held_out.faults[:SHOWN]:
        say(f"not asked: {held_out.prompts.describe_fault(fault)}")
    if held_out.prompts:
        say(f"loading {config.student.model} into {config.rollout.engine}")
    progress = Progress("vaopd: evaluating", total=len(held_out.prompts), unit="problems")
    result = evaluate_model(
        config,
        held_out.prompts,
        not_asked=held_out.count_faults(),
        on_progress=progress.report,
        on_refused=lambda prompt, error: say(f"not asked: {prompt.prompt_id}: {error}"),
    )
    if arguments.json:
        emit(json.dumps({"model": config.student.model, "split": config.data.validation_split, **asdict(result)}))
    else:
        source = config.data.validation_source or config.data.source
        emit(f"{config.student.model} on {source} ({config.data.validation_split}): {result}")
    if not result.not_asked or arguments.allow_unasked:
        return 0
    say(f"{describe_unasked(result.not_asked, asked=result.prompts)}; --allow-unasked accepts that")
    return 1
