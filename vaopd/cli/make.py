"""`vaopd data` and `vaopd models`: make the demo's data set and tiny models."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vaopd.cli.common import Subparsers


def add_parsers(subparsers: Subparsers) -> None:
    """Adds `vaopd data` and `vaopd models`."""
    data = subparsers.add_parser("data", help="make a data set").add_subparsers(required=True, metavar="DATASET")
    geometry = data.add_parser(
        "handwritten-geometry",
        help="draw geometry problems with scans of handwritten digits; Parquet in Geometry3K's schema",
    )
    geometry.add_argument("folder", metavar="FOLDER", type=Path, help="the folder to write to")
    geometry.add_argument("--seed", type=int, default=0, help="seed of the drawing (default 0)")
    geometry.add_argument("--train", type=int, default=4000, metavar="N", help="training problems (default 4000)")
    geometry.add_argument("--validation", type=int, default=300, metavar="N", help="validation problems (default 300)")
    geometry.add_argument("--test", type=int, default=600, metavar="N", help="test problems (default 600)")
    geometry.set_defaults(command=_make_geometry, extra="tiny")

    models = subparsers.add_parser("models", help="make tiny models").add_subparsers(required=True, metavar="ACTION")
    make = models.add_parser("make", help="pre-train a tiny Qwen3-VL; about ten minutes on one core")
    make.add_argument("name", metavar="NAME", help="e.g. teacher or student; an unknown name prints the list")
    make.add_argument("folder", metavar="FOLDER", type=Path, help="the folder to write to")
    make.add_argument("--seed", type=int, help="seed of weights and data (default: the recipe's)")
    make.add_argument("--steps", type=int, help="training steps (default: the recipe's)")
    make.set_defaults(command=_make_model, extra="tiny")


def _make_geometry(arguments: argparse.Namespace) -> int:
    from vaopd.data import handwritten_geometry

    handwritten_geometry.write(
        arguments.folder,
        seed=arguments.seed,
        train=arguments.train,
        validation=arguments.validation,
        test=arguments.test,
    )
    print(arguments.folder)
    return 0


def _make_model(arguments: argparse.Namespace) -> int:
    from vaopd.tiny.config import find_model

    find_model(arguments.name)  # refuses an unknown name before torch is loaded
    from vaopd.tiny.pretrain import make

    print(json.dumps(make(arguments.name, arguments.folder, seed=arguments.seed, steps=arguments.steps), indent=2))
    return 0
