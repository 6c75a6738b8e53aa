"""Lets the student of `--student` answer the event loop's questions, one after another on its own thread."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from vaopd.http_types import SampleReply
from vaopd.sampling.adhoc import AdHocStudent
from vaopd.types import EncodedImage, SamplingSettings


class Student:
    """A student by folder or hub id, on one thread, since an engine belongs to one."""

    def __init__(self, model: str, *, dtype: str = "float32") -> None:
        """Raises NotFound for a name that is neither a folder nor a hub id."""
        self._student = AdHocStudent(model, dtype=dtype)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="student")

    @property
    def model(self) -> str:
        """The model's name or folder."""
        return self._student.model

    @property
    def loaded(self) -> bool:
        """Whether the model is in memory."""
        return self._student.loaded

    async def sample(
        self, question: str, images: Sequence[EncodedImage], sampling: SamplingSettings, *, num_responses: int
    ) -> SampleReply:
        """Samples `num_responses` responses to one question. Raises InvalidInput and other errors of the engine."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._student.answer, question, images, sampling, num_responses)
