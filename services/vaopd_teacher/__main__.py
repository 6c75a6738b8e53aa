"""`python -m vaopd_teacher --config CONFIG.toml`: parses first, imports the heavy libraries afterwards."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from vaopd import process
from vaopd.config import Config, load_service_config
from vaopd.telemetry import metrics_port


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the service; returns the exit status."""
    parser = process.parser("vaopd_teacher", "Serves a frozen teacher over gRPC.")
    parser.add_argument("--service", type=Path, metavar="FILE", help="who may use it and how it is shared, a TOML file")
    parser.add_argument("--announce", type=Path, metavar="FILE", help="write host:port there once serving")
    return process.main(_run, parser, argv)


def _run(arguments: argparse.Namespace, config: Config) -> int:
    service = load_service_config(arguments.service)
    if service.engine.processes > 1 and (code := _as_one_of(service.engine.processes, config)) is not None:
        return code
    from vaopd_teacher.metrics import TeacherMetrics
    from vaopd_teacher.server import serve

    metrics = TeacherMetrics()
    with metrics_port.serve_metrics(metrics.registry, metrics_port.metrics_address(arguments)):
        return asyncio.run(serve(config, service=service, announce=arguments.announce, metrics=metrics))


def _as_one_of(processes: int, config: Config) -> int | None:
    """Starts the ranks, unless `torchrun` has, or runs one. Returns the exit status, None for rank 0, which serves."""
    if "RANK" not in os.environ:
        from vaopd.process.ranks import die_as, launch

        ranks = (sys.executable, "-m", "vaopd_teacher", *sys.argv[1:])
        return die_as(launch(ranks, processes=processes))
    if os.environ["RANK"] == "0":
        return None
    from vaopd_teacher.engines.tensor_parallel import follow

    return follow(config, processes=processes)


if __name__ == "__main__":
    sys.exit(main())
