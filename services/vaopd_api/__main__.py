"""`python -m vaopd_api --config CONFIG.toml`: serves the scoring API and the viewer until SIGTERM, then drains."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vaopd import process
from vaopd.config import Config
from vaopd.errors import ConfigError
from vaopd.process import entry, hang_timer
from vaopd.telemetry import metrics_port

if TYPE_CHECKING:
    from vaopd_api.metrics import Metrics

DRAIN_S = 10
JOB = "api"
STUCK_AFTER_S = 60.0
"""After this long without a turn of the event loop, the process ends itself, to be restarted."""
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the API and returns its exit code."""
    parser = process.parser("vaopd_api", "Serves the scoring API over HTTP.")
    parser.add_argument("--announce", type=Path, metavar="FILE", help="write host:port there once listening")
    parser.add_argument("--teacher", action="append", default=[], metavar="HOST:PORT", help="a further teacher")
    parser.add_argument("--student", metavar="MODEL", help="folder or hub id of a student that answers questions here")
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="show the reports of the runs in this folder")
    parser.add_argument("--keys", type=Path, metavar="FILE", help="API keys (`vaopd keys`); without, everybody may ask")
    parser.add_argument("--requests-per-minute", type=int, metavar="N", help="quota of each client; default: none")
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="serve HTTPS with this certificate, PEM")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="the certificate's private key, PEM")
    return process.main(_run, parser, argv)


def _run(arguments: argparse.Namespace, config: Config) -> int:
    from vaopd_api.metrics import Metrics

    metrics = Metrics()
    address = metrics_port.metrics_address(arguments)
    with metrics_port.serve_metrics(metrics.registry, address):
        serve(
            config,
            further_teachers=arguments.teacher,
            student=arguments.student,
            runs=arguments.runs,
            keys=arguments.keys,
            requests_per_minute=arguments.requests_per_minute,
            tls=_tls_files(arguments.tls_cert, arguments.tls_key),
            announce=arguments.announce,
            metrics=metrics,
            metrics_route=address is None,  # else only that address serves them
        )
    return 0


def serve(
    config: Config,
    *,
    further_teachers: Sequence[str] = (),
    student: str | None = None,
    runs: Path | None = None,
    keys: Path | None = None,
    requests_per_minute: int | None = None,
    tls: tuple[Path, Path] | None = None,
    announce: Path | None,
    metrics: Metrics,
    metrics_route: bool,
) -> None:
    """Listens, announces the address, and serves until a signal. Raises ConfigError."""
    import uvicorn

    from vaopd.access.keys import KeyStore
    from vaopd.client import ClientOptions, from_environment
    from vaopd_api.access import Access, Quota
    from vaopd_api.app import create_app
    from vaopd_api.student import Student
    from vaopd_api.teachers import Teachers

    if requests_per_minute is not None and requests_per_minute < 1:
        raise ConfigError(f"--requests-per-minute is {requests_per_minute}; it must be at least 1")
    host, _, port = config.api.address.rpartition(":")
    if keys is not None and tls is None and host not in LOOPBACK:
        logging.warning("API keys travel in plain text on %s: use --tls-cert, or a proxy that adds TLS", host)
    credentials = from_environment()
    # With a key, the API's job is the key's.
    options: ClientOptions = {**credentials} if "api_key" in credentials else {**credentials, "job": JOB}
    settings = uvicorn.Config(
        create_app(
            teachers=Teachers([config.teacher.address, *further_teachers], options=options),
            student=None if student is None else Student(student, dtype=config.student.dtype),
            runs=runs,
            metrics=metrics,
            metrics_route=metrics_route,
            access=Access(
                job_of_key=None if keys is None else KeyStore.load(keys).job_of,
                quota=None if requests_per_minute is None else Quota(requests_per_minute),
            ),
        ),
        host=host.strip("[]"),
        port=int(port),
        timeout_graceful_shutdown=DRAIN_S,
        server_header=False,
        ssl_certfile=None if tls is None else tls[0],
        ssl_keyfile=None if tls is None else tls[1],
        access_log=False,  # vaopd_api.middleware writes a line of its own
        log_config=None,  # uvicorn's lines look like all others
    )
    try:
        settings.load()
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"the files of --tls-cert and --tls-key can't be used ({error.strerror})") from None
    try:
        listener = settings.bind_socket()
    except SystemExit:  # uvicorn's answer to a port that it can't have, logged by it
        raise ConfigError(f"api.address = {config.api.address} can't be listened on; is the port taken?") from None
    listener.listen()  # uvicorn only binds here, and a client may read the announced address at once
    address = f"{host}:{listener.getsockname()[1]}"
    if announce is not None:
        entry.announce(address, announce)
    print(f"api ready on {address}", flush=True)

    class Server(uvicorn.Server):
        async def on_tick(self, counter: int) -> bool:
            """Resets the hang timer; called ten times a second while the event loop runs."""
            hang_timer.expect_life_within(STUCK_AFTER_S)
            return await super().on_tick(counter)

    Server(settings).run(sockets=[listener])
    hang_timer.expect_nothing()


def _tls_files(cert: Path | None, key: Path | None) -> tuple[Path, Path] | None:
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise ConfigError("--tls-cert and --tls-key go together; give both, or neither")
    for path in (cert, key):
        if not path.is_file():
            raise ConfigError(f"{str(path)!r} is no file; --tls-cert and --tls-key name PEM files")
    return cert, key


if __name__ == "__main__":
    sys.exit(main())
