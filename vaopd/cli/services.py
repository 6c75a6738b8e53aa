"""`vaopd train | teacher | rollout | api`: one process of the system in the foreground.

The process replaces this one, so that signals and exit codes are the service's own.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from vaopd.cli.common import Needs, add_config_arguments, check, dry_run
from vaopd.process import add_monitoring_arguments

if TYPE_CHECKING:
    from vaopd.cli.common import Subparsers

NEEDS: dict[str, tuple[Needs, ...]] = {
    "trainer": ("student", "data"),
    "teacher": ("teacher", "device", "teacher port"),
    "rollout": ("student", "engine"),
    "api": ("api port",),
}


def add_parsers(subparsers: Subparsers) -> None:
    train = subparsers.add_parser("train", help="a trainer alone, against a running teacher, Redis and workers")
    add_config_arguments(train)
    train.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    train.set_defaults(command=_run, service="trainer")

    teacher = subparsers.add_parser("teacher", help="the teacher server (gRPC)")
    rollout = subparsers.add_parser("rollout", help="one rollout worker")
    api = subparsers.add_parser("api", help="the scoring API (HTTP)")
    for parser, service in ((teacher, "teacher"), (rollout, "rollout"), (api, "api")):
        add_config_arguments(parser)
        parser.set_defaults(command=_run, service=service)
    for parser in (train, teacher, rollout, api):
        add_monitoring_arguments(parser)
    for parser in (teacher, api):
        parser.add_argument("--announce", metavar="FILE", help="write host:port there once it serves")
    add_service_argument(teacher)
    api.add_argument("--teacher", action="append", default=[], metavar="HOST:PORT", help="a further teacher to choose")
    api.add_argument(
        "--student", metavar="MODEL", help="a student that answers questions here (loaded when first asked)"
    )
    api.add_argument("--runs", metavar="FOLDER", help="show the reports of the runs in this folder, e.g. runs")
    api.add_argument("--keys", metavar="FILE", help="API keys, see `vaopd keys`; without, everybody may ask")
    api.add_argument("--requests-per-minute", metavar="N", help="quota of each client; default: none")
    api.add_argument("--tls-cert", metavar="FILE", help="serve HTTPS with this certificate, PEM")
    api.add_argument("--tls-key", metavar="FILE", help="the certificate's private key, PEM")
    rollout.add_argument("--worker", metavar="NAME", help="the worker's name, unique within the run")


def add_service_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--service",
        metavar="FILE",
        dest="service_file",
        help="who may use the teacher and how it is shared: TLS, keys, quotas, a TOML file",
    )


def _run(arguments: argparse.Namespace) -> int:
    from vaopd.config import load_config, load_service_config
    from vaopd.launch.up import service_argv

    config = load_config(arguments.config, arguments.overrides)
    load_service_config(getattr(arguments, "service_file", None))  # what is wrong with it is told before anything else
    if arguments.dry_run:
        return dry_run(config, NEEDS[arguments.service])
    # A taken port is the service's own to tell: it may be free again by the time it listens.
    check(config, [need for need in NEEDS[arguments.service] if not need.endswith("port")])
    extra = ["--resume"] if getattr(arguments, "resume", False) else []
    for name in ("announce", "worker", "service_file"):
        if value := getattr(arguments, name, None):
            extra += [f"--{name.removesuffix('_file')}", value]
    for name in (
        "metrics_address",
        "log_format",
        "student",
        "runs",
        "keys",
        "requests_per_minute",
        "tls_cert",
        "tls_key",
    ):
        if value := getattr(arguments, name, None):
            extra += [f"--{name.replace('_', '-')}", value]
    extra += [part for address in getattr(arguments, "teacher", []) for part in ("--teacher", address)]
    argv = service_argv(arguments.service, arguments.config, arguments.overrides, *extra)
    sys.stdout.flush()
    return os.execv(argv[0], argv)
