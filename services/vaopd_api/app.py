"""The scoring API: its routes.

In: images, a question and responses. Out: each token's log-probs in both views and its VA; the viewer page, which calls
the same API; the reports of the runs in a folder. It waits for the teachers, over gRPC, and for the student if it has
one. It keeps no state, and needs no torch until a student is asked.
"""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Awaitable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

from fastapi import Depends, FastAPI, Query, Request
from fastapi.responses import FileResponse, HTMLResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles

import vaopd
from vaopd.errors import ConfigError, NotFound
from vaopd.http_types import (
    DegradeBody,
    Health,
    RegionsBody,
    RegionsReply,
    RunsReply,
    SampleBody,
    SampleReply,
    ScoreReply,
    StudentModel,
    StudentsReply,
    TeachersReply,
)
from vaopd.report import content_security_policy
from vaopd.scoring.views import make_views
from vaopd.types import Degradation, EncodedImage, SamplingSettings
from vaopd_api import batch, openapi, problems
from vaopd_api.access import Access
from vaopd_api.bodies import JsonRoute, read_batch, read_score, require_json
from vaopd_api.metrics import Metrics
from vaopd_api.middleware import NO_FRAMES, BodyLimit, Envelope, Gate
from vaopd_api.problems import ApiError
from vaopd_api.regions import find_regions
from vaopd_api.runs import Report, Runs
from vaopd_api.scorer import AdHocScorer, decode_images, make_degradation, make_teacher_model
from vaopd_api.teachers import Teachers
from vaopd_api.uploads import image_from_text

logger = logging.getLogger("vaopd.api")
T = TypeVar("T")

MAX_BODY_BYTES = 48 * 2**20  # two images of the teacher's limit, 15 MiB, are 40 MiB as base64
DEGRADED_AT_ONCE, REGIONS_AT_ONCE = 2, 2  # each decoded image takes memory
PAGE = Path(__file__).parent / "page"
JSON_ONLY = [Depends(require_json)]
REVALIDATE = {"Cache-Control": "no-cache"}  # browsers ask each time, and get 304 while nothing has changed

PixelBounds = tuple[int | None, int | None]
"""The fewest and the most pixels of an image; None: the processor's own."""


class Sampler(Protocol):
    """A student that answers; `vaopd_api.student` implements it."""

    @property
    def model(self) -> str:
        """The model's name or folder."""

    @property
    def loaded(self) -> bool:
        """Whether the model is in memory."""

    async def sample(
        self, question: str, images: list[EncodedImage], sampling: SamplingSettings, *, num_responses: int
    ) -> SampleReply:
        """Samples `num_responses` responses to one question."""


def create_app(
    *,
    teachers: Teachers,
    students: Sequence[Sampler] = (),
    runs: Path | None = None,
    metrics: Metrics | None = None,
    metrics_route: bool = True,
    access: Access | None = None,
    pixel_bounds: PixelBounds = (None, None),
) -> FastAPI:
    """Builds the application that `vaopd_api.__main__` serves.

    students: without any, /v1/sample answers 404. Raises ConfigError for two of one name.
    runs: the folder with the runs to report on.
    metrics_route: whether /metrics is a route here, rather than on a port of its own.
    access: None: no keys and no quota.
    pixel_bounds: those of the teacher, where the degraded view is asked for by itself.
    """
    metrics = metrics or Metrics()
    access = access or Access()
    app = FastAPI(title="vaopd scoring API", version=vaopd.__version__, docs_url=None, redoc_url=None)
    app.router.route_class = JsonRoute
    problems.install(app)
    app.add_middleware(BodyLimit, max_bytes=MAX_BODY_BYTES)
    app.add_middleware(Gate, access=access)
    app.add_middleware(Envelope, metrics=metrics)  # the last one added is the outermost
    openapi.install(app)
    _add_health(app, teachers)
    if metrics_route:
        _add_metrics(app, metrics)
    _add_scoring(app, teachers, AdHocScorer(teachers=teachers, metrics=metrics), access, pixel_bounds)
    _add_sampling(app, students)
    _add_runs(app, Runs(runs))
    _add_pages(app)
    return app


