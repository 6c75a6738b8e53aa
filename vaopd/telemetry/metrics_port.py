"""Serves a process's Prometheus metrics over HTTP."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vaopd.errors import ConfigError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

log = logging.getLogger(__name__)

METRICS_VARIABLE = "VAOPD_METRICS_ADDRESS"


def choose_metrics_address(arguments: argparse.Namespace) -> str | None:
    """Returns HOST:PORT from --metrics-address or the environment, None where neither is set."""
    return arguments.metrics_address or os.environ.get(METRICS_VARIABLE) or None


@contextmanager
def serve_metrics(registry: CollectorRegistry, address: str | None) -> Iterator[None]:
    """Answers GET /metrics on its own thread while the block runs; without an address it does nothing.

    Raises ConfigError for an address that is malformed or can't be listened on.
    """
    if address is None:
        yield
        return
    from prometheus_client import ProcessCollector, start_http_server

    host, separator, port = address.rpartition(":")
    if not separator or not port.isdecimal() or not host:
        raise ConfigError(f"metrics address {address!r} is not of the form HOST:PORT, such as 127.0.0.1:9091")
    ProcessCollector(registry=registry)
    try:
        server, thread = start_http_server(int(port), host.strip("[]"), registry)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"metrics address {address}: {reason}; choose another, port 0 takes a free one") from None
    log.info("metrics at http://%s:%d/metrics", host, server.server_port)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
