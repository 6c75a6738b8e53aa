"""`vaopd up` and `vaopd demo`: start all processes of a run on this host."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vaopd.cli.common import Needs, Subparsers, add_config_arguments, check, dry_run
from vaopd.cli.output import emit, say
from vaopd.cli.parser import bounded
from vaopd.errors import ConfigError, VaopdError
from vaopd.files.hub import no_folder
from vaopd.net.ports import LOOPBACK, join_address
from vaopd.process.extras import require
from vaopd.process.flags import add_accept_teacher_flag, add_service_flag, read_service_config
from vaopd.telemetry.logs import FORMAT_VARIABLE, FORMATS
from vaopd.telemetry.progress_line import draw

if TYPE_CHECKING:
    from vaopd.launch.up import UpOptions

DEMO_CONFIG = Path("configs/tiny.toml")
DEMO_LORA = ("student.lora.rank=16", "trainer.learning_rate=3e-3")
"""Adapters want a higher rate than the 6e-4 of all weights."""
NEXT = """
next
  the baseline, to compare   {vaopd} demo --variant standard, then {vaopd} report RUN RUN
  the viewer, the reports    {vaopd} teacher {config}, and beside it {vaopd} api {config} --runs runs
  a run of your own          docs/quickstart.md"""


def add_parsers(subparsers: Subparsers) -> None:
    """Adds `vaopd demo` and `vaopd up`."""
    demo = subparsers.add_parser("demo", help="run the tiny pair on two CPU cores, in about nine minutes")
    demo.add_argument("--name", help="the run's name (default: demo-DATE-TIME)")
    demo.add_argument("--steps", type=bounded(int, 1), help="optimizer steps (default: those of configs/tiny.toml)")
    demo.add_argument("--variant", choices=("va_opd", "standard"), default="va_opd", help="the loss (default va_opd)")
    demo.add_argument("--lora", action="store_true", help="train adapters (LoRA) in place of all weights")
    demo.add_argument("--seed", type=int, default=0, help="seed of the prompts' order and of sampling (default 0)")
    demo.set_defaults(command=_run_demo)

    up = subparsers.add_parser(
        "up", help="start Redis, teacher, workers, API and trainer of a configuration on this host"
    )
    add_config_arguments(up, optional=True)
    up.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="RUN",
        help="continue from the run's last checkpoint; with RUN, a run's folder, CONFIG may be left out: every setting "
        "and option is the run's, and --set may change what a resume may change, e.g. trainer.steps",
    )
    add_accept_teacher_flag(up)
    up.tie("--accept-teacher", to="--resume")
    up.add_argument(
        "--restart-trainer",
        action="store_true",
        help="resume automatically when the trainer was killed, failed unexpectedly, or waited in vain",
    )
    up.add_argument(
        "--teacher", metavar="HOST:PORT[,…]", help="use this running teacher, or replicas of it, and start none"
    )
    add_service_flag(up)
    up.add_argument("--no-api", dest="api", action="store_false", help="don't start the scoring API")
    up.add_argument(
        "--gpus",
        action="append",
        default=[],
        metavar="ROLE=DEVICES",
        help="CUDA_VISIBLE_DEVICES of teacher, rollout or trainer, e.g. --gpus teacher=0,1 --gpus rollout=2 "
        "(repeatable: rollout's devices are dealt to the workers in turn, each of the teacher's is a replica); "
        "auto: place all processes by the memory that they need",
    )
    up.add_argument(
        "--cards",
        metavar="NUMBERxGIB",
        help="with --gpus auto --dry-run: plan for these cards, e.g. 8x79.1 or 2x79.1,4x23.6, instead of this host's",
    )
    up.add_argument(
        "--metrics-port",
        type=bounded(int, 0, 65535),
        metavar="N",
        help="serve Prometheus metrics of teacher, workers and trainer on 127.0.0.1, from port N on; 0: on free ports",
    )
    up.add_argument("--log-format", choices=FORMATS, help=f"format of the processes' logs (also {FORMAT_VARIABLE})")
    up.set_defaults(command=_run_up)


def _run_up(arguments: argparse.Namespace) -> int:
    from vaopd.config import load_config
    from vaopd.launch.cards import parse_gpus
    from vaopd.launch.up import list_addresses, starts_teacher, up

    read_service_config(arguments)  # raises for an invalid file before anything is started
    auto = "auto" in arguments.gpus
    if arguments.cards is not None and not (auto and arguments.dry_run):
        raise ConfigError("--cards assumes cards for a plan; give it with --gpus auto --dry-run")
    gpus = {} if auto else parse_gpus(arguments.gpus)
    if arguments.teacher is not None and "teacher" in gpus:
        raise ConfigError(f"--gpus teacher=… starts a teacher, and --teacher {arguments.teacher} none; leave out one")
    options = _make_options(arguments, gpus=gpus)
    if auto:
        if arguments.gpus != ["auto"]:
            raise ConfigError("--gpus auto places every process; leave out the other --gpus, or auto")
        options = _place_on_gpus(options, arguments.cards)
    shared = options.teacher is not None
    needs: list[Needs] = ["student", "data", "engine", "trackers", "redis"]
    needs += ["running teacher"] if shared else ["teacher", "device"]
    if arguments.dry_run:
        overrides = list(options.overrides)
        if options.teacher is not None:
            overrides.append(f"teacher.address={options.teacher}")
        from vaopd.launch.checks import find_port_problems
        from vaopd.launch.estimate import describe_cost
        from vaopd.launch.resume import check_start
        from vaopd.launch.teacher import check_ranks

        config = load_config(options.config_path, overrides)
        check_ranks(config, options.service, options.gpus, with_teacher=starts_teacher(config, options))
        notes = describe_cost(config, options.gpus, with_teacher=not shared)
        try:
            check_start(config, resume=options.resume, accept_teacher=options.accept_teacher, say=say)
            problems = []
        except VaopdError as error:
            problems = [str(error)]
        problems += find_port_problems(list_addresses(config, options))
        return dry_run(config, needs, offline=arguments.offline, notes=notes, problems=problems)
    if arguments.log_format:
        os.environ[FORMAT_VARIABLE] = arguments.log_format  # the processes inherit it
    roles = ["rollout", "trainer", *([] if shared else ["teacher"]), *(["api"] if arguments.api else [])]
    require(*roles)
    # `up` describes a running teacher itself, and says what it found.
    needs = [need for need in needs if need != "running teacher"]
    return up(options, say=say, show=_make_show(), check=lambda config: check(config, needs))


def _make_options(arguments: argparse.Namespace, *, gpus: dict[str, tuple[str, ...]]) -> UpOptions:
    """Returns the options of `up`. Raises ConfigError when neither a configuration nor a run is given."""
    from vaopd.launch.resume import read_launch
    from vaopd.launch.up import UpOptions

    config, run = arguments.config, arguments.resume
    if config is None and isinstance(run, str) and not Path(run).is_dir():
        if Path(run).suffix != ".toml":
            raise ConfigError(f"--resume {run}: {no_folder(run)}; RUN is a run's folder, e.g. runs/first")
        config, run = Path(run), True  # `up --resume CONFIG`
    if config is None and run in (True, False):
        raise ConfigError("give a CONFIG, e.g. configs/tiny.toml, or --resume RUN with a run's folder")
    options = UpOptions(
        config_path=config or Path(),
        overrides=tuple(arguments.overrides),
        resume=bool(run),
        accept_teacher=arguments.accept_teacher,
        restart_trainer=arguments.restart_trainer,
        teacher=arguments.teacher,
        service=arguments.service,
        api=arguments.api,
        gpus=gpus,
        metrics_port=arguments.metrics_port,
    )
    if config is not None and isinstance(run, str):
        raise ConfigError(f"give CONFIG or --resume {run}, not both: the run has its own configuration")
    if config is not None:
        return options
    launch = read_launch(Path(run))
    return dataclasses.replace(
        options,
        config_path=launch.config_path,
        overrides=(*launch.overrides, *options.overrides),
        teacher=options.teacher or launch.teacher,
        service=options.service or launch.service,
        gpus=options.gpus or launch.gpus,
    )


def _place_on_gpus(options: UpOptions, assumed: str | None) -> UpOptions:
    """Chooses the cards by memory and says why; returns the options with them."""
    from vaopd.launch.cards import assume_cards, list_cards
    from vaopd.launch.placement import place_run

    cards = list_cards() if assumed is None else assume_cards(assumed)
    chosen = place_run(cards, options.config_path, options.overrides, with_teacher=options.teacher is None)
    for reason in chosen.reasons:
        say(reason)
    say(f"the same by hand: {chosen.flags}")
    # What is set by hand has priority.
    return dataclasses.replace(options, gpus=chosen.gpus, overrides=(*chosen.overrides, *options.overrides))


def _run_demo(arguments: argparse.Namespace) -> int:
    from vaopd.config import load_config
    from vaopd.launch.checks import find_engine_problem
    from vaopd.launch.up import UpOptions, up

    if not DEMO_CONFIG.exists():
        raise ConfigError(f"{DEMO_CONFIG} doesn't exist here; run the demo in the repository's root")
    require("services", "tiny")
    overrides = [
        f"run.name={arguments.name or time.strftime('demo-%Y%m%d-%H%M%S')}",
        f"run.seed={arguments.seed}",
        f"objective.variant={arguments.variant}",
        # Free ports, so that a second run or another program on this host isn't disturbed.
        f"teacher.address={join_address(LOOPBACK, 0)}",
        f"api.address={join_address(LOOPBACK, 0)}",
    ]
    if arguments.lora:
        overrides += DEMO_LORA
    if arguments.steps is not None:
        overrides.append(f"trainer.steps={arguments.steps}")
    if find_engine_problem(load_config(DEMO_CONFIG, overrides)):
        say("vLLM is not installed: transformers samples the rollouts, which takes longer")
        overrides.append("rollout.engine=transformers")
    config = load_config(DEMO_CONFIG, overrides)

    _make_demo_data(Path(config.data.source))
    check(config, ("student", "teacher", "data", "engine"))
    say(
        f"run {config.run.name}: {config.trainer.steps} steps of {config.trainer.prompts_per_step} prompts × "
        f"{config.trainer.rollouts_per_prompt} rollouts; 180 steps take about 8 minutes on two cores. Ctrl-C ends it"
    )
    say(f"logs and results: {config.run_folder}")
    code = up(UpOptions(config_path=DEMO_CONFIG, overrides=tuple(overrides)), say=say, show=_make_show())
    if code == 0:
        _print_result(config.run_folder)
    return code


def _make_demo_data(folder: Path) -> None:
    if folder.exists():
        return
    from vaopd.data import handwritten_geometry

    say(f"drawing geometry problems on handwritten digits into {folder} …")
    handwritten_geometry.write(folder, seed=0, train=4000, validation=300, test=600)


def _print_result(folder: Path) -> None:
    from vaopd.report import read_run, write_report

    evaluations = read_run(folder).evaluations
    path = write_report([folder])
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        gain = f"{100 * (last.accuracy - first.accuracy):+.1f} points"
        emit(
            f"\nheld-out accuracy  before: {first.label}   after {last.step} steps: {last.label}   ({gain})"
            f"\njudge    {last.judge}"
        )
    emit(f"run      {folder}\nmetrics  {folder / 'metrics.jsonl'}\nreport   {path}   (open it in a browser)")
    emit(NEXT.format(vaopd="vaopd" if shutil.which("vaopd") else os.path.relpath(sys.argv[0]), config=DEMO_CONFIG))


def _make_show() -> Callable[[str], None] | None:
    """Returns a function that draws over the last line; None without a terminal."""
    return (lambda line: draw(sys.stderr, f"vaopd: {line}", stays=False)) if sys.stderr.isatty() else None
