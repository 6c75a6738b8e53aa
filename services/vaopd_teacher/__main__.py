"""`python -m vaopd_teacher --config CONFIG.toml`: parses first, imports the heavy libraries afterwards."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Sequence

from vaopd import process
from vaopd.config import Config
from vaopd.telemetry import metrics_port

log = logging.getLogger("vaopd_teacher")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the service; returns the exit status."""
    return process.main(_run, process.make_parser("teacher", "Serves a frozen teacher over gRPC."), argv)


def _run(arguments: argparse.Namespace, config: Config) -> int:
    service = process.read_service_config(arguments).teacher
    processes = service.count_ranks(config.teacher.processes)
    if processes > 1:
        code = _as_one_of(processes, config)
        if code is not None:
            return code
    log.info("loading %s", config.teacher.model)  # which takes minutes for a large one
    with process.loading():
        from vaopd_teacher.metrics import TeacherMetrics
        from vaopd_teacher.server import serve

    metrics = TeacherMetrics()
    with metrics_port.serve_metrics(metrics.registry, metrics_port.choose_metrics_address(arguments)):
        return asyncio.run(serve(config, service=service, announce=arguments.announce, metrics=metrics))


def _as_one_of(processes: int, config: Config) -> int | None:
    """Starts the ranks, unless `torchrun` has, or runs one. Returns the exit status, None for rank 0, which serves."""
    if "RANK" not in os.environ:
        from vaopd.process.ranks import die_as, launch

        ranks = (sys.executable, "-m", "vaopd_teacher", *sys.argv[1:])
        return die_as(launch(ranks, processes=processes))
    if os.environ["RANK"] == "0":
        return None
    with process.loading():
        from vaopd_teacher.engines.tensor_parallel import follow

    return follow(config, processes=processes)


if __name__ == "__main__":
    sys.exit(main())
