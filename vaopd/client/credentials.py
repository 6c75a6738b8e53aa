"""A client's credentials for the teacher, from files that environment variables name.

    VAOPD_API_KEY_FILE              the job's API key, as `vaopd keys add` printed it
    VAOPD_TLS_CA                    the authority that signed the teacher's certificate, PEM; turns TLS on
    VAOPD_TLS_CERT, VAOPD_TLS_KEY   the client's own certificate and its key, PEM, if the teacher asks for one

Files, not values: an environment is inherited by child processes, and shown by tools. Trainer, API and command line
read them here.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import grpc

from vaopd.errors import ConfigError
from vaopd.files.plain import read_plain_bytes
from vaopd.files.secret import parse_api_key, read_secret

API_KEY_FILE, CA, CERT, KEY = "VAOPD_API_KEY_FILE", "VAOPD_TLS_CA", "VAOPD_TLS_CERT", "VAOPD_TLS_KEY"


class Credentials(TypedDict, total=False):
    """Keyword arguments of `TeacherClient`."""

    api_key: str
    tls: grpc.ChannelCredentials


def from_environment(environment: Mapping[str, str] = os.environ) -> Credentials:
    """Reads the credentials for `TeacherClient(target, **from_environment())`.

    Raises ConfigError, naming the variable, for a file that can't be read or holds no key or certificate.
    """
    found: Credentials = {}
    if (key := _read(environment, API_KEY_FILE)) is not None:
        found["api_key"] = parse_api_key(key, origin=f"the file of {API_KEY_FILE}")
    ca, cert, cert_key = (_read(environment, name) for name in (CA, CERT, KEY))
    if (cert is None) != (cert_key is None):
        raise ConfigError(f"{CERT} and {KEY} go together; set both, or neither")
    if ca is not None or cert is not None:
        make_tls_context(environment)
        found["tls"] = grpc.ssl_channel_credentials(ca, cert_key, cert)
    return found


def make_tls_context(environment: Mapping[str, str] = os.environ) -> ssl.SSLContext:
    """Returns a context with the environment's certificates. Raises ConfigError by name for those that don't fit.

    gRPC would only log that, or ask for a key's pass phrase on the terminal.
    """
    ca, cert, key = (environment.get(name) or None for name in (CA, CERT, KEY))
    try:
        context = ssl.create_default_context(cafile=ca)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"{CA} = {ca!r} holds no certificate that can be read ({error.strerror})") from None
    if cert and key:
        try:
            context.load_cert_chain(cert, key, password="")
        except OSError as error:
            raise ConfigError(
                f"{CERT} = {cert!r} and {KEY} = {key!r} must be PEM files that belong together, the key without a pass "
                f"phrase ({error.strerror})"
            ) from None
    return context


def _read(environment: Mapping[str, str], name: str) -> bytes | None:
    if not (path := environment.get(name)):
        return None
    try:
        return read_secret(Path(path), what=name) if name in (API_KEY_FILE, KEY) else read_plain_bytes(Path(path))
    except OSError as error:
        raise ConfigError(f"{name} = {path!r} can't be read ({error.strerror})") from None
