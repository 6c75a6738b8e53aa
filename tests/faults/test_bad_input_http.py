"""The bad inputs through HTTP that tests/services/test_api_bad_inputs.py leaves, and a walk over every route.

Malformed images, values, JSON and content types are there. Here: what only a decoder or the model's limits tell, and
what depends on who asks and when. HTTP has no row "another job's data": a request names no job, its key does.
"""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.routing import APIRoute
from starlette.routing import Route

from tests.support import pictures
from tests.support.api import BODY, PNG, QUESTION, Api, error_of, start_api
from tests.support.models import tiny_vlm
from tests.support.teacher import TeacherInProcess, drawing, encoded, teacher_in_process, token_request
from tests.support.waiting import wait_until
from vaopd import errors
from vaopd.access.keys import KeyStore, add_key
from vaopd.client import SyncTeacherClient
from vaopd.config import SharingConfig, TeacherServiceConfig
from vaopd.errors import NumericalError, VaopdError
from vaopd.types import TeacherLimits
from vaopd.wire.errors import choose_status
from vaopd_api.access import OPEN, Access
from vaopd_api.app import create_app
from vaopd_api.problems import describe
from vaopd_api.teachers import Teachers
from vaopd_teacher.engines.engine import EngineResult, PreparedGroup
from vaopd_teacher.engines.transformers_engine import GroupEngine

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    limits = TeacherLimits(max_image_bytes=200_000)
    with teacher_in_process(tiny_vlm(), limits=limits) as teacher:
        yield from start_api(tmp_path_factory.mktemp("api"), teacher.target)


@pytest.fixture
def same_afterwards(api: Api) -> Iterator[None]:
    before = api.known_answer()
    yield
    assert api.process.poll() is None
    assert api.known_answer() == before


IMAGES = {
    "a cut WEBP": (encoded(drawing(1), "WEBP").data[:900], 422, "re-encode it"),
    "random bytes": (np.random.default_rng(0).bytes(500), 422, "re-encode it"),
    "an animated GIF": (pictures.saved("GIF", frames=3), 415, "another format than PNG, JPEG and WEBP; re-encode"),
    "an animated PNG": (pictures.saved("PNG", frames=3), 422, "animation of 3 frames, the limit is 1; send one"),
    "an animated WEBP": (pictures.saved("WEBP", frames=3), 422, "animation of 3 frames, the limit is 1; send one"),
    "a JPEG of too many scans": (pictures.jpeg_of_many_scans(), 422, "more than 32 scans, the limit; re-encode it"),
    "a header over the cap": (pictures.png_that_claims(6_400, 5_001), 422, "6400×5001 pixels, the limit is 32000000"),
    "an extreme aspect ratio": (pictures.saved("PNG", size=(2010, 10)), 422, "2010×10, .* ratio of 200; crop it"),
    "above the byte limit": (
        encoded(drawing(1, (600, 600))).data,
        413,
        r"\d+ bytes, the limit is 200000; send a smaller",
    ),
}


@pytest.mark.parametrize(("data", "status", "words"), IMAGES.values(), ids=IMAGES.keys())
@pytest.mark.usefixtures("same_afterwards")
def test_an_image_that_isn_t_decoded(api: Api, data: bytes, status: int, words: str) -> None:
    answer = api.score(**{**BODY, "image": base64.b64encode(data).decode()})
    assert answer.status_code == status
    with pytest.raises(ValueError, match=words):
        raise ValueError(error_of(answer)["detail"])


@pytest.mark.parametrize(
    "name", ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"]
)
@pytest.mark.usefixtures("same_afterwards")
def test_a_vision_token_inside_a_response(api: Api, name: str) -> None:
    token = tiny_vlm().tokenizer.convert_tokens_to_ids(name)
    answer = api.score(image=PNG, question=QUESTION, response_token_ids=[5, token])
    assert (answer.status_code, error_of(answer)["field"]) == (422, "response_token_ids")
    assert f"token id {token} is a vision placeholder" in error_of(answer)["detail"]


