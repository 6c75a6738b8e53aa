"""What the API refuses: a status, one error shape, the field's name; and afterwards it answers as before."""

from __future__ import annotations

import base64
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import PIL.Image
import pytest

from tests.support.api import BODY, PNG, QUESTION, Api, error_of
from tests.support.models import tiny_vlm
from tests.support.teacher import drawing, encoded


@pytest.fixture(scope="module")
def known(api: Api) -> bytes:
    return api.known_answer()


@pytest.fixture(autouse=True)
def _as_healthy_as_before(api: Api, known: bytes) -> Iterator[None]:
    """Rule 4 of the faults: the same process, and the known request answered bit for bit."""
    yield
    assert api.process.poll() is None
    assert api.known_answer() == known


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def header_only_png(width: int, height: int) -> bytes:
    """A PNG whose header claims a size and whose pixels are missing."""
    header = b"IHDR" + width.to_bytes(4) + height.to_bytes(4) + bytes([8, 2, 0, 0, 0])
    chunk = (13).to_bytes(4) + header + zlib.crc32(header).to_bytes(4)
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IEND\xaeB`\x82"


def saved(image: PIL.Image.Image, format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


GOOD_PNG = encoded(drawing(1)).data
GOOD_JPEG = saved(drawing(1), "JPEG")
SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'


@pytest.mark.parametrize(
    ("image", "status"),
    [
        pytest.param("", 422, id="empty"),
        pytest.param(base64_of(b"x"), 422, id="one byte"),
        pytest.param(base64_of(b"This is a text."), 422, id="text"),
        pytest.param(base64_of(bytes(range(256))), 422, id="arbitrary bytes"),
        pytest.param("not base64!", 422, id="not base64"),
        pytest.param(base64_of(GOOD_PNG[:-200]), 422, id="cut PNG"),
        pytest.param(base64_of(GOOD_JPEG[: len(GOOD_JPEG) // 4]), 422, id="cut JPEG"),
        pytest.param(base64_of(flipped(GOOD_PNG, 60)), 422, id="PNG with a bad CRC"),
        pytest.param(base64_of(header_only_png(0, 0)), 422, id="0×0"),
        pytest.param(base64_of(header_only_png(60000, 60000)), 422, id="60000²"),
        pytest.param(base64_of(header_only_png(2**31 - 1, 1)), 422, id="2³¹×1"),
        pytest.param(base64_of(saved(PIL.Image.new("RGB", (1500, 2)), "PNG")), 422, id="extreme aspect ratio"),
        pytest.param(base64_of(saved(drawing(1), "GIF")), 415, id="GIF"),
        pytest.param(base64_of(saved(drawing(1), "BMP")), 415, id="BMP"),
        pytest.param(base64_of(saved(drawing(1), "TIFF")), 415, id="TIFF"),
        pytest.param(base64_of(saved(drawing(1), "EPS")), 415, id="EPS"),
        pytest.param(base64_of(SVG), 415, id="SVG"),
        pytest.param("https://example.com/cat.png", 422, id="https URL"),
        pytest.param("file:///etc/passwd", 422, id="file URL"),
        pytest.param("/etc/passwd", 422, id="path"),
        pytest.param("/etc/ssl", 422, id="path that happens to be base64"),
        pytest.param("data:image/png,%89PNG", 422, id="data URL without base64"),
        pytest.param("data:image/png;base64", 422, id="data URL without data"),
    ],
)
def test_an_image_that_can_t_be_used(api: Api, image: str, status: int) -> None:
    answer = api.score(image=image, question=QUESTION, response="It is 12.")
    error = error_of(answer)
    assert answer.status_code == status, error
    assert "0x" not in error["detail"]  # a library's text with an address of its heap


def test_the_image_at_fault_is_named(api: Api) -> None:
    answer = api.score(images=[PNG, "https://example.com/cat.png"], question=QUESTION, response="It is 12.")
    assert error_of(answer)["field"] == "images.1"
    assert "nothing is fetched" in error_of(answer)["detail"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        pytest.param({"response": None, "response_token_ids": [-1]}, "response_token_ids.0", id="token −1"),
        pytest.param({"response": None, "response_token_ids": [5, 2**63 - 1]}, "response_token_ids.1", id="2⁶³−1"),
        pytest.param({"response": None, "response_token_ids": [1.5]}, "response_token_ids.0", id="1.5"),
        pytest.param({"response": None, "response_token_ids": [True]}, "response_token_ids.0", id="a boolean"),
        pytest.param({"response": None, "response_token_ids": []}, "response_token_ids", id="no token"),
        pytest.param({"response": ""}, "response", id="empty response"),
        pytest.param({"response": "lone surrogate \ud800"}, "response", id="no valid Unicode"),
        pytest.param({"question": ""}, "question", id="empty question"),
        pytest.param({"question": 5}, "question", id="a number for a text"),
        pytest.param({"response": None, "responses": []}, "responses", id="no responses"),
        pytest.param({"response": None, "responses": ["a", ""]}, "responses.1", id="one empty among responses"),
        pytest.param({"responses": ["a"]}, None, id="two kinds of responses"),
        pytest.param({"response": None}, None, id="no response at all"),
        pytest.param({"images": [PNG]}, None, id="image and images"),
        pytest.param({"temperature": 1.0}, "temperature", id="an unknown key"),
        pytest.param({"degradation": {"kind": "melt"}}, "degradation.kind", id="unknown degradation"),
        pytest.param({"degradation": {"strength": 2}}, "degradation.strength", id="strength above 1"),
        pytest.param({"degradation": {"ratio": 0.1}}, "degradation.ratio", id="unknown key within"),
    ],
)
def test_a_value_that_can_t_be_scored_is_named(api: Api, change: dict[str, Any], field: str | None) -> None:
    answer = api.http.post("/v1/score", content=json.dumps({**BODY, **change}), headers=JSON)
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (422, "invalid_input")
    assert error["field"] == field


JSON = {"Content-Type": "application/json"}


def test_what_only_the_teacher_knows_is_refused_too(api: Api) -> None:
    """Ids beyond the vocabulary, and vision tokens, which would be taken for images."""
    vocab_size = api.http.get("/v1/teachers").json()["teachers"][0]["vocab_size"]
    placeholder = tiny_vlm().tokenizer.convert_tokens_to_ids("<|image_pad|>")
    for token in (vocab_size, 2**31 - 1, placeholder):
        answer = api.score(image=PNG, question=QUESTION, response_token_ids=[token])
        assert (answer.status_code, error_of(answer)["code"]) == (422, "invalid_input")


def test_more_responses_than_the_teacher_takes(api: Api) -> None:
    limit = api.http.get("/v1/teachers").json()["teachers"][0]["limits"]["max_rollouts_per_group"]
    answer = api.score(image=PNG, question=QUESTION, responses=["a"] * (limit + 1))
    assert (answer.status_code, error_of(answer)["code"]) == (413, "too_large")
    assert str(limit) in error_of(answer)["detail"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"{'question': 1}", b"\xff\xfe", b'{"question": "\xff"}', b"[" * 100_000],
    ids=["empty", "cut", "single quotes", "no UTF-8", "no UTF-8 within", "nested too deep"],
)
def test_a_body_that_is_no_json(api: Api, content: bytes) -> None:
    for route in ("/v1/score", "/v1/degrade") if content else ("/v1/score",):
        answer = api.http.post(route, content=content, headers=JSON)
        assert answer.status_code == (422 if content == b"" else 400)
        assert "the body is" in error_of(answer)["detail"]


@pytest.mark.parametrize("route", ["/v1/score", "/v1/score/batch", "/v1/degrade", "/v1/regions"])
def test_a_key_that_occurs_twice(api: Api, route: str) -> None:
    answer = api.http.post(route, content=b'{"image": {"a": 1, "a": 2}}', headers=JSON)
    assert answer.status_code == 422
    assert error_of(answer)["detail"] == "'a' occurs twice in one object; send it once"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite(api: Api, number: str) -> None:
    body = json.dumps({**BODY, "degradation": {"strength": 0.5}}).replace("0.5", number)
    answer = api.http.post("/v1/score", content=body, headers=JSON)
    assert answer.status_code == 422
    assert error_of(answer)["field"] == "degradation.strength"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/mixed; boundary=x", ""])
def test_another_content_type(api: Api, kind: str) -> None:
    answer = api.http.post("/v1/score", content=json.dumps(BODY), headers={"Content-Type": kind})
    assert (answer.status_code, error_of(answer)["code"]) == (415, "unsupported_media_type")


def test_a_compressed_body_is_named_as_such(api: Api) -> None:
    answer = api.http.post(
        "/v1/score",
        content=gzip.compress(json.dumps(BODY).encode()),
        headers={"Content-Type": "application/json", "Content-Encoding": "gzip"},
    )
    assert (answer.status_code, error_of(answer)["code"]) == (415, "unsupported_media_type")
    assert error_of(answer)["detail"] == "the body's content encoding 'gzip' isn't read; send it uncompressed"


def test_a_body_above_the_limit_is_refused_by_its_declared_length(api: Api) -> None:
    """Before a byte of it is read: the answer comes though nothing but the headers was sent."""
    import socket

    host, port = api.http.base_url.host, api.http.base_url.port
    with socket.create_connection((host, port or 80), timeout=30) as connection:
        connection.sendall(b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        connection.sendall(b"Content-Length: 99999999999\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(65536), b"")).decode()  # until the API closes
    assert answer.startswith("HTTP/1.1 413 ")
    assert '"code":"too_large"' in answer


def test_a_body_above_the_limit_is_refused_while_it_arrives(api: Api) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(60):
            yield b" " * 2**20

    try:
        answer = api.http.post("/v1/score", content=endless(), headers=JSON)
    except httpx.WriteError:  # the server may close before all is sent
        return
    assert (answer.status_code, error_of(answer)["code"]) == (413, "too_large")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("GET", "/v1/score", 405), ("DELETE", "/v1/teachers", 405)],
)
def test_unknown_paths_and_methods_have_the_same_error_shape(api: Api, method: str, path: str, status: int) -> None:
    answer = api.http.request(method, path)
    assert answer.status_code == status
    error_of(answer)
