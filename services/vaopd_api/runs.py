"""Lists the runs in a folder, and makes their reports, also of unfinished runs.

Reading a run and making its report takes up to a second, so one thread does it, beside the event loop. Summaries and
reports are kept until the run's files change.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cachetools import LRUCache

from vaopd.errors import NotFound, PermissionDenied, VaopdError
from vaopd.http_types import RunModel
from vaopd.run.records import read_run
from vaopd.run.status import read_status
from vaopd_api.problems import ApiError

logger = logging.getLogger("vaopd.api")

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""The form of `run.name`; no path that leads out of the folder has it."""
FILES = ("config.toml", "metrics.jsonl", "samples.jsonl", "settings.jsonl")
BROKEN = "broken"
LATEST_S = datetime(9999, 1, 1, tzinfo=UTC).timestamp()
LOOK_AGAIN_S = 15
REPORTS_KEPT = 8
COMPARED = 16
"""Runs in one comparison, at most."""
Signature = tuple[tuple[str, int, int], ...]
"""Name, time of the last change in ns and size in bytes of each file that exists."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """A page and its ETag."""

    html: bytes
    tag: str


class Runs:
    """The runs in `folder`; None: none. A client with a key sees only the run of its job."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="runs")
        self._summaries: dict[str, tuple[Signature, RunModel]] = {}
        self._reports: LRUCache[tuple[str, ...], tuple[tuple[Signature, ...], Report]] = LRUCache(REPORTS_KEPT)

    async def list_summaries(self, *, job: str | None) -> list[RunModel]:
        """Returns the runs, latest change first, broken ones with the reason; with `job`, only that job's run."""
        if self._folder is None:
            return []
        found = await asyncio.get_running_loop().run_in_executor(self._thread, self._summarise, self._folder)
        return [run for run in found if job in (None, run.name)]

    async def report(self, names: Sequence[str], *, job: str | None) -> Report:
        """Returns a run's report, or the comparison of several runs.

        Raises NotFound; PermissionDenied for any run, real or not, but the job's own; ApiError for too many runs.
        """
        if any(job not in (None, name) for name in names):
            raise PermissionDenied("this key is for another job's run; ask the service's operator")
        if len(names) > COMPARED:
            raise ApiError(
                422, f"{len(names)} runs to compare, the limit is {COMPARED}; choose fewer", field="query.run"
            )
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._report, tuple(names))

    # The methods below run on the thread.

    def _summarise(self, folder: Path) -> list[RunModel]:
        runs = [self._find_summary(path) for path in (folder.iterdir() if folder.is_dir() else ()) if _is_run(path)]
        for name in self._summaries.keys() - {run.name for run in runs}:
            del self._summaries[name]
        return sorted(runs, key=lambda run: run.changed, reverse=True)

    def _find_summary(self, path: Path) -> RunModel:
        """Returns a run's summary; a run that can't be read is its own fault only, and is listed as broken."""
        signature = _read_signature(path)
        known = self._summaries.get(path.name)
        try:
            if known is None or known[0] != signature:
                known = self._summaries[path.name] = (signature, _summarise(path, signature))
            return known[1] if known[1].state == BROKEN else _add_state(known[1], path)
        except Exception as error:
            logger.warning("run %s is broken: %s", path.name, error, exc_info=not isinstance(error, VaopdError))
            broken = _describe_broken(path, signature, error)
            if known is None or known[0] != signature:  # not for a status, which may be whole the next time
                self._summaries[path.name] = (signature, broken)
            return broken

    def _report(self, names: tuple[str, ...]) -> Report:
        paths = [self._find(name) for name in names]
        # A run may die without a change of its files.
        signature = tuple((*_read_signature(path), (_read_state(path), 0, 0)) for path in paths)
        known = self._reports.get(names)
        if known is None or known[0] != signature:
            known = self._reports[names] = (signature, _draw(paths))
        return known[1]

    def _find(self, name: str) -> Path:
        if self._folder is None or not NAME.fullmatch(name) or not _is_run(self._folder / name):
            raise NotFound(f"there is no run {name[:128]!r} here; GET /v1/runs lists the runs")
        return self._folder / name


def _read_state(path: Path) -> str:
    try:
        status = read_status(path)
    except VaopdError:
        return BROKEN  # the report says so
    return "" if status is None else status.state


def _is_run(path: Path) -> bool:
    """Returns whether `path` is a run's folder; not a link, which could lead anywhere."""
    # The configuration may be anything, such as a loop of links: then the run is broken.
    return bool(NAME.fullmatch(path.name)) and not path.is_symlink() and os.path.lexists(path / "config.toml")


def _read_signature(path: Path) -> Signature:
    found = []
    for name in FILES:
        with contextlib.suppress(OSError):
            status = (path / name).stat()
            found.append((name, status.st_mtime_ns, status.st_size))
    return tuple(found)


def _describe_broken(path: Path, signature: Signature, error: Exception) -> RunModel:
    known = isinstance(error, VaopdError | OSError)
    # Clients don't learn where the folder is.
    reason = str(error).replace(f"{path}/", "") if known else f"its files can't be read ({type(error).__name__})"
    return RunModel(
        name=path.name,
        objective=None,
        seed=None,
        steps_done=None,
        steps_planned=None,
        finished=False,
        state=BROKEN,
        reason=reason,
        accuracy_before=None,
        accuracy=None,
        changed=_find_change(signature),
    )


def _find_change(signature: Signature) -> datetime:
    newest_ns = max((changed for _, changed, _ in signature), default=0)
    # Files may have any time, also one that no date has.
    return datetime.fromtimestamp(min(max(newest_ns / 1e9, 0.0), LATEST_S), UTC)


def _add_state(summary: RunModel, path: Path) -> RunModel:
    """Returns the summary with the run's state now, which changes without a change of the files."""
    status = read_status(path)
    if status is None:
        return summary
    update = {"state": status.state, "reason": status.reason, "finished": status.state == "finished"}
    return summary.model_copy(update=update)


def _summarise(path: Path, signature: Signature) -> RunModel:
    run = read_run(path)
    first, last = (run.evaluations[0], run.evaluations[-1]) if run.evaluations else (None, None)
    return RunModel(
        name=path.name,
        objective=run.variant,
        seed=run.seed,
        steps_done=run.steps_done,
        steps_planned=run.steps_planned,
        finished=run.finished,
        state=run.state,
        accuracy_before=first and first.accuracy,
        accuracy=last and last.accuracy,
        judge_before=(first and first.judge) or None,
        judge=(last and last.judge) or None,
        changed=_find_change(signature),
    )


def _draw(paths: Sequence[Path]) -> Report:
    from vaopd.report import report_html  # numpy, Pillow

    try:
        runs = [read_run(path) for path in paths]
        again_s = LOOK_AGAIN_S if any(run.may_continue for run in runs) else None
        html = report_html(runs, again_s=again_s).encode()
    except Exception as error:
        # What is wrong with the trainer's files is for the API's log, not for its clients.
        names = ", ".join(path.name for path in paths)
        logger.exception("the report of run %s can't be made: %s", names, error)
        raise ApiError(500, f"the report of run {names!r} can't be made; see the API's log") from None
    return Report(html=html, tag=f'"{hashlib.sha256(html).hexdigest()[:32]}"')
