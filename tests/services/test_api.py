"""The scoring API over HTTP, served by uvicorn in front of a real teacher."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.support import tolerance
from tests.support.api import BODY, PNG, QUESTION, Api, error_of, start_api
from tests.support.models import LARGEST_LOGIT, tiny_vlm
from tests.support.teacher import TeacherInProcess, drawing, encoded
from tests.support.tolerance import assert_within, gamma
from vaopd.client import SyncTeacherClient
from vaopd.http_types import ScoreBody
from vaopd.scoring.weights import rollout_weights
from vaopd.types import GroupScore
from vaopd_api.scorer import decode_images, score_request


@pytest.fixture
def orphan(tmp_path: Path) -> Iterator[Api]:
    """An API whose teacher isn't there: the port is bound, so that nobody else can be, and nothing listens."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        yield from start_api(tmp_path, f"127.0.0.1:{nobody.getsockname()[1]}")


def direct_score(target: str, body: dict[str, Any]) -> GroupScore:
    """What the teacher answers without the API between."""
    parsed = ScoreBody.model_validate(body)
    with SyncTeacherClient(target, payload="none") as client:
        (score,) = client.score(
            [score_request(parsed, decode_images(parsed.image, parsed.images))], with_token_texts=True
        )
    assert isinstance(score, GroupScore)
    return score


def test_a_response_is_scored_token_by_token(api: Api, teacher: TeacherInProcess) -> None:
    answer = api.score(**BODY).json()
    (rollout,) = answer["rollouts"]
    score = direct_score(teacher.target, BODY)
    assert rollout["teacher_logprobs"] == score.teacher_logprobs[0].tolist()
    assert rollout["degraded_logprobs"] == score.degraded_logprobs[0].tolist()
    difference = np.subtract(rollout["teacher_logprobs"], rollout["degraded_logprobs"])
    # One float32 difference of numbers that JSON gives back as they were; their mean is float64's.
    assert_within(rollout["visual_advantage"], np.maximum(difference, 0), gamma(1) * np.abs(difference))
    assert rollout["mean_visual_advantage"] == pytest.approx(np.mean(rollout["visual_advantage"]))
    assert rollout["rollout_weight"] == 1.0  # a group of one
    assert answer["model"] == "tiny-teacher"
    assert answer["revision"] == teacher.description.revision
    assert answer["prompt_tokens"] == score.prompt_tokens


def test_a_text_is_scored_as_a_finished_turn_and_its_tokens_are_named(api: Api) -> None:
    tokens = api.score(**BODY).json()["rollouts"][0]["tokens"]
    assert "".join(token["text"] for token in tokens) == "It is 12.<|im_end|>"


def test_token_ids_are_scored_just_as_they_are(api: Api) -> None:
    by_text = api.score(**BODY).json()
    ids = [token["id"] for token in by_text["rollouts"][0]["tokens"]]
    by_ids = api.score(image=PNG, question=QUESTION, response_token_ids=ids).json()
    assert by_ids == by_text


def test_the_responses_of_a_group_are_weighed_against_each_other(api: Api) -> None:
    responses = ["It is 12.", "It is 7.", [70, 71, 72]]
    rollouts = api.score(image=PNG, question=QUESTION, responses=responses).json()["rollouts"]
    assert [token["id"] for token in rollouts[2]["tokens"]] == [70, 71, 72]
    means = [rollout["mean_visual_advantage"] for rollout in rollouts]
    weights = [rollout["rollout_weight"] for rollout in rollouts]
    assert sum(weights) == pytest.approx(1)
    assert np.argsort(weights).tolist() == np.argsort(means).tolist()


