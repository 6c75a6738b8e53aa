"""`--set`, `--dry-run` and the checks before a start, for the subcommands that take a CONFIG."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from vaopd.config import Config

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

Needs = Literal[
    "student",
    "teacher",
    "data",
    "engine",
    "trackers",
    "device",
    "redis",
    "running teacher",
    "later teacher",
    "teacher port",
    "api port",
]
OVER_THE_NETWORK: tuple[Needs, ...] = ("redis", "running teacher", "later teacher")


def add_config_arguments(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Declares CONFIG, `--set`, `--dry-run` and `--offline`."""
    nargs = "?" if optional else None
    parser.add_argument("config", metavar="CONFIG", type=Path, nargs=nargs, help="a TOML file, e.g. configs/tiny.toml")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help="override one field, e.g. --set trainer.steps=10 (repeatable)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration, check its requirements, start nothing"
    )
    parser.add_argument("--offline", action="store_true", help="with --dry-run, contact no teacher and no Redis")


def dry_run(config: Config, needs: Iterable[Needs], *, offline: bool = False) -> int:
    """Prints the configuration as TOML, and its problems on standard error; returns 1 if there are any."""
    from vaopd.config import to_toml

    print(to_toml(config), end="")
    problems = list(find_problems(config, [need for need in needs if not offline or need not in OVER_THE_NETWORK]))
    for problem in problems:
        print(f"vaopd: {problem}", file=sys.stderr)
    return 1 if problems else 0


def find_problems(config: Config, needs: Iterable[Needs]) -> Iterator[str]:
    """Yields the problems that would stop a process with these needs, each with its key and remedy."""
    from vaopd.launch.checks import (
        find_engine_problem,
        find_gpu_problem,
        find_redis_problem,
        find_teacher_problem,
        find_tokenizer_problem,
        find_tracker_problem,
    )
    from vaopd.net.ports import find_port_problem

    for need in needs:
        match need:
            case "student":
                yield from _find_model_problems("student.model", config.student.model)
            case "teacher":
                yield from _find_model_problems("teacher.model", config.teacher.model)
            case "data":
                yield from dict.fromkeys(_find_data_problems(config))
            case "engine":
                yield from filter(None, [find_engine_problem(config)])
            case "trackers":
                yield from filter(None, [find_tracker_problem(config)])
            case "redis":
                yield from filter(None, [find_redis_problem(config)])
            case "running teacher" | "later teacher":
                yield from filter(None, [find_teacher_problem(config, may_start_later=need == "later teacher")])
            case "device":
                yield from filter(None, [find_gpu_problem(config), find_tokenizer_problem(config)])
            case "teacher port" | "api port":
                key = need.replace(" port", ".address")
                address = config.teacher.address if need == "teacher port" else config.api.address
                if problem := find_port_problem(address):
                    yield f"{key} = {address}: {problem}; stop what listens there, or --set {key}=HOST:PORT"


def check(config: Config, needs: Iterable[Needs]) -> None:
    """Raises ConfigError that lists the problems which would stop a process with these needs."""
    from vaopd.errors import ConfigError

    if problems := list(find_problems(config, needs)):
        raise ConfigError("\n  ".join(["the process can't start:", *problems]))


def _find_model_problems(key: str, name: str) -> Iterator[str]:
    from vaopd.files.hub import is_hub_id

    folder = Path(name)
    if folder.is_dir():
        missing = [file for file in ("config.json", "tokenizer_config.json") if not (folder / file).exists()]
        if missing:
            yield f"{key} = {name}: the folder has no {' and no '.join(missing)}; it isn't a saved model"
    elif not is_hub_id(name):
        made = (
            f"; `vaopd models make {folder.name.removeprefix('tiny-')} {name}` makes it"
            if folder.name.startswith("tiny-")
            else ""
        )
        yield f"{key} = {name}: no such folder{made or ', and it is not a hub id of the form ORG/NAME'}"


def _find_data_problems(config: Config) -> Iterator[str]:
    from vaopd.data.loaders import load_training_prompts
    from vaopd.errors import VaopdError
    from vaopd.evaluation import held_out_prompts
    from vaopd.files.hub import is_hub_id

    data = config.data
    validation = "validation_source" if data.validation_source else "source"
    for key, load in (("source", load_training_prompts), (validation, held_out_prompts)):
        source = getattr(data, key)
        if Path(source).is_dir():
            try:
                load(config)
            except VaopdError as error:
                yield f"data.{key} = {source}: {error}"
        elif not is_hub_id(source):
            made = f"`vaopd data handwritten-geometry {source}` makes one" if "geometry" in source else "give a folder"
            yield f"data.{key} = {source}: no such folder; {made}"
