"""A rollout engine over transformers' `generate`, for hosts without vLLM. Runs one request at a time, with K rows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from vaopd.config import LoraConfig
from vaopd.errors import Mismatch
from vaopd.run.snapshots import ADAPTER_FILE, verify_snapshot
from vaopd.sampling.engine import (
    FinishReason,
    Outcome,
    RefusedRequest,
    check_length,
    check_version,
    derive_seed,
    make_group,
    make_rollout,
    open_reader,
    read_request,
)
from vaopd.types import PolicyVersion, Rollout, RolloutGroup, RolloutRequest
from vaopd.vlm.adapters import add_adapters, load_adapters
from vaopd.vlm.model import Vlm
from vaopd.vlm.prompts import PreparedPrompt
from vaopd.vlm.torchvision_compat import ensure_torchvision

ensure_torchvision()
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList  # noqa: E402


@dataclass(eq=False)
class TransformersEngine:
    """The rollout engine without vLLM; see `RolloutEngine` for its methods."""

    model: str | Path
    """Folder or hub id; its processor and EOS ids are used for all snapshots."""
    _: KW_ONLY
    worker: str
    dtype: str = "float32"
    min_pixels: int | None = None
    max_pixels: int | None = None
    lora: LoraConfig | None = None
    """With it, the snapshots are adapters of the model's weights."""
    vision_tower: bool = True
    """Whether the tower has adapters, too."""

    def __post_init__(self) -> None:
        self._device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        self._reader = open_reader(self.model, min_pixels=self.min_pixels, max_pixels=self.max_pixels)
        self._vlm: Vlm | None = None
        self._policy: PolicyVersion | None = None

    @property
    def policy(self) -> PolicyVersion | None:
        """The loaded snapshot."""
        return self._policy

    def load_policy(self, policy: PolicyVersion) -> None:
        """Loads a snapshot; see `RolloutEngine`."""
        verify_snapshot(policy)
        self._policy = None
        if self.lora is None:
            self._vlm = None  # before the new weights are loaded, so that both are never in memory
            vlm = self._open(policy.path)
        else:
            vlm = self._vlm or self._open_base(self.lora)
            load_adapters(vlm.model, load_file(Path(policy.path) / ADAPTER_FILE))
        # Empty, so that the model's own settings (top_k, repetition_penalty, …) don't mix with a request's.
        vlm.model.generation_config = GenerationConfig()
        self._vlm = vlm
        self._policy = policy

    def _open(self, model: str | Path) -> Vlm:
        return Vlm.load(
            model, dtype=self.dtype, device=str(self._device), min_pixels=self.min_pixels, max_pixels=self.max_pixels
        )

    def _open_base(self, lora: LoraConfig) -> Vlm:
        vlm = self._open(self.model)
        add_adapters(vlm, lora, vision_tower=self.vision_tower, dtype=getattr(torch, self.dtype))
        return vlm

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Outcome]:
        """Samples all requests, one after the other; see `RolloutEngine`."""
        vlm, policy = self._vlm, self._policy
        if vlm is None or policy is None:
            raise Mismatch("no policy is loaded; call load_policy first")
        outcomes: list[Outcome] = []
        for request in requests:
            try:
                check_version(request, policy)
                outcomes.append(self._sample_group(vlm, policy, request))
            except RefusedRequest as error:
                outcomes.append(error)
        return outcomes

    def close(self) -> None:
        """Frees the model's memory."""
        self._vlm = None
        self._policy = None

    def _sample_group(self, vlm: Vlm, policy: PolicyVersion, request: RolloutRequest) -> RolloutGroup:
        start = time.monotonic()
        prompt = self._prepare_prompt(vlm, request)
        ids_KT, logprobs_KT = self._sample(vlm, request, prompt)
        if request.sampling.temperature == 0:
            ids_KT = np.repeat(ids_KT, request.num_rollouts, axis=0)
            logprobs_KT = np.repeat(logprobs_KT, request.num_rollouts, axis=0)
        return make_group(
            request,
            policy,
            prompt_token_ids=prompt.token_ids.tolist(),
            rollouts=[self._cut(request, k, ids_KT[k], logprobs_KT[k]) for k in range(request.num_rollouts)],
            worker=self.worker,
            generation_s=time.monotonic() - start,
        )

    def _prepare_prompt(self, vlm: Vlm, request: RolloutRequest) -> PreparedPrompt:
        ids, images = read_request(self._reader, request)
        prepared = [vlm.prepare_image(image) for image in images]
        expanded = vlm.expand(ids, prepared)
        check_length(
            request,
            prompt_tokens=len(expanded),
            limit=vlm.max_tokens,
            remedy="lower max_new_tokens, shorten the prompt or scale its images down",
        )
        return vlm.read_token_ids(expanded, prepared)

    @torch.inference_mode()
    def _sample(self, vlm: Vlm, request: RolloutRequest, prompt: PreparedPrompt) -> tuple[np.ndarray, np.ndarray]:
        """Returns response ids and log-probs, (K, T) each, or (1, T) if greedy; values after the first EOS are void."""
        sampling = request.sampling
        greedy = sampling.temperature == 0
        settings: dict[str, Any] = {"do_sample": False}
        if not greedy:
            settings = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
            settings["num_return_sequences"] = request.num_rollouts
        recorder = _BanAndRecord(vlm.vocab_size, sorted(self._reader.vision_token_ids))
        input_ids = torch.from_numpy(prompt.token_ids)[None].to(self._device)
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(request))
            sequences = vlm.model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                generation_config=GenerationConfig(
                    max_new_tokens=sampling.max_new_tokens,
                    eos_token_id=list(self._reader.eos_ids),
                    pad_token_id=self._reader.eos_ids[0],
                    **settings,
                ),
                logits_processor=LogitsProcessorList([recorder]),
                **vlm.family.make_generation_inputs(vlm.model, input_ids, prompt.images),
            )
        response_KT = sequences[:, input_ids.shape[1] :]
        return response_KT.cpu().numpy(), recorder.collect_logprobs(response_KT).cpu().numpy()

    def _cut(self, request: RolloutRequest, index: int, ids: np.ndarray, logprobs: np.ndarray) -> Rollout:
        ends = np.flatnonzero(np.isin(ids, self._reader.eos_ids))
        length = int(ends[0]) + 1 if ends.size else len(ids)
        finish: FinishReason = "stop" if ends.size else "length"
        return make_rollout(
            request, index, response_ids=ids[:length].tolist(), logprobs=logprobs[:length].tolist(), finish=finish
        )


class _BanAndRecord(LogitsProcessor):
    """Runs before temperature and top-p: records the student's log-probs, then bans ids that must not be sampled.

    Only one step's log-probs (K, V) exist at a time: the sampled token is known at the next step.
    """

    def __init__(self, vocab_size: int, banned: Sequence[int]) -> None:
        self._vocab_size = vocab_size
        self._banned = list(banned)
        self._pending: torch.Tensor | None = None
        self._recorded: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self._pending is not None:
            self._record(input_ids[:, -1])
        self._pending = scores[:, : self._vocab_size].float().log_softmax(dim=-1)
        allowed = scores.clone()
        allowed[:, self._vocab_size :] = float("-inf")
        allowed[:, self._banned] = float("-inf")
        return allowed  # type: ignore[return-value]

    def collect_logprobs(self, response_KT: torch.Tensor) -> torch.Tensor:
        """Returns the sampled tokens' log-probs (K, T), float32. Call it once, after generation."""
        self._record(response_KT[:, -1])
        return torch.stack(self._recorded, dim=1)

    def _record(self, sampled_K: torch.Tensor) -> None:
        assert self._pending is not None
        self._recorded.append(self._pending.gather(1, sampled_K[:, None])[:, 0])
