"""`vaopd completion SHELL`: prints the shell's completion of commands, options and files."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from vaopd.cli.common import Subparsers
from vaopd.cli.output import emit
from vaopd.cli.parser import walk


def add_parsers(subparsers: Subparsers, root: argparse.ArgumentParser) -> None:
    """Adds `vaopd completion`. root: the parser of all commands."""
    completion = subparsers.add_parser(
        "completion", help='print a shell\'s completion: eval "$(vaopd completion bash)"'
    )
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="the shell")
    completion.set_defaults(command=functools.partial(_complete, root), extra="completion")


def _complete(root: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    import shtab

    for each in walk(root):
        for action in each._actions:
            if action.type is Path:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    emit(shtab.complete(root, arguments.shell))
    return 0
