"""`python -m vaopd_trainer --config FILE`: composes one trainer rank and runs it."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence

from vaopd import process
from vaopd.config import Config
from vaopd.telemetry import logs, metrics_port


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one rank, or starts all of them; returns the exit code."""
    parser = process.make_parser("trainer", "Trains a student; one job.")
    given = sys.argv[1:] if argv is None else argv
    return process.main(lambda arguments, config: _run(arguments, config, given), parser, given)


def _run(arguments: argparse.Namespace, config: Config, given: Sequence[str]) -> int:
    logs.share(job=config.run.name)
    set_environment(config.trainer.processes)
    if config.trainer.processes > 1 and "RANK" not in os.environ:
        from vaopd.process.ranks import die_as, launch

        ranks = (sys.executable, "-m", "vaopd_trainer", *given)
        return die_as(launch(ranks, processes=config.trainer.processes))
    if "RANK" in os.environ:
        from vaopd.process.ranks import end_with_the_launcher

        end_with_the_launcher()
    with process.loading():
        from vaopd_trainer.compose import run
        from vaopd_trainer.metrics import TrainerMetrics

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    metrics = TrainerMetrics(job=config.run.name, steps=config.trainer.steps)
    # The coordinator has the numbers of all ranks.
    address = metrics_port.choose_metrics_address(arguments) if os.environ.get("RANK", "0") == "0" else None
    with metrics_port.serve_metrics(metrics.registry, address):
        return run(config, resume=arguments.resume, accept_teacher=arguments.accept_teacher, stop=stop, metrics=metrics)


def set_environment(processes: int) -> None:
    """Sets what torch reads when it is imported, unless the user has; the ranks inherit it.

    Prompts of all lengths cut a GPU's memory into blocks that fit no other; expandable segments grow instead. torch
    2.9 has renamed the variable and reads the new name first.
    """
    allocator = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    if not any(name in os.environ for name in allocator):
        os.environ |= dict.fromkeys(allocator, "expandable_segments:True")
    if processes > 1:  # every rank would take all cores
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))


if __name__ == "__main__":
    sys.exit(main())
