"""The student of `--student`, for the event loop: answers one question after another on its own thread."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from vaopd.http_types import SampleReply
from vaopd.sampling.adhoc import AdHocStudent
from vaopd.types import EncodedImage, SamplingSettings


class Student:
    """`model`: a folder or hub id. An engine belongs to one thread."""

    def __init__(self, model: str, *, dtype: str = "float32") -> None:
        """Raises NotFound for a name that can't be a model."""
        self._student = AdHocStudent(model, dtype=dtype)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="student")

    @property
    def model(self) -> str:
        return self._student.model

    @property
    def loaded(self) -> bool:
        return self._student.loaded

    async def sample(
        self, question: str, images: Sequence[EncodedImage], sampling: SamplingSettings, *, num_responses: int
    ) -> SampleReply:
        """Raises what the engine refuses."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._student.answer, question, images, sampling, num_responses)
