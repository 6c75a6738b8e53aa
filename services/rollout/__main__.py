"""`python -m services.rollout --config CONFIG.toml`: one rollout worker, until SIGTERM."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vaopd.config import Config, load_config
from vaopd.errors import ConfigError, VaopdError
from vaopd.preflight import told

if TYPE_CHECKING:
    from services.rollout.engine import RolloutEngine

DRAIN_S = 10.0  # half of what `vaopd up` grants between SIGTERM and SIGKILL


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="rollout", description="Samples responses with the student's newest weights.")
    parser.add_argument("--config", required=True, help="the run's TOML file")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one field")
    own_name = f"{socket.gethostname()}-{os.getpid()}"
    parser.add_argument("--worker", default=own_name, help="name in the queue (default: host and process id)")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        config = load_config(arguments.config, arguments.set)
        if config.queue.url == "embedded":
            raise ConfigError(
                'queue.url = "embedded" is for `vaopd up`, which starts a Valkey; '
                "name a running one: --set queue.url=redis://HOST:PORT/0"
            )
        try:
            run(config, worker=arguments.worker)
        except (RuntimeError, ImportError) as error:  # torch's and vLLM's: no device, no memory, not installed
            raise told(error, "rollout") from error
    except VaopdError as error:
        print(f"rollout: {error}", file=sys.stderr)
        return 1
    return 0


def run(config: Config, *, worker: str) -> None:
    """Composes and runs the worker; the heavy imports come here, after the arguments have been read."""
    # Nothing is held while the engine starts, so that the end may come at once.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    from services.rollout.worker import RolloutWorker, Stop
    from vaopd.queue import WorkerQueue

    queue = WorkerQueue(
        url=config.queue.url,
        job=config.run.name,
        worker=worker,
        lease_s=config.queue.lease_s,
        max_deliveries=config.queue.max_deliveries,
    )
    engine = build_engine(config, worker=worker)
    stop = Stop(drain_s=DRAIN_S)
    stop.install()
    try:
        RolloutWorker(engine=engine, queue=queue, requests_per_batch=config.rollout.requests_per_batch, stop=stop).run()
    finally:
        engine.close()


def build_engine(config: Config, *, worker: str) -> RolloutEngine:
    model, dtype = config.student.model, config.student.dtype
    min_pixels, max_pixels = config.data.min_pixels, config.data.max_pixels
    if config.rollout.engine == "transformers":
        from services.rollout.transformers_engine import TransformersEngine

        return TransformersEngine(model, worker=worker, dtype=dtype, min_pixels=min_pixels, max_pixels=max_pixels)
    from services.rollout.vllm_engine import VllmEngine

    options = config.rollout.engine_options
    return VllmEngine(model, worker=worker, dtype=dtype, min_pixels=min_pixels, max_pixels=max_pixels, options=options)


if __name__ == "__main__":
    sys.exit(main())
