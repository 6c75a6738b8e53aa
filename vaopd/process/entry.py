"""How every process of the system opens: the options that all have, its log lines, its traces, and its metrics' port.

    def main(argv: Sequence[str] | None = None) -> int:
        parser = process.parser("vaopd_teacher", "Serves a frozen teacher over gRPC.")
        return process.main(_run, parser, argv)     # _run(arguments, config) imports what is heavy

Importing this loads nothing heavy, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vaopd.errors import VaopdError
from vaopd.telemetry import logs, tracing
from vaopd.telemetry.metrics_port import METRICS_VARIABLE

if TYPE_CHECKING:
    from vaopd.config import Config

log = logging.getLogger(__name__)

FAILED = 2


def parser(module: str, description: str) -> argparse.ArgumentParser:
    """With the options that all processes have; `module` is what `python -m` runs."""
    made = argparse.ArgumentParser(prog=module, description=description)
    made.add_argument("--config", type=Path, required=True, help="the run's TOML file")
    made.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="overrides a field")
    add_monitoring_arguments(made)
    return made


def add_monitoring_arguments(parser: argparse.ArgumentParser) -> None:
    """What `vaopd ROLE` passes on to the process as it is."""
    parser.add_argument(
        "--metrics-address",
        metavar="HOST:PORT",
        help=f"serve Prometheus metrics there, to whoever can reach it; port 0: a free one (also {METRICS_VARIABLE})",
    )
    parser.add_argument(
        "--log-format", choices=logs.FORMATS, help=f"of the lines on standard error (also {logs.FORMAT_VARIABLE})"
    )


def main(
    run: Callable[[argparse.Namespace, Config], int],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
) -> int:
    """Parses, opens, runs; an error of the tree, or a library's that has words, is told in a line: exit code 2."""
    arguments = parser.parse_args(argv)
    role = parser.prog.removeprefix("vaopd_")
    log_format = arguments.log_format or os.environ.get(logs.FORMAT_VARIABLE) or "text"
    from vaopd.config import load_config
    from vaopd.process.failures import as_config_error

    try:
        logs.set_up(log_format, process=role, rank=os.environ.get("RANK"))
        config = load_config(arguments.config, arguments.set)
        tracing.set_up(role)
        try:
            return run(arguments, config)
        except (RuntimeError, ImportError, AssertionError) as error:  # torch's and vLLM's: no device, no memory
            raise as_config_error(error, role) from error
    except VaopdError as error:
        if log_format == "json":
            log.critical("%s", error)
        else:
            print(f"{role}: {error}", file=sys.stderr)
        return FAILED


def announce(text: str, path: Path) -> None:
    """Writes a file for another process; whoever reads it sees all of it or nothing."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)
