"""`vaopd certs FOLDER`: makes certificates for development."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vaopd.cli.output import emit

if TYPE_CHECKING:
    from vaopd.cli.common import Subparsers


def add_parsers(subparsers: Subparsers) -> None:
    """Adds `vaopd certs`."""
    certs = subparsers.add_parser("certs", help="make TLS certificates for development")
    certs.add_argument(
        "folder",
        metavar="FOLDER",
        type=Path,
        help="the folder to write the authority's, server's and client's files to",
    )
    certs.add_argument(
        "--host",
        metavar="NAME",
        action="append",
        default=[],
        help="another name or address of the server, besides localhost (repeatable)",
    )
    certs.add_argument("--days", type=int, default=30, metavar="N", help="days until they expire (default 30)")
    certs.add_argument("--replace", action="store_true", help="overwrite existing files")
    certs.set_defaults(command=_make, extra="certs")


def _make(arguments: argparse.Namespace) -> int:
    from vaopd.access.certificates import make_certificates

    for path in make_certificates(
        arguments.folder, hosts=arguments.host, days=arguments.days, replace=arguments.replace
    ):
        emit(path)
    return 0
