"""How every process of the system opens: the options that all have, its log lines, its traces, and its metrics' port.

    def main(argv: Sequence[str] | None = None) -> int:
        parser = process.parser("services.teacher", "Serves a frozen teacher over gRPC.")
        return process.main(_run, parser, argv)     # _run(arguments, config) imports what is heavy

Importing this loads nothing heavy, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vaopd import logs, tracing
from vaopd.errors import ConfigError, VaopdError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from vaopd.config import Config

log = logging.getLogger(__name__)

FAILED = 2
METRICS_VARIABLE = "VAOPD_METRICS_ADDRESS"


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
    role = parser.prog.rpartition(".")[2]
    log_format = arguments.log_format or os.environ.get(logs.FORMAT_VARIABLE) or "text"
    from vaopd.config import load_config
    from vaopd.preflight import told

    try:
        logs.set_up(log_format, process=role, rank=os.environ.get("RANK"))
        config = load_config(arguments.config, arguments.set)
        tracing.set_up(role)
        try:
            return run(arguments, config)
        except (RuntimeError, ImportError, AssertionError) as error:  # torch's and vLLM's: no device, no memory
            raise told(error, role) from error
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


def metrics_address(arguments: argparse.Namespace) -> str | None:
    return arguments.metrics_address or os.environ.get(METRICS_VARIABLE) or None


@contextmanager
def serve_metrics(registry: CollectorRegistry, address: str | None) -> Iterator[None]:
    """Answers GET /metrics on a thread of its own while the block runs; without an address it does nothing."""
    if address is None:
        yield
        return
    from prometheus_client import ProcessCollector, start_http_server

    host, separator, port = address.rpartition(":")
    if not separator or not port.isdecimal() or not host:
        raise ConfigError(f"metrics address {address!r} is not of the form HOST:PORT, such as 127.0.0.1:9091")
    ProcessCollector(registry=registry)
    try:
        server, thread = start_http_server(int(port), host.strip("[]"), registry)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"metrics address {address}: {reason}; choose another, port 0 takes a free one") from None
    log.info("metrics at http://%s:%d/metrics", host, server.server_port)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
