"""Certificates for development, by trustme: an authority, a server and a client, elliptic curve P-256.

    ca.pem                     what clients and, for mTLS, the server trust
    server.pem, server.key     [teacher.tls] or [api.tls] cert and key
    client.pem, client.key     VAOPD_TLS_CERT and VAOPD_TLS_KEY of trainers and API

Server and client are valid for days. The authority's own key is thrown away, so nothing can be signed that these files
would trust; that is why its certificate need not expire. Use your site's authority for a service that others than its
developers can reach.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import idna
import trustme

from vaopd.errors import ConfigError
from vaopd.files.durable import atomic_file

OWN_HOSTS = ("localhost", "127.0.0.1", "::1")
"""Always among the server's names, for health checks."""
FILES = ("ca.pem", "server.pem", "server.key", "client.pem", "client.key")
CLIENT_NAME = "client.invalid"
"""A name that no server can have (RFC 2606), so that a client's key is of no use to imitate the service."""
_CLOCK_SKEW = timedelta(minutes=5)


def make_certificates(folder: Path, *, hosts: Sequence[str] = (), days: int = 30, replace: bool = False) -> list[Path]:
    """Writes FILES into `folder` and returns their paths; keys are readable by their owner only.

    hosts: names and addresses under which clients reach the server, beside OWN_HOSTS.
    days: how long server and client are valid, 1 to 365.
    replace: overwrites files that exist.

    Raises ConfigError for a host that is no name or address, for files that exist, and where nothing can be written.
    """
    if not 1 <= days <= 365:
        raise ConfigError(f"certificates for development can't be valid for {days} days; use 1 to 365")
    names = [_check_host(host) for host in dict.fromkeys((*OWN_HOSTS, *hosts))]
    paths = [folder / name for name in FILES]
    if not replace and (existing := [path.name for path in paths if path.exists()]):
        raise ConfigError(f"{folder} already holds {', '.join(existing)}; --replace replaces all of them")
    authority = trustme.CA(path_length=0, organization_name="vaopd", organization_unit_name="development authority")
    contents = [authority.cert_pem]
    for common_name, identities in (("vaopd teacher", names), ("vaopd client", [CLIENT_NAME])):
        issued = authority.issue_cert(
            *identities,
            common_name=common_name,
            organization_name="vaopd",
            organization_unit_name="development",
            not_before=datetime.now(UTC) - _CLOCK_SKEW,
            not_after=datetime.now(UTC) + timedelta(days=days),
        )
        contents += [issued.cert_chain_pems[0], issued.private_key_pem]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in zip(paths, contents, strict=True):
            with atomic_file(path, mode=0o600 if path.suffix == ".key" else 0o644) as file:
                file.write(content.bytes())
    except OSError as error:
        raise ConfigError(f"{folder} can't be written ({error.strerror}); name another folder") from None
    return paths


def _check_host(host: str) -> str:
    """Returns a host for trustme, which would accept networks, mail addresses and non-ASCII letters too."""
    name = host.strip("[]")
    try:
        ipaddress.ip_address(name)
    except ValueError:
        try:
            idna.encode(name.removeprefix("*."))
            name.encode("ascii")
        except UnicodeError:  # idna.IDNAError is one
            raise ConfigError(f"host {host[:80]!r} is no name or address; leave port and scheme out") from None
    return name
