"""`--set`, `--dry-run` and the checks before a start, for the subcommands that take a CONFIG."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from vaopd.cli.output import emit
from vaopd.cli.parser import Parser
from vaopd.errors import ConfigError, VaopdError
from vaopd.files.hub import is_hub_id, no_folder
from vaopd.telemetry.progress_line import Progress

if TYPE_CHECKING:
    from vaopd.config import Config

Subparsers: TypeAlias = "argparse._SubParsersAction[Any]"
QUICK_S = 2.0
Needs = Literal[
    "student",
    "teacher",
    "data folders",
    "data",
    "engine",
    "trackers",
    "queue",
    "device",
    "redis",
    "running teacher",
    "later teacher",
    "teacher port",
    "api port",
]
OVER_THE_NETWORK: tuple[Needs, ...] = ("redis", "running teacher", "later teacher")


def add_config_arguments(parser: Parser, *, optional: bool = False) -> None:
    """Declares CONFIG, `--set`, `--dry-run` and `--offline`."""
    nargs = "?" if optional else None
    parser.add_argument("config", metavar="CONFIG", type=Path, nargs=nargs, help="a TOML file, e.g. configs/tiny.toml")
    add_set_argument(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration, check its requirements, start nothing"
    )
    parser.add_argument("--offline", action="store_true", help="with --dry-run, contact no teacher and no Redis")
    parser.tie("--offline", to="--dry-run")


def add_set_argument(parser: argparse.ArgumentParser) -> None:
    """Declares `--set`."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help="override one field, e.g. --set trainer.steps=10 (repeatable)",
    )


def dry_run(
    config: Config,
    needs: Iterable[Needs],
    *,
    offline: bool = False,
    notes: Iterable[str] = (),
    problems: Iterable[str] = (),
) -> int:
    """Prints the configuration as TOML, and its problems on standard error; returns 1 if there are any.

    notes: lines that follow as comments. problems: those that the caller has found.
    """
    from vaopd.config import to_toml

    emit(to_toml(config), end="")
    for note in notes:
        emit(f"# {note}")
    needs = [need for need in needs if not offline or need not in OVER_THE_NETWORK]
    problems = [*problems, *find_problems(config, needs, ask_hub=False)]
    for problem in problems:
        print(f"vaopd: {problem}", file=sys.stderr)
    return 1 if problems else 0


def find_problems(config: Config, needs: Iterable[Needs], *, ask_hub: bool = True) -> Iterator[str]:
    """Yields the problems that would stop a process with these needs, each with its key and remedy.

    ask_hub: also read data sets and processors that have to be downloaded.
    """
    from vaopd.launch.checks import (
        find_adapters_problem,
        find_engine_problem,
        find_gpu_problem,
        find_optimizer_problem,
        find_port_problems,
        find_queue_problem,
        find_redis_problem,
        find_teacher_problem,
        find_tokenizer_problem,
        find_tracker_problem,
    )

    for need in needs:
        match need:
            case "student":
                yield from _find_model_problems("student.model", config.student.model)
                yield from filter(None, [find_adapters_problem(config)])
            case "teacher":
                yield from _find_model_problems("teacher.model", config.teacher.model)
            case "data folders":
                yield from _find_missing_data(config)
            case "data":
                yield from _find_data_problems(config, ask_hub=ask_hub)
            case "engine":
                yield from filter(None, [find_engine_problem(config)])
            case "trackers":
                yield from filter(None, [find_tracker_problem(config), find_optimizer_problem(config)])
            case "queue":
                yield from filter(None, [find_queue_problem(config)])
            case "redis":
                yield from filter(None, [find_redis_problem(config)])
            case "running teacher" | "later teacher":
                yield from filter(None, [find_teacher_problem(config, may_start_later=need == "later teacher")])
            case "device":
                yield from filter(None, [find_gpu_problem(config), find_tokenizer_problem(config)])
            case "teacher port" | "api port":
                key = need.replace(" port", ".address")
                address = config.teacher.address if need == "teacher port" else config.api.address
                yield from find_port_problems({key: address})


def check(config: Config, needs: Iterable[Needs]) -> None:
    """Raises ConfigError that lists the problems which would stop a process with these needs."""
    if problems := list(find_problems(config, needs)):
        raise ConfigError("\n  ".join(["the process can't start:", *problems]))


def _find_model_problems(key: str, name: str) -> Iterator[str]:
    folder = Path(name)
    if folder.is_dir():
        missing = [file for file in ("config.json", "tokenizer_config.json") if not (folder / file).exists()]
        if missing:
            yield f"{key} = {name}: the folder has no {' and no '.join(missing)}; it isn't a saved model"
    elif not is_hub_id(name):
        from vaopd.tiny.config import MODELS

        known = folder.name.removeprefix("tiny-")
        made = f"; `vaopd models make {known} {name}` makes it" if known in MODELS else ""
        yield f"{key} = {name}: {no_folder(name)}{made or ', and it is not a hub id of the form ORG/NAME'}"


def make_progress(task: str) -> Callable[[int, int], None]:
    """Makes the report of a task over records, on standard error; nothing for one that is done in two seconds."""
    started = time.monotonic()
    progress: list[Progress] = []

    def report(done: int, total: int) -> None:
        if not progress and done < total and time.monotonic() - started > QUICK_S:
            progress.append(Progress(f"vaopd: {task}", total=total, unit="records"))
        if progress:
            progress[0].report(done)

    return report


def _find_data_problems(config: Config, *, ask_hub: bool) -> Iterator[str]:
    from vaopd.data.problems import check_local_problems, load_problems

    if missing := list(_find_missing_data(config)):
        yield from missing
        return
    try:
        (load_problems if ask_hub else check_local_problems)(config, make_report=make_progress)
    except VaopdError as error:
        yield str(error)


def _find_missing_data(config: Config) -> Iterator[str]:
    """Yields the data sets that are neither a folder nor a hub id."""
    for key in ("source", "validation_source"):
        source = getattr(config.data, key)
        if source and not Path(source).is_dir() and not is_hub_id(source):
            made = f"`vaopd data handwritten-geometry {source}` makes one" if "geometry" in source else "give a folder"
            yield f"data.{key} = {source}: {no_folder(source)}; {made}"
