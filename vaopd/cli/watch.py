"""`vaopd watch`: shows a run's progress and updates it while the run continues."""

from __future__ import annotations

import argparse
from pathlib import Path

from vaopd.cli.common import Subparsers
from vaopd.cli.output import get_results
from vaopd.cli.parser import bounded


def add_parsers(subparsers: Subparsers) -> None:
    """Adds `vaopd watch`."""
    watch = subparsers.add_parser(
        "watch", help="show a run's progress, updated until it has ended; exit code 1 if it failed"
    )
    watch.add_argument("run", metavar="RUN", type=Path, help="the run's folder, e.g. runs/demo-…")
    watch.add_argument("--once", action="store_true", help="print it once and exit")
    watch.add_argument(
        "--every",
        type=bounded(float, 0.1),
        default=2.0,
        metavar="SECONDS",
        help="seconds between two updates (default 2)",
    )
    watch.set_defaults(command=_watch)


def _watch(arguments: argparse.Namespace) -> int:
    from vaopd.report.watch import watch

    state = watch(arguments.run, stream=get_results(), every_s=arguments.every, once=arguments.once)
    return 1 if state == "failed" else 0
