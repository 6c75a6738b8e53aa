"""Small requests that would cost much: endless headers, slow senders, many connections, foreign pages, huge replies."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from fastapi.exceptions import RequestValidationError

from tests.support.api import BODY, Api, error_of, service_file, start_api
from tests.support.teacher import TeacherInProcess
from tests.support.waiting import wait_until
from vaopd.access.certificates import make_certificates
from vaopd.config import ConnectionsConfig
from vaopd.errors import ConfigError, LimitExceeded
from vaopd.http_types import MAX_BATCH_ITEMS, RegionsBody, ScoreBody
from vaopd_api import connections, middleware
from vaopd_api.access import HostNames
from vaopd_api.app import MAX_BODY_BYTES
from vaopd_api.connections import CHUNK_BYTES, FREE_CHUNKS, HEADER_BYTES, MAX_HEADERS
from vaopd_api.middleware import MAX_JSON_KEYS, MAX_JSON_VALUES
from vaopd_api.problems import ApiError, parse
from vaopd_api.reply_cost import MAX_VALUES, ReplyBudget, count_values


def connect(api: Api) -> socket.socket:
    url = api.http.base_url
    return socket.create_connection((url.host, url.port or 80), timeout=60)


def read_to_end(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


def problem_in(answer: bytes) -> dict[str, object]:
    problem: dict[str, object] = json.loads(answer.partition(b"\r\n\r\n")[2])
    return problem


def test_an_endless_header_ends_at_the_limit_and_stops_nobody(api: Api) -> None:
    """It took 350 MB and everybody's health check with a parser that reads to the header's end."""
    process = psutil.Process(api.process.pid)
    before = process.memory_info().rss
    with connect(api) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Long: ")
        sent = 0
        with suppress(ConnectionError):  # closed by the server while we send
            while sent < 64 * 2**20:
                sent += connection.send(b"a" * 65536)
        assert sent < 64 * 2**20
    assert process.memory_info().rss - before < 32 * 2**20
    assert api.http.get("/healthz").status_code == 200


def test_headers_that_are_too_long_or_too_many_are_refused_by_name(api: Api) -> None:
    for lines in (b"X: " + b"a" * HEADER_BYTES + b"\r\n", b"".join(b"X%d: a\r\n" % n for n in range(MAX_HEADERS))):
        with connect(api) as connection:
            connection.sendall(
                b"GET /v1/teachers HTTP/1.1\r\nHost: localhost\r\n" + lines + b"Connection: close\r\n\r\n"
            )
            answer = read_to_end(connection)
        assert answer.startswith(b"HTTP/1.1 431 ")
        assert problem_in(answer)["code"] == "too_large"
        assert str(MAX_HEADERS) in str(problem_in(answer)["detail"])


@pytest.mark.parametrize("start", [b"GET /healthz HTTP/1.1\r\nX: ", b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\n"
                                   b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"])  # fmt: skip
def test_a_slow_sender_is_refused_before_its_request_is_complete(
    start: bytes, monkeypatch: pytest.MonkeyPatch, orphan_server: tuple[str, int]
) -> None:
    monkeypatch.setattr(connections, "WINDOW_S", 0.5)
    with socket.create_connection(orphan_server, timeout=60) as connection:
        connection.sendall(start)
        answer = read_to_end(connection)  # nothing more is sent, and the server ends it
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert "16384 bytes/s" in str(problem_in(answer)["detail"])


def test_a_silent_connection_is_closed(monkeypatch: pytest.MonkeyPatch, orphan_server: tuple[str, int]) -> None:
    monkeypatch.setattr(connections, "WINDOW_S", 0.5)
    with socket.create_connection(orphan_server, timeout=60) as connection:
        assert read_to_end(connection).startswith(b"HTTP/1.1 408 ")


@pytest.fixture
def orphan_server() -> Iterator[tuple[str, int]]:
    """An application without a teacher, served in this process with the product's protocol."""
    with serve_orphan(http=connections.BoundedProtocol) as address:
        yield address


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    make_certificates(folder)
    return folder


@contextmanager
def serve_orphan(**settings: Any) -> Iterator[tuple[str, int]]:
    import threading

    import uvicorn

    from vaopd_api.app import create_app
    from vaopd_api.teachers import Teachers

    app = create_app(teachers=Teachers(["127.0.0.1:1"], options={"job": "api"}))
    server = uvicorn.Server(uvicorn.Config(app, port=0, ws="none", log_config=None, loop="asyncio", **settings))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until("the server listens", lambda: server.started)
        yield server.servers[0].sockets[0].getsockname()
    finally:
        server.should_exit = True
        thread.join()


CHUNKED = (
    b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Connection: close\r\nTransfer-Encoding: chunked\r\n"
)


