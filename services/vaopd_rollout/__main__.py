"""`python -m vaopd_rollout --config CONFIG.toml`: one rollout worker, until SIGTERM."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vaopd import process
from vaopd.config import Config, RolloutServiceConfig
from vaopd.sampling.build import build_engine
from vaopd.telemetry import logs, metrics_port

if TYPE_CHECKING:
    from vaopd_rollout.metrics import WorkerMetrics


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the worker with these options; returns its exit code."""
    parser = process.make_parser("rollout", "Samples responses with the student's newest weights.")
    return process.main(_run, parser, argv)


def _run(arguments: argparse.Namespace, config: Config) -> int:
    service = process.read_service_config(arguments).rollout
    worker = arguments.worker or f"{socket.gethostname()}-{os.getpid()}"
    logs.share(job=config.run.name, worker=worker)
    with process.loading():
        from vaopd_rollout.metrics import WorkerMetrics

    metrics = WorkerMetrics(job=config.run.name)
    with metrics_port.serve_metrics(metrics.registry, metrics_port.choose_metrics_address(arguments)):
        run(config, worker=worker, metrics=metrics, service=service)
    return 0


def run(config: Config, *, worker: str, metrics: WorkerMetrics, service: RolloutServiceConfig) -> None:
    """Puts the worker together and runs it; heavy imports come here, after the options were read."""
    # No lease is held while the engine starts, so the process may end at once.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    from vaopd.queue import WorkerQueue
    from vaopd.weights.fetch import PolicyFetcher
    from vaopd_rollout.worker import RolloutWorker, Stop

    queue = WorkerQueue(
        url=config.queue.find_url(),
        job=config.run.name,
        worker=worker,
        lease_s=config.queue.lease_s,
        max_deliveries=config.queue.max_deliveries,
    )
    metrics.watch(leases=lambda: len(queue.held()))
    with process.loading():
        engine = build_engine(config, worker=worker)
    stop = Stop(drain_s=service.drain_s)
    stop.install()
    fetcher = PolicyFetcher(service.weights_folder)
    try:
        RolloutWorker(
            engine=engine,
            queue=queue,
            requests_per_batch=config.rollout.requests_per_batch,
            tokens_in_flight=config.rollout.tokens_in_flight,
            stop=stop,
            metrics=metrics,
            stuck_after_s=service.stuck_after_s,
            fetch=fetcher.fetch,
        ).run()
    finally:
        fetcher.close()
        engine.close()


if __name__ == "__main__":
    sys.exit(main())
