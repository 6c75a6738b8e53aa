"""The command line. Each subcommand imports heavy packages only when it runs, so that `--help` is fast."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import vaopd
from vaopd.cli import (
    certs,
    completion,
    data,
    doctor,
    evaluate,
    init,
    keys,
    ledger,
    make,
    output,
    push,
    queue,
    report,
    run,
    score,
    services,
    usage,
    watch,
)
from vaopd.cli.parser import Parser
from vaopd.errors import VaopdError
from vaopd.process.extras import explain_missing_module
from vaopd.process.failures import explain_disk
from vaopd.telemetry.streams import drop_when_full, replace_closed
from vaopd.telemetry.usage import disable_usage_reports
from vaopd.telemetry.visible import escape_lines

FAILED = 2
GROUPS = {
    "run": ("demo", "init", "up", "train", "eval", "push"),
    "look": ("watch", "report", "score", "ledger", "usage"),
    "serve": ("teacher", "rollout", "api", "keys", "certs"),
    "maintain": ("data", "models", "queue", "doctor", "completion"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, 1 if a check found a problem, 2 after an error message, 130 after Ctrl-C."""
    replace_closed()
    if argv is None and sys.getfilesystemencoding() != "utf-8":
        _start_again_in_utf8()
    disable_usage_reports()
    drop_when_full("stderr")
    parser = build_parser()
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help()
        return 0
    arguments = parser.parse_args(argv)
    try:
        with output.reserve_stdout():
            return int(arguments.command(arguments))
    except VaopdError as error:
        if arguments.verbose or os.environ.get("VAOPD_DEBUG") == "1":
            traceback.print_exc()
        print(f"vaopd: {escape_lines(str(error))}", file=sys.stderr)
        return FAILED
    except ImportError as error:
        missing = explain_missing_module(error, arguments.extra)
        if missing is None:
            raise
        print(f"vaopd: {missing}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (head, less) has closed its end; without this, Python would raise again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), output.get_results().fileno())
        return 0
    except Exception as error:  # safetensors has its own class for a full disk
        if (problem := explain_disk(error)) is None:
            raise
        print(f"vaopd: {escape_lines(problem)}", file=sys.stderr)
        return FAILED


def _start_again_in_utf8() -> NoReturn:
    """Starts this process again, and its children so, in Python's UTF-8 mode: files and paths are in it in any locale.

    The terminal keeps its encoding.
    """
    added = {"PYTHONIOENCODING": sys.stdout.encoding, **os.environ, "PYTHONUTF8": "1"}
    os.execve(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]], added)


def build_parser() -> Parser:
    """Builds the parser of all commands; docs/tools/reference.py prints its help texts."""
    parser = Parser(
        prog="vaopd",
        groups=GROUPS,
        description="Distil a vision-language teacher into a student, weighting the tokens that depend on the image.",
        epilog="`vaopd demo` is a whole run on two CPU cores; `vaopd init` writes the configuration of your own.",
    )
    parser.add_argument("--version", action="version", version=vaopd.__version__)
    parser.add_argument("--verbose", action="store_true", help="print the traceback of an error (also VAOPD_DEBUG=1)")
    parser.set_defaults(extra="services")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    shown = (run, init, services, evaluate, push, watch, report, score, ledger, usage, keys, certs, data, make, queue)
    for module in (*shown, doctor):
        module.add_parsers(subparsers)
    completion.add_parsers(subparsers, parser)
    return parser
