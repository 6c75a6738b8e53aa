"""The teacher as a process: how it starts, drains, dies and comes back."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.models import tiny_vlm
from tests.support.teacher import drawing, teacher_process, token_request
from tests.support.waiting import wait_until
from vaopd.client import SyncTeacherClient
from vaopd.errors import Unavailable
from vaopd.types import GroupScore, ScoreRequest


def groups(count: int) -> list[ScoreRequest]:
    return [token_request(tiny_vlm(), f"g{n}", pictures=[drawing(n % 5)]) for n in range(count)]


def serving(target: str) -> bool:
    with grpc.insecure_channel(target) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
        except grpc.RpcError:
            return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING


def test_a_wrong_configuration_is_named_and_ends_the_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vaopd_teacher", "--config", str(tmp_path / "none.toml")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "none.toml" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_on_sigterm_the_accepted_call_finishes_and_no_other_begins(tmp_path: Path) -> None:
    # Small forwards and a reader that stops: the call is in its middle when the signal comes.
    with teacher_process(tmp_path, batch_tokens=200) as teacher, SyncTeacherClient(teacher.target) as client:
        results = client.score(groups(120))
        first = next(results)
        with grpc.insecure_channel(teacher.target) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            teacher.send(signal.SIGTERM)
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        wait_until("new calls are refused", lambda: not serving(teacher.target))
        with SyncTeacherClient(teacher.target, timeout_s=0.5) as late, pytest.raises(Unavailable):
            late.describe()
        assert teacher.process.poll() is None
        rest = list(results)
        assert all(isinstance(result, GroupScore) for result in [first, *rest])
        assert len(rest) == 119
        assert teacher.process.wait(60) == 0


@pytest.mark.slow
def test_a_client_outlives_the_death_of_its_teacher_in_mid_stream(tmp_path: Path) -> None:
    wanted = groups(120)
    results: list[object] = []
    with teacher_process(tmp_path, batch_tokens=200) as teacher, SyncTeacherClient(teacher.target) as client:
        stream = client.score(wanted)
        results.append(next(stream))
        teacher.process.kill()
        teacher.process.wait()
        reader = threading.Thread(target=lambda: results.extend(stream))
        reader.start()  # meets a dead server first, and waits for the next one
        with teacher_process(tmp_path, address=teacher.target, batch_tokens=200):
            reader.join(60)
            assert not reader.is_alive()
    assert all(isinstance(result, GroupScore) for result in results)
    assert sorted(r.group_id for r in results) == sorted(g.group_id for g in wanted)  # type: ignore[attr-defined]
    assert "image" in (tmp_path / "teacher.log").read_text().rpartition("teacher ready")[2]  # uploaded again


@pytest.mark.slow
def test_a_teacher_that_vllm_holds_serves_and_drains(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    service = tmp_path / "service.toml"
    service.write_text('[teacher.engine]\nbackend = "vllm"\noptions = { max_num_batched_tokens = 512 }\n')
    launch = ("-m", "vaopd_teacher", "--service", str(service))
    with teacher_process(tmp_path, launch=launch) as teacher:
        with SyncTeacherClient(teacher.target, payload="sampled") as client:
            results = list(client.score(groups(3)))
        assert all(isinstance(result, GroupScore) for result in results)
        assert len(results) == 3
        teacher.send(signal.SIGTERM)
        assert teacher.process.wait(30) == 0
    assert "nanobind" not in (tmp_path / "teacher.log").read_text()  # a library's thirty lines about leaks


BROKEN = """
import sys
from vaopd_teacher.__main__ import main
from vaopd_teacher.engines.transformers_engine import GroupEngine

def broken(self, batch):
    raise RuntimeError("CUDA error: device-side assert triggered")

GroupEngine._forward = broken
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_device_error_ends_the_process_with_a_status_that_gets_it_restarted(tmp_path: Path) -> None:
    with teacher_process(tmp_path, launch=("-c", BROKEN)) as teacher:
        with SyncTeacherClient(teacher.target, patience_s=0.0) as client, pytest.raises(Unavailable):
            list(client.score(groups(1)))
        assert teacher.process.wait(60) == 1
    assert "device-side assert" in (tmp_path / "teacher.log").read_text()
