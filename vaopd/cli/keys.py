"""`vaopd keys add | list | revoke`: manages the API keys of a shared service; the file holds only digests."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vaopd.cli.common import Subparsers
from vaopd.cli.output import emit
from vaopd.cli.parser import bounded


def add_parsers(subparsers: Subparsers) -> None:
    """Adds `vaopd keys add | list | revoke`."""
    keys = subparsers.add_parser("keys", help="manage the API keys of a shared service")
    actions = keys.add_subparsers(required=True, metavar="ACTION")
    add = actions.add_parser("add", help="make a key for a job and print it, once")
    add.add_argument("job", metavar="JOB", help="the job's name, which is its run's name")
    add.add_argument(
        "--expires",
        metavar="DAYS",
        type=_parse_days,
        default=90.0,
        help='days until it expires, or "never" (default 90)',
    )
    add.set_defaults(command=_add)
    actions.add_parser("list", help="list every key's id, job and state").set_defaults(command=_list)
    revoke = actions.add_parser("revoke", help="make a key invalid, at once in running services too")
    revoke.add_argument("id", metavar="ID", help="the key's id, from `vaopd keys list`")
    revoke.set_defaults(command=_revoke)
    for parser in actions.choices.values():
        parser.add_argument(
            "--file",
            metavar="FILE",
            type=Path,
            default=Path("keys.json"),
            help="the key file that [teacher.keys] or [api.keys] of the service file names (default keys.json)",
        )


def _parse_days(text: str) -> float | None:
    return None if text == "never" else bounded(float, 0.0)(text)


def _add(arguments: argparse.Namespace) -> int:
    from vaopd.access.keys import add_key

    emit(add_key(arguments.file, arguments.job, expires_days=arguments.expires))
    print(
        "vaopd: the key is shown only now and stored nowhere. Save it in a file that only its job can read, and name "
        "that file in the job's VAOPD_API_KEY_FILE",
        file=sys.stderr,
    )
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from vaopd.access.keys import read_keys

    entries = read_keys(arguments.file)
    emit(f"{'id':<12}  {'job':<24}  {'state':<8}  {'created':<25}  expires")
    for entry in entries:
        emit(f"{entry.id:<12}  {entry.job:<24}  {entry.state():<8}  {entry.created:<25}  {entry.expires or 'never'}")
    return 0


def _revoke(arguments: argparse.Namespace) -> int:
    from vaopd.access.keys import revoke_key

    entry = revoke_key(arguments.file, arguments.id)
    emit(f"key {entry.id} of job {entry.job} is revoked")
    return 0
