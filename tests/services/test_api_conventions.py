"""What HTTP clients expect of any API: ids, keys, quotas, batches, streams, forms, headers, metrics, a sound schema."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import ssl
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import PIL.Image
import pytest
import torch

from tests.support import tolerance
from tests.support.api import BODY, IMAGE, PNG, QUESTION, Api, error_of, service_file, start_api, with_keys
from tests.support.models import LARGEST_LOGIT, tiny_vlm
from tests.support.teacher import TeacherInProcess, token_request
from tests.support.tolerance import assert_within
from tests.support.waiting import wait_until
from vaopd import objective
from vaopd.access.certificates import make_certificates
from vaopd.access.keys import add_key, revoke_key
from vaopd.client import SyncTeacherClient
from vaopd.degradation import pixelate
from vaopd.http_types import DegradationModel
from vaopd.scoring.reply import make_reply
from vaopd.types import GroupScore
from vaopd_api.access import Quota
from vaopd_api.problems import ApiError

BATCH = "/v1/score/batch"


# ------------------------------------------------------------------------------------------- what an answer says


def test_the_high_group_and_the_shares_are_the_objective_s(api: Api) -> None:
    answer = api.score(image=PNG, question=QUESTION, responses=["It is 12.", "The sides are 3, 4 and 5."]).json()
    every = []
    for rollout in answer["rollouts"]:
        va = torch.tensor([rollout["visual_advantage"]])
        every.append(va[0])
        mask = torch.ones_like(va, dtype=torch.bool)
        high = objective.high_group(va, mask, high_fraction=answer["high_fraction"])
        assert rollout["high_group"] == high[0].tolist()
    values = torch.cat(every)[None]
    mask = torch.ones_like(values, dtype=torch.bool)
    for fraction, key in ((0.1, "share_of_top_10"), (0.2, "share_of_top_20")):
        assert answer[key] == pytest.approx(objective.va_share_of_top(values, mask, fraction=fraction))


def test_without_any_advantage_there_are_no_shares(teacher: TeacherInProcess) -> None:
    """Not asked of a teacher: of equal views it says what is equal but for rounding."""
    with SyncTeacherClient(teacher.target, payload="none") as client:
        (score,) = client.score([token_request(tiny_vlm(), "g")], with_token_texts=True)
    assert isinstance(score, GroupScore)
    equal = replace(
        score,
        degraded_logprobs=score.teacher_logprobs,
        visual_advantage=tuple(map(np.zeros_like, score.visual_advantage)),
    )
    answer = make_reply(equal, teacher.description, degradation=DegradationModel(), top_k=0)
    assert (answer.share_of_top_10, answer.share_of_top_20) == (None, None)


def test_ranks_and_alternatives_on_request(api: Api) -> None:
    """Where the token itself is among the alternatives, it has the log-prob that the score has, at its rank."""
    (rollout,) = api.score(**BODY, top_k=5).json()["rollouts"]
    found = 0
    for t, token in enumerate(rollout["tokens"]):
        alternatives = rollout["alternatives"][t]
        assert len(alternatives) == 5
        logprobs = [alternative["logprob"] for alternative in alternatives]
        assert logprobs == sorted(logprobs, reverse=True)
        if (rank := rollout["ranks"][t]) is not None and rank <= 5:
            found += 1
            same = alternatives[rank - 1]
            assert (same["id"], same["text"]) == (token["id"], token["text"])
            error = 2 * tolerance.forward(tiny_vlm().config) * LARGEST_LOGIT
            assert_within(same["logprob"], rollout["teacher_logprobs"][t], error)
    assert found
    assert api.score(**BODY).json()["rollouts"][0]["alternatives"] is None


def test_the_degraded_view_is_the_one_that_the_teacher_makes(api: Api) -> None:
    answer = api.http.post("/v1/degrade", json={"image": PNG, "degradation": {"kind": "pixelate", "strength": 0.3}})
    assert answer.headers["content-type"] == "image/png"
    expected = pixelate(PIL.Image.open(io.BytesIO(IMAGE.data)).convert("RGB"), 0.3)
    assert PIL.Image.open(io.BytesIO(answer.content)).tobytes() == expected.tobytes()
    for image, status in (("bm8gaW1hZ2U=", 422), (PNG[: len(PNG) // 8 * 4], 422)):
        refused = api.http.post("/v1/degrade", json={"image": image})
        assert (refused.status_code, error_of(refused)["code"]) == (status, "invalid_input")
    zero = api.http.post("/v1/degrade", json={"image": PNG, "degradation": {"strength": 0}})
    assert error_of(zero)["field"] == "degradation.strength"


def test_what_the_teacher_refuses_is_named_by_the_request_s_own_keys(api: Api) -> None:
    cut = base64.b64encode(IMAGE.data[:-200]).decode()
    for change, field in (
        ({"image": cut}, "image"),
        ({"image": None, "images": [PNG, cut]}, "images.1"),
        ({"response": "It is <|image_pad|>"}, "response"),
        ({"response": None, "responses": ["It is 12.", "It is <|image_pad|>"]}, "responses.1"),
    ):
        error = error_of(api.score(**{**BODY, **change}))
        assert error["field"] == field
        assert error["detail"].startswith(field)


# ------------------------------------------------------------------------------------------- forms


def test_a_form_with_a_file_is_scored_like_json(api: Api) -> None:
    fields = {"question": QUESTION, "response": ["It is 12.", "It is 7."], "strength": "0.2", "top_k": "3"}
    by_form = api.http.post("/v1/score", data=fields, files={"image": ("a.png", IMAGE.data, "image/png")})
    by_json = api.score(
        image=PNG,
        question=QUESTION,
        responses=["It is 12.", "It is 7."],
        degradation={"kind": "pixelate", "strength": 0.2},
        top_k=3,
    )
    assert by_form.json() == by_json.json()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        pytest.param({"question": QUESTION}, None, id="no response"),
        pytest.param({"question": QUESTION, "response": "a", "strength": "much"}, "degradation.strength", id="number"),
        pytest.param({"question": QUESTION, "response": "a", "seed": "1"}, "seed", id="unknown key"),
        pytest.param({"question": [QUESTION, "?"], "response": "a"}, "question", id="two questions"),
    ],
)
def test_a_form_that_can_t_be_scored(api: Api, fields: dict[str, Any], field: str | None) -> None:
    answer = api.http.post("/v1/score", data=fields, files={"image": ("a.png", IMAGE.data)})
    assert answer.status_code == 422
    assert error_of(answer)["field"] == field


def test_a_form_s_image_is_looked_at_like_any_other(api: Api) -> None:
    answer = api.http.post("/v1/score", data={"question": "?", "response": "a"}, files={"image": ("a.gif", b"GIF89a")})
    assert (answer.status_code, error_of(answer)["field"]) == (415, "image.0")


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        pytest.param(lambda form: form[:8], "", id="torn"),
        pytest.param(lambda form: form.removesuffix(b"--x--\r\n"), "", id="no end"),
        pytest.param(lambda form: form.replace(b"?", b"\xff"), "", id="no UTF-8"),
        pytest.param(lambda form: form.replace(b"?", b"\xff"), "; charset=latin-1", id="no UTF-8, and says so"),
        pytest.param(lambda form: form.replace(b"name", b"nome"), "", id="no names"),
    ],
)
def test_a_form_that_is_none(api: Api, change: Callable[[bytes], bytes], kind: str) -> None:
    parts = [b'Content-Disposition: form-data; name="%s"\r\n\r\n?' % name for name in (b"response", b"question")]
    form = b"".join(b"--x\r\n" + part + b"\r\n" for part in parts) + b"--x--\r\n"
    headers = {"Content-Type": f"multipart/form-data; boundary=x{kind}"}
    answer = api.http.post("/v1/score", content=change(form), headers=headers)
    assert answer.status_code == 400
    assert "not a valid multipart/form-data in UTF-8" in error_of(answer)["detail"]
    assert api.http.post("/v1/score", content=form, headers=headers).status_code == 200


# ------------------------------------------------------------------------------------------- batches


def test_in_a_batch_each_request_has_a_fate_of_its_own(api: Api) -> None:
    requests = [BODY, {**BODY, "image": "no image"}, {"question": "2+2?", "response": "4"}, {**BODY, "temperature": 1}]
    answer = api.http.post(BATCH, json={"requests": requests})
    assert answer.status_code == 200
    results = answer.json()["results"]
    assert [result["index"] for result in results] == [0, 1, 2, 3]
    assert results[0]["score"] == api.score(**BODY).json()
    assert results[2]["score"]["rollouts"]
    problems = [results[1]["problem"], results[3]["problem"]]
    assert [(problem["status"], problem["field"]) for problem in problems] == [(422, "image"), (422, "temperature")]
    assert answer.json()["failed"] == 2


def test_a_batch_as_server_sent_events(api: Api) -> None:
    requests = [BODY, {**BODY, "response": ""}, {**BODY, "response": "It is 7."}]
    with api.http.stream("POST", BATCH, json={"requests": requests}, headers={"Accept": "text/event-stream"}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [dict(line.split(": ", 1) for line in block.splitlines()) for block in _blocks(answer)]
    assert [event["event"] for event in events] == ["result"] * 3 + ["done"]
    results = {int(event["id"]): json.loads(event["data"]) for event in events[:3]}
    assert results[0]["score"] == api.score(**BODY).json()
    assert results[1]["problem"]["field"] == "response"
    assert json.loads(events[3]["data"]) == {"results": 3, "failed": 1}


def _blocks(answer: httpx.Response) -> list[str]:
    text = "".join(answer.iter_text())
    assert text.endswith("\n\n")
    return [block for block in text.split("\n\n") if block and not block.startswith(":")]


@pytest.mark.parametrize(
    ("body", "status"),
    [({"requests": []}, 422), ({"requests": BODY}, 422), ([BODY], 422), ({}, 422), ({"requests": [BODY] * 257}, 413)],
    ids=["empty", "no list", "a list", "nothing", "too many"],
)
def test_a_batch_that_is_none(api: Api, body: Any, status: int) -> None:
    answer = api.http.post(BATCH, json=body)
    assert answer.status_code == status
    assert error_of(answer)["field"] == "requests"


# ------------------------------------------------------------------------------------------- ids, headers, metrics


def test_every_answer_has_a_request_id_the_client_s_own_if_it_brought_one(api: Api) -> None:
    assert api.http.get("/healthz", headers={"X-Request-Id": "run-7/42"}).headers["x-request-id"] == "run-7/42"
    made = {api.http.get("/healthz").headers["x-request-id"] for _ in range(2)}
    assert all(re.fullmatch(r"[0-9a-f]{32}", name) for name in made)
    assert len(made) == 2
    for forged in ("two words", "a" * 129, "<script>"):
        assert api.http.get("/healthz", headers={"X-Request-Id": forged}).headers["x-request-id"] != forged


@pytest.mark.parametrize("path", ["/", "/docs", "/page/main.js", "/healthz", "/nothing", "/openapi.json"])
def test_every_answer_is_safe_to_show(api: Api, path: str) -> None:
    headers = api.http.get(path).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert "server" not in headers


def test_the_page_names_no_other_host(api: Api) -> None:
    """Not even as a link; namespaces of SVG are no addresses."""
    names = re.findall(r'(?:href|src)="(page/[^"]+)"', api.http.get("/").text)
    assert "page/main.js" in names
    scripts = [path.name for path in Path("services/vaopd_api/page").glob("*.js")]
    for path in ["/", "/docs", *names, *(f"/page/{name}" for name in scripts)]:
        assert not re.search(r"https?://(?!www\.w3\.org)", api.http.get(path).text), path


def test_static_files_are_asked_again_and_answered_shortly(api: Api) -> None:
    first = api.http.get("/page/style.css")
    again = api.http.get("/page/style.css", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    for outside in ("/page/../app.py", "/page/%2e%2e/app.py", "/page/nothing.js"):
        assert api.http.get(outside).status_code == 404


def test_metrics_count_what_was_asked(api: Api) -> None:
    tokens = len(api.score(**BODY).json()["rollouts"][0]["tokens"])
    before = _metrics(api)
    api.score(**BODY)
    api.score(question="?")
    after = _metrics(api)
    route = 'method="POST",route="/v1/score"'
    for name, added in (
        (f'vaopd_api_requests_total{{{route},status="200"}}', 1),
        ("vaopd_api_scored_tokens_total", tokens),
        (f"vaopd_api_request_duration_seconds_count{{{route}}}", 2),
    ):
        assert after[name] - before[name] == added, name
    assert after["vaopd_api_requests_in_flight"] == 1  # the very one that asks


def _metrics(api: Api) -> dict[str, float]:
    lines = api.http.get("/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_work_for_a_client_that_went_away_is_dropped(api: Api) -> None:
    body = json.dumps({**BODY, "responses": ["The sides are 3, 4 and 5. " * 20] * 8, "response": None}).encode()
    head = "POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    gone = 'vaopd_api_requests_total{method="POST",route="/v1/score",status="499"}'
    before = _metrics(api).get(gone, 0)
    with socket.create_connection((api.http.base_url.host, api.http.base_url.port or 80)) as connection:
        connection.sendall(head.encode() + body)
    wait_until("the request is given up", lambda: _metrics(api).get(gone, 0) == before + 1)


def test_the_schema_is_whole_and_its_examples_work(api: Api) -> None:
    schema = api.http.get("/openapi.json").json()
    names = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(schema)))
    assert names <= set(schema["components"]["schemas"])
    assert {"Problem", "ScoreBody", "BatchResult"} <= names | set(schema["components"]["schemas"])
    batch = schema["paths"][BATCH]["post"]["requestBody"]["content"]["application/json"]["example"]
    assert api.http.post(BATCH, json=batch).json()["failed"] == 0
    (degrade,) = schema["components"]["schemas"]["DegradeBody"]["examples"]
    assert api.http.post("/v1/degrade", json=degrade).status_code == 200
    assert schema["components"]["securitySchemes"]["key"]["scheme"] == "bearer"


# ------------------------------------------------------------------------------------------- keys and quotas


def test_with_keys_only_health_and_the_page_are_open(teacher: TeacherInProcess, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    key = add_key(keys, "geometry")
    for api in start_api(tmp_path, teacher.target, *with_keys(tmp_path)):
        for path in ("/", "/docs", "/page/main.js", "/healthz", "/readyz"):
            assert api.http.get(path).status_code == 200, path
        for path in ("/v1/teachers", "/v1/students", "/v1/runs", "/metrics", "/openapi.json", "/v1/nothing"):
            refused = api.http.get(path)
            assert (refused.status_code, error_of(refused)["code"]) == (401, "unauthenticated"), path
            assert refused.headers["www-authenticate"].startswith("Bearer")
        for wrong in ("Bearer", "Bearer nonsense", f"Basic {key}", f"Bearer {key[:-1]}_"):
            assert api.http.post("/v1/score", json=BODY, headers={"Authorization": wrong}).status_code == 401
        right = {"Authorization": f"Bearer {key}"}
        assert api.http.post("/v1/score", json=BODY, headers=right).status_code == 200
        revoke_key(keys, key.split("_")[1])
        assert api.http.post("/v1/score", json=BODY, headers=right).status_code == 401
        assert key not in (tmp_path / "api.log").read_text()


def test_https_with_a_certificate_of_one_s_own(teacher: TeacherInProcess, tmp_path: Path) -> None:
    certificates = tmp_path / "certificates"
    make_certificates(certificates)
    tls = '[api.tls]\ncert = "certificates/server.pem"\nkey = "certificates/server.key"\n'
    for api in start_api(tmp_path, teacher.target, *service_file(tmp_path, tls)):
        port = api.http.base_url.port
        trusting = ssl.create_default_context(cafile=certificates / "ca.pem")
        assert httpx.get(f"https://localhost:{port}/readyz", verify=trusting).json() == {"status": "ready"}
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"https://localhost:{port}/readyz")


def test_a_quota_is_told_in_headers_and_then_enforced(teacher: TeacherInProcess, tmp_path: Path) -> None:
    quota = "[api.quotas]\nrequests_per_minute = 3\n"
    for api in start_api(tmp_path, teacher.target, *service_file(tmp_path, quota)):
        assert "ratelimit-limit" not in api.http.get("/v1/teachers").headers  # costs nothing
        first = api.score(**BODY)
        assert [first.headers[f"ratelimit-{name}"] for name in ("limit", "remaining")] == ["3", "2"]
        both = api.http.post(BATCH, json={"requests": [BODY, BODY]})  # one each
        assert both.headers["ratelimit-remaining"] == "0"
        refused = api.score(**BODY)
        assert (refused.status_code, error_of(refused)["code"]) == (429, "busy")
        assert 1 <= int(refused.headers["retry-after"]) <= 20
        assert refused.headers["ratelimit-remaining"] == "0"


def test_a_quota_refills_evenly() -> None:
    now = 0.0
    quota = Quota(6, clock=lambda: now)
    for left in ("5", "4", "3", "2", "1", "0"):
        assert quota.take("a")["RateLimit-Remaining"] == left
    with pytest.raises(ApiError) as refused:
        quota.take("a")
    assert refused.value.headers
    assert refused.value.headers["Retry-After"] == "10"  # six a minute: one every ten seconds
    assert quota.take("b")["RateLimit-Remaining"] == "5"
    now = 10.0
    assert quota.take("a")["RateLimit-Remaining"] == "0"
    now = 1000.0
    assert quota.take("a")["RateLimit-Remaining"] == "5"  # never more than a minute's worth
    with pytest.raises(ApiError) as never:
        quota.take("a", 7)
    assert never.value.status_code == 413
