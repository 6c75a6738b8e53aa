"""`vaopd queue dead | retry | drop`: lists requests and groups that were given up, publishes them again, drops them."""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from vaopd.cli.common import Subparsers
from vaopd.cli.output import emit
from vaopd.errors import ConfigError
from vaopd.telemetry.visible import escape

if TYPE_CHECKING:
    from vaopd.queue import DeadLetter, DeadLetters

URL = "redis://127.0.0.1:6379/0"
PAGE = 100


def add_parsers(subparsers: Subparsers) -> None:
    """Adds `vaopd queue dead | retry | drop`."""
    queue = subparsers.add_parser(
        "queue", help="list, retry or drop a job's dead letters: requests and groups that were given up"
    )
    actions = queue.add_subparsers(required=True, metavar="ACTION")
    dead = actions.add_parser("dead", help="list them, oldest first, each with its reason")
    dead.set_defaults(command=_list_dead, extra="queue")
    retry = actions.add_parser(
        "retry",
        help="publish them again",
        description="Publishes dead letters again. A run uses them only if it hasn't closed their step yet, for "
        "example after it was resumed from an earlier checkpoint; otherwise it drops and counts them.",
    )
    retry.set_defaults(command=_settle, retries=True, extra="queue")
    drop = actions.add_parser("drop", help="remove them for good")
    drop.set_defaults(command=_settle, retries=False, extra="queue")
    for parser in (retry, drop):
        which = parser.add_mutually_exclusive_group(required=True)
        which.add_argument("ids", metavar="ID", nargs="*", default=[], help="a letter's id, from `vaopd queue dead`")
        which.add_argument("--all", action="store_true", help="every letter of the job")
    for parser in (dead, retry, drop):
        parser.add_argument(
            "--run", metavar="RUN", type=Path, help="a run's folder; its config.toml names job and Redis"
        )
        parser.add_argument("--job", metavar="JOB", help="the job's name, which is its run's name")
        parser.add_argument("--url", metavar="URL", help=f"Redis or Valkey (default: that of RUN, or {URL})")


def _list_dead(arguments: argparse.Namespace) -> int:
    with closing(_open_letters(arguments)) as letters:
        found = _list_all(letters)
        emit(f"{'id':<22}  {'group':<22}{'policy':>7}  {'stream':<8}{'deliveries':>11}  reason")
        for letter in found:
            version = "–" if letter.policy_version is None else letter.policy_version
            emit(
                f"{letter.entry_id:<22}  {escape(letter.group_id):<22}{version:>7}  {escape(letter.stream):<8}"
                f"{letter.deliveries:>11}  {escape(letter.reason)}"
            )
    return 0


def _settle(arguments: argparse.Namespace) -> int:
    with closing(_open_letters(arguments)) as letters:
        settle, done = (letters.retry, "published again") if arguments.retries else (letters.drop, "dropped")
        for entry_id in _choose_ids(arguments, letters):
            settle(entry_id)
            emit(f"{entry_id} was {done}")
    return 0


def _open_letters(arguments: argparse.Namespace) -> DeadLetters:
    from vaopd.config import load_config
    from vaopd.launch.resume import has_own_redis
    from vaopd.queue import DeadLetters
    from vaopd.run.status import read_status

    job, url = arguments.job, arguments.url
    if arguments.run is not None:
        config = load_config(arguments.run / "config.toml")
        status = read_status(arguments.run)
        if url is None and has_own_redis(arguments.run) and status is not None and not status.alive:
            raise ConfigError(
                f"{arguments.run} has a Redis of its own, which ended with the run: `vaopd ledger --groups` names the "
                "groups that were given up; while the run is resumed (`vaopd up --resume`), the letters are there again"
            )
        job, url = job or config.run.name, url or config.queue.find_url()
    if not job:
        raise ConfigError("no job is given; use --job JOB or --run RUN")
    return DeadLetters(url=url or URL, job=job, patience_s=5.0)


def _list_all(letters: DeadLetters) -> list[DeadLetter]:
    found: list[DeadLetter] = []
    while page := letters.list(after=found[-1].entry_id if found else "", limit=PAGE):
        found += page
    return found


def _choose_ids(arguments: argparse.Namespace, letters: DeadLetters) -> list[str]:
    return [letter.entry_id for letter in _list_all(letters)] if arguments.all else arguments.ids
