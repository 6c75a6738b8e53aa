"""The runs in a folder: a list, and each one's report, also while it goes on. State: what was read, until it changes.

Reports are drawn by matplotlib, whose settings are global: one thread of its own draws them all, and the event loop
goes on meanwhile. What was drawn holds as long as the run's files are the same.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from vaopd.errors import NotFound, PermissionDenied, VaopdError
from vaopd.http_types import RunModel
from vaopd.run.records import read_run
from vaopd_api.problems import ApiError

logger = logging.getLogger("vaopd.api")

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""As `run.name`; nothing that leads out of the folder has this form."""
FILES = ("config.toml", "metrics.jsonl", "samples.jsonl")
LOOK_AGAIN_S = 15
REPORTS_KEPT = 8
Signature = tuple[tuple[str, int, int], ...]
"""Name, time of the last change in ns and size of each file that is there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """A page, and the tag by which a browser asks whether it is still the same."""

    html: bytes
    tag: str


class Runs:
    """`folder` None: there are none. A client with a key sees the run of its key's job, and no other."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="runs")
        self._summaries: dict[str, tuple[Signature, RunModel]] = {}
        self._reports: OrderedDict[str, tuple[Signature, Report]] = OrderedDict()

    async def summaries(self, *, job: str | None) -> list[RunModel]:
        """Those that can be read, the one that changed last first."""
        if self._folder is None:
            return []
        found = await asyncio.get_running_loop().run_in_executor(self._thread, self._summarise, self._folder)
        return [run for run in found if job in (None, run.name)]

    async def report(self, name: str, *, job: str | None) -> Report:
        """Raises NotFound, and PermissionDenied for any name but the job's own, whether or not there is such a run."""
        if job not in (None, name):
            raise PermissionDenied("this key is for another job's run; ask whoever runs the service")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._report, name)

    # What follows runs on the thread.

    def _summarise(self, folder: Path) -> list[RunModel]:
        runs = []
        for path in folder.iterdir() if folder.is_dir() else ():
            if _is_run(path):
                try:
                    runs.append(self._summary(path))
                except (VaopdError, OSError) as error:
                    logger.warning("run %s is left out: %s", path.name, error)
        return sorted(runs, key=lambda run: run.changed, reverse=True)

    def _summary(self, path: Path) -> RunModel:
        signature = _signature(path)
        known = self._summaries.get(path.name)
        if known is None or known[0] != signature:
            known = self._summaries[path.name] = (signature, _summarised(path, signature))
        return known[1]

    def _report(self, name: str) -> Report:
        if self._folder is None or not NAME.fullmatch(name) or not _is_run(self._folder / name):
            raise NotFound(f"there is no run {name[:128]!r} here; GET /v1/runs names those there are")
        path = self._folder / name
        signature = _signature(path)
        known = self._reports.get(name)
        if known is None or known[0] != signature:
            known = (signature, _drawn(path))
            self._reports[name] = known
        self._reports.move_to_end(name)
        while len(self._reports) > REPORTS_KEPT:
            self._reports.popitem(last=False)
        return known[1]


def _is_run(path: Path) -> bool:
    """A folder of its own, under a run's name; a link could lead anywhere."""
    return bool(NAME.fullmatch(path.name)) and not path.is_symlink() and (path / "config.toml").is_file()


def _signature(path: Path) -> Signature:
    files = ((name, path / name) for name in FILES)
    return tuple((name, file.stat().st_mtime_ns, file.stat().st_size) for name, file in files if file.is_file())


def _summarised(path: Path, signature: Signature) -> RunModel:
    run = read_run(path)
    first, last = (run.evaluations[0], run.evaluations[-1]) if run.evaluations else (None, None)
    return RunModel(
        name=path.name,
        objective=run.variant,
        seed=run.seed,
        steps_done=run.steps_done,
        steps_planned=run.steps_planned,
        finished=run.finished,
        accuracy_before=first and first.accuracy,
        accuracy=last and last.accuracy,
        changed=datetime.fromtimestamp(max(changed for _, changed, _ in signature) / 1e9, UTC),
    )


def _drawn(path: Path) -> Report:
    from vaopd.report import report_html  # matplotlib

    try:
        run = read_run(path)
        html = report_html([run], again_s=None if run.finished else LOOK_AGAIN_S).encode()
    except (VaopdError, KeyError, ValueError, TypeError) as error:
        # The files are the trainer's; what is wrong in one is told where the API runs.
        logger.exception("the report of run %s can't be made: %s", path.name, error)
        raise ApiError(500, f"the report of run {path.name!r} can't be made; the API's log tells why") from None
    return Report(html=html, tag=f'"{hashlib.sha256(html).hexdigest()[:32]}"')
