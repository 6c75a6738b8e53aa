"""`vaopd score`: what a running teacher says of one question about images, token by token."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vaopd.cli.common import Subparsers
    from vaopd.types import GroupScore


def add_parsers(subparsers: Subparsers) -> None:
    score = subparsers.add_parser("score", help="visual advantage of a response's tokens, from a running teacher")
    score.add_argument(
        "--image", action="append", default=[], type=Path, metavar="FILE", help="PNG, JPEG or WEBP (repeatable)"
    )
    score.add_argument("--question", required=True)
    score.add_argument("--response", action="append", required=True, help="repeat it to compare several")
    score.add_argument("--teacher", default="127.0.0.1:50051", metavar="HOST:PORT", help="(default %(default)s)")
    score.add_argument(
        "--degradation", default="pixelate", metavar="KIND", help="of the second view (default pixelate)"
    )
    score.add_argument("--strength", type=float, default=0.1, help="of the degradation (default 0.1)")
    score.add_argument("--json", action="store_true", help="print JSON, with the log-probs of both views")
    score.set_defaults(command=_score)


def _score(arguments: argparse.Namespace) -> int:
    score = ask(
        arguments.teacher,
        images=arguments.image,
        question=arguments.question,
        responses=arguments.response,
        kind=arguments.degradation,
        strength=arguments.strength,
    )
    if arguments.json:
        print(json.dumps(as_json(score), indent=2, allow_nan=False))
    else:
        print(as_table(score))
    return 0
