"""What the teacher keeps for each job, call and image has a bound, whatever is sent: counted, not weighed."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
import pytest

from tests.faults.soak_load import PICTURES, Load
from tests.support.models import tiny_vlm
from tests.support.teacher import TeacherInProcess, teacher_in_process
from tests.support.waiting import wait_until
from vaopd_teacher import metrics
from vaopd_teacher.line import scheduler

TIMES = 6
KEPT = 5
JOBS = 4
"""Of the load's groups with pictures; all others are jobs that were never seen before, or of one name."""


def count_entries(teacher: TeacherInProcess) -> dict[str, int]:
    """Of every table that is empty while nobody asks for anything."""
    server = teacher.server
    return {
        "groups that wait": server.admission.waiting,
        "jobs that wait": len(server.admission.count_waiting_by_job()),
        "units in the line": server.scheduler.waiting_units,
        "jobs in the line": len(server.scheduler.waiting_tokens_by_job()),
        "jobs that prepare": len(server.ahead._preparing) + len(server.ahead._queues),
        "pins": len(server.images._pins),
        "views being made": len(server.prepared_images._making),
    }


async def send_all(load: Load, target: str) -> None:
    async with grpc.aio.insecure_channel(target) as channel:
        for send, _, _ in load._kinds.values():
            for _ in range(TIMES):
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await send(channel)


def test_tables_are_bounded_after_every_kind_of_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_JOBS", KEPT)
    monkeypatch.setattr(scheduler, "JOBS_REMEMBERED", KEPT)
    shown = metrics.TeacherMetrics()
    with teacher_in_process(tiny_vlm(), metrics=shown) as teacher:
        load = Load(teacher.target)
        asyncio.run(send_all(load, teacher.target))
        wait_until("all tables are empty", lambda: not any(count_entries(teacher).values()))
        store = teacher.server.images
        assert len(store._owners) <= PICTURES
        assert len(store._shares) <= JOBS
        assert len(teacher.server.scheduler.served_by_job()) == KEPT
        samples = [sample for family in shown.registry.collect() for sample in family.samples]
        jobs = {sample.labels[metrics.JOB] for sample in samples if metrics.JOB in sample.labels}
        assert len(jobs - {"-"}) == KEPT
