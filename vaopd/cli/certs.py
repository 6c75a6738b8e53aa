"""`vaopd certs FOLDER`: makes certificates for development."""

from __future__ import annotations

import argparse
from pathlib import Path

from vaopd.cli.common import Subparsers
from vaopd.cli.output import emit


def add_parsers(subparsers: Subparsers) -> None:
    """Adds `vaopd certs`."""
    certs = subparsers.add_parser("certs", help="make TLS certificates for development, or one more client's")
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
    certs.add_argument(
        "--keep-authority", action="store_true", help="also write ca.key, with which --client signs more certificates"
    )
    certs.add_argument("--client", metavar="NAME", help="only add a client's NAME.pem and NAME.key to FOLDER")
    certs.tie("--host", "--keep-authority", to="--client", apart=True)
    certs.set_defaults(command=_make, extra="certs")


def _make(arguments: argparse.Namespace) -> int:
    from vaopd.access.certificates import add_client, make_certificates

    days, replace = arguments.days, arguments.replace
    if arguments.client:
        paths = add_client(arguments.folder, arguments.client, days=days, replace=replace)
    else:
        keep = arguments.keep_authority
        paths = make_certificates(
            arguments.folder, hosts=arguments.host, days=days, replace=replace, keep_authority=keep
        )
    for path in paths:
        emit(path)
    return 0