def test_a_body_of_very_many_small_chunks_is_refused(orphan_server: tuple[str, int]) -> None:
    """A million of one byte each, six megabytes, held up the event loop for nine seconds."""
    for size in (1, CHUNK_BYTES):
        chunk = b"%x\r\n" % size + b" " * size + b"\r\n"
        with socket.create_connection(orphan_server, timeout=60) as connection:
            connection.sendall(CHUNKED + b"\r\n" + chunk * (FREE_CHUNKS + 200) + b"0\r\n\r\n")
            answer = read_to_end(connection)
        assert answer.startswith(b"HTTP/1.1 400 ")  # the larger ones are read, and are no JSON
        assert (b"chunks" in answer) == (size == 1)


def test_a_body_that_breaks_off_or_off_the_rules_is_no_error_of_the_server(
    orphan_server: tuple[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for rest in (b"ZZ\r\n", b""):
        with socket.create_connection(orphan_server, timeout=60) as connection:
            connection.sendall(CHUNKED + b"\r\n2\r\n{}\r\n" + rest)
            connection.shutdown(socket.SHUT_WR)
            read_to_end(connection)
    wait_until("both are in the log", lambda: sum("/v1/score 499" in line for line in caplog.messages) == 2)
    assert "unexpected error" not in caplog.messages


def test_a_request_with_two_lengths_is_refused_and_its_connection_closed(orphan_server: tuple[str, int]) -> None:
    with socket.create_connection(orphan_server, timeout=60) as connection:
        connection.sendall(CHUNKED + b"Content-Length: 4\r\n\r\n2\r\n{}\r\n0\r\n\r\nGET /healthz HTTP/1.1\r\n\r\n")
        answer = read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1") == 1


def test_bodies_share_a_room_and_one_that_ends_makes_some(
    orphan_server: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 bodies of 47 MiB each, all but their last byte, would stay for minutes."""
    monkeypatch.setattr(middleware, "SMALL_BYTES", 10)
    monkeypatch.setattr(middleware, "LARGE_BODIES", 100 / MAX_BODY_BYTES)
    head = CHUNKED.replace(b"Transfer-Encoding: chunked", b"Content-Length: 100") + b"\r\n"

    def answer_to(body: bytes) -> bytes:
        with socket.create_connection(orphan_server, timeout=60) as connection:
            connection.sendall(head.replace(b": 100", b": %d" % len(body)) + body)
            return read_to_end(connection)

    with socket.create_connection(orphan_server, timeout=60) as held:
        held.sendall(head + b" " * 99)  # 89 of the 100 bytes
        wait_until("it is held", lambda: answer_to(b" " * 30).startswith(b"HTTP/1.1 503 "))
        assert b"the bodies of other requests take 89 bytes" in answer_to(b" " * 30)
        assert answer_to(b" " * 20).startswith(b"HTTP/1.1 400 ")  # no JSON, but there is room
    wait_until("there is room", lambda: answer_to(b" " * 30).startswith(b"HTTP/1.1 400 "))


def test_a_request_has_to_keep_its_rate(monkeypatch: pytest.MonkeyPatch, orphan_server: tuple[str, int]) -> None:
    """What came fast at first buys no time for later."""
    monkeypatch.setattr(connections, "WINDOW_S", 0.3)
    with socket.create_connection(orphan_server, timeout=60) as connection:
        connection.sendall(CHUNKED.replace(b"Transfer-Encoding: chunked", b"Content-Length: 40000000") + b"\r\n")
        connection.sendall(b" " * 30_000_000)  # half an hour's worth
        assert read_to_end(connection).startswith(b"HTTP/1.1 408 ")


def test_tls_handshakes_that_do_not_end_are_limited(certificates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Client and server are one process here, so each connection takes two descriptors, beside the one that listens.

    The process's other descriptors come and go, and aren't counted here.
    """
    protocol = connections.BoundedProtocol.bind(ConnectionsConfig(total=2))
    files = {"ssl_certfile": certificates / "server.pem", "ssl_keyfile": certificates / "server.key"}
    with serve_orphan(http=protocol, **files) as (host, port):
        context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))

        def count() -> int:
            found = psutil.Process().net_connections()
            return sum(port in [end.port for end in (each.laddr, each.raddr) if end] for each in found)

        monkeypatch.setattr(connections, "count_open_files", count)
        monkeypatch.setattr(connections, "OWN_FILES", 1)
        with ExitStack() as stack:
            for _ in range(2):
                stack.enter_context(socket.create_connection((host, port), timeout=60))
            wait_until("both are accepted", lambda: count() == 5)
            with socket.create_connection((host, port), timeout=60) as third:
                assert third.recv(1) == b""
        wait_until("their places are free", lambda: count() == 1)
        with (
            socket.create_connection((host, port), timeout=60) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as secure,
        ):
            secure.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert secure.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_connections_of_one_address_are_limited_and_a_closed_one_makes_room(
    tmp_path: Path, teacher: TeacherInProcess
) -> None:
    limits = service_file(tmp_path, "[api.connections]\nper_address = 3\n")
    with contextmanager(start_api)(tmp_path, teacher.target, *limits) as api:
        with ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(connect(api))
            wait_until("all are accepted", lambda: len(psutil.Process(api.process.pid).net_connections()) >= 4)
            with connect(api) as fourth:
                answer = read_to_end(fourth)
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert "3 connections are open from this address" in str(problem_in(answer)["detail"])
        wait_until("there is room", lambda: is_healthy(api))


def is_healthy(api: Api) -> bool:
    try:
        return api.http.get("/healthz").status_code == 200
    except httpx.HTTPError:
        return False


def test_other_hosts_and_pages_of_other_sites_are_refused(api: Api) -> None:
    """DNS rebinding sends another Host; a form on another page sends another Origin, and may be multipart."""
    host = f"127.0.0.1:{api.http.base_url.port}"
    rebound = api.http.get("/v1/teachers", headers={"Host": "evil.example"})
    assert error_of(rebound)["status"] == 421
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
        foreign = api.http.post("/v1/score", json=BODY, headers={"Origin": origin})
        assert error_of(foreign)["status"] == 403
    form = api.http.post(
        "/v1/score", data={"question": "?", "response": "x"}, files={"image": b"x"}, headers={"Origin": "http://a.b"}
    )
    assert error_of(form)["status"] == 403
    assert error_of(api.http.post("/v1/score", json=BODY, headers={"Sec-Fetch-Site": "cross-site"}))["status"] == 403
    assert api.http.post("/v1/score", json=BODY, headers={"Origin": f"http://{host}"}).status_code == 200
    both = [("Origin", f"http://{host}"), ("Origin", "http://evil.example")]
    assert error_of(api.http.post("/v1/score", json=BODY, headers=both))["status"] == 403
    for name in ("localhost", "LOCALHOST:8080", "[::1]:8080"):
        assert api.http.get("/v1/teachers", headers={"Host": name}).status_code == 200
    assert api.http.get("/healthz", headers={"Host": "10.0.0.7:8080"}).status_code == 200  # a probe's


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        (["a.example"], None, None),
        (["A.example:443"], "https://a.example", None),
        (["a.example", "b"], None, 421),
        ([], None, 421),
        ([""], None, 421),
        (["a.example@b"], None, 421),
        (["a.example"], "ftp://a.example", 403),
        (["a.example:1"], "http://a.example:2", 403),
        (["a.example."], "https://A.example", None),
        (["a.example.."], None, 421),
        (["[2001:DB8::0:1]:80"], "http://[2001:db8::1]", None),
        (["[::1]:8080"], "http://[0:0::1]:8080", None),
        (["0.0.0.0:8080"], None, 421),
        (["127.1"], None, 421),
        (["[::ffff:127.0.0.1]"], None, 421),
    ],
)
def test_host_names(host: list[str], origin: str | None, status: int | None) -> None:
    headers = [(b"host", value.encode()) for value in host]
    headers += [] if origin is None else [(b"origin", origin.encode())]
    scope = {"type": "http", "path": "/v1/score", "method": "POST", "headers": headers}
    if status is None:
        HostNames(["a.example", "2001:db8:0::1"]).check(scope)
    else:
        with pytest.raises(ApiError) as caught:
            HostNames(["a.example"]).check(scope)
        assert caught.value.status_code == status


