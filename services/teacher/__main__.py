"""`python -m services.teacher --config CONFIG.toml`: parses first, imports the heavy libraries afterwards."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from pathlib import Path

from vaopd.config import load_config
from vaopd.errors import VaopdError
from vaopd.preflight import told
from vaopd.service_config import load_service_config


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="services.teacher", description="Serves a frozen teacher over gRPC.")
    parser.add_argument("--config", type=Path, required=True, help="the run's TOML file")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="overrides a field")
    parser.add_argument("--service", type=Path, metavar="FILE", help="who may use it and how it is shared, a TOML file")
    parser.add_argument("--announce", type=Path, metavar="FILE", help="write host:port there once serving")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        config = load_config(arguments.config, arguments.set)
        service = load_service_config(arguments.service)
        from services.teacher.server import serve

        try:
            return asyncio.run(serve(config, service=service, announce=arguments.announce))
        except (RuntimeError, AssertionError) as error:  # torch's: no device, no memory
            raise told(error, "teacher") from error
    except VaopdError as error:
        print(f"teacher: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
