"""`python -m services.teacher --config CONFIG.toml`: parses first, imports the heavy libraries afterwards."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from vaopd import process
from vaopd.config import Config
from vaopd.service_config import load_service_config


def main(argv: Sequence[str] | None = None) -> int:
    parser = process.parser("services.teacher", "Serves a frozen teacher over gRPC.")
    parser.add_argument("--service", type=Path, metavar="FILE", help="who may use it and how it is shared, a TOML file")
    parser.add_argument("--announce", type=Path, metavar="FILE", help="write host:port there once serving")
    return process.main(_run, parser, argv)


def _run(arguments: argparse.Namespace, config: Config) -> int:
    service = load_service_config(arguments.service)
    from services.teacher.metrics import TeacherMetrics
    from services.teacher.server import serve

    metrics = TeacherMetrics()
    with process.serve_metrics(metrics.registry, process.metrics_address(arguments)):
        return asyncio.run(serve(config, service=service, announce=arguments.announce, metrics=metrics))


if __name__ == "__main__":
    sys.exit(main())
