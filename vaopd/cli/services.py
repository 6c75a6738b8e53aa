"""`vaopd train | teacher | rollout | api`: run one process of the system in the foreground.

It replaces this process, so that signals and exit codes are the service's own.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from vaopd.cli.common import Needs, Subparsers, add_config_arguments, check, dry_run
from vaopd.cli.output import get_results, say
from vaopd.errors import Unavailable
from vaopd.process.extras import require
from vaopd.process.flags import Role, add_flags, read_service_config, to_argv

if TYPE_CHECKING:
    from vaopd.config import Config

COMMANDS: dict[str, tuple[Role, str]] = {
    "train": ("trainer", "run a trainer alone, against a running teacher, Redis and workers"),
    "teacher": ("teacher", "run the teacher server (gRPC)"),
    "rollout": ("rollout", "run one rollout worker"),
    "api": ("api", "run the scoring API (HTTP)"),
}
NEEDS: dict[Role, tuple[Needs, ...]] = {
    "trainer": ("student", "data", "trackers", "queue", "later teacher"),
    "teacher": ("teacher", "device", "teacher port"),
    "rollout": ("student", "engine", "queue"),
    "api": ("api port",),
}


def add_parsers(subparsers: Subparsers) -> None:
    """Adds a command for each process, with that process's flags."""
    for name, (role, text) in COMMANDS.items():
        parser = subparsers.add_parser(name, help=text)
        add_config_arguments(parser)
        add_flags(parser, role)
        parser.set_defaults(command=_run, role=role)


def _run(arguments: argparse.Namespace) -> int:
    from vaopd.config import load_config
    from vaopd.launch.up import make_service_argv

    role: Role = arguments.role
    config = load_config(arguments.config, arguments.overrides)
    read_service_config(arguments)
    if arguments.dry_run:
        return dry_run(config, NEEDS[role], offline=arguments.offline)
    require(role)  # before a check needs one of its packages
    # The service reports a taken port itself: it may be free again by the time the service listens.
    check(config, [need for need in NEEDS[role] if not need.endswith("port") and need != "later teacher"])
    if role == "trainer" and not config.teacher.shared_base:
        _check_teacher(config)
    argv = make_service_argv(role, arguments.config, arguments.overrides, *to_argv(arguments, role))
    get_results().flush()
    return os.execv(argv[0], argv)


def _check_teacher(config: Config) -> None:
    """Raises an error for TLS or a key that doesn't fit. Names a teacher that is away, which may still be starting."""
    from vaopd.client.diagnosis import examine_teacher

    try:
        examine_teacher(config.teacher.address, job=config.run.name, payload=config.teacher.payload)
    except Unavailable as error:
        say(f"{error}; the trainer waits for it")
