"""`vaopd certs FOLDER`: certificates for development."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vaopd.cli.common import Subparsers


def add_parsers(subparsers: Subparsers) -> None:
    certs = subparsers.add_parser("certs", help="make TLS certificates for development")
    certs.add_argument("folder", metavar="FOLDER", type=Path, help="where authority, server and client files are put")
    certs.add_argument(
        "--host",
        metavar="NAME",
        action="append",
        default=[],
        help="a name or address of the server beside localhost (repeatable)",
    )
    certs.add_argument("--days", type=int, default=30, metavar="N", help="how long they are valid (default 30)")
    certs.add_argument("--replace", action="store_true", help="overwrite those that are there")
    certs.set_defaults(command=_make, extra="certs")


def _make(arguments: argparse.Namespace) -> int:
    from vaopd.access.certificates import make_certificates

    for path in make_certificates(
        arguments.folder, hosts=arguments.host, days=arguments.days, replace=arguments.replace
    ):
        print(path)
    return 0
