"""`vaopd ledger RUN`: checks that every published group was trained once, or given up for a reason."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vaopd.cli.common import Subparsers
from vaopd.cli.output import emit
from vaopd.telemetry.visible import escape

if TYPE_CHECKING:
    from vaopd.run.ledger import Audit, Fate

SHOWN_PROBLEMS = 20


def add_parsers(subparsers: Subparsers) -> None:
    """Adds `vaopd ledger`."""
    ledger = subparsers.add_parser("ledger", help="check that a run lost no group and trained none twice")
    ledger.add_argument("run", metavar="RUN", type=Path, help="a run's folder; the run may still be running")
    ledger.add_argument("--groups", action="store_true", help="also print a line for each group")
    ledger.set_defaults(command=_check_ledger)


def _check_ledger(arguments: argparse.Namespace) -> int:
    from vaopd.run.ledger import audit

    books = audit(arguments.run)
    if arguments.groups:
        _print_groups(books)
    _print_summary(books)
    for problem in books.problems[:SHOWN_PROBLEMS]:
        print(f"vaopd: {escape(problem)}", file=sys.stderr)
    if (more := len(books.problems) - SHOWN_PROBLEMS) > 0:
        print(f"vaopd: … and {more} more", file=sys.stderr)
    return 1 if books.problems else 0


def _print_summary(books: Audit) -> None:
    training, evaluation = (books.count_outcomes(training=kind) for kind in (True, False))
    emit(f"{books.run}, {books.step} steps in its newest checkpoint")
    emit(f"{'':<24}{'training':>10}{'evaluation':>12}")
    for name in dict.fromkeys([*training, *evaluation]):
        row = [str(counts.get(name, "–")) for counts in (training, evaluation)]
        emit(f"{name:<24}{row[0]:>10}{row[1]:>12}")
    settled = training["published"] - training["in flight"]
    found = len(books.problems)
    verdict = f"{found} problem{'s' * (found != 1)}" if found else "each once"
    emit(
        f"trained = published − in flight − dead-lettered: {training['trained']} = {settled} − "
        f"{training['dead-lettered']}, {verdict}"
    )


def _print_groups(books: Audit) -> None:
    emit(f"{'group':<22}{'step':>6}{'policy':>8}  {'worker':<16}{'checkpoint':>10}  outcome")
    for fate in books.fates:
        emit(
            f"{fate.group_id:<22}{_format_number(fate.step):>6}{_format_number(fate.delivered_policy):>8}  "
            f"{fate.worker or '–':<16}{_format_number(fate.checkpoint):>10}  {_describe_outcome(fate, books.step)}"
        )


def _describe_outcome(fate: Fate, done: int) -> str:
    dropped = ", ".join(f"{number} × {reason}" for reason, number in fate.dropped.items())
    return (
        fate.name_outcome(done)
        + (f": {fate.dead}" if fate.dead is not None else "")
        + (f" (dropped: {dropped})" if dropped else "")
    )


def _format_number(number: int | None) -> str:
    return "–" if number is None else str(number)
