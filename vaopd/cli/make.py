"""`vaopd data` and `vaopd models`: the demo's data set and tiny models, made anew."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vaopd.cli.common import Subparsers


def add_parsers(subparsers: Subparsers) -> None:
    data = subparsers.add_parser("data", help="make a data set").add_subparsers(required=True, metavar="DATASET")
    geometry = data.add_parser(
        "handwritten-geometry",
        help="geometry problems drawn on scans of handwritten digits, as Parquet in Geometry3K's schema",
    )
    geometry.add_argument("folder", metavar="FOLDER", type=Path)
    geometry.add_argument("--seed", type=int, default=0)
    geometry.add_argument("--train", type=int, default=4000, metavar="N", help="problems to train on (default 4000)")
    geometry.add_argument("--validation", type=int, default=300, metavar="N", help="(default 300)")
    geometry.add_argument("--test", type=int, default=600, metavar="N", help="(default 600)")
    geometry.set_defaults(command=_make_geometry, extra="tiny")

    models = subparsers.add_parser("models", help="make tiny models").add_subparsers(required=True, metavar="ACTION")
    make = models.add_parser("make", help="pre-train a tiny Qwen3-VL; about ten minutes on one core")
    make.add_argument("name", metavar="NAME", help="e.g. teacher or student; an unknown name lists them all")
    make.add_argument("folder", metavar="FOLDER", type=Path)
    make.add_argument("--seed", type=int, help="instead of the recipe's own")
    make.add_argument("--steps", type=int, help="instead of the recipe's own")
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
    from vaopd.tiny.config import named

    named(arguments.name)  # an unknown name is told before torch is loaded
    from vaopd.tiny.pretrain import make

    print(json.dumps(make(arguments.name, arguments.folder, seed=arguments.seed, steps=arguments.steps), indent=2))
    return 0
