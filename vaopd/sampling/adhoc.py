"""Answers a single question with a student in this process, for the API's `--student` and `vaopd score --generate`.

The student is loaded at the first question; until then it needs neither memory nor torch.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vaopd.errors import NotFound
from vaopd.files.hub import is_hub_id, model_folder
from vaopd.http_types import SampledResponse, SampleReply
from vaopd.types import EncodedImage, PolicyVersion, RolloutRequest, SamplingSettings, unique_images, user_turn

if TYPE_CHECKING:
    from vaopd.sampling.transformers_engine import TransformersEngine

log = logging.getLogger("vaopd.api")


class AdHocStudent:
    """A student that answers questions. Use it from one thread."""

    def __init__(self, model: str, *, dtype: str = "float32") -> None:
        """Takes a folder or hub id; loads nothing yet. Raises NotFound for a name that can't be a model."""
        if not Path(model).is_dir() and not is_hub_id(model):
            raise NotFound(f"student {model!r} is no folder here, and no hub id of the form ORG/NAME")
        # The run's name distinguishes the RUN/model of several runs.
        parts = Path(model).absolute().parts if Path(model).name in ("model", "best") else Path(model).parts[-1:]
        self.model = "/".join(parts[-2:])
        self._source = model
        self._dtype = dtype
        self._loaded: _Loaded | None = None

    @property
    def loaded(self) -> bool:
        """Whether the model is in memory."""
        return self._loaded is not None

    def answer(
        self, question: str, images: Sequence[EncodedImage], sampling: SamplingSettings, num_responses: int
    ) -> SampleReply:
        """Samples `num_responses` answers. Raises InvalidInput, LimitExceeded or Mismatch as the engine does."""
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
    """The model in memory; only the thread that made it may use it."""

    def __init__(self, model: str, *, dtype: str) -> None:
        from vaopd.run.snapshots import describe_model
        from vaopd.sampling.transformers_engine import TransformersEngine  # torch
        from vaopd.vlm.prompts import load_processor, tokenizer_fingerprint

        log.info("loading the student %s", model)
        folder = model_folder(model, role="student")
        self.tokenizer: Any = load_processor(folder).tokenizer
        self.fingerprint = tokenizer_fingerprint(self.tokenizer)
        self.engine: TransformersEngine = TransformersEngine(folder, worker="api", dtype=dtype)
        self.policy: PolicyVersion = describe_model(folder)
        self.engine.load_policy(self.policy)
        log.info("the student %s is loaded", model)