def _add_health(app: FastAPI, teachers: Teachers) -> None:
    @app.get("/healthz", tags=["health"])
    async def healthz() -> Health:
        """Returns 200 while the process is alive."""
        return Health(status="ok")

    @app.get("/readyz", tags=["health"], responses=openapi.describe_problems(503))
    async def readyz() -> Health:
        """Returns 200 while a teacher answers."""
        await teachers.describe()
        return Health(status="ready")


def _add_metrics(app: FastAPI, metrics: Metrics) -> None:
    @app.get("/metrics", tags=["health"], response_class=Response)
    async def prometheus() -> Response:
        """Returns the API's metrics in Prometheus' text format."""
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_scoring(
    app: FastAPI, teachers: Teachers, scorer: AdHocScorer, access: Access, pixel_bounds: PixelBounds
) -> None:
    decoding, examining = asyncio.Semaphore(DEGRADED_AT_ONCE), asyncio.Semaphore(REGIONS_AT_ONCE)

    @app.get("/v1/teachers", tags=["scoring"], responses=openapi.describe_problems(503))
    async def list_teachers() -> TeachersReply:
        """Lists the teachers that score here, with their limits."""
        return TeachersReply(teachers=[make_teacher_model(found) for found in (await teachers.describe()).values()])

    @app.post(
        "/v1/score",
        tags=["scoring"],
        response_model=ScoreReply,
        responses=openapi.PROBLEMS,
        openapi_extra=openapi.SCORE_BODY,
    )
    async def score(request: Request) -> Response:
        """Scores one response or a group of responses to a question about no, one or several images."""
        body, images = await read_score(request)
        reply = await run_unless_disconnected(request, scorer.score(body, images))
        return Response(reply, media_type="application/json")

    @app.post("/v1/score/batch", tags=["scoring"], responses=openapi.BATCH_REPLIES, openapi_extra=openapi.BATCH_BODY)
    async def score_batch(request: Request) -> Any:
        """Scores each request by itself; a request that is refused has a problem in place of a score.

        With `Accept: text/event-stream` each result is sent when it is done, as an event `result`; then `done`.
        """
        items = await read_batch(request)
        access.charge(request.scope, len(items) - 1)
        if batch.EVENT_STREAM in request.headers.get("accept", ""):
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return StreamingResponse(batch.stream_events(scorer, items), media_type=batch.EVENT_STREAM, headers=headers)
        return StreamingResponse(batch.stream_json(scorer, items), media_type="application/json")

    @app.post(
        "/v1/regions",
        tags=["scoring"],
        dependencies=JSON_ONLY,
        response_model=RegionsReply,
        responses=openapi.PROBLEMS,
    )
    async def regions(body: RegionsBody, request: Request) -> Response:
        """Finds the regions of a picture that the tokens of a response depend on: degrades one tile at a time.

        Counts as one request for each tile, and one for the whole picture.
        """
        charge = partial(access.charge, request.scope)

        async def work() -> str:
            images = await asyncio.to_thread(decode_images, body.image, body.images)
            async with examining:
                return await find_regions(teachers, body, images, pixel_bounds=pixel_bounds, charge=charge)

        return Response(await run_unless_disconnected(request, work()), media_type="application/json")

    @app.post(
        "/v1/degrade",
        tags=["scoring"],
        dependencies=JSON_ONLY,
        response_class=Response,
        responses=openapi.PROBLEMS | {200: {"content": {"image/png": {}}, "description": "the degraded view, a PNG"}},
    )
    async def degraded_view(body: DegradeBody) -> Response:
        """Returns the degraded view as the teacher sees it, of the picture scaled to the run's pixel bounds."""
        image = await asyncio.to_thread(image_from_text, body.image, field="image")
        async with decoding:
            png = await asyncio.to_thread(make_degraded_png, image, make_degradation(body.degradation), pixel_bounds)
        return Response(png, media_type="image/png")