def test_a_reverse_proxy_is_believed_only_where_it_is_configured(tmp_path: Path, teacher: TeacherInProcess) -> None:
    """Quotas count by address: a made-up X-Forwarded-For must not be a new client."""
    forged = [{"X-Forwarded-For": f"10.0.0.{n}"} for n in range(3)]
    quota = "[api.quotas]\nrequests_per_minute = 2\n"
    for proxies, expected in (("", [200, 200, 429]), ('[api.connections]\nproxies = ["127.0.0.1"]\n', [200, 200, 200])):
        for api in start_api(tmp_path, teacher.target, *service_file(tmp_path, quota + proxies)):
            statuses = [api.http.post("/v1/score", json=BODY, headers=headers).status_code for headers in forged]
            assert statuses == expected


def test_the_api_is_not_opened_to_other_hosts_by_accident() -> None:
    from vaopd.config import ApiConfig, Config
    from vaopd_api.__main__ import serve
    from vaopd_api.metrics import Metrics

    config = Config.model_construct(api=ApiConfig(address="0.0.0.0:0"))
    with pytest.raises(ConfigError, match=r"can be reached from other hosts.*trusted_network = true"):
        serve(config, announce=None, metrics=Metrics(), metrics_route=False)


def test_the_values_of_a_reply_are_counted_before_the_teacher_is_asked(api: Api) -> None:
    """105 KB of short responses with top-k details made 1 GB of replies."""
    short = ScoreBody(question="?", responses=["a"] * 100, top_k=20)
    assert count_values(short) == 100 * 2 * (6 + 3 * 20)  # each a token and the EOS
    many = {"question": "?", "responses": ["a"] * 10_000, "top_k": 20}
    refused = error_of(api.http.post("/v1/score", json=many))
    assert refused["status"] == 413
    assert f"1320000 values, the limit is {MAX_VALUES}" in refused["detail"]


