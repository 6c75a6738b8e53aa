"""`python -m services.api --config CONFIG.toml`: serves the scoring API until SIGTERM, then drains."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from vaopd.config import Config, load_config
from vaopd.errors import ConfigError, VaopdError

DRAIN_S = 10


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="services.api", description="Serves the scoring API over HTTP.")
    parser.add_argument("--config", type=Path, required=True, help="the run's TOML file")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="overrides a field")
    parser.add_argument("--announce", type=Path, metavar="FILE", help="write host:port there once listening")
    arguments = parser.parse_args(argv)
    try:
        serve(load_config(arguments.config, arguments.set), announce=arguments.announce)
    except VaopdError as error:
        print(f"api: {error}", file=sys.stderr)
        return 2
    return 0


def serve(config: Config, *, announce: Path | None) -> None:
    """Listens first, so that the address is known, then serves until a signal."""
    import uvicorn

    from services.api.app import Teacher, create_app

    host, _, port = config.api.address.rpartition(":")
    settings = uvicorn.Config(
        create_app(teacher=Teacher(config.teacher.address)),
        host=host.strip("[]"),
        port=int(port),
        timeout_graceful_shutdown=DRAIN_S,
        server_header=False,
    )
    try:
        listener = settings.bind_socket()
    except SystemExit:  # uvicorn's answer to a port that it can't have, logged by it
        raise ConfigError(f"api.address = {config.api.address} can't be listened on; is the port taken?") from None
    address = f"{host}:{listener.getsockname()[1]}"
    if announce is not None:
        # Whoever reads the file sees all of it or nothing.
        partial = announce.with_name(f".{announce.name}.{os.getpid()}")
        partial.write_text(address)
        partial.replace(announce)
    print(f"api ready on {address}", flush=True)
    uvicorn.Server(settings).run(sockets=[listener])


if __name__ == "__main__":
    sys.exit(main())
