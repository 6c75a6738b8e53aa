"""TLS of the teacher's port: certificates from files, read again when they change; plaintext only when asked for."""

from __future__ import annotations

import logging
import ssl

import grpc

from vaopd.access.tls import ExpiryWatch, read_expiry
from vaopd.config import TeacherTlsConfig
from vaopd.errors import ConfigError
from vaopd.files.plain import read_plain_bytes
from vaopd.net.ports import is_loopback

log = logging.getLogger(__name__)


def make_server_credentials(tls: TeacherTlsConfig, address: str) -> grpc.ServerCredentials | None:
    """Returns the port's credentials, None for plaintext.

    Raises ConfigError for plaintext that other hosts could reach, and for unusable files.
    """
    if tls.cert is None:
        if tls.plaintext or is_loopback(address):
            return None
        raise ConfigError(
            f"teacher.address = {address!r} can be reached from other hosts: give [teacher.tls] cert and key in the "
            "service file (`vaopd certs FOLDER` makes some), or plaintext = true on a network without other users"
        )
    files = _Files(tls)
    return grpc.dynamic_ssl_server_credentials(
        files.read_first(), files.read_if_changed, require_client_authentication=tls.client_ca is not None
    )


class _Files:
    """Reads the files again when gRPC asks, at every handshake, so that a renewed certificate needs no restart."""

    def __init__(self, tls: TeacherTlsConfig) -> None:
        self._tls = tls
        self._content: tuple[bytes, bytes, bytes | None] | None = None
        self._expiry: ExpiryWatch | None = None

    def read_first(self) -> grpc.ServerCertificateConfiguration:
        self._content = self._read()
        if self._expiry is not None:
            self._expiry.look()
        return _make_configuration(*self._content)

    def read_if_changed(self) -> grpc.ServerCertificateConfiguration | None:
        try:
            content = self._read()
        except ConfigError as error:  # e.g. the certificate has been renewed, and its key not yet
            log.error("the previous certificate stays in use: %s", error)
            return None
        finally:
            if self._expiry is not None:
                self._expiry.look()
        if content == self._content:
            return None
        self._content = content
        return _make_configuration(*content)

    def _read(self) -> tuple[bytes, bytes, bytes | None]:
        """Raises ConfigError for files that can't be read or don't belong together; gRPC itself would only log it."""
        tls = self._tls
        assert tls.cert is not None
        assert tls.key is not None
        try:
            client_ca = read_plain_bytes(tls.client_ca) if tls.client_ca else None
            if client_ca is not None:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=client_ca.decode("ascii"))
            expires = read_expiry(tls.cert, tls.key, section="teacher")
            if self._expiry is None or self._expiry.expires != expires:
                self._expiry = ExpiryWatch(expires, section="teacher")
            return read_plain_bytes(tls.key), read_plain_bytes(tls.cert), client_ca
        except (ssl.SSLError, UnicodeDecodeError):
            raise ConfigError(
                f"[teacher.tls] cert = {str(tls.cert)!r} and key = {str(tls.key)!r} (and client_ca) must be PEM files "
                "that belong together, the key without a pass phrase; `vaopd certs FOLDER` makes a set"
            ) from None
        except OSError as error:
            names = ", ".join(repr(str(path)) for path in (tls.cert, tls.key, tls.client_ca) if path is not None)
            raise ConfigError(f"[teacher.tls] one of {names} can't be read ({error.strerror})") from None


def _make_configuration(key: bytes, cert: bytes, client_ca: bytes | None) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(key, cert)], client_ca)
