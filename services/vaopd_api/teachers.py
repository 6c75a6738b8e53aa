"""The API's way to its teachers. A client per request: none outlives a teacher that is replaced by another."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vaopd.client import ClientOptions, GroupFailure, TeacherClient
from vaopd.errors import NotFound, PermissionDenied, TeacherFault, Unauthenticated, Unavailable
from vaopd.types import Degradation, GroupScore, ScoreRequest, TeacherDescription
from vaopd_api.problems import ApiError

logger = logging.getLogger("vaopd.api")

CONNECT_TIMEOUT_S = 3.0
SCORE_TIMEOUT_S = 120.0


class Teachers:
    """`options`: what every client is made with (job, key, TLS)."""

    def __init__(self, addresses: Sequence[str], *, options: ClientOptions) -> None:
        self._addresses = addresses
        self._options = options

    async def describe(self) -> dict[str, TeacherDescription]:
        """Those that answer, by address. Raises Unavailable when none does, and soon."""
        answers = await asyncio.gather(*map(self._describe, self._addresses), return_exceptions=True)
        described = {}
        for address, answer in zip(self._addresses, answers, strict=True):
            if isinstance(answer, TeacherDescription):
                described[address] = answer
            elif len(answers) == 1 or not isinstance(answer, Unavailable):
                raise answer
        if not described:
            raise Unavailable("none of the teachers can be reached")
        return described

    async def find(self, model: str | None) -> tuple[str, TeacherDescription]:
        """Address and description of a teacher by name, of the first one when there is no name.

        It waits for no other teacher than those before it, so that one that is down costs the others little.
        """
        asked = [asyncio.create_task(self._describe(address)) for address in self._addresses]
        unavailable: Unavailable | None = None
        try:
            for address, task in zip(self._addresses, asked, strict=True):
                try:
                    description = await task
                except Unavailable as error:
                    unavailable = error
                    continue
                if model is None or description.model == model:
                    return address, description
        finally:
            for task in asked:
                task.cancel()
        if unavailable is not None and (model is None or len(asked) == 1):
            raise unavailable
        raise NotFound(f"there is no teacher {model!r} here; GET /v1/teachers names those there are")

    async def score(self, address: str, request: ScoreRequest, degradation: Degradation, *, top_k: int) -> GroupScore:
        options: ClientOptions = {
            **self._options,
            "timeout_s": SCORE_TIMEOUT_S,
            "patience_s": CONNECT_TIMEOUT_S,
            "degradation": degradation,
            "payload": "top_k" if top_k else "none",
            "top_k": max(top_k, 1),
        }
        async with TeacherClient(address, **options) as client:
            with _own_credentials():
                async for result in client.score([request], with_token_texts=True):
                    if isinstance(result, GroupFailure):
                        raise result.error
                    return result
        raise ApiError(502, "the teacher ended the call without an answer")

    async def _describe(self, address: str) -> TeacherDescription:
        options: ClientOptions = {**self._options, "timeout_s": CONNECT_TIMEOUT_S}
        async with TeacherClient(address, **options) as client:
            with _own_credentials():
                return await client.describe()


@contextmanager
def _own_credentials() -> Iterator[None]:
    """A key that the teacher refuses is the API's, not that of whoever asks the API; so are teachers that differ."""
    try:
        yield
    except TeacherFault as error:
        logger.error("%s", error)  # the message would tell everybody where the teacher runs
        raise ApiError(
            502, "the teacher behind this API doesn't answer as it should; the API's log tells more"
        ) from None
    except (Unauthenticated, PermissionDenied) as error:
        logger.error("the teacher refuses this API: %s", error)
        raise ApiError(
            502, "the teacher refuses this API; whoever runs it has to give it a key (VAOPD_API_KEY_FILE)"
        ) from None
