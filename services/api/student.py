"""A student that answers questions ad hoc, in this process: what `--student` brings.

It is loaded when the first question comes: until then it costs nothing, and the API needs no torch.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vaopd.errors import NotFound
from vaopd.http_types import SampledResponse, SampleReply
from vaopd.preflight import is_hub_id
from vaopd.scoring import unique_images, user_turn
from vaopd.types import EncodedImage, PolicyVersion, RolloutRequest, SamplingSettings

if TYPE_CHECKING:
    from services.rollout.transformers_engine import TransformersEngine

logger = logging.getLogger("vaopd.api")


class Student:
    """`model`: a folder or hub id. An engine belongs to one thread, so questions are answered one after the other."""

    def __init__(self, model: str, *, dtype: str = "float32") -> None:
        """Raises NotFound for what can't be a model."""
        if not Path(model).is_dir() and not is_hub_id(model):
            raise NotFound(f"student {model!r} is no folder here, and no hub id of the form ORG/NAME")
        self.model = Path(model).name
        self._source = model
        self._dtype = dtype
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="student")
        self._loaded: _Loaded | None = None

    @property
    def loaded(self) -> bool:
        return self._loaded is not None

    async def sample(
        self, question: str, images: Sequence[EncodedImage], sampling: SamplingSettings, *, num_responses: int
    ) -> SampleReply:
        """Raises what the engine refuses."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self.answer, question, images, sampling, num_responses)

    def answer(
        self, question: str, images: Sequence[EncodedImage], sampling: SamplingSettings, num_responses: int
    ) -> SampleReply:
        """Belongs on the student's thread; elsewhere only where nobody else asks."""
        student = self._loaded = self._loaded or _Loaded(self._source, dtype=self._dtype)
        request = RolloutRequest(
            group_id=uuid.uuid4().hex,
            messages=user_turn(question, images),
            images=unique_images(images),
            num_rollouts=num_responses,
            sampling=sampling,
            policy_version=student.policy.version,
        )
        (outcome,) = student.engine.generate([request])
        if isinstance(outcome, Exception):
            raise outcome
        return SampleReply(
            model=self.model,
            tokenizer_fingerprint=student.fingerprint,
            responses=[
                SampledResponse(
                    text=student.tokenizer.decode(rollout.response_ids, skip_special_tokens=True),
                    token_ids=rollout.response_ids.tolist(),
                    finish_reason=rollout.finish_reason,
                )
                for rollout in outcome.rollouts
            ],
        )


class _Loaded:
    """The model in memory; made on the thread that asks it."""

    def __init__(self, model: str, *, dtype: str) -> None:
        from services.rollout.transformers_engine import TransformersEngine  # torch
        from vaopd.prompts import load_processor, tokenizer_fingerprint
        from vaopd.weights import snapshot_of

        logger.info("loading the student %s", model)
        folder = _folder(model)
        self.tokenizer: Any = load_processor(folder).tokenizer
        self.fingerprint = tokenizer_fingerprint(self.tokenizer)
        self.engine: TransformersEngine = TransformersEngine(folder, worker="api", dtype=dtype)
        with tempfile.TemporaryDirectory(prefix="vaopd-student-") as scratch:
            self.policy: PolicyVersion = snapshot_of(folder, Path(scratch))
            self.engine.load_policy(self.policy)
        logger.info("the student %s is loaded", model)


def _folder(model: str) -> Path:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        raise NotFound(f"student {model!r} is no folder here and can't be had from the hub; give a folder") from None
