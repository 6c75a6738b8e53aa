"""Calls the API's teachers, each time with a new client, since a teacher may be replaced."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vaopd.client import ClientOptions, GroupFailure, TeacherClient
from vaopd.errors import Busy, NotFound, PermissionDenied, TeacherFault, Unauthenticated, Unavailable
from vaopd.types import Degradation, GroupScore, ScoreRequest, TeacherDescription
from vaopd_api.problems import ApiError

logger = logging.getLogger("vaopd.api")

CONNECT_TIMEOUT_S = 3.0
SCORE_TIMEOUT_S = 120.0
_BUSY_S = 2.0


class Teachers:
    """The teachers by address; `options` are those of every client (job, key, TLS)."""

    def __init__(self, addresses: Sequence[str], *, options: ClientOptions) -> None:
        self._addresses = addresses
        self._options = options

    async def describe(self) -> dict[str, TeacherDescription]:
        """Returns the teachers that answer, by address. Raises Unavailable if none does within CONNECT_TIMEOUT_S."""
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
        """Returns address and description of the teacher of `model`; None: of the first that answers.

        Waits only for the teachers before it, so that one that is down delays the others little. Raises NotFound for a
        name that no teacher has, Unavailable where that can't be known.
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
        raise NotFound(f"there is no teacher {model!r} here; GET /v1/teachers lists the teachers")

    async def score(
        self,
        address: str,
        request: ScoreRequest,
        degradation: Degradation,
        *,
        top_k: int,
        columns: Sequence[str] = (),
    ) -> GroupScore:
        """Scores one group with the teacher at `address`. Raises the client's errors, and ApiError (502)."""
        (score,) = await self.score_all(address, [request], degradation, top_k=top_k, columns=columns)
        return score

    async def score_all(
        self,
        address: str,
        requests: Sequence[ScoreRequest],
        degradation: Degradation,
        *,
        top_k: int = 0,
        columns: Sequence[str] = (),
    ) -> list[GroupScore]:
        """Scores several groups in one call; returns the scores in the groups' order. Raises as `score` does."""
        options: ClientOptions = {
            **self._options,
            "timeout_s": SCORE_TIMEOUT_S,
            "patience_s": CONNECT_TIMEOUT_S,
            "degradation": degradation,
            "payload": "top_k" if top_k else "none",
            "top_k": max(top_k, 1),
        }
        found: dict[str, GroupScore] = {}
        async with TeacherClient(address, **options) as client:
            with _map_operator_errors():
                async for result in client.score(requests, with_token_texts=True, columns=columns):
                    if isinstance(result, GroupFailure):
                        if isinstance(result.error, NotFound):
                            raise Busy("the teacher has no room for the request's images now; try again", _BUSY_S)
                        raise result.error
                    found[result.group_id] = result
        if len(found) < len(requests):
            raise ApiError(502, "the teacher ended the call without an answer")
        return [found[request.group_id] for request in requests]

    async def _describe(self, address: str) -> TeacherDescription:
        options: ClientOptions = {**self._options, "timeout_s": CONNECT_TIMEOUT_S}
        async with TeacherClient(address, **options) as client:
            with _map_operator_errors():
                return await client.describe()


@contextmanager
def _map_operator_errors() -> Iterator[None]:
    """Turns errors that are the operator's to fix into 502: the API's key is refused, or replicas differ."""
    try:
        yield
    except TeacherFault as error:
        logger.error("%s", error)  # only here: the message contains the teacher's address
        raise ApiError(502, "the teacher behind this API doesn't answer as expected; see the API's log") from None
    except (Unauthenticated, PermissionDenied) as error:
        logger.error("the teacher refuses this API: %s", error)
        raise ApiError(
            502, "the teacher refuses this API; its operator has to give it a key (VAOPD_API_KEY_FILE)"
        ) from None
