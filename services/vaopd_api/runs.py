"""Lists the runs in a folder, and makes their reports, also of unfinished runs.

Reports are drawn by matplotlib, which has global settings, so one thread draws them all, beside the event loop.
Summaries and reports are kept until the run's files change.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import re
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
        self._reports: LRUCache[str, tuple[Signature, Report]] = LRUCache(REPORTS_KEPT)

    async def list_summaries(self, *, job: str | None) -> list[RunModel]:
        """Returns the runs, latest change first, broken ones with the reason; with `job`, only that job's run."""
        if self._folder is None:
            return []
        found = await asyncio.get_running_loop().run_in_executor(self._thread, self._summarise, self._folder)
        return [run for run in found if job in (None, run.name)]

    async def report(self, name: str, *, job: str | None) -> Report:
        """Returns a run's report. Raises NotFound; PermissionDenied for any run, real or not, but the job's own."""
        if job not in (None, name):
            raise PermissionDenied("this key is for another job's run; ask the service's operator")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._report, name)

    # The methods below run on the thread.

    def _summarise(self, folder: Path) -> list[RunModel]:
        runs = [self._find_summary(path) for path in (folder.iterdir() if folder.is_dir() else ()) if _is_run(path)]
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

    def _report(self, name: str) -> Report:
        if self._folder is None or not NAME.fullmatch(name) or not _is_run(self._folder / name):
            raise NotFound(f"there is no run {name[:128]!r} here; GET /v1/runs lists the runs")
        path = self._folder / name
        signature = _read_signature(path)
        known = self._reports.get(name)
        # A run may die without a change of its files.
        state = _read_state(path)
        if known is None or known[0] != (*signature, (state, 0, 0)):
            known = self._reports[name] = ((*signature, (state, 0, 0)), _draw(path))
        return known[1]


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
    # A client is not told where the folder is.
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


def _draw(path: Path) -> Report:
    from vaopd.report import report_html  # matplotlib

    try:
        run = read_run(path)
        html = report_html([run], again_s=LOOK_AGAIN_S if run.may_continue else None).encode()
    except Exception as error:
        # What is wrong with the trainer's files is for the API's log, not for its clients.
        logger.exception("the report of run %s can't be made: %s", path.name, error)
        raise ApiError(500, f"the report of run {path.name!r} can't be made; see the API's log") from None
    return Report(html=html, tag=f'"{hashlib.sha256(html).hexdigest()[:32]}"')
