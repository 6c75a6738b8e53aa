"""A student that answers questions ad hoc, in this process: what `--student` brings. The only part that loads torch."""

from __future__ import annotations

import asyncio
import tempfile
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from services.rollout.transformers_engine import TransformersEngine
from vaopd.errors import NotFound
from vaopd.http_types import SampledResponse, SampleReply
from vaopd.prompts import load_processor, tokenizer_fingerprint
from vaopd.scoring import unique_images, user_turn
from vaopd.types import EncodedImage, RolloutRequest, SamplingSettings
from vaopd.weights import snapshot_of


class Student:
    """`model`: a folder or hub id. An engine belongs to one thread, so questions are answered one after the other."""

    def __init__(self, model: str, *, dtype: str = "float32") -> None:
        self.model = Path(model).name
        folder = _folder(model)
        self._tokenizer = load_processor(folder).tokenizer
        self.tokenizer_fingerprint = tokenizer_fingerprint(self._tokenizer)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="student")
        self._engine = TransformersEngine(folder, worker="api", dtype=dtype)
        with tempfile.TemporaryDirectory(prefix="vaopd-student-") as scratch:
            self._policy = snapshot_of(folder, Path(scratch))
            self._thread.submit(self._engine.load_policy, self._policy).result()

    async def sample(
        self, question: str, images: Sequence[EncodedImage], sampling: SamplingSettings, *, num_responses: int
    ) -> SampleReply:
        """Raises what the engine refuses."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self.answer, question, images, sampling, num_responses)

    def answer(
        self, question: str, images: Sequence[EncodedImage], sampling: SamplingSettings, num_responses: int
    ) -> SampleReply:
        request = RolloutRequest(
            group_id=uuid.uuid4().hex,
            messages=user_turn(question, images),
            images=unique_images(images),
            num_rollouts=num_responses,
            sampling=sampling,
            policy_version=self._policy.version,
        )
        (outcome,) = self._engine.generate([request])
        if isinstance(outcome, Exception):
            raise outcome
        return SampleReply(
            model=self.model,
            responses=[
                SampledResponse(
                    text=self._tokenizer.decode(rollout.response_ids, skip_special_tokens=True),
                    token_ids=rollout.response_ids.tolist(),
                    finish_reason=rollout.finish_reason,
                )
                for rollout in outcome.rollouts
            ],
        )


def _folder(model: str) -> Path:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        raise NotFound(f"student {model!r} is no folder here and can't be had from the hub; give a folder") from None