def _add_sampling(app: FastAPI, students: Sequence[Sampler]) -> None:
    by_name = {student.model: student for student in students}
    if len(by_name) < len(students):
        names = ", ".join(student.model for student in students)
        raise ConfigError(f"two students have one name ({names}); rename a folder, or leave one of them out")

    @app.get("/v1/students", tags=["sampling"])
    async def list_students() -> StudentsReply:
        """Lists the students that answer here; none if the API was started without."""
        return StudentsReply(students=[StudentModel(model=each.model, loaded=each.loaded) for each in students])

    @app.post("/v1/sample", tags=["sampling"], responses=openapi.PROBLEMS, dependencies=JSON_ONLY)
    async def sample(body: SampleBody) -> SampleReply:
        """Samples responses from the student; they can be scored as token ids."""
        if not students:
            raise NotFound("this API has no student; start it with vaopd api CONFIG --student MODEL")
        student = students[0] if body.student is None else by_name.get(body.student)
        if student is None:
            raise NotFound(f"there is no student {body.student!r} here; GET /v1/students lists the students")
        sampling = SamplingSettings(
            temperature=body.temperature, top_p=body.top_p, max_new_tokens=body.max_new_tokens, seed=body.seed
        )
        images = await asyncio.to_thread(decode_images, body.image, body.images)
        return await student.sample(body.question, images, sampling, num_responses=body.num_responses)


def _add_runs(app: FastAPI, runs: Runs) -> None:
    policy = f"{content_security_policy(live=True)}; {NO_FRAMES}"

    @app.get("/v1/runs", tags=["runs"])
    async def list_runs(request: Request) -> RunsReply:
        """Lists the runs with a report here; with a key, only the run of the key's job."""
        return RunsReply(runs=await runs.list_summaries(job=request.scope.get("job")))

    @app.get(
        "/runs/{name}/report",
        tags=["runs"],
        response_class=HTMLResponse,
        responses=openapi.describe_problems(401, 403, 404, 500)
        | {304: {"description": "not changed since If-None-Match"}},
    )
    async def report(name: str, request: Request) -> Response:
        """Returns a run's report, one self-contained page, which updates itself until the run is finished."""
        return answer(await runs.report([name], job=request.scope.get("job")), request)

    @app.get(
        "/runs/compare",
        tags=["runs"],
        response_class=HTMLResponse,
        responses=openapi.describe_problems(401, 403, 404, 422, 500)
        | {304: {"description": "not changed since If-None-Match"}},
    )
    async def compare(request: Request, run: Annotated[list[str], Query(min_length=1)]) -> Response:
        """Returns the page that compares several runs, `run=NAME` once for each."""
        return answer(await runs.report(run, job=request.scope.get("job")), request)

    def answer(found: Report, request: Request) -> Response:
        headers = {**REVALIDATE, "ETag": found.tag, "Content-Security-Policy": policy}
        if request.headers.get("if-none-match") == found.tag:
            return Response(status_code=304, headers=headers)
        return HTMLResponse(found.html, headers=headers)


def _add_pages(app: FastAPI) -> None:
    headers = REVALIDATE

    @app.get("/", include_in_schema=False)
    async def viewer() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers=headers)

    @app.get("/docs", include_in_schema=False)
    async def reference() -> FileResponse:
        return FileResponse(PAGE / "docs.html", headers=headers)

    @app.get("/runs", include_in_schema=False)
    async def runs_page() -> FileResponse:
        return FileResponse(PAGE / "runs.html", headers=headers)

    app.mount("/page", StaticFiles(directory=PAGE), name="page")


def make_degraded_png(image: EncodedImage, degradation: Degradation, pixel_bounds: PixelBounds) -> bytes:
    """Returns the degraded view exactly as the teacher makes it: same caps, noise seeded by the content."""
    written = io.BytesIO()
    min_pixels, max_pixels = pixel_bounds
    make_views(image, degradation, min_pixels=min_pixels, max_pixels=max_pixels).degraded.save(written, "PNG")
    return written.getvalue()


async def run_unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """Returns the work's result; if the client disconnects first, cancels the work, and with it the teacher's."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_wait_until_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client disconnected")
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _wait_until_disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
