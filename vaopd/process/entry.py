"""Opens every process of the system: its flags, log lines, traces and configuration.

    def main(argv: Sequence[str] | None = None) -> int:
        parser = process.make_parser("teacher", "Serves a frozen teacher over gRPC.")
        return process.main(_run, parser, argv)     # _run(arguments, config) imports torch, gRPC and the like

Importing this module loads no such library, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vaopd.errors import Busy, Unavailable, VaopdError
from vaopd.files.durable import write_atomic
from vaopd.process.flags import Role, add_flags
from vaopd.telemetry import logs, tracing
from vaopd.telemetry.streams import drop_when_full, replace_closed
from vaopd.telemetry.usage import disable_usage_reports
from vaopd.telemetry.visible import escape_lines

if TYPE_CHECKING:
    from vaopd.config import Config

log = logging.getLogger(__name__)

FAILED = 2
UNAVAILABLE = 75
"""What the process needs was away for too long; the same command may succeed later (EX_TEMPFAIL)."""


def make_parser(role: Role, description: str) -> argparse.ArgumentParser:
    """Returns the parser of `python -m vaopd_ROLE`."""
    made = argparse.ArgumentParser(prog=f"vaopd_{role}", description=description)
    made.add_argument("--config", type=Path, required=True, help="the run's TOML file")
    made.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="overrides a field")
    add_flags(made, role)
    return made


def main(
    run: Callable[[argparse.Namespace, Config], int], parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> int:
    """Parses the options, sets up logs and traces, and returns `run`'s exit code.

    Returns 2 after a VaopdError, or a library's error that `failures` can explain, printed in one line; 75 after
    Unavailable or Busy.
    """
    replace_closed()
    arguments = parser.parse_args(argv)
    disable_usage_reports()
    drop_when_full("stdout")  # a log, too
    drop_when_full("stderr")
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
        except VaopdError:
            raise
        except Exception as error:  # torch's and vLLM's: no device, no memory; of the disk; any other is raised again
            raise as_config_error(error, role) from error
    except VaopdError as error:
        if log_format == "json":
            log.critical("%s", error)
        else:
            print(f"{role}: {escape_lines(str(error))}", file=sys.stderr)
        return UNAVAILABLE if isinstance(error, Unavailable | Busy) else FAILED


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Suspends garbage collection while a block loads libraries and a model; they then stay outside of it.

    torch and transformers make a million objects: looking through them takes a sixth of the start, and would delay
    every call by 0.3 s later on. At the process's end they are collected as usual, or nanobind reports them as leaks.
    """
    atexit.register(gc.unfreeze)
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def announce(address: str, path: Path) -> None:
    """Writes an address for another process; after a restart on a full disk it is there already."""
    if not (path.is_file() and path.read_text() == address):
        write_atomic(path, address)
