"""Certificates for development: an authority, a server and a client, elliptic curve P-256, valid for days.

    ca.pem                     what clients and, for mTLS, the server trust
    server.pem, server.key     [teacher.tls] or [api.tls] cert and key
    client.pem, client.key     VAOPD_TLS_CERT and VAOPD_TLS_KEY of trainers and API

The authority's own key is thrown away, so nobody can make further certificates that these files would trust. A service
that others than its developers reach gets its certificates from the authority of its site.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from vaopd.errors import ConfigError

OWN_HOSTS = ("localhost", "127.0.0.1", "::1")
"""Always among the server's names: health checks ask there."""
FILES = ("ca.pem", "server.pem", "server.key", "client.pem", "client.key")
_CLOCK_SKEW = timedelta(minutes=5)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Issued:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def key_pem(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )


def make_certificates(folder: Path, *, hosts: Sequence[str] = (), days: int = 30, replace: bool = False) -> list[Path]:
    """Writes FILES into `folder`; `hosts` are names and addresses under which clients reach the server.

    Raises ConfigError for a name that is none, and where files would be overwritten unless `replace`.
    """
    if not 1 <= days <= 365:
        raise ConfigError(f"{days} days are no life time for certificates of development; use 1 to 365")
    names = x509.SubjectAlternativeName([_name(host) for host in dict.fromkeys((*OWN_HOSTS, *hosts))])
    paths = [folder / name for name in FILES]
    if not replace and (there := [path.name for path in paths if path.exists()]):
        raise ConfigError(f"{folder} holds {', '.join(there)} already; --replace makes all of them anew")
    until = datetime.now(UTC) + timedelta(days=days)
    authority = _issue("vaopd development authority", until=until)
    server = _issue(
        "vaopd teacher", until=until, authority=authority, usage=ExtendedKeyUsageOID.SERVER_AUTH, names=names
    )
    client = _issue("vaopd client", until=until, authority=authority, usage=ExtendedKeyUsageOID.CLIENT_AUTH)
    contents = (
        authority.certificate_pem(),
        server.certificate_pem(),
        server.key_pem(),
        client.certificate_pem(),
        client.key_pem(),
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in zip(paths, contents, strict=True):
            _write(path, content)
    except OSError as error:
        raise ConfigError(f"{folder} can't be written ({error.strerror}); name another folder") from None
    return paths


def _issue(
    common_name: str,
    *,
    until: datetime,
    authority: _Issued | None = None,
    usage: x509.ObjectIdentifier | None = None,
    names: x509.SubjectAlternativeName | None = None,
) -> _Issued:
    """A certificate that `authority` signs, or one that signs itself and others."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    is_authority = authority is None
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(authority.certificate.subject if authority else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - _CLOCK_SKEW)
        .not_valid_after(until)
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=0 if is_authority else None), critical=True)
        .add_extension(_key_usage(signs_certificates=is_authority), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    if authority is not None:
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
        builder = builder.add_extension(issuer, critical=False)
    if usage is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    if names is not None:
        builder = builder.add_extension(names, critical=False)
    return _Issued(certificate=builder.sign(authority.key if authority else key, hashes.SHA256()), key=key)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        pass
    if not host or ":" in host or "/" in host or not host.isascii():
        raise ConfigError(f"host {host[:80]!r} is no name or address; leave port and scheme out")
    return x509.DNSName(host)


def _write(path: Path, content: bytes) -> None:
    """Keys are for their owner only, from their first byte on; readers see the old file or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    mode = 0o600 if path.suffix == ".key" else 0o644
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with open(descriptor, "wb") as file:
        file.write(content)
    partial.replace(path)
