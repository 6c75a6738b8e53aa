"""Certificates for development, by trustme: an authority, a server and a client, elliptic curve P-256.

    ca.pem                     what clients and, for mTLS, the server trust
    server.pem, server.key     [teacher.tls] or [api.tls] cert and key
    client.pem, client.key     VAOPD_TLS_CERT and VAOPD_TLS_KEY of trainers and API

Server and client are valid for days. The authority's own key is thrown away, so nothing can be signed that these files
would trust; that is why its certificate need not expire. With `keep_authority` it stays in ca.key, and `add_client`
signs a certificate for one more client: don't leave that file where the service runs. Use your site's authority for a
service that others than its developers can reach.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import idna
import trustme

from vaopd.errors import ConfigError
from vaopd.files.durable import atomic_file

OWN_HOSTS = ("localhost", "127.0.0.1", "::1")
"""Always among the server's names, for health checks."""
AUTHORITY_KEY = "ca.key"
FILES = ("ca.pem", "server.pem", "server.key", "client.pem", "client.key")
CLIENT_NAME = "client.invalid"
"""A name that no server can have (RFC 2606), so that a client's key is of no use to imitate the service."""
_CLOCK_SKEW = timedelta(minutes=5)


def make_certificates(
    folder: Path, *, hosts: Sequence[str] = (), days: int = 30, replace: bool = False, keep_authority: bool = False
) -> list[Path]:
    """Writes FILES into `folder` and returns their paths; keys are readable by their owner only.

    hosts: names and addresses under which clients reach the server, beside OWN_HOSTS.
    days: how long server and client are valid, 1 to 365.
    replace: overwrites files that exist.
    keep_authority: also writes the authority's key, AUTHORITY_KEY.

    Raises ConfigError for a host that is no name or address, for files that exist, and where nothing can be written.
    """
    names = [_check_host(host) for host in dict.fromkeys((*OWN_HOSTS, *hosts))]
    paths = [folder / name for name in FILES]
    if not replace and (existing := [path.name for path in paths if path.exists()]):
        raise ConfigError(f"{folder} already holds {', '.join(existing)}; --replace replaces all of them")
    authority = trustme.CA(path_length=0, organization_name="vaopd", organization_unit_name="development authority")
    contents = [
        authority.cert_pem.bytes(),
        *_issue(authority, names, common_name="vaopd teacher", days=days),
        *_issue(authority, [CLIENT_NAME], common_name="vaopd client", days=days),
    ]
    if keep_authority:
        paths.append(folder / AUTHORITY_KEY)
        contents.append(authority.private_key_pem.bytes())
    return _write(folder, paths, contents)


def add_client(folder: Path, name: str, *, days: int = 30, replace: bool = False) -> list[Path]:
    """Writes NAME.pem and NAME.key, signed by the authority in `folder`, and returns their paths.

    Raises ConfigError where the authority's key was not kept, for files that exist and for an unfit name.
    """
    paths = [folder / f"{name}.pem", folder / f"{name}.key"]
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,60}", name) or {path.name for path in paths} & {*FILES, AUTHORITY_KEY}:
        raise ConfigError(f"client {name!r}: use small letters, digits and -, and none of ca, server, client")
    if not replace and any(path.exists() for path in paths):
        raise ConfigError(f"{folder} already holds {name}'s files; --replace replaces them")
    try:
        authority = trustme.CA.from_pem((folder / "ca.pem").read_bytes(), (folder / AUTHORITY_KEY).read_bytes())
    except OSError:
        raise ConfigError(
            f"{folder} has no {AUTHORITY_KEY}, so nothing more can be signed; make the files again with "
            "--keep-authority, and replace them everywhere"
        ) from None
    return _write(folder, paths, _issue(authority, [f"{name}.{CLIENT_NAME}"], common_name=f"vaopd {name}", days=days))


def _issue(authority: trustme.CA, identities: Sequence[str], *, common_name: str, days: int) -> list[bytes]:
    """Returns certificate and key. Raises ConfigError for a time that is too short or too long."""
    if not 1 <= days <= 365:
        raise ConfigError(f"certificates for development can't be valid for {days} days; use 1 to 365")
    issued = authority.issue_cert(
        *identities,
        common_name=common_name,
        organization_name="vaopd",
        organization_unit_name="development",
        not_before=datetime.now(UTC) - _CLOCK_SKEW,
        not_after=datetime.now(UTC) + timedelta(days=days),
    )
    return [issued.cert_chain_pems[0].bytes(), issued.private_key_pem.bytes()]


def _write(folder: Path, paths: list[Path], contents: Sequence[bytes]) -> list[Path]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in zip(paths, contents, strict=True):
            with atomic_file(path, mode=0o600 if path.suffix == ".key" else 0o644) as file:
                file.write(content)
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
