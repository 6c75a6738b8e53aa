"""A rollout engine over vLLM; `vllm_extension` runs inside vLLM.

In: requests, at any time. Out: groups, each when its last sibling ends; the K siblings of a group are one vLLM request,
so that prompt and image are computed once. New weights are loaded in place, while nothing is sampled. A snapshot of
adapters is applied beside the base weights by vLLM's own LoRA, or merged into them for families that need it.
docs/decisions/2026-11-24-rollout-worker.md has the measurements and the failures.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vaopd.config import LoraConfig
from vaopd.errors import ConfigError, InvalidInput, LimitExceeded, Mismatch, VaopdError
from vaopd.files.hub import model_folder
from vaopd.run.snapshots import is_adapter, verify_snapshot
from vaopd.sampling.engine import (
    Ended,
    Outcome,
    RefusedRequest,
    check_length,
    check_version,
    count_tokens,
    derive_seed,
    make_group,
    make_rollout,
    open_reader,
    read_request,
    sample_all,
)
from vaopd.types import PolicyVersion, Rollout, RolloutRequest
from vaopd.vlm import vllm_start

log = logging.getLogger(__name__)

# Options that the trainer relies on.
_OURS = ("model", "dtype", "generation_config", "logprobs_mode", "worker_extension_cls", "mm_processor_kwargs")


@dataclass(frozen=True, slots=True)
class _Running:
    """A request that vLLM samples. began_s: when it was added; time.monotonic."""

    key: str
    request: RolloutRequest
    began_s: float


class VllmEngine:
    """The rollout engine over vLLM, and its stream; see `RolloutEngine` and `RolloutStream` for its methods."""

    capacity: int | None = None

    def __init__(
        self,
        model: str,
        *,
        worker: str,
        dtype: str = "bfloat16",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        options: Mapping[str, Any] | None = None,
        lora: LoraConfig | None = None,
        vision_tower: bool = True,
    ) -> None:
        """Starts vLLM for a folder or hub id; its own weights are sampled from with adapters only.

        options: `rollout.engine_options`, by vLLM's names. lora: the snapshots are adapters, of this rank.
        vision_tower: whether it has adapters too.

        Raises ConfigError for an option that the worker sets itself, and if vLLM isn't installed.
        """
        options = dict(options or {})
        if taken := sorted(set(options) & set(_OURS) - {"dtype"}):
            raise ConfigError(f"rollout.engine_options.{taken[0]} is set by the worker itself; leave it out")
        if options.pop("dtype", dtype) != dtype:
            raise ConfigError(f"rollout.engine_options.dtype must be student.dtype, which is {dtype}; leave it out")
        self._worker = worker
        self._reader = open_reader(model, min_pixels=min_pixels, max_pixels=max_pixels)
        self._policy: PolicyVersion | None = None
        self._running: dict[str, _Running] = {}  # by vLLM's id of the request
        self._refused: list[Ended] = []
        self._base, self._dtype = model, dtype
        self._adapter: Any = None  # vLLM's request for the loaded adapters, where it computes with them
        family = self._reader.config.model_type
        lora_options = lora and vllm_start.make_lora_options(family, rank=lora.rank, vision_tower=vision_tower)
        self._merges = not lora_options
        if lora and self._merges:
            log.info("vLLM doesn't apply adapters in all layers of %s: they are merged into its weights", family)
        self._llm = vllm_start.start(
            model,
            dtype=dtype,
            options=options,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            extension="vaopd.sampling.vllm_extension.RolloutExtension",
            logprobs_mode="raw_logprobs",  # before temperature, bias and top-p: those of the student at temperature 1
            **lora_options or {},
        )
        self._max_images = vllm_start.read_max_images(self._llm)
        self._llm.collective_rpc("narrow_to_logical_vocabulary", args=(self._reader.vocab_size,))

    @property
    def policy(self) -> PolicyVersion | None:
        """The loaded snapshot."""
        return self._policy

    @property
    def tokens_held(self) -> int:
        """See `RolloutStream`; an upper bound where requests differ in their limits."""
        requests = [running.request for running in self._running.values()]
        rollouts = self._llm.llm_engine.get_num_unfinished_requests()
        longest = max((request.sampling.max_new_tokens for request in requests), default=0)
        return min(rollouts * longest, sum(map(count_tokens, requests)))

    def load_policy(self, policy: PolicyVersion) -> None:
        """Loads a snapshot in place and empties vLLM's caches; see `RolloutEngine`."""
        if self._running:
            raise VaopdError(
                f"{len(self._running)} groups of another policy are still sampled; version {policy.version} must not "
                "be loaded before they end"
            )
        verify_snapshot(policy)
        self._policy = None
        self._load(policy)
        # Keys, values and image features of the old weights must not be used again. The encoder cache has two halves:
        # reload_weights empties the runner's but not the scheduler's, which would then promise features that are gone.
        self._llm.llm_engine.reset_encoder_cache()
        if not self._llm.reset_prefix_cache():
            raise VaopdError("vLLM did not reset its prefix cache, since requests still run; restart the worker")
        self._policy = policy

    def _load(self, policy: PolicyVersion) -> None:
        if not is_adapter(policy.path):
            self._llm.collective_rpc("load_snapshot", args=(policy.path,))
        elif self._merges:
            folder = model_folder(self._base, role="student").resolve()
            self._llm.collective_rpc("load_merged", args=(str(folder), policy.path, self._dtype))
        else:
            from vllm.lora.request import LoRARequest

            if self._adapter is not None:
                self._llm.llm_engine.remove_lora(self._adapter.lora_int_id)
            # Loaded under this number, the next version's adapters are not taken for these.
            self._adapter = LoRARequest(f"v{policy.version}", policy.version + 1, policy.path)
            self._llm.llm_engine.add_lora(self._adapter)

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Outcome]:
        """Samples all requests beside each other; see `RolloutEngine`."""
        outcomes = dict(sample_all(self, requests))
        return [outcomes[index] for index in range(len(requests))]

    def add(self, key: str, request: RolloutRequest) -> None:
        """Gives vLLM a request; see `RolloutStream`."""
        if self._policy is None:
            raise Mismatch("no policy is loaded; call load_policy first")
        began_s = time.monotonic()
        try:
            vllm_id = self._enqueue(request, self._policy)
        except RefusedRequest as error:
            self._refused.append(Ended(key, error))
        else:
            self._running[vllm_id] = _Running(key, request, began_s)

    def step(self) -> list[Ended]:
        """Samples one token of each rollout, or computes prompts; see `RolloutStream`."""
        ended, self._refused = self._refused, []
        if ended or not self._running:
            return ended
        if not self._llm.llm_engine.has_unfinished_requests():
            raise VaopdError(f"vLLM lost {len(self._running)} requests; its log says why")
        return [
            self._finish(self._running.pop(output.request_id), output)
            for output in self._llm.llm_engine.step()
            if output.finished
        ]

    def close(self) -> None:
        """Stops vLLM."""
        vllm_start.stop(self._llm)

    def _finish(self, running: _Running, output: Any) -> Ended:
        assert self._policy is not None
        request = running.request
        try:
            # Not when the request is added: only vLLM knows how many tokens its images take.
            check_length(
                request,
                prompt_tokens=len(output.prompt_token_ids),
                limit=self._llm.llm_engine.model_config.max_model_len,
                remedy="raise rollout.engine_options.max_model_len or lower rollout.max_new_tokens",
            )
        except RefusedRequest as error:
            return Ended(running.key, error)
        group = make_group(
            request,
            self._policy,
            prompt_token_ids=output.prompt_token_ids,
            rollouts=_make_rollouts(request, output),
            worker=self._worker,
            generation_s=time.monotonic() - running.began_s,
        )
        return Ended(running.key, group)

    def _enqueue(self, request: RolloutRequest, policy: PolicyVersion) -> str:
        """Returns the id that vLLM's outputs have. Raises RefusedRequest."""
        check_version(request, policy)
        token_ids, images = read_request(self._reader, request)
        if len(images) > self._max_images:
            raise LimitExceeded(
                f"group {request.group_id!r} has {len(images)} images, the limit is {self._max_images}; "
                "raise rollout.engine_options.limit_mm_per_prompt"
            )
        from vllm.exceptions import VLLMClientError

        prompt: dict[str, Any] = {"prompt_token_ids": token_ids}
        if images:
            prompt["multi_modal_data"] = {"image": images}
        try:
            # One at a time, so that a refused request doesn't fail the others.
            [internal_id] = self._llm.enqueue(
                prompt, self._make_sampling_params(request), lora_request=self._adapter, use_tqdm=False
            )
        except (VLLMClientError, ValueError) as error:
            raise InvalidInput(f"vLLM refuses group {request.group_id!r}: {error}") from None
        return str(internal_id).partition("-")[0]  # NUMBER-RANDOM; outputs have the number alone

    def _make_sampling_params(self, request: RolloutRequest) -> Any:
        from vllm import SamplingParams

        sampling = request.sampling
        greedy = sampling.temperature == 0
        return SamplingParams(
            # Greedy siblings are equal, and vLLM refuses n > 1 for them.
            n=1 if greedy else request.num_rollouts,
            temperature=sampling.temperature,
            top_p=1.0 if greedy else sampling.top_p,
            top_k=0,
            max_tokens=sampling.max_new_tokens,
            seed=None if greedy else derive_seed(request),
            logprobs=0,  # the sampled token's only
            logit_bias={token_id: float("-inf") for token_id in sorted(self._reader.vision_token_ids)},
            # Exactly the EOS ids that the model declares, in place of vLLM's own EOS.
            ignore_eos=True,
            stop_token_ids=list(self._reader.eos_ids),
            detokenize=False,
        )


def _make_rollouts(request: RolloutRequest, output: Any) -> list[Rollout]:
    siblings = sorted(output.outputs, key=lambda sibling: sibling.index)
    if len(siblings) == 1:
        siblings *= request.num_rollouts  # greedy
    rollouts = []
    for index, sibling in enumerate(siblings):
        if sibling.finish_reason not in ("stop", "length"):
            raise VaopdError(f"vLLM ended group {request.group_id!r} with {sibling.finish_reason!r}; its log says why")
        ids = list(sibling.token_ids)
        # (T,) dicts, each with the sampled token's log-prob.
        logprobs = [step[token_id].logprob for step, token_id in zip(sibling.logprobs, ids, strict=True)]
        rollouts.append(make_rollout(request, index, response_ids=ids, logprobs=logprobs, finish=sibling.finish_reason))
    return rollouts
