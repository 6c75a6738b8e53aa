"""The replicas of one teacher, as a client sees them: their channels, their turns, the images that each one stores.

They are listed by their addresses, "host1:50051,host2:50051". Each has a channel of its own, since an image that was
uploaded to one is not stored by the others. A name that resolves to several addresses is one replica here: the client
stays with one of them for as long as it answers. Everything runs on the event loop of the client.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import ssl
import time
from collections.abc import Collection, Sequence
from typing import Any

import grpc

from vaopd.client.answers import check_description
from vaopd.client.channel import await_answer, make_channel_options, trace_metadata
from vaopd.errors import (
    Busy,
    ConfigError,
    InvalidInput,
    LimitExceeded,
    TeacherFault,
    TlsRefused,
    Unavailable,
    VaopdError,
)
from vaopd.net.backoff import Backoff
from vaopd.pb import teacher_pb2 as pb
from vaopd.pb import teacher_pb2_grpc
from vaopd.types import EncodedImage, TeacherDescription, TeacherLimits
from vaopd.wire.common import image_to_pb
from vaopd.wire.teacher import description_from_pb

log = logging.getLogger(__name__)

_CONNECT_S = 5.0
"""How long a client waits for the first of several replicas to be connected before it calls one regardless."""
_POLL_S = 0.01
PROBE_S = 3.0
_HUNG_UP = re.compile("failed to connect to all addresses.*Socket closed")


def speaks_tls(host: str, port: int) -> bool | None:
    """Returns whether a server answers a TLS handshake; None when it says nothing in time."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # only whether it is TLS, not whether its certificate is good
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, port), timeout=PROBE_S) as plain,
            context.wrap_socket(plain, server_hostname=host),
        ):
            return True
    except TimeoutError:
        return None
    except ssl.SSLError as error:
        # An alert is TLS; anything else that isn't a handshake is not.
        return "ALERT" in (error.reason or "")
    except OSError:
        return False


def split_addresses(target: str) -> list[str]:
    """Returns the replicas that a target names. Raises ConfigError for none, for one twice, and for no HOST:PORT.

    >>> split_addresses("first:50051, second:50051")
    ['first:50051', 'second:50051']
    >>> split_addresses("ipv4:10.0.0.1:50051,10.0.0.2:50051")  # gRPC's own way of listing them
    ['10.0.0.1:50051', '10.0.0.2:50051']
    """
    found = [part.strip() for part in re.sub(r"^ipv[46]:", "", target).split(",")]
    if not all(found) or len(set(found)) < len(found):
        raise ConfigError(f"teacher {target!r} must list addresses host:port, each once, with commas between them")
    for address in found:
        host, _, port = address.rpartition(":")
        # gRPC would take 443 for a missing port, and a larger one modulo 65536.
        sound = host and port.isascii() and port.isdecimal() and int(port) <= 65535 and "://" not in host
        if not sound and not address.startswith(("dns:", "unix:")):  # names that only gRPC reads
            raise ConfigError(
                f"teacher address {address!r} is not HOST:PORT with a port from 0 to 65535, e.g. 127.0.0.1:50051"
            )
    return found


