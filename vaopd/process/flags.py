"""Declares each service's own flags, once: for `python -m vaopd_ROLE` and for `vaopd ROLE`, which passes them on.

Flags are for addresses, files and the moment; settings of a service are in the service file (`vaopd.config.service`).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vaopd.telemetry import logs
from vaopd.telemetry.metrics_port import METRICS_VARIABLE

if TYPE_CHECKING:
    from vaopd.config import ServiceConfig

Role = Literal["trainer", "teacher", "rollout", "api"]


def add_flags(parser: argparse.ArgumentParser, role: Role) -> None:
    """Declares the flags of a service, beside its configuration."""
    {"trainer": _add_trainer, "teacher": _add_teacher, "rollout": _add_rollout, "api": _add_api}[role](parser)
    parser.add_argument(
        "--metrics-address",
        metavar="HOST:PORT",
        help="serve Prometheus metrics on this address, without authentication; port 0: a free one "
        f"(also {METRICS_VARIABLE})",
    )
    parser.add_argument(
        "--log-format", choices=logs.FORMATS, help=f"format of the logs on standard error (also {logs.FORMAT_VARIABLE})"
    )


def add_service_flag(parser: argparse.ArgumentParser) -> None:
    """Declares `--service FILE`."""
    parser.add_argument(
        "--service", type=Path, metavar="FILE", help="the services' own settings (TLS, keys, quotas, …), a TOML file"
    )


def read_service_config(arguments: argparse.Namespace) -> ServiceConfig:
    """Reads the file of --service; the defaults without it, and for a role that has none. Raises ConfigError."""
    from vaopd.config import load_service_config

    return load_service_config(getattr(arguments, "service", None))


def to_argv(arguments: argparse.Namespace, role: Role) -> list[str]:
    """Returns the flags of a service as they were given, to pass them on to its process."""
    parser = argparse.ArgumentParser(add_help=False)
    add_flags(parser, role)
    argv: list[str] = []
    for action in parser._actions:  # argparse has no public list of them
        flag, value = action.option_strings[0], getattr(arguments, action.dest)
        for item in value if isinstance(value, list) else [value]:
            if item is True:
                argv.append(flag)
            elif item not in (None, False):
                argv += [flag, str(item)]
    return argv


def _add_trainer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resume", action="store_true", help="continue from the run's last checkpoint")
    add_accept_teacher_flag(parser)


def add_accept_teacher_flag(parser: argparse.ArgumentParser) -> None:
    """Declares `--accept-teacher [REVISION]`."""
    parser.add_argument(
        "--accept-teacher",
        nargs="?",
        const="any",
        metavar="REVISION",
        help="with --resume, continue with another teacher than before: that of this revision (its first characters), "
        "or, without REVISION and for one start only, whichever answers",
    )


def _add_teacher(parser: argparse.ArgumentParser) -> None:
    add_service_flag(parser)
    _add_announce(parser)


def _add_rollout(parser: argparse.ArgumentParser) -> None:
    add_service_flag(parser)
    parser.add_argument(
        "--worker", metavar="NAME", help="the worker's name, unique within the run (default: host and process id)"
    )


def _add_api(parser: argparse.ArgumentParser) -> None:
    add_service_flag(parser)
    _add_announce(parser)
    parser.add_argument(
        "--teacher", action="append", default=[], metavar="HOST:PORT", help="another teacher to offer (repeatable)"
    )
    parser.add_argument(
        "--student",
        action="append",
        default=[],
        metavar="MODEL",
        help="a student that answers questions, loaded at the first one; repeatable",
    )
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="show the reports of the runs in this folder")


def _add_announce(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--announce",
        type=Path,
        metavar="FILE",
        help="write the address, HOST:PORT, to this file once the service is ready",
    )
