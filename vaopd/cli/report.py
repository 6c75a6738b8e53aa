"""`vaopd report`: writes a run, or several compared, as one HTML file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vaopd.cli.output import emit

if TYPE_CHECKING:
    from vaopd.cli.common import Subparsers


def add_parsers(subparsers: Subparsers) -> None:
    """Adds `vaopd report`."""
    report = subparsers.add_parser("report", help="write curves, configuration and rollouts of a run as one HTML file")
    report.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="run folders; several are compared")
    report.add_argument(
        "--output", type=Path, metavar="FILE", help="the file to write (default: report.html in the first run's folder)"
    )
    report.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="write only the accuracy curves, as an image (.png, .svg or .pdf)"
    )
    report.add_argument(
        "--band",
        choices=("standard-error", "range"),
        default="range",
        help="the band around the mean over seeds: its standard error, or lowest to highest (default)",
    )
    report.set_defaults(command=_report, extra="report")


def _report(arguments: argparse.Namespace) -> int:
    from vaopd.report import plot_accuracy, write_report

    if arguments.plot is not None:
        emit(plot_accuracy(arguments.runs, arguments.plot, band=arguments.band))
    else:
        emit(write_report(arguments.runs, output=arguments.output, band=arguments.band))
    return 0