class Replica:
    """One teacher server: its channel, and what the client knows of it."""

    def __init__(
        self,
        target: str,
        *,
        tls: grpc.ChannelCredentials | None,
        metadata: Sequence[tuple[str, str]],
        timeout_s: float,
        job: str = "",
    ) -> None:
        """job: charged for uploads; "" stands for the key's own."""
        self.target = target
        self.stored: set[str] = set()
        """SHA-256 of the images that it stores, as far as is known."""
        self.description: TeacherDescription | None = None
        """None until the replica has been compared with the others."""
        self.groups = 0
        """Groups of this client that are sent and not yet answered."""
        self._tls = tls
        self._metadata = metadata
        self._timeout_s = timeout_s
        self._job = job
        self._channel: grpc.aio.Channel | None = None

    @property
    def channel(self) -> grpc.aio.Channel:
        """The channel, opened by the first call."""
        if self._channel is None:
            options = make_channel_options()
            if self._tls is None:
                self._channel = grpc.aio.insecure_channel(self.target, options=options)
            else:
                self._channel = grpc.aio.secure_channel(self.target, self._tls, options=options)
        return self._channel

    @property
    def stub(self) -> Any:
        """The gRPC stub over the channel."""
        return teacher_pb2_grpc.TeacherStub(self.channel)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Returns a call's metadata: the key, and the id by which client and teacher name the call."""
        return (*self._metadata, *trace_metadata())

    def state(self) -> grpc.ChannelConnectivity:
        """Returns the connection's state and begins to connect if it is idle. A server that drains disconnects."""
        return self.channel.get_state(try_to_connect=True)

    async def close(self) -> None:
        """Closes the channel; the next call opens another one."""
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    def mark_lost(self, error: Unavailable) -> None:
        """Forgets its images and description: the next server at its address may have others."""
        if self.description is not None:  # logged once, not at every attempt until it returns
            log.warning("%s", error)
        self.stored.clear()
        self.description = None

    async def explain(self, error: Unavailable) -> Unavailable:
        """Returns TlsRefused for a server that hangs up on this client since the two don't agree on TLS."""
        if not _HUNG_UP.search(str(error)) or isinstance(error, TlsRefused):
            return error
        host, _, port = self.target.rpartition(":")
        if not port.isdecimal() or not await asyncio.to_thread(speaks_tls, host.strip("[]"), int(port)):
            return error
        reason = (
            "it speaks TLS, and this client plain text; set VAOPD_TLS_CA"
            if self._tls is None
            else "it refuses this client's certificate, or wants one; set VAOPD_TLS_CERT and VAOPD_TLS_KEY"
        )
        return TlsRefused(f"TLS with the teacher at {self.target} failed: {reason}")

    async def describe(self, timeout_s: float | None = None) -> TeacherDescription:
        """Asks the replica for its description. Raises Unavailable when it doesn't answer in time."""
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        call = self.stub.Describe(pb.DescribeRequest(), metadata=self.metadata(), timeout=timeout_s)
        description = description_from_pb(await await_answer(call, self.target))
        check_description(description, self.target)
        return description

    async def upload(self, images: dict[str, EncodedImage], limits: TeacherLimits) -> dict[str, VaopdError]:
        """Uploads those of these images that the replica lacks. Returns its refusals by the images' SHA-256.

        Raises Busy while the replica has no room for them.
        """
        refused: dict[str, VaopdError] = {}
        unknown = [sha256 for sha256 in images if sha256 not in self.stored]
        if not unknown:
            return refused
        asked = pb.MissingImagesRequest(sha256=unknown, job=self._job)
        call = self.stub.MissingImages(asked, metadata=self.metadata(), timeout=self._timeout_s)
        missing = (await await_answer(call, self.target)).sha256
        self.stored.update(set(unknown) - set(missing))
        sendable = []
        for sha256 in missing:
            if (size := len(images[sha256].data)) > limits.max_image_bytes:
                refused[sha256] = LimitExceeded(
                    f"image {sha256[:12]}… has {size} bytes, the limit is {limits.max_image_bytes}; "
                    "send a smaller encoding"
                )
            else:
                sendable.append(images[sha256])
        try:
            await self._put(sendable)
        except Busy:
            raise
        except (InvalidInput, LimitExceeded):
            for image in sendable:  # one of them is refused: find out which
                try:
                    await self._put([image])
                except Busy:
                    raise
                except (InvalidInput, LimitExceeded) as error:
                    refused[image.sha256] = error
        return refused

    async def _put(self, images: Sequence[EncodedImage]) -> None:
        if images:
            messages = iter([image_to_pb(image, job=self._job) for image in images])
            call = self.stub.PutImages(messages, metadata=self.metadata(), timeout=self._timeout_s)
            self.stored.update((await await_answer(call, self.target)).sha256)


Failures = dict[Replica, VaopdError]
"""The replicas that have failed since the last pause, each with its error."""


