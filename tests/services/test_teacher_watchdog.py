"""A device that hangs: the teacher says that it doesn't serve, and ends with a status that gets it restarted."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.models import tiny_vlm
from tests.support.teacher import teacher_in_process, teacher_process, token_request
from tests.support.waiting import wait_until
from vaopd.client import SyncTeacherClient
from vaopd.config import TeacherServiceConfig
from vaopd.errors import Unavailable, VaopdError
from vaopd.types import GroupScore
from vaopd_teacher.engines.engine import EngineResult, PreparedGroup
from vaopd_teacher.engines.transformers_engine import GroupEngine


class HangingEngine:
    """The real engine, but for a group called "hang", whose forward doesn't come back until the test is over."""

    def __init__(self) -> None:
        self._engine = GroupEngine(tiny_vlm(), batch_tokens=4096)
        self.over = threading.Event()

    def score(self, groups: Sequence[PreparedGroup]) -> Iterator[EngineResult | VaopdError]:
        if any(group.group_id == "hang" for group in groups):
            self.over.wait()
        yield from self._engine.score(groups)


@pytest.fixture
def engine() -> Iterator[HangingEngine]:
    engine = HangingEngine()
    yield engine
    engine.over.set()


def score(target: str, name: str, **options: object) -> object:
    with SyncTeacherClient(target, **options) as client:  # type: ignore[arg-type]
        (result,) = client.score([token_request(tiny_vlm(), name)])
    return result


def test_a_hanging_device_is_not_serving_and_its_callers_are_told(engine: HangingEngine) -> None:
    service = TeacherServiceConfig(stuck_after_s=2.0)  # on a busy machine a sound forward takes a while
    with teacher_in_process(tiny_vlm(), engine=engine, service=service) as teacher:
        assert isinstance(score(teacher.target, "sound"), GroupScore)
        wait_until("the device is idle", lambda: teacher.server.scheduler.busy_s == 0)
        callers: list[BaseException] = []

        def hang() -> None:
            with pytest.raises(Unavailable) as caught:
                score(teacher.target, "hang", timeout_s=5.0)
            callers.append(caught.value)

        thread = threading.Thread(target=hang)
        thread.start()
        wait_until("the watchdog has seen it", teacher.failed)
        assert teacher.server.scheduler.busy_s > 2.0
        with grpc.insecure_channel(teacher.target) as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        thread.join(30)
    assert len(callers) == 1


def test_a_device_that_waits_for_work_is_not_stuck() -> None:
    service = TeacherServiceConfig(stuck_after_s=0.5)
    with teacher_in_process(tiny_vlm(), service=service, engine=QuickEngine()) as teacher:
        for name in ("a", "b", "c"):
            score(teacher.target, name)
        over = time.monotonic() + 2 * 0.5
        wait_until("it has waited for longer than a forward may take", lambda: time.monotonic() > over)
        assert not teacher.failed()


class QuickEngine:
    """Refuses every group at once."""

    def score(self, groups: Sequence[PreparedGroup]) -> Iterator[EngineResult | VaopdError]:
        for group in groups:
            yield VaopdError(f"{group.group_id} is not wanted")


HANGING = """
import ctypes, sys, threading
from vaopd_teacher.__main__ import main
from vaopd_teacher.engines.transformers_engine import GroupEngine

def hang(self, groups):
    {how}
    yield

GroupEngine.score = hang
sys.exit(main([*sys.argv[1:], "--service", "{service}"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("threading.Event().wait()", "the device has given no result for"),
        # PyDLL keeps Python's lock while the C function runs: no thread and no event loop of the process goes on.
        ("ctypes.PyDLL(None).sleep(1000)", "Timeout (0:00:02)!"),
    ],
    ids=["the thread waits", "it keeps Python's lock"],
)
def test_a_process_whose_device_hangs_ends(tmp_path: Path, how: str, words: str) -> None:
    service = tmp_path / "service.toml"
    service.write_text("[teacher]\nstuck_after_s = 1.0\n")
    code = HANGING.format(how=how, service=service)
    with teacher_process(tmp_path, launch=("-c", code)) as teacher:
        with pytest.raises(Unavailable):
            score(teacher.target, "g", patience_s=0.0)  # until the process ends
        assert teacher.process.wait(60) == 1
    assert words in (tmp_path / "teacher.log").read_text()
