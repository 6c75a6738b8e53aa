"""Behind the API: several teachers, one that refuses it, one that is down; and a student that answers questions."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.api import BODY, PNG, QUESTION, Api, error_of, start_api
from tests.support.models import model_folder, tiny_vlm
from tests.support.teacher import TeacherInProcess, teacher_in_process, write_config
from vaopd.access.keys import add_key
from vaopd.config import KeysConfig, TeacherServiceConfig


def test_a_teacher_that_refuses_the_api_s_own_key_is_no_fault_of_its_clients(tmp_path: Path) -> None:
    keys = tmp_path / "teacher-keys.json"
    right = add_key(keys, "api")
    (tmp_path / "api.key").write_text(right)
    (tmp_path / "api.key").chmod(0o600)
    with teacher_in_process(tiny_vlm(), service=TeacherServiceConfig(keys=KeysConfig(file=keys))) as guarded:
        for api in start_api(tmp_path, guarded.target):
            refused = api.score(**BODY)
            assert (refused.status_code, error_of(refused)["code"]) == (502, "bad_gateway")
            assert "VAOPD_API_KEY_FILE" in error_of(refused)["detail"]
        for api in start_api(tmp_path, guarded.target, VAOPD_API_KEY_FILE=str(tmp_path / "api.key")):
            assert api.score(**BODY).status_code == 200


def test_a_teacher_that_is_down_does_not_hide_the_others(teacher: TeacherInProcess, tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        dead = f"127.0.0.1:{nobody.getsockname()[1]}"
        for api in start_api(tmp_path, dead, "--teacher", teacher.target):
            (listed,) = api.http.get("/v1/teachers").json()["teachers"]
            assert listed["model"] == "tiny-teacher"
            assert api.score(**BODY, teacher="tiny-teacher").status_code == 200


def test_a_student_that_is_no_model_is_told_before_anything_serves(tmp_path: Path) -> None:
    config = write_config(tmp_path, model=tmp_path, address="127.0.0.1:1")
    command = [sys.executable, "-m", "vaopd_api", "--config", str(config), "--student", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "none' is no folder here, and no hub id of the form ORG/NAME" in done.stderr


def test_an_api_without_a_student_says_so(api: Api) -> None:
    assert api.http.get("/v1/students").json() == {"students": []}
    refused = api.http.post("/v1/sample", json={"question": "?"})
    assert (refused.status_code, error_of(refused)["code"]) == (404, "not_found")


def test_students_are_asked_by_name(tmp_path: Path, teacher: TeacherInProcess) -> None:
    """RUN/model and RUN/best are named with their run."""
    trained = tmp_path / "first" / "model"
    trained.parent.mkdir()
    trained.symlink_to(model_folder("student"), target_is_directory=True)
    students = ("--student", str(model_folder("student")), "--student", str(trained))
    for api in start_api(tmp_path, teacher.target, *students):
        names = [student["model"] for student in api.http.get("/v1/students").json()["students"]]
        assert names == [model_folder("student").name, "first/model"]
        unknown = api.http.post("/v1/sample", json={"question": "?", "student": "none"})
        assert (unknown.status_code, error_of(unknown)["code"]) == (404, "not_found")


@pytest.mark.slow
def test_a_student_answers_with_tokens_that_can_be_scored(teacher: TeacherInProcess, tmp_path: Path) -> None:
    for api in start_api(tmp_path, teacher.target, "--student", str(model_folder("student"))):
        assert api.http.get("/v1/students").json()["students"] == [{"model": "tiny-student", "loaded": False}]
        asked = {"image": PNG, "question": QUESTION, "num_responses": 3, "max_new_tokens": 12, "seed": 5}
        answer = api.http.post("/v1/sample", json=asked).json()
        assert api.http.get("/v1/students").json()["students"] == [{"model": "tiny-student", "loaded": True}]
        assert answer["tokenizer_fingerprint"] == teacher.description.tokenizer_fingerprint
        ids = [response["token_ids"] for response in answer["responses"]]
        assert len(ids) == 3
        assert all(0 < len(each) <= 12 for each in ids)
        assert api.http.post("/v1/sample", json={**asked, "temperature": 0}).status_code == 200
        scored = api.score(image=PNG, question=QUESTION, responses=ids).json()
        assert [[token["id"] for token in rollout["tokens"]] for rollout in scored["rollouts"]] == ids
        refused = api.http.post("/v1/sample", json={**asked, "num_responses": 0})
        assert error_of(refused)["field"] == "num_responses"
