"""Clients of the scoring API, typed and torch-free: `ScoringClient`, and `AsyncScoringClient` for event loops.

    with ScoringClient("http://127.0.0.1:8080") as api:                    # pip install 'vaopd[http]'
        score = api.score("What is the perimeter?", ["It is 12.", "It is 7."], images=[Path("triangle.png")])
        score.rollouts[0].visual_advantage                                 # nats, one per token
        for result in api.score_batch([ask("2+2?", ["4"]), ask("3+3?", ["6"])]):
            print(result.index, result.score or result.problem)

Replies are the models of `vaopd.http_types`; refusals are raised as the errors of `vaopd.errors`. Scoring changes
nothing on the server, so requests to an API that is down or busy are repeated for `patience_s`.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncGenerator, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TypedDict, TypeVar, Unpack
from urllib.parse import urlsplit

import pydantic

from vaopd import errors
from vaopd.files.secret import parse_api_key
from vaopd.http_types import (
    MAX_BATCH_ITEMS,
    BatchResult,
    DegradationModel,
    DegradeBody,
    Problem,
    RunModel,
    RunsReply,
    SampleBody,
    SampleReply,
    ScoreBody,
    ScoreReply,
    StudentModel,
    StudentsReply,
    TeacherModel,
    TeachersReply,
)
from vaopd.net.backoff import Backoff, check_timeout
from vaopd.net.loop import LoopThread

try:
    import httpx
except ModuleNotFoundError:
    raise ModuleNotFoundError("vaopd.http_client needs httpx; install it with: pip install 'vaopd[http]'") from None

__all__ = ["AsyncScoringClient", "ImageSource", "ScoringClient", "ask"]

LOCAL = "http://127.0.0.1:8080"
NO_PROXY: dict[str, None] = {"all://127.0.0.1": None, "all://localhost": None, "all://[::1]": None}
"""httpx's mounts for this host: it would ask a proxy of the environment, which is another host."""
ImageSource = bytes | Path
"""A PNG, JPEG or WEBP file: its bytes or its path."""
M = TypeVar("M", bound=pydantic.BaseModel)

_KINDS: dict[int, type[errors.VaopdError]] = {
    400: errors.InvalidInput,
    401: errors.Unauthenticated,
    403: errors.PermissionDenied,
    404: errors.NotFound,
    409: errors.Mismatch,
    413: errors.LimitExceeded,
    415: errors.InvalidInput,
    422: errors.InvalidInput,
    500: errors.VaopdError,
    502: errors.Unavailable,
    503: errors.Unavailable,
}


class AskOptions(TypedDict, total=False):
    """The keyword arguments of a request to score."""

    images: Sequence[ImageSource]
    degradation: DegradationModel
    teacher: str | None
    """The model to score with; None: the API's first."""
    top_k: int
    """The number of alternatives to list at each place."""
    columns: Sequence[str]
    """Further numbers to compute for each token, see `vaopd.columns`."""


def ask(question: str, responses: Sequence[str | Sequence[int]], **options: Unpack[AskOptions]) -> ScoreBody:
    """Builds one request to score.

    responses: K texts or lists of token ids, compared as one group.

    Raises InvalidInput for an image that can't be read, pydantic.ValidationError for values that the API would refuse.
    """
    given: dict[str, Any] = {**options, "images": [_encode_image(image) for image in options.get("images", ())]}
    listed = [response if isinstance(response, str) else list(response) for response in responses]
    return ScoreBody(question=question, responses=listed, **given)


