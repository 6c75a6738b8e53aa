"""A failed call has one id: in the client's error, in the server's answer and in the server's log."""

from __future__ import annotations

import logging
import re

import grpc
import numpy as np
import pytest

from tests.support.api import QUESTION, Api
from tests.support.models import tiny_vlm
from tests.support.teacher import TeacherInProcess, token_request
from tests.support.waiting import wait_until
from vaopd.client import GroupFailure, SyncTeacherClient
from vaopd.errors import InvalidInput, LimitExceeded, Mismatch, VaopdError
from vaopd.http_client import ScoringClient
from vaopd.pb import teacher_pb2 as pb
from vaopd.pb import teacher_pb2_grpc
from vaopd.telemetry import logs
from vaopd.types import ScoreRequest, user_turn
from vaopd_teacher.rpc import servicer

SHOWN = re.compile(r" \(request ([0-9a-f]{32})\)$")


@pytest.fixture(autouse=True)
def _every_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def id_in(error: VaopdError) -> str:
    shown = SHOWN.search(str(error))
    assert shown is not None, str(error)
    assert shown[1] == error.request_id
    assert shown[1] not in error.message
    return shown[1]


def test_a_refused_call(teacher: TeacherInProcess, caplog: pytest.LogCaptureFixture) -> None:
    with (
        SyncTeacherClient(teacher.target, tokenizer_fingerprint="0" * 64) as client,
        pytest.raises(Mismatch, match="vocabularies") as refused,
    ):
        list(client.score([token_request(tiny_vlm(), "g")]))
    (line,) = (record.getMessage() for record in caplog.records if record.name == "vaopd.audit")
    assert line.endswith(f", request {id_in(refused.value)}")


def test_a_refused_group(teacher: TeacherInProcess, caplog: pytest.LogCaptureFixture) -> None:
    bad = ScoreRequest(group_id="bad", responses=(np.array([-1], np.int32),), messages=user_turn("?", []))
    with SyncTeacherClient(teacher.target, job="geometry") as client:
        results = {result.group_id: result for result in client.score([bad, token_request(tiny_vlm(), "good")])}
    failure = results["bad"]
    assert isinstance(failure, GroupFailure)
    assert isinstance(failure.error, InvalidInput)
    begins = f"request {id_in(failure.error)}, job 'geometry': 2 groups, 1 refused, "
    wait_until("the call is logged", lambda: any(message.startswith(begins) for message in caplog.messages))


def test_a_fault_of_the_server_and_the_id_of_the_request_that_caused_the_call(
    teacher: TeacherInProcess, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("a secret of the server")

    monkeypatch.setattr(servicer, "description_to_pb", fail)
    with SyncTeacherClient(teacher.target) as client, pytest.raises(VaopdError, match="internal error") as failed:
        client.describe()
    assert f"request {id_in(failed.value)}: /vaopd.v1.Teacher/Describe failed" in caplog.messages
    assert "secret" not in str(failed.value)
    token = logs.request_id.set("step-7/score")
    try:
        with SyncTeacherClient(teacher.target) as client, pytest.raises(VaopdError, match=r"\(request step-7/score\)$"):
            client.describe()
    finally:
        logs.request_id.reset(token)


def test_a_client_without_ids_gets_one(teacher: TeacherInProcess, caplog: pytest.LogCaptureFixture) -> None:
    forged = (("x-request-id", "two words"),)
    with grpc.insecure_channel(teacher.target) as channel:
        for metadata in ((), forged):
            with pytest.raises(grpc.RpcError) as refused:
                list(teacher_pb2_grpc.TeacherStub(channel).ScoreGroups(pb.ScoreGroupsRequest(), metadata=metadata))
            given = dict(refused.value.trailing_metadata())["x-request-id"]  # type: ignore[attr-defined]
            assert re.fullmatch("[0-9a-f]{32}", given)
            assert caplog.messages[-1].endswith(f", request {given}")


def test_over_http_it_is_in_both_logs(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    """The API is a process before the teacher in this one."""
    with ScoringClient(str(api.http.base_url), patience_s=0) as client, pytest.raises(LimitExceeded) as refused:
        client.score(QUESTION, [[5] * 20] * 65)
    name = SHOWN.search(str(refused.value))
    assert name is not None
    assert str(refused.value).count("(request") == 1
    wait_until("the API has logged it", lambda: f"request {name[1]}: POST /v1/score 413" in api.log.read_text())
    assert any(f"request {name[1]}, job " in message for message in caplog.messages)