@pytest.mark.parametrize("name", ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|image_pad|>", "<|video_pad|>"])
@pytest.mark.usefixtures("same_afterwards")
def test_a_control_token_inside_a_question(api: Api, name: str) -> None:
    answer = api.score(**{**BODY, "question": f"What does {name} mean?"})
    assert answer.status_code == 422
    assert f"a text holds '{name}'" in error_of(answer)["detail"]


@pytest.mark.usefixtures("same_afterwards")
def test_more_tokens_than_the_model_takes(api: Api) -> None:
    answer = api.score(image=PNG, question=QUESTION, response_token_ids=[5] * 1024)
    assert answer.status_code == 422
    assert "the limit is 1024; shorten" in error_of(answer)["detail"]


@pytest.mark.usefixtures("same_afterwards")
def test_a_teacher_that_isn_t_here(api: Api) -> None:
    answer = api.score(**BODY, teacher="another")
    assert (answer.status_code, error_of(answer)["code"]) == (404, "not_found")


@pytest.mark.parametrize(
    ("kind", "grpc_status", "http_status"),
    [
        (errors.ImageRefused, "INVALID_ARGUMENT", 422),
        (errors.InvalidInput, "INVALID_ARGUMENT", 422),
        (errors.LimitExceeded, "RESOURCE_EXHAUSTED", 413),
        (errors.Mismatch, "FAILED_PRECONDITION", 409),
        (errors.NotFound, "NOT_FOUND", 404),
        (errors.Unauthenticated, "UNAUTHENTICATED", 401),
        (errors.PermissionDenied, "PERMISSION_DENIED", 403),
        (errors.Unavailable, "UNAVAILABLE", 503),
        (errors.NumericalError, "INTERNAL", 500),
    ],
)
def test_one_error_tree_has_one_status_in_each_protocol(
    kind: type[VaopdError], grpc_status: str, http_status: int
) -> None:
    assert choose_status(kind("x")).name == grpc_status
    assert describe(kind("x"))[0].status == http_status


def test_what_has_to_wait_is_told_how_long_in_each_protocol() -> None:
    full = errors.Busy("full", 2.5)
    assert choose_status(full).name == "RESOURCE_EXHAUSTED"
    problem, headers = describe(full)
    assert (problem.status, headers["Retry-After"]) == (429, "3")


# ------------------------------------------------------------------------------------------------- every route


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    add_key(tmp_path / "keys.json", "geometry")
    return tmp_path / "keys.json"


async def test_every_route_but_health_and_the_page_refuses_without_a_key(key_file: Path) -> None:
    """Also routes that are added some day: whoever opens one has to say so in `OPEN`, and here."""
    app = create_app(
        teachers=Teachers(["127.0.0.1:1"], options={}), access=Access(job_of_key=KeyStore(key_file).find_job)
    )
    routes = {
        (method, route.path)
        for route in app.routes
        if isinstance(route, APIRoute | Route)
        for method in route.methods or ()
    }
    assert ("POST", "/v1/score") in routes
    assert set(OPEN) == {"/", "/docs", "/runs", "/healthz", "/readyz"}  # the pages bring no data of their own
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        for method, path in sorted(routes | {("GET", "/v1/nothing"), ("PUT", "/v1/score"), ("GET", "//v1/score")}):
            for headers in ({}, {"Authorization": "Bearer vaopd_nonsense"}):
                answer = await client.request(method, path, headers=headers)
                assert (answer.status_code == 401) is (path not in OPEN), (method, path, answer.status_code)


# ------------------------------------------------------------------------------------------------- when it is asked


class HeldEngine:
    """The real engine, held before each forward until it is let go; `broken` groups have no finite number."""

    def __init__(self, *, broken: bool = False) -> None:
        self._engine = GroupEngine(tiny_vlm(), batch_tokens=4096)
        self._broken = broken
        self.reached: list[str] = []
        self.go = threading.Event()

    def score(self, groups: Sequence[PreparedGroup]) -> Iterator[EngineResult | VaopdError]:
        self.reached += [group.group_id for group in groups]
        assert self.go.wait(60)
        if self._broken:
            yield from (NumericalError(f"group {group.group_id!r}: 3 log-probs are not finite") for group in groups)
        else:
            yield from self._engine.score(groups)


def test_a_full_teacher_is_429_with_retry_after(tmp_path: Path) -> None:
    engine = HeldEngine()
    service = TeacherServiceConfig(sharing=SharingConfig(max_waiting_groups=1))
    with teacher_in_process(tiny_vlm(), engine=engine, service=service) as teacher:
        try:
            waiting = threading.Thread(target=_score_one, args=(teacher,))
            waiting.start()
            wait_until("it is on the device", lambda: len(engine.reached) == 1)
            for api in start_api(tmp_path, teacher.target):
                answer = api.score(**BODY)
                assert (answer.status_code, error_of(answer)["code"]) == (429, "busy")
                assert int(answer.headers["retry-after"]) >= 1
                engine.go.set()
                assert api.score(**BODY).status_code == 200
        finally:
            engine.go.set()
        waiting.join()


def _score_one(teacher: TeacherInProcess) -> None:
    with SyncTeacherClient(teacher.target) as client:
        list(client.score([token_request(tiny_vlm(), "g")]))


def test_a_client_that_goes_away_takes_its_work_along(tmp_path: Path) -> None:
    engine = HeldEngine()
    with teacher_in_process(tiny_vlm(), batch_tokens=30, engine=engine) as teacher:
        waiting = lambda: teacher.server.admission.waiting  # noqa: E731
        arrived = {"first": lambda: engine.reached == ["first"], "second": lambda: waiting() == 1}
        try:
            for api in start_api(tmp_path, teacher.target):
                for name, condition in arrived.items():
                    headers = {"X-Request-Id": name, "Content-Type": "application/json"}
                    url = api.http.base_url
                    with closing(HTTPConnection(url.host, url.port)) as connection:
                        connection.request("POST", "/v1/score", json.dumps(BODY), headers)
                        wait_until(f"the teacher has the {name}", condition)
                    wait_until("the teacher has no work left", lambda: waiting() == 0)
                engine.go.set()
                assert api.http.post("/v1/score", json=BODY, headers={"X-Request-Id": "third"}).status_code == 200
                wait_until("it is logged", lambda: "499" in (tmp_path / "api.log").read_text())
        finally:
            engine.go.set()
    assert engine.reached == ["first", "third"]


def test_numbers_that_are_not_finite_are_500_and_no_numbers(tmp_path: Path) -> None:
    engine = HeldEngine(broken=True)
    engine.go.set()
    with teacher_in_process(tiny_vlm(), engine=engine) as teacher:
        for api in start_api(tmp_path, teacher.target):
            answer = api.score(**BODY)
            assert (answer.status_code, error_of(answer)["code"]) == (500, "numerical_error")
            assert "nan" not in answer.text.lower()


def test_a_teacher_that_is_loading_or_draining_is_503_and_not_told_where(tmp_path: Path) -> None:
    with socket.socket() as nobody:  # bound, and not listening yet
        nobody.bind(("127.0.0.1", 0))
        for api in start_api(tmp_path, f"127.0.0.1:{nobody.getsockname()[1]}"):
            assert api.http.get("/healthz").status_code == 200
            for answer in (api.http.get("/readyz"), api.score(**BODY)):
                assert (answer.status_code, error_of(answer)["code"]) == (503, "unavailable")
                assert int(answer.headers["retry-after"]) >= 1
                assert "127.0.0.1" not in answer.text


def test_nothing_of_the_inside_is_told(api: Api) -> None:
    """No path, address, module or library's text in any answer to what is wrong."""
    bodies: list[dict[str, Any]] = [
        {**BODY, "image": base64.b64encode(b"\x89PNG" + bytes(40)).decode()},
        {**BODY, "response_token_ids": [2**31 - 1], "response": None},
        {**BODY, "teacher": "../../etc/passwd"},
    ]
    for body in bodies:
        told = api.score(**body).text
        assert not [
            word for word in ("Traceback", "0x", "site-packages", str(ROOT), "PIL", "grpc", "127.0.0.1") if word in told
        ]
