"""`vaopd usage ADDRESS…`: prints how much of a teacher each job has used, over all replicas."""

from __future__ import annotations

import argparse
import collections
import json
import urllib.error
import urllib.request

from vaopd.cli.common import Subparsers
from vaopd.cli.output import emit
from vaopd.errors import Unavailable

JOB = "vaopd_job"
COLUMNS = {
    "vaopd_teacher_groups_total": "groups",
    "vaopd_teacher_tokens_total": "tokens",
    "vaopd_teacher_failed_groups_total": "failed",
    "vaopd_teacher_refused_calls_total": "refused",
    "vaopd_teacher_queue_groups": "waiting",
}
"""The teacher's metrics by their column: prompt groups and tokens since its start, and groups that wait now."""
TIMEOUT_S = 10.0


def add_parsers(subparsers: Subparsers) -> None:
    """Adds `vaopd usage`."""
    usage = subparsers.add_parser("usage", help="print how much of a teacher each job has used, over all replicas")
    usage.add_argument(
        "addresses", metavar="HOST:PORT", nargs="+", help="where a teacher serves its metrics (--metrics-address)"
    )
    usage.add_argument("--json", action="store_true", help="print JSON")
    usage.set_defaults(command=_print_usage, extra="teacher")


def _print_usage(arguments: argparse.Namespace) -> int:
    used: dict[str, dict[str, int]] = collections.defaultdict(lambda: dict.fromkeys(COLUMNS.values(), 0))
    for address in arguments.addresses:
        for job, column, value in _read_metrics(address):
            used[job][column] += value
    if arguments.json:
        emit(json.dumps(used, indent=2))
        return 0
    total = sum(numbers["tokens"] for numbers in used.values())
    emit(f"{'job':<32}{'share':>8}{''.join(f'{name:>16}' for name in COLUMNS.values())}")
    for job, numbers in sorted(used.items(), key=lambda item: -item[1]["tokens"]):
        share = f"{numbers['tokens'] / total:.1%}" if total else "–"
        job = "(without a valid key)" if job == "-" else job
        emit(f"{job:<32}{share:>8}{''.join(f'{number:>16,}' for number in numbers.values())}")
    return 0


def _read_metrics(address: str) -> list[tuple[str, str, int]]:
    """Returns (job, column, value) of one teacher. Raises Unavailable if it can't be read."""
    from prometheus_client.parser import text_string_to_metric_families

    try:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the teacher is a neighbour
        with direct.open(f"http://{address}/metrics", timeout=TIMEOUT_S) as reply:
            text = reply.read().decode()
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise Unavailable(f"no metrics at {address} ({reason}); name the teacher's --metrics-address") from None
    if "vaopd_teacher_" not in text:
        raise Unavailable(f"what {address} serves are no metrics of a teacher; name the teacher's --metrics-address")
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return [
        (sample.labels[JOB], COLUMNS[sample.name], int(sample.value))
        for sample in samples
        if sample.name in COLUMNS and JOB in sample.labels
    ]
