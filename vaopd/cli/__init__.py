"""The command line. Each subcommand imports heavy packages only when it runs, so that `--help` is fast."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

import vaopd
from vaopd.cli import certs, data, doctor, evaluate, keys, ledger, make, queue, report, run, score, services, watch
from vaopd.errors import VaopdError
from vaopd.process.extras import explain_missing_module
from vaopd.telemetry.usage import disable_usage_reports

FAILED = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, 1 if a check found a problem, 2 after an error message, 130 after Ctrl-C."""
    arguments = build_parser().parse_args(argv)
    disable_usage_reports()
    try:
        return int(arguments.command(arguments))
    except VaopdError as error:
        if arguments.verbose or os.environ.get("VAOPD_DEBUG") == "1":
            traceback.print_exc()
        print(f"vaopd: {error}", file=sys.stderr)
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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of all commands; docs/tools/reference.py prints its help texts."""
    parser = argparse.ArgumentParser(
        prog="vaopd",
        description="Distil a vision-language teacher into a student, weighting the tokens that depend on the image.",
        epilog="Start with `vaopd demo`: a whole run on two CPU cores.",
    )
    parser.add_argument("--version", action="version", version=vaopd.__version__)
    parser.add_argument("--verbose", action="store_true", help="print the traceback of an error (also VAOPD_DEBUG=1)")
    parser.set_defaults(extra="services")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for module in (run, services, score, evaluate, data, make, watch, report, ledger, queue, keys, certs, doctor):
        module.add_parsers(subparsers)
    return parser