def test_the_values_of_a_body_are_counted_before_it_is_parsed(api: Api) -> None:
    keys = b",".join(b'"k%d":1' % n for n in range(MAX_JSON_KEYS + 1))
    for content in (b"{" + keys + b"}", b'{"response_token_ids":[1' + b",1" * (MAX_JSON_VALUES + 1) + b"]}"):
        for route in ("/v1/score", "/v1/score/batch", "/v1/sample", "/v1/degrade"):
            answer = api.http.post(route, content=content, headers={"Content-Type": "application/json"})
            assert error_of(answer)["status"] == 413
            assert f"more than {MAX_JSON_VALUES} values or {MAX_JSON_KEYS} keys" in error_of(answer)["detail"]


def test_of_many_wrong_pictures_only_the_first_is_named() -> None:
    for wrong, place in (({"images": [1] * 1000}, ("images", 0)), ({"images": ["a"] * 1000}, ("images",))):
        with pytest.raises(RequestValidationError) as caught:
            parse(RegionsBody, {"question": "?", "response": "x", **wrong})
        assert [error["loc"] for error in caught.value.errors()] == [place]


@pytest.mark.parametrize(
    ("wrong", "place"),
    [
        ({f"k{n}": 1 for n in range(1000)}, ("k0",)),
        ({"degradation": {f"k{n}": 1 for n in range(1000)}}, ("degradation", "k0")),
        ({"images": [1] * 1000}, ("images", 0)),
        ({"columns": [1] * 1000}, ("columns", 0)),
        ({"response": None, "response_token_ids": [-1] * 1000}, ("response_token_ids", 0)),
    ],
)
def test_of_many_errors_only_the_first_is_made(wrong: dict[str, object], place: tuple[object, ...]) -> None:
    """Three million unknown keys in a body took 27 s and 5 GB."""
    with pytest.raises(RequestValidationError) as caught:
        parse(ScoreBody, {"question": "?", "response": "x", **wrong})
    (error,) = caught.value.errors()
    assert error["loc"] == place


def test_a_batch_of_the_worst_requests_stays_within_its_memory(api: Api) -> None:
    """As many items as a batch may have, each with the longest reply that is answered in reasonable time here."""
    process = psutil.Process(api.process.pid)
    items = [{"question": "?", "responses": ["abcdefg"] * 16, "top_k": 20}] * MAX_BATCH_ITEMS
    assert api.http.post("/v1/score/batch", json={"requests": items[:8]}).json()["failed"] == 0  # all code is loaded
    before = process.memory_info().rss
    peak = 0
    with api.http.stream("POST", "/v1/score/batch", json={"requests": items}) as answer:
        for _ in answer.iter_bytes():
            peak = max(peak, process.memory_info().rss)
    values = count_values(ScoreBody.model_validate(items[0]))
    # Eight at once, each value at most 200 bytes as an object and as text, and what the allocator keeps.
    assert peak - before < 8 * values * 200 + 64 * 2**20


async def test_replies_share_the_room_in_the_order_of_arrival() -> None:
    body = ScoreBody(question="?", responses=["a"] * 10)  # 10 × 2 tokens × 6 values
    budget = ReplyBudget(limit=count_values(body))
    order: list[str] = []

    async def hold(name: str, until: asyncio.Event) -> None:
        async with budget.hold(body):
            order.append(name)
            await until.wait()

    first, rest = asyncio.Event(), asyncio.Event()
    rest.set()
    tasks = [asyncio.create_task(hold("a", first)), asyncio.create_task(hold("b", rest))]
    for _ in range(10):  # turns of the event loop: more than either needs to get its room
        await asyncio.sleep(0)
    assert order == ["a"]
    first.set()
    await asyncio.gather(*tasks)
    assert order == ["a", "b"]
    too_large = ScoreBody(question="?", response_token_ids=np.zeros(MAX_VALUES // 6 + 1, int).tolist())
    with pytest.raises(LimitExceeded, match="fewer or shorter responses"):
        async with budget.hold(too_large):
            raise AssertionError("it must be refused")
