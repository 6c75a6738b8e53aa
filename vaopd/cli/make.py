"""`vaopd models`: makes tiny models."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vaopd.cli.common import Subparsers
from vaopd.cli.output import emit
from vaopd.cli.parser import bounded


def add_parsers(subparsers: Subparsers) -> None:
    """Adds `vaopd models`."""
    models = subparsers.add_parser("models", help="make tiny models").add_subparsers(required=True, metavar="ACTION")
    make = models.add_parser("make", help="pre-train a tiny Qwen3-VL; about ten minutes on one core")
    make.add_argument("name", metavar="NAME", help="e.g. teacher or student; an unknown name prints the list")
    make.add_argument("folder", metavar="FOLDER", type=Path, help="the folder to write to")
    make.add_argument("--seed", type=int, help="seed of weights and data (default: the recipe's)")
    make.add_argument("--steps", type=bounded(int, 1), help="training steps (default: the recipe's)")
    make.set_defaults(command=_make_model, extra="tiny")


def _make_model(arguments: argparse.Namespace) -> int:
    from vaopd.tiny.config import find_model

    find_model(arguments.name)  # refuses an unknown name before torch is loaded
    from vaopd.tiny.pretrain import make

    emit(json.dumps(make(arguments.name, arguments.folder, seed=arguments.seed, steps=arguments.steps), indent=2))
    return 0
