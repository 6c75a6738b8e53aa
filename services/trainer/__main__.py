"""`python -m services.trainer --config FILE`: composes one trainer rank and runs it."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m services.trainer", description="Trains a student; one job.")
    parser.add_argument("--config", required=True, help="TOML file of the run")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a field")
    parser.add_argument("--resume", action="store_true", help="go on from the run's newest checkpoint")
    options = parser.parse_args(arguments)

    from vaopd.config import load_config
    from vaopd.errors import VaopdError
    from vaopd.preflight import told

    try:
        config = load_config(options.config, options.set)
        if config.trainer.processes > 1 and "RANK" not in os.environ:
            from services.trainer.launcher import die_as, launch

            ranks = (sys.executable, "-m", "services.trainer", *(sys.argv[1:] if arguments is None else arguments))
            return die_as(launch(ranks, processes=config.trainer.processes))
        from services.trainer.compose import run

        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        try:
            return run(config, resume=options.resume, stop=stop)
        except RuntimeError as error:  # torch's: no device, no memory
            raise told(error, "trainer") from error
    except VaopdError as error:
        print(f"trainer: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
