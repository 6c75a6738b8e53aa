"""The teacher's process from the loaded model to the drained server.

Start: load, listen, health SERVING. SIGTERM or SIGINT: health NOT_SERVING, new calls UNAVAILABLE, accepted calls finish
within `drain_s`, exit 0. The engine failed or hangs: health NOT_SERVING, waiting calls UNAVAILABLE, exit 1.
Even if the device hangs, the process ends at most drain_s + 7 s after the signal.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from vaopd.access.keys import KeyStore
from vaopd.config import Config, TeacherServiceConfig
from vaopd.errors import ConfigError
from vaopd.net.ports import allow_connections
from vaopd.pb import teacher_pb2, teacher_pb2_grpc
from vaopd.process import entry
from vaopd.types import TeacherDescription, TeacherLimits
from vaopd.vlm.model import Vlm
from vaopd.wire.teacher import DEGRADATION_KINDS
from vaopd_teacher.engines.backend import Backend
from vaopd_teacher.engines.engine import Engine
from vaopd_teacher.engines.load import load, make_backend
from vaopd_teacher.hang_watch import Watchdog
from vaopd_teacher.intake.image_stores import ImageStore, PreparedImages
from vaopd_teacher.intake.prepare import Preparer
from vaopd_teacher.line.admission import Admission
from vaopd_teacher.line.prepare_ahead import Ahead
from vaopd_teacher.line.scheduler import Scheduler
from vaopd_teacher.metrics import Cache, TeacherMetrics
from vaopd_teacher.rpc.access import Access, Quotas
from vaopd_teacher.rpc.interceptor import ErrorInterceptor
from vaopd_teacher.rpc.servicer import CHUNK_BYTES, MESSAGE_OVERHEAD_BYTES, TeacherServicer
from vaopd_teacher.rpc.tls import make_server_credentials

log = logging.getLogger(__name__)

SERVICE = teacher_pb2.DESCRIPTOR.services_by_name["Teacher"].full_name
MAX_CONNECTIONS, MAX_CALLS_PER_CONNECTION, MAX_CALLS = 1024, 1024, 4096
METADATA_BYTES = 16 * 1024
_LAST_BYTES_S = 1.0
_LAST_FORWARD_S = 5.0
"""How long a drained process waits for a forward in progress after all of its calls have ended."""


def describe(backend: Backend, *, model: str, limits: TeacherLimits) -> TeacherDescription:
    """Returns the answer to Describe. An image travels in one message, so it can't be larger than a message."""
    reader = backend.reader
    return TeacherDescription(
        # Clients don't need to know a folder's path on this host.
        model=Path(model).name if Path(model).is_dir() else model,
        revision=backend.revision,
        tokenizer_fingerprint=reader.fingerprint,
        vocab_size=reader.vocab_size,
        hidden_size=reader.hidden_size,
        dtype=backend.dtype,
        limits=replace(
            limits,
            max_tokens_per_rollout=min(limits.max_tokens_per_rollout, reader.max_tokens),
            max_image_bytes=min(limits.max_image_bytes, limits.max_message_bytes - MESSAGE_OVERHEAD_BYTES),
        ),
        payloads=backend.payloads,
        columns=backend.columns,
        degradations=tuple(DEGRADATION_KINDS),
        pixel_bounds=reader.pixel_bounds,
    )


def _make_options(limits: TeacherLimits) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.max_send_message_length", limits.max_message_bytes),
        # Clients ping every 10 s to notice a frozen server; without these two the server would call that abuse.
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # A client that vanished silently is noticed within 15 s too, and its waiting work is dropped.
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.http2.ping_timeout_ms", 5_000),
        ("grpc.http2.max_pings_without_data", 0),
        # Beyond these, connections are closed, pings count as abuse, and further calls are refused.
        ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
        ("grpc.server_handshake_timeout_ms", 10_000),  # two minutes by default
        ("grpc.http2.max_ping_strikes", 2),
        ("grpc.max_concurrent_streams", MAX_CALLS_PER_CONNECTION),
        ("grpc.max_metadata_size", METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", METADATA_BYTES),
        # A second server on the same port must fail to start, not share the port silently.
        ("grpc.so_reuseport", 0),
    ]


