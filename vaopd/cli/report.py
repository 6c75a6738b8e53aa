"""`vaopd report`: writes a run, or several compared, as one HTML file; with --figures, the paper's figures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vaopd.cli.common import Subparsers
from vaopd.cli.output import emit, say


def add_parsers(subparsers: Subparsers) -> None:
    """Adds `vaopd report`."""
    report = subparsers.add_parser("report", help="write curves, configuration and rollouts of a run as one HTML file")
    report.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="run folders; several are compared")
    instead = report.add_mutually_exclusive_group()
    instead.add_argument(
        "--output", type=Path, metavar="FILE", help="the file to write (default: report.html in the first run's folder)"
    )
    instead.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="write only the accuracy curves, as an image (.png, .svg or .pdf)"
    )
    instead.add_argument(
        "--figures", action="store_true", help="write only the paper's figures, as PNG files (docs/figures.md)"
    )
    report.add_argument(
        "--band",
        choices=("standard-error", "range"),
        default="range",
        help="the band around the mean over seeds: its standard error, or lowest to highest (default)",
    )
    report.add_argument(
        "--out", type=Path, default=Path("figures"), metavar="FOLDER", help="of --figures (default: figures)"
    )
    report.tie("--out", to="--figures")
    report.tie("--band", to="--figures", apart=True)
    report.set_defaults(command=_report, extra="report")


def _report(arguments: argparse.Namespace) -> int:
    from vaopd.report import plot_accuracy, write_report

    runs = list({folder.resolve(): folder for folder in arguments.runs}.values())
    if len(runs) < len(arguments.runs):
        say("a run that is given twice counts once")
    if arguments.figures:
        return _draw_figures(runs, arguments.out)
    if arguments.plot is not None:
        emit(plot_accuracy(runs, arguments.plot, band=arguments.band))
    else:
        emit(write_report(runs, output=arguments.output, band=arguments.band))
    return 0


def _draw_figures(folders: list[Path], out: Path) -> int:
    """Draws what the runs have the data of and names the rest; returns 1 if nothing could be drawn."""
    from vaopd.report import read_run
    from vaopd.report.figure_plots import write_figures

    paths = []
    for drawn in write_figures([read_run(folder) for folder in folders], out):
        if drawn.path is not None:
            paths.append(drawn.path)
            emit(drawn.path)
        else:
            print(f"vaopd: figure {drawn.name}, {drawn.title}, is not drawn: {drawn.why}", file=sys.stderr)
    return 0 if paths else 1
