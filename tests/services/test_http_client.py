"""The Python clients of the scoring API, against a real one; and the example that uses them."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.api import BODY, IMAGE, QUESTION, Api, start_api, with_keys
from tests.support.http_server import Answer, http_server
from tests.support.teacher import TeacherInProcess
from vaopd.access.keys import add_key
from vaopd.errors import ConfigError, InvalidInput, LimitExceeded, Mismatch, NotFound, Unauthenticated, Unavailable
from vaopd.http_client import AsyncScoringClient, ScoringClient, ask
from vaopd.http_types import DegradationModel, ScoreBody

RESPONSES = ["It is 12.", [70, 71, 72]]


@pytest.fixture
def client(api: Api) -> Iterator[ScoringClient]:
    with ScoringClient(str(api.http.base_url), patience_s=0) as opened:
        yield opened


def test_a_score_as_typed_values(client: ScoringClient, api: Api, tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(IMAGE.data)
    view = DegradationModel(kind="blur", strength=0.2)
    score = client.score(QUESTION, RESPONSES, images=[tmp_path / "image.png"], degradation=view, top_k=2)
    asked = {**BODY, "degradation": view.model_dump(), "top_k": 2}
    del asked["response"]
    assert score.model_dump() == api.score(**asked, responses=RESPONSES).json()
    assert [token.id for token in score.rollouts[1].tokens] == [70, 71, 72]
    assert client.teachers()[0].model == score.model
    assert client.degrade(IMAGE.data, view).startswith(b"\x89PNG")


def test_a_batch_tells_each_result_with_its_place(client: ScoringClient) -> None:
    good = ask(QUESTION, ["It is 12."], images=[IMAGE.data])
    bad = ScoreBody(question=QUESTION, images=["bm8gaW1hZ2U="], response="It is 12.")
    results = {result.index: result for result in client.score_batch([good, bad, good])}
    assert sorted(results) == [0, 1, 2]
    assert results[0].score == results[2].score == client.score(QUESTION, ["It is 12."], images=[IMAGE.data])
    assert results[1].problem
    assert (results[1].problem.status, results[1].problem.field) == (422, "images.0")


async def test_the_asynchronous_client_answers_alike(api: Api, client: ScoringClient) -> None:
    async with AsyncScoringClient(str(api.http.base_url)) as asynchronous:
        assert await asynchronous.teachers() == client.teachers()
        score = await asynchronous.score(QUESTION, RESPONSES, images=[IMAGE.data])
        assert score == client.score(QUESTION, RESPONSES, images=[IMAGE.data])
        results = [result async for result in asynchronous.score_batch([ask(QUESTION, ["a"]), ask(QUESTION, ["b"])])]
        assert sorted(result.index for result in results) == [0, 1]
        assert await asynchronous.degrade(IMAGE.data) == client.degrade(IMAGE.data)
        with pytest.raises(NotFound, match="no student"):
            await asynchronous.sample(QUESTION)


def test_refusals_are_the_errors_of_the_tree(client: ScoringClient) -> None:
    with pytest.raises(InvalidInput, match=r"not a PNG.*\(request [0-9a-f]{32}\)"):
        client.score(QUESTION, ["a"], images=[b"no image"])
    with pytest.raises(InvalidInput, match="can't be read"):
        client.score(QUESTION, ["a"], images=[Path("nowhere.png")])
    with pytest.raises(NotFound, match="no teacher 'huge'"):
        client.score(QUESTION, ["a"], teacher="huge")
    with pytest.raises(LimitExceeded):
        client.score(QUESTION, ["a"] * 1000)
    with pytest.raises(NotFound, match="no student"):
        client.sample(QUESTION)


def test_an_api_with_keys(teacher: TeacherInProcess, tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys.json", "geometry")
    for api in start_api(tmp_path, teacher.target, *with_keys(tmp_path)):
        with ScoringClient(str(api.http.base_url)) as stranger, pytest.raises(Unauthenticated):
            stranger.teachers()
        with ScoringClient(str(api.http.base_url), api_key=key) as known:
            assert known.teachers()


@pytest.mark.parametrize("address", ["", "127.0.0.1:1", "ftp://one", "http://one:65536", "http://[::1", "http://a\nb"])
def test_an_address_that_is_not_http_is_refused_at_once(address: str) -> None:
    """As lost connections they would be tried again, for all of `patience_s`."""
    with pytest.raises(ConfigError, match="is no http://HOST:PORT or https://HOST:PORT"):
        AsyncScoringClient(address)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0])
def test_a_time_out_of_range_is_named(wrong: float) -> None:
    with pytest.raises(ConfigError, match=f"patience_s = {wrong} must be above 0"):
        AsyncScoringClient(patience_s=wrong)


async def test_a_closed_client_says_so() -> None:
    client = AsyncScoringClient()
    await client.close()
    with pytest.raises(Unavailable, match="this client of the scoring API is closed"):
        await client.teachers()


def test_what_is_busy_or_starting_is_asked_again() -> None:
    starting = Answer(status=503, body="{}")
    busy = Answer(status=429, headers={"Retry-After": "0"}, body="{}")
    with http_server(starting, busy, Answer(body='{"teachers": []}')) as address, ScoringClient(address) as client:
        assert client.teachers() == []
    with ScoringClient("http://127.0.0.1:9", patience_s=0) as nobody, pytest.raises(Unavailable, match="is it running"):
        nobody.teachers()


def test_something_else_than_a_scoring_api_is_named() -> None:
    with (
        http_server(Answer(body="hello")) as address,
        ScoringClient(address) as client,
        pytest.raises(Mismatch, match="is it a scoring API"),
    ):
        client.teachers()


def test_a_batch_that_ends_early_is_an_error() -> None:
    cut = Answer(headers={"Content-Type": "text/event-stream"}, body="event: result\n")
    with (
        http_server(cut) as address,
        ScoringClient(address) as client,
        pytest.raises(Unavailable, match="ended a batch early"),
    ):
        list(client.score_batch([ask("?", ["a"])]))


def test_it_needs_no_torch() -> None:
    code = "import sys, vaopd.http_client; print({'torch', 'fastapi', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_example_runs(api: Api) -> None:
    command = [sys.executable, "examples/score_image.py", str(api.http.base_url)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert "'6' was read, the teacher sees '5'" in done.stdout
    assert "pixelation to" in done.stdout