class TeacherServer:
    """One listening server: call `start`, then `stop`, on the event loop that created it."""

    def __init__(
        self,
        teacher: Vlm | Backend,
        *,
        model: str,
        batch_tokens: int,
        limits: TeacherLimits = TeacherLimits(),
        engine: Engine | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        service: TeacherServiceConfig = TeacherServiceConfig(),
        ends_process: bool = False,
        metrics: TeacherMetrics | None = None,
    ) -> None:
        """`teacher`: a backend, or a loaded model for the transformers backend, with another `engine` if given.

        `ends_process`: whether the watchdog may end the process when its event loop stands still.
        """
        if isinstance(teacher, Backend):
            backend = teacher
        else:
            vision_bytes = service.images.vision_bytes
            backend = make_backend(teacher, batch_tokens=batch_tokens, vision_bytes=vision_bytes, engine=engine)
        metrics = metrics or TeacherMetrics()
        self.serving = False
        """Whether health checks are answered with SERVING."""
        self.failed = asyncio.Event()
        """Set when the engine has failed or hangs: the process has to end."""
        sharing = service.sharing
        ever_fits = min(sharing.max_waiting_groups, sharing.max_waiting_groups_per_job)
        limits = replace(limits, max_groups_per_request=min(limits.max_groups_per_request, ever_fits))
        self.description = describe(backend, model=model, limits=limits)
        limits = self.description.limits
        loop = asyncio.get_running_loop()
        self.images = ImageStore(service.images.encoded_bytes, weights=sharing.weights)
        self.prepared_images = PreparedImages(service.images.prepared_bytes)
        self.vision_cache = backend.vision_cache
        self.caches: dict[str, Cache] = {"encoded": self.images, "prepared": self.prepared_images}
        """The stores by the kind of their entries."""
        if self.vision_cache is not None:
            self.caches["vision"] = self.vision_cache
        self._threads = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="teacher-prepare")
        self.ahead = ahead = Ahead(lambda job: self.scheduler.waiting_tokens(job), batch_tokens=batch_tokens)
        self.scheduler = Scheduler(
            backend.engine,
            batch_tokens=batch_tokens,
            on_failure=lambda: loop.call_soon_threadsafe(self.failed.set),
            on_taken=lambda: loop.call_soon_threadsafe(ahead.look),
            on_batch=metrics.observe_batch,
            weights=sharing.weights,
        )
        self.admission = Admission(sharing, self.scheduler, Quotas(service.quotas))
        self._watchdog = Watchdog(
            lambda: self.scheduler.busy_s,
            stuck_after_s=service.stuck_after_s,
            on_stuck=self._give_up,
            ends_process=ends_process,
        )
        self._health = health.aio.HealthServicer()
        self._tls = service.tls
        keys = KeyStore(service.keys.file) if service.keys.file else None
        self._calls = ErrorInterceptor(
            SERVICE, Access(keys), check_room=self.admission.check_any_room, on_refused=metrics.count_refused
        )
        self._server = grpc.aio.server(
            interceptors=[self._calls], options=_make_options(limits), maximum_concurrent_rpcs=MAX_CALLS
        )
        servicer = TeacherServicer(
            description=self.description,
            head=backend.head,
            preparer=Preparer(backend.reader, store=self.images, views=self.prepared_images, limits=limits),
            store=self.images,
            scheduler=self.scheduler,
            admission=self.admission,
            ahead=ahead,
            threads=self._threads,
            batch_tokens=batch_tokens,
            chunk_bytes=chunk_bytes,
            metrics=metrics,
        )
        metrics.watch(self)
        teacher_pb2_grpc.add_TeacherServicer_to_server(servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, "grpc.health.v1.Health", reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self, address: str) -> str:
        """Listens and answers health checks with SERVING. Returns host:port; port 0 in `address` means any free one.

        Raises ConfigError when the address can't be listened on.
        """
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        credentials = make_server_credentials(self._tls, address)
        try:
            if credentials is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, credentials)
        except RuntimeError:
            raise ConfigError(f"teacher.address = {address!r} can't be listened on; is the port taken?") from None
        await self._server.start()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        self._watchdog.start()
        return f"{address.rpartition(':')[0]}:{port}"

    async def stop(self, grace_s: float) -> None:
        """Drains: health NOT_SERVING, so that balancers turn away; no new calls; then waits for the accepted ones."""
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        draining = asyncio.create_task(self._server.stop(grace_s))
        idle = asyncio.create_task(self._calls.wait_idle())
        await asyncio.wait((draining, idle), return_when=asyncio.FIRST_COMPLETED)
        idle.cancel()
        # The last bytes of answered calls are left, and health watches, which would never end.
        await self._server.stop(min(grace_s, _LAST_BYTES_S))
        await draining
        longest_s = 0.0 if self.failed.is_set() else _LAST_FORWARD_S
        if not await asyncio.get_running_loop().run_in_executor(None, self.scheduler.stop, longest_s):
            self.failed.set()  # the device hangs: the process must not exit with 0
        self._watchdog.stop()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _give_up(self) -> None:
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self.failed.set()

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        self.serving = status == health_pb2.HealthCheckResponse.SERVING
        for name in ("", SERVICE):
            await self._health.set(name, status)


async def serve(
    config: Config,
    *,
    service: TeacherServiceConfig = TeacherServiceConfig(),
    announce: Path | None = None,
    metrics: TeacherMetrics | None = None,
) -> int:
    """Serves until a signal or a failed engine; returns the exit status."""
    # Address, certificates and keys are checked before the model is loaded, which may take half an hour.
    if "," in config.teacher.address:
        raise ConfigError(
            f"teacher.address = {config.teacher.address!r} lists several; that is for clients, a teacher listens on one"
        )
    make_server_credentials(service.tls, config.teacher.address)
    if service.keys.file is not None:
        KeyStore(service.keys.file)
    with entry.loading():
        backend = load(config, service)
    server = TeacherServer(
        backend,
        model=config.teacher.model,
        batch_tokens=config.teacher.batch_tokens,
        service=service,
        ends_process=True,
        metrics=metrics,
    )
    allow_connections(MAX_CONNECTIONS)
    address = await server.start(config.teacher.address)
    signalled = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, signalled.set)
    if announce is not None:
        entry.announce(address, announce)
    print(f"teacher ready on {address}", flush=True)
    ends = [asyncio.create_task(event.wait()) for event in (signalled, server.failed)]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    for end in ends:
        end.cancel()
    log.info("teacher stops: %s", "its engine failed or hangs" if server.failed.is_set() else "a signal")
    # After a failure no accepted call can be answered; the waiting ones have got UNAVAILABLE already.
    await server.stop(1.0 if server.failed.is_set() else service.drain_s)
    if not server.failed.is_set():
        backend.close()
        return 0
    # Skips the interpreter's shutdown, in which the libraries would wait for a device that may never answer.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