class Replicas:
    """All replicas of one teacher, which have to serve the same model in the same precision."""

    def __init__(
        self,
        target: str,
        *,
        tls: grpc.ChannelCredentials | None,
        metadata: Sequence[tuple[str, str]],
        timeout_s: float,
        job: str,
    ) -> None:
        self._all = [
            Replica(address, tls=tls, metadata=metadata, timeout_s=timeout_s, job=job)
            for address in split_addresses(target)
        ]
        self._turn = 0
        self.description: TeacherDescription | None = None
        """The first replica's description, which the others have to match, until `forget`."""
        self._first = ""

    async def introduce(self, replica: Replica, *, timeout_s: float | None = None) -> TeacherDescription:
        """Returns a replica's description, asked for once. Raises TeacherFault when it differs from the first's."""
        if replica.description is None:
            description = await replica.describe(timeout_s)
            if self.description is None:
                self.description, self._first = description, replica.target
            for field in ("revision", "tokenizer_fingerprint", "dtype", "pixel_bounds"):
                known, found = getattr(self.description, field), getattr(description, field)
                # A replica of an earlier version doesn't say its pixel bounds.
                if known != found and None not in (known, found):
                    known, found = (value[:12] if isinstance(value, str) else value for value in (known, found))
                    raise TeacherFault(
                        f"the teacher at {replica.target} has {field} {found}, the one at {self._first} had "
                        f"{known}; replicas must serve the same model in the same precision. To continue "
                        "with another model, describe the teacher and fetch its head again"
                    )
            replica.description = description
        return replica.description

    async def introduce_others(self, timeout_s: float) -> None:
        """Compares all replicas now, so that a different one is found at once; those that don't answer, later."""
        asked = [self.introduce(replica, timeout_s=timeout_s) for replica in self._all]
        for answer in await asyncio.gather(*asked, return_exceptions=True):
            if isinstance(answer, BaseException) and not isinstance(answer, Unavailable | Busy):
                raise answer

    def forget(self) -> None:
        """Forgets all descriptions, so that the teacher may serve another model."""
        self.description = None
        for replica in self._all:
            replica.description = None

    async def close(self) -> None:
        """Closes all channels."""
        for replica in self._all:
            await replica.close()

    async def pick(self, failed: Collection[Replica] = ()) -> Replica:
        """Chooses a connected replica with the fewest groups, in turns; a failed one only when no other is left."""
        candidates = [replica for replica in self._all if replica not in failed] or self._all
        if len(candidates) == 1:
            return candidates[0]
        await _wait_for_connection(candidates)
        self._turn += 1
        ready = grpc.ChannelConnectivity.READY
        in_turn = [candidates[(self._turn + index) % len(candidates)] for index in range(len(candidates))]
        return min(in_turn, key=lambda replica: (replica.state() is not ready, replica.groups))

    async def pause(self, failures: Failures, backoff: Backoff) -> None:
        """Waits until the next attempt: not at all while a replica is left that has not failed, else for a pause.

        Raises the error of the last attempt, or of the one with the shortest retry hint, when `backoff` is over; at
        once when all failed by TLS.
        """
        if len(failures) < len(self._all):
            return
        # The shortest retry hint, if there is one, or else the last failure.
        busy = [error for error in failures.values() if isinstance(error, Busy)]
        error = min(busy, key=lambda hint: hint.retry_after_s) if busy else list(failures.values())[-1]
        refused = all(isinstance(failure, TlsRefused) for failure in failures.values())
        failures.clear()
        if refused:
            raise error
        await asyncio.sleep(backoff.delay_s(error))


async def _wait_for_connection(replicas: Sequence[Replica]) -> None:
    """Waits until one replica is connected, all are known to be down, or `_CONNECT_S` have passed."""
    deadline = time.monotonic() + _CONNECT_S
    down = grpc.ChannelConnectivity.TRANSIENT_FAILURE
    while True:
        states = {replica.state() for replica in replicas}
        if grpc.ChannelConnectivity.READY in states or states == {down} or time.monotonic() > deadline:
            return
        await asyncio.sleep(_POLL_S)