def test_rollout_weights_by_hand() -> None:
    """Means 1, 2, 3: standard deviation √(2/3), z = −1.22474, 0, 1.22474; e^z = 0.29383, 1, 3.40330, sum 4.69713."""
    by_hand = [0.29383 / 4.69713, 1 / 4.69713, 3.40330 / 4.69713]
    # float64, to what is written here: five decimals, and ε = 1e-6 of a deviation of 0.8 in each of two z.
    assert rollout_weights(np.array([1.0, 2.0, 3.0])).tolist() == pytest.approx(by_hand, rel=1e-5 / 0.29383 + 3e-6)
    assert rollout_weights(np.array([0.7, 0.7, 0.7, 0.7])).tolist() == pytest.approx([0.25] * 4)
    assert rollout_weights(np.array([0.3])).tolist() == [1.0]


def test_a_ratio_of_one_degrades_nothing_so_no_token_has_an_advantage(api: Api) -> None:
    """Beyond rounding: both views go through one forward, at two places in it."""
    answer = api.score(**BODY, degradation={"kind": "pixelate", "strength": 1.0}).json()
    error = 2 * tolerance.forward(tiny_vlm().config) * LARGEST_LOGIT
    assert_within(answer["rollouts"][0]["visual_advantage"], 0.0, error)
    assert max(api.score(**BODY).json()["rollouts"][0]["visual_advantage"]) > 2 * error
    assert answer["degradation"] == {"kind": "pixelate", "strength": 1.0}


def test_a_data_url_several_images_and_none_are_all_fine(api: Api) -> None:
    as_url = {**BODY, "image": f"data:image/png;base64,{PNG}"}
    assert api.score(**as_url).json() == api.score(**BODY).json()
    other = base64.b64encode(encoded(drawing(2), "JPEG").data).decode()
    one, two, text_only = (
        api.score(images=images, question=QUESTION, response="It is 12.").json()["prompt_tokens"]
        for images in ([PNG], [PNG, other], [])
    )
    assert two > one > text_only


def test_the_same_question_has_the_same_answer(api: Api) -> None:
    assert api.known_answer() == api.known_answer()


def test_teachers_are_listed(api: Api, teacher: TeacherInProcess) -> None:
    (listed,) = api.http.get("/v1/teachers").json()["teachers"]
    assert listed["model"] == "tiny-teacher"
    assert listed["tokenizer_fingerprint"] == teacher.description.tokenizer_fingerprint
    assert listed["limits"]["max_rollouts_per_group"] == teacher.description.limits.max_rollouts_per_group
    assert api.score(**BODY, teacher="tiny-teacher").status_code == 200
    unknown = api.score(**BODY, teacher="huge-teacher")
    assert (unknown.status_code, error_of(unknown)["code"]) == (404, "not_found")


def test_health_and_readiness(api: Api) -> None:
    assert api.http.get("/healthz").json() == {"status": "ok"}
    assert api.http.get("/readyz").json() == {"status": "ready"}


def test_without_a_teacher_it_is_alive_but_not_ready(orphan: Api) -> None:
    assert orphan.http.get("/healthz").status_code == 200
    for answer in (orphan.http.get("/readyz"), orphan.http.get("/v1/teachers"), orphan.score(**BODY)):
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) >= 1
        error = error_of(answer)
        assert error["code"] == "unavailable"
        assert "127.0.0.1" not in error["detail"]  # where the teacher runs is nobody's business


def test_the_schema_has_examples_that_work(api: Api) -> None:
    schema = api.http.get("/openapi.json").json()
    examples = schema["components"]["schemas"]["ScoreBody"]["examples"]
    assert len(examples) == 2
    for example in examples:
        assert api.score(**example).status_code == 200, example


def test_sigterm_ends_it_cleanly(orphan: Api) -> None:
    orphan.process.send_signal(signal.SIGTERM)
    assert orphan.process.wait(30) in (0, -signal.SIGTERM)
    with pytest.raises(httpx.ConnectError):
        orphan.http.get("/healthz")


def test_it_loads_no_torch() -> None:
    """The scoring API is small: it runs where only the client is installed."""
    code = "import sys, vaopd_api.app, vaopd_api.__main__; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert json.loads(done.stdout.lower()) is False
