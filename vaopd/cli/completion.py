"""`vaopd completion SHELL`: prints the shell's completion of commands, options and files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vaopd.cli.output import emit
from vaopd.cli.parser import walk

if TYPE_CHECKING:
    from vaopd.cli.common import Subparsers


def add_parsers(subparsers: Subparsers) -> None:
    """Adds `vaopd completion`."""
    completion = subparsers.add_parser(
        "completion", help='print a shell\'s completion: eval "$(vaopd completion bash)"'
    )
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="the shell")
    completion.set_defaults(command=_complete, extra="completion")


def _complete(arguments: argparse.Namespace) -> int:
    import shtab

    from vaopd.cli import build_parser

    parser = build_parser()
    for each in walk(parser):
        for action in each._actions:
            if action.type is Path:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    emit(shtab.complete(parser, arguments.shell))
    return 0
