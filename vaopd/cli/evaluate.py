"""`vaopd eval`: measures a model's held-out accuracy, without a run."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from vaopd.cli.common import add_config_arguments, dry_run, find_problems

if TYPE_CHECKING:
    from vaopd.cli.common import Needs, Subparsers

NEEDS: tuple[Needs, ...] = ("student", "data")


def add_parsers(subparsers: Subparsers) -> None:
    """Adds `vaopd eval`."""
    evaluate = subparsers.add_parser(
        "eval", help="measure a model's held-out accuracy (avg@n) on a configuration's data"
    )
    add_config_arguments(evaluate)
    evaluate.add_argument(
        "--model", metavar="MODEL", help="a folder or hub id, e.g. runs/NAME/model (default: student.model)"
    )
    evaluate.add_argument("--split", help="the split of the data (default: data.validation_split)")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.set_defaults(command=_evaluate, extra="trainer")


def _evaluate(arguments: argparse.Namespace) -> int:
    from vaopd.config import load_config
    from vaopd.errors import ConfigError

    overrides = list(arguments.overrides)
    overrides += [f"student.model={json.dumps(arguments.model)}"] if arguments.model else []
    overrides += [f"data.validation_split={json.dumps(arguments.split)}"] if arguments.split else []
    config = load_config(arguments.config, overrides)
    if arguments.dry_run:
        return dry_run(config, NEEDS)
    if problems := list(find_problems(config, NEEDS)):
        raise ConfigError("\n  ".join(["the model can't be evaluated:", *problems]))
    from vaopd.evaluation import held_out_prompts
    from vaopd.sampling.evaluate import evaluate_model
    from vaopd.telemetry.progress_line import Progress

    prompts = held_out_prompts(config)
    print(f"vaopd: loading {config.student.model} into {config.rollout.engine}", file=sys.stderr, flush=True)
    progress = Progress("vaopd: evaluating", total=len(prompts), unit="problems")
    result = evaluate_model(config, prompts, on_progress=progress.report)
    if arguments.json:
        print(json.dumps({"model": config.student.model, "split": config.data.validation_split, **asdict(result)}))
    else:
        print(f"{config.student.model} on {config.data.source} ({config.data.validation_split}): {result}")
    return 0
