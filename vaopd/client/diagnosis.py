"""Says why a teacher can't be used, before anything is started that needs it.

A client that retries for minutes, as a trainer's must, reports TLS and absence alike as "can't be reached". Here each
replica is tried once, from the socket up: does something listen, does it speak TLS as this client does, is the
certificate good, does it want a client's certificate, is there a key and is it this job's, what does it serve. Errors
name the variable or option to set.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vaopd.client.channel import await_answer
from vaopd.client.credentials import API_KEY_FILE, CA, CERT, KEY, from_environment, make_tls_context
from vaopd.client.replicas import PROBE_S, Replica, speaks_tls, split_addresses
from vaopd.errors import (
    Busy,
    ConfigError,
    Mismatch,
    PermissionDenied,
    TlsRefused,
    Unauthenticated,
    Unavailable,
)
from vaopd.pb import teacher_pb2 as pb
from vaopd.types import PayloadKind, TeacherDescription

log = logging.getLogger(__name__)

CALL_S = 10.0
AGAIN_S = 1.0
SAY_EVERY_S = 10.0
_ALERT_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Examination:
    """What was found: the description of the first replica that answers, and those that don't, with the reason."""

    description: TeacherDescription
    absent: dict[str, str]


def examine_teacher(
    target: str,
    *,
    job: str | None,
    payload: PayloadKind | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Examination:
    """Asks every replica of `target` once. A replica that is away is tolerated while another one answers.

    Raises Unavailable when none answers, ConfigError for TLS that doesn't fit, Unauthenticated and PermissionDenied for
    the key, Mismatch when the teacher doesn't offer `payload`. job: None stands for the key's own.
    """
    absent: dict[str, str] = {}
    found: TeacherDescription | None = None
    for address in split_addresses(target):
        try:
            _check_connection(address, environment)
            described = asyncio.run(_describe(address, job=job, environment=environment))
            found = found or described
        except TlsRefused:
            raise
        except (Unavailable, Busy) as error:
            absent[address] = str(error)
    if found is None:
        raise Unavailable("\n".join(absent.values()))
    if payload is not None and payload not in found.payloads:
        raise Mismatch(
            f"teacher.payload = {payload}: the teacher at {target} offers {', '.join(found.payloads)}; choose one of "
            "these" + (', and another objective.token_score than "expected"' if payload == "hidden_pair" else "")
        )
    return Examination(description=found, absent=absent)


def wait_for_teacher(
    target: str, *, job: str, patience_s: float = 300.0, check: Callable[[], None] = lambda: None
) -> Examination:
    """Returns the examination once a replica answers; logs meanwhile why none does.

    Raises Unavailable after `patience_s`, and at once the errors that waiting doesn't cure. `check` is called during
    the wait and may raise.
    """
    deadline = time.monotonic() + patience_s
    said_s = -SAY_EVERY_S
    while True:
        try:
            return examine_teacher(target, job=job)
        except Unavailable as error:
            now = time.monotonic()
            if now > deadline or isinstance(error, TlsRefused):
                raise
            if now - said_s >= SAY_EVERY_S:
                log.warning("waiting for the teacher: %s", error)
                said_s = now
        until = time.monotonic() + AGAIN_S
        while time.monotonic() < until:
            check()
            time.sleep(0.1)


def _check_connection(address: str, environment: Mapping[str, str]) -> None:
    """Raises Unavailable when nothing listens, ConfigError when the two sides disagree on TLS."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        socket.create_connection((host, int(port)), timeout=PROBE_S).close()
    except (OverflowError, ValueError):
        raise ConfigError(
            f"teacher address {address!r} is not HOST:PORT with a port from 0 to 65535, e.g. 127.0.0.1:50051"
        ) from None
    except OSError as error:
        reason = "it did not answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        raise Unavailable(
            f"no teacher listens at {address} ({reason}); start it there (`vaopd teacher CONFIG`), or correct "
            "teacher.address or --teacher"
        ) from None
    own_tls = bool(environment.get(CA) or environment.get(CERT))
    found_tls = speaks_tls(host, int(port))
    if found_tls is False and own_tls:
        raise ConfigError(
            f"the teacher at {address} speaks plain text, and {CA if environment.get(CA) else CERT} turns TLS on here; "
            "unset it, or give the teacher a certificate ([teacher.tls] of its service file)"
        )
    if found_tls and not own_tls:
        raise ConfigError(
            f"the teacher at {address} speaks TLS, and this process plain text; set {CA} to the file of the authority "
            "that signed the teacher's certificate"
        )
    if found_tls and own_tls:
        _check_certificates(host, int(port), environment)


def _check_certificates(host: str, port: int, environment: Mapping[str, str]) -> None:
    """Raises ConfigError for a certificate that isn't good, of the server or of this client."""
    address = f"{host}:{port}"
    from_environment(environment)  # reads the files, within bounds
    context = make_tls_context(environment)
    context.set_alpn_protocols(["h2"])
    agreed = False
    try:
        with (
            socket.create_connection((host, port), timeout=PROBE_S) as plain,
            context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            agreed = True
            secure.settimeout(_ALERT_S)
            # A server that is content sends its HTTP/2 settings; in TLS 1.3 one that is not hangs up only now.
            if secure.recv(1):
                return
            reason = "it hung up"
    except TimeoutError:
        return  # gRPC's own words, then
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(
            f"the certificate of the teacher at {address} is refused: {error.verify_message}; {CA} must name the "
            "authority that signed it, and the certificate must be valid now and for this host name"
        ) from None
    except ssl.SSLError as error:
        if not agreed and "CERTIFICATE" not in (error.reason or "").upper():
            return
        reason = error.reason or "TLS"
    except OSError:
        if not agreed:
            return
        reason = "it hung up"
    given = f"refuses the certificate of {CERT}" if environment.get(CERT) else "wants a client's certificate"
    raise ConfigError(
        f"the teacher at {address} {given} ({reason}); set {CERT} and {KEY} to one that its authority signed (`vaopd "
        "certs` makes them)"
    )


async def _describe(address: str, *, job: str | None, environment: Mapping[str, str]) -> TeacherDescription:
    """Returns a replica's description; checks that the key, if there is one, is the job's."""
    credentials = from_environment(environment)
    key = credentials.get("api_key")
    metadata = () if key is None else (("authorization", f"Bearer {key}"),)
    replica = Replica(address, tls=credentials.get("tls"), metadata=metadata, timeout_s=CALL_S)
    try:
        description = await replica.describe()
        if key is not None and job is not None:
            await _check_job(replica, job=job, metadata=metadata)
        return description
    except Unauthenticated as error:
        whose = "a key" if job is None else f"the key of job {job!r}"
        remedy = (
            f"set {API_KEY_FILE} to a file with {whose}"
            if key is None
            else f"the file of {API_KEY_FILE} needs to hold {whose}"
        )
        raise Unauthenticated(
            f"the teacher at {address}: {error}; {remedy} (`vaopd keys add {job or 'JOB'}` there makes one)"
        ) from None
    finally:
        await replica.close()


async def _check_job(replica: Replica, *, job: str, metadata: tuple[tuple[str, str], ...]) -> None:
    """Raises PermissionDenied when the key is another job's. To ask for no image is the cheapest call with a job."""
    call = replica.stub.MissingImages(pb.MissingImagesRequest(job=job), metadata=metadata, timeout=CALL_S)
    try:
        await await_answer(call, replica.target)
    except PermissionDenied:
        raise PermissionDenied(
            f"the teacher at {replica.target}: the key in the file of {API_KEY_FILE} is another job's than {job!r}; "
            f"set {API_KEY_FILE} to a file with the key of job {job!r}, or run.name to the key's job"
        ) from None