class AsyncScoringClient:
    """A client of the scoring API, for one event loop. Methods raise the errors of `vaopd.errors`.

    Raises ConfigError for an address that isn't HTTP, a key that can't be one, and times out of range.

    timeout_s: for each request.
    patience_s: how long requests to an API that is down or busy are repeated.
    """

    def __init__(
        self, base_url: str = LOCAL, *, api_key: str | None = None, timeout_s: float = 120.0, patience_s: float = 30.0
    ) -> None:
        self._http = httpx.AsyncClient(
            base_url=check_url(base_url),
            headers=make_headers(api_key),
            timeout=check_timeout("timeout_s", timeout_s),
            mounts=NO_PROXY,
        )
        self._patience_s = patience_s and check_timeout("patience_s", patience_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def teachers(self) -> list[TeacherModel]:
        """Returns the teachers that score for this API."""
        return _read(TeachersReply, await self._ask("GET", "/v1/teachers")).teachers

    async def students(self) -> list[StudentModel]:
        """Returns the API's student, if it has one."""
        return _read(StudentsReply, await self._ask("GET", "/v1/students")).students

    async def runs(self) -> list[RunModel]:
        """Returns the runs that the API has reports of."""
        return _read(RunsReply, await self._ask("GET", "/v1/runs")).runs

    async def score(
        self, question: str, responses: Sequence[str | Sequence[int]], **options: Unpack[AskOptions]
    ) -> ScoreReply:
        """Scores the responses as one group. See `ask` for the arguments."""
        return _read(ScoreReply, await self._ask("POST", "/v1/score", ask(question, responses, **options)))

    async def score_batch(self, requests: Sequence[ScoreBody]) -> AsyncGenerator[BatchResult]:
        """Yields each request's result when it is done; `index` is the request's place. Long lists are split."""
        for start in range(0, len(requests), MAX_BATCH_ITEMS):
            reader = _Events(start)
            request = self._http.build_request(
                "POST", "/v1/score/batch", **_encode_batch(requests[start:][:MAX_BATCH_ITEMS])
            )
            answer = await self._send(request)
            try:
                async for line in answer.aiter_lines():
                    for result in reader.read(line):
                        yield result
            except httpx.TransportError as error:
                raise _make_lost_error(error) from None
            finally:
                await answer.aclose()
            reader.end()

    async def degrade(self, image: ImageSource, degradation: DegradationModel = DegradationModel()) -> bytes:
        """Returns the degraded view that the teacher sees, as PNG."""
        body = DegradeBody(image=_encode_image(image), degradation=degradation)
        return (await self._ask("POST", "/v1/degrade", body)).content

    async def sample(self, question: str, *, images: Sequence[ImageSource] = (), **settings: Any) -> SampleReply:
        """Samples responses from the API's student; `settings` are those of `vaopd.http_types.SampleBody`."""
        body = SampleBody(question=question, images=[_encode_image(image) for image in images], **settings)
        return _read(SampleReply, await self._ask("POST", "/v1/sample", body))

    async def _ask(self, method: str, path: str, body: pydantic.BaseModel | None = None) -> httpx.Response:
        answer = await self._send(self._http.build_request(method, path, **_encode_body(body)))
        try:
            await answer.aread()
        finally:
            await answer.aclose()
        return answer

    async def _send(self, request: httpx.Request) -> httpx.Response:
        backoff = Backoff(self._patience_s)
        while True:
            if self._http.is_closed:
                raise errors.Unavailable("this client of the scoring API is closed")
            try:
                answer = await self._http.send(request, stream=True)
                if answer.is_success:
                    return answer
                await answer.aread()
                await answer.aclose()
                raise _make_refusal(answer)
            except httpx.TransportError as error:
                await asyncio.sleep(backoff.delay_s(_make_lost_error(error)))
            except (errors.Busy, errors.Unavailable) as refused:
                await asyncio.sleep(backoff.delay_s(refused))


class ScoringClient:
    """`AsyncScoringClient` for code without an event loop: the same methods, run on a thread of its own."""

    def __init__(
        self, base_url: str = LOCAL, *, api_key: str | None = None, timeout_s: float = 120.0, patience_s: float = 30.0
    ) -> None:
        """See `AsyncScoringClient`."""
        self._client = AsyncScoringClient(base_url, api_key=api_key, timeout_s=timeout_s, patience_s=patience_s)
        self._loop = LoopThread("this client of the scoring API")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections; calls in progress on other threads raise Unavailable."""
        self._loop.close(self._client.close())

    def teachers(self) -> list[TeacherModel]:
        """Returns the teachers that score for this API."""
        return self._loop.run(self._client.teachers())

    def students(self) -> list[StudentModel]:
        """Returns the API's student, if it has one."""
        return self._loop.run(self._client.students())

    def runs(self) -> list[RunModel]:
        """Returns the runs that the API has reports of."""
        return self._loop.run(self._client.runs())

    def score(
        self, question: str, responses: Sequence[str | Sequence[int]], **options: Unpack[AskOptions]
    ) -> ScoreReply:
        """Scores the responses as one group. See `ask` for the arguments."""
        return self._loop.run(self._client.score(question, responses, **options))

    def score_batch(self, requests: Sequence[ScoreBody]) -> Iterator[BatchResult]:
        """Yields each request's result when it is done; `index` is the request's place. Long lists are split."""
        return self._loop.iterate(self._client.score_batch(requests))

    def degrade(self, image: ImageSource, degradation: DegradationModel = DegradationModel()) -> bytes:
        """Returns the degraded view that the teacher sees, as PNG."""
        return self._loop.run(self._client.degrade(image, degradation))

    def sample(self, question: str, *, images: Sequence[ImageSource] = (), **settings: Any) -> SampleReply:
        """Samples responses from the API's student; `settings` are those of `vaopd.http_types.SampleBody`."""
        return self._loop.run(self._client.sample(question, images=images, **settings))


class _Events:
    """Reads results from the lines of server-sent events."""

    def __init__(self, start: int) -> None:
        self._start = start
        self._event = ""
        self._done = False

    def read(self, line: str) -> Iterator[BatchResult]:
        name, _, value = line.partition(": ")
        if name == "event":
            self._event = value
            self._done = value == "done"
        elif name == "data" and self._event == "result":
            try:
                result = BatchResult.model_validate_json(value)
            except pydantic.ValidationError:
                raise errors.Mismatch(
                    "the API sent no result of a batch; client and API are of different versions"
                ) from None
            yield result.model_copy(update={"index": self._start + result.index})

    def end(self) -> None:
        if not self._done:
            raise errors.Unavailable("the API ended a batch early; send the requests without a result again")


def check_url(url: str) -> str:
    """Returns an address that httpx takes. Raises ConfigError for any other."""
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            httpx.URL(url)
            return url
    except (ValueError, httpx.InvalidURL):
        pass
    raise errors.ConfigError(f"address {url!r} is no http://HOST:PORT or https://HOST:PORT")


def make_headers(api_key: str | None) -> dict[str, str]:
    """Returns the headers of requests with this key. Raises ConfigError for what can't be one."""
    return {} if api_key is None else {"Authorization": f"Bearer {parse_api_key(api_key, origin='api_key')}"}


def _encode_body(body: pydantic.BaseModel | None) -> dict[str, Any]:
    return {} if body is None else {"json": body.model_dump(mode="json", exclude_defaults=True)}


def _encode_batch(requests: Sequence[ScoreBody]) -> dict[str, Any]:
    items = [request.model_dump(mode="json", exclude_defaults=True) for request in requests]
    return {"json": {"requests": items}, "headers": {"Accept": "text/event-stream"}}


def _encode_image(image: ImageSource) -> str:
    if isinstance(image, bytes):
        return base64.b64encode(image).decode()
    try:
        return base64.b64encode(image.read_bytes()).decode()
    except OSError as error:
        raise errors.InvalidInput(f"image {str(image)!r} can't be read ({error.strerror})") from None


def _read(model: type[M], answer: httpx.Response) -> M:
    try:
        return model.model_validate_json(answer.content)
    except pydantic.ValidationError:
        raise errors.Mismatch(
            f"the answer from {answer.request.url.copy_with(query=None)} is no {model.__name__}; is it a scoring API "
            "of this version?"
        ) from None


def _make_refusal(answer: httpx.Response) -> errors.VaopdError:
    """Returns the API's problem as an error, with the request's id, which is in the API's log."""
    try:
        problem = Problem.model_validate_json(answer.content)
        message = f"{problem.detail} (request {problem.request_id})"
    except pydantic.ValidationError:
        message = f"{answer.request.url.host} answered {answer.status_code}, but not as a scoring API"
    if answer.status_code == 429:
        return errors.Busy(message, read_retry_after(answer.headers.get("Retry-After", "")))
    if "numerical_error" in answer.text:
        return errors.NumericalError(message)
    return _KINDS.get(answer.status_code, errors.VaopdError)(message)


def read_retry_after(text: str) -> float:
    """Returns the seconds in a Retry-After; 1 for a date, or anything else."""
    try:
        return float(text)
    except ValueError:
        return 1.0


def _make_lost_error(error: httpx.TransportError) -> errors.Unavailable:
    place = error.request.url.copy_with(path="/", query=None)
    return errors.Unavailable(f"the scoring API at {place} can't be reached ({type(error).__name__}); is it running?")
