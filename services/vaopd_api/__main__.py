"""`python -m vaopd_api --config CONFIG.toml`: serves the scoring API and the viewer until SIGTERM, then drains."""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import functools
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING, Any

from vaopd import process
from vaopd.access.tls import ExpiryWatch, read_expiry
from vaopd.config import ApiServiceConfig, Config, TlsConfig
from vaopd.errors import ConfigError
from vaopd.net.ports import allow_connections, is_loopback
from vaopd.process import entry
from vaopd.process.memory import give_back, use_one_arena
from vaopd.telemetry import metrics_port

if TYPE_CHECKING:
    from vaopd_api.metrics import Metrics

JOB = "api"
GIVE_BACK_TICKS = 300
"""Of a tenth of a second."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the API and returns its exit code."""
    return process.main(_run, process.make_parser("api", "Serves the scoring API over HTTP."), argv)


def _run(arguments: argparse.Namespace, config: Config) -> int:
    from vaopd_api.metrics import Metrics

    metrics = Metrics()
    address = metrics_port.choose_metrics_address(arguments)
    with metrics_port.serve_metrics(metrics.registry, address):
        serve(
            config,
            further_teachers=arguments.teacher,
            students=arguments.student,
            runs=arguments.runs,
            service=process.read_service_config(arguments).api,
            announce=arguments.announce,
            metrics=metrics,
            metrics_route=address is None,  # else only that address serves them
        )
    return 0


def read_tls_expiry(tls: TlsConfig) -> float:
    """Returns when the certificate expires; infinity without TLS. Raises ConfigError for files that can't be used."""
    if not (tls.cert and tls.key):
        return math.inf
    try:
        return read_expiry(tls.cert, tls.key, section="api")
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"[api.tls] cert = {str(tls.cert)!r} and key = {str(tls.key)!r} must be PEM files that belong together, "
            f"the key without a pass phrase ({error.strerror})"
        ) from None


def serve(
    config: Config,
    *,
    further_teachers: Sequence[str] = (),
    students: Sequence[str] = (),
    runs: Path | None = None,
    service: ApiServiceConfig = ApiServiceConfig(),
    announce: Path | None,
    metrics: Metrics,
    metrics_route: bool,
) -> None:
    """Listens, announces the address, and serves until a signal. Raises ConfigError."""
    import uvicorn

    from vaopd.access.keys import KeyStore
    from vaopd.client import ClientOptions, from_environment
    from vaopd_api.access import Access, HostNames, Quota
    from vaopd_api.app import create_app
    from vaopd_api.connections import WINDOW_S, BoundedProtocol
    from vaopd_api.student import Student
    from vaopd_api.teachers import Teachers

    use_one_arena()
    keys, tls, requests_per_minute = service.keys.file, service.tls, service.quotas.requests_per_minute
    host, _, port = config.api.address.rpartition(":")
    if not (is_loopback(config.api.address) or service.trusted_network or (keys and tls.cert)):
        raise ConfigError(
            f"api.address = {config.api.address!r} can be reached from other hosts: give [api.keys] file and [api.tls] "
            "cert and key in the service file, or [api] trusted_network = true on a network without other users"
        )
    if keys is not None and tls.cert is None and not is_loopback(config.api.address):
        logging.warning("API keys travel in plain text on %s: set [api.tls], or use a proxy that adds TLS", host)
    credentials = from_environment()
    # With a key, the API's job is the key's.
    options: ClientOptions = {**credentials} if "api_key" in credentials else {**credentials, "job": JOB}
    settings = uvicorn.Config(
        create_app(
            teachers=Teachers([config.teacher.address, *further_teachers], options=options),
            students=[Student(model, dtype=config.student.dtype) for model in students],
            runs=runs,
            pixel_bounds=(config.data.min_pixels, config.data.max_pixels),
            metrics=metrics,
            metrics_route=metrics_route,
            access=Access(
                hosts=HostNames([host.strip("[]"), *service.hosts]),
                job_of_key=None if keys is None else KeyStore(keys).find_job,
                quota=None if requests_per_minute is None else Quota(requests_per_minute),
            ),
        ),
        host=host.strip("[]"),
        port=int(port),
        http=BoundedProtocol.bind(service.connections),
        ws="none",
        loop="asyncio",
        proxy_headers=bool(service.connections.proxies),
        forwarded_allow_ips=service.connections.proxies,
        timeout_graceful_shutdown=math.ceil(service.drain_s),
        server_header=False,
        ssl_certfile=tls.cert,
        ssl_keyfile=tls.key,
        access_log=False,  # vaopd_api.middleware writes a line of its own
        log_config=None,  # uvicorn's lines look like all others
    )
    expires = read_tls_expiry(tls)  # first of all, since `load` would ask for a key's pass phrase on the terminal
    settings.load()
    try:
        listener = settings.bind_socket()
    except SystemExit:  # uvicorn's answer to a port that it can't have, logged by it
        raise ConfigError(f"api.address = {config.api.address} can't be listened on; is the port taken?") from None
    allow_connections(2 * service.connections.total)  # open ones, and handshakes
    listener.listen()  # uvicorn only binds here, and a client may read the announced address at once
    address = f"{host}:{listener.getsockname()[1]}"
    if announce is not None:
        entry.announce(address, announce)
    print(f"api ready on {address}", flush=True)

    expiry = ExpiryWatch(expires, section="api")

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket] | None = None) -> None:
            """Listens; with TLS, connections that don't begin or end as TLS does are dropped after a while."""
            if self.config.is_ssl:
                loop: Any = asyncio.get_running_loop()
                waits = {"ssl_handshake_timeout": WINDOW_S, "ssl_shutdown_timeout": WINDOW_S}
                loop.create_server = functools.partial(loop.create_server, **waits)
            await super().startup(sockets)

        async def on_tick(self, counter: int) -> bool:
            """Resets the hang timer; called ten times a second while the event loop runs."""
            faulthandler.dump_traceback_later(service.stuck_after_s, exit=True)
            expiry.look()
            if counter % GIVE_BACK_TICKS == 0:
                await asyncio.to_thread(give_back)
            return await super().on_tick(counter)

    Server(settings).run(sockets=[listener])
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    sys.exit(main())
