"""vLLM as a rollout engine; the only module that knows vLLM, with `vllm_extension`, which runs inside it.

In: requests. Out: groups, K siblings from one vLLM request each, so that prompt and image are computed once. New
weights are loaded in place. docs/decisions/2026-11-24-rollout-worker.md says what was measured and what did not work.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from services.rollout.engine import (
    Outcome,
    Prompting,
    RefusedRequest,
    check_version,
    make_group,
    make_rollout,
    sibling_seed,
)
from vaopd.errors import ConfigError, InvalidInput, LimitExceeded, Mismatch, VaopdError
from vaopd.torchvision_compat import ensure_torchvision
from vaopd.types import PolicyVersion, Rollout, RolloutRequest
from vaopd.weights import verify_snapshot

MAX_IMAGES_PER_PROMPT = 8
"""The default; rollout.engine_options.limit_mm_per_prompt overrides it. On a GPU, vLLM reserves memory for so many."""
CPU_KV_CACHE_BYTES = 2**30
# The engine would no longer be what the trainer takes it for.
_OURS = ("model", "dtype", "generation_config", "logprobs_mode", "worker_extension_cls", "mm_processor_kwargs")


class VllmEngine:
    """`model` is a folder or hub id; its own weights are never sampled from: `load_policy` comes first."""

    def __init__(
        self,
        model: str,
        *,
        worker: str,
        dtype: str = "bfloat16",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        options = dict(options or {})
        if taken := sorted(set(options) & set(_OURS) - {"dtype"}):
            raise ConfigError(f"rollout.engine_options.{taken[0]} is what the worker sets itself; leave it out")
        if options.pop("dtype", dtype) != dtype:
            raise ConfigError(f"rollout.engine_options.dtype must be student.dtype, which is {dtype}; leave it out")
        _prepare_process(options)
        self._worker = worker
        self._prompting = Prompting.load(model, min_pixels=min_pixels, max_pixels=max_pixels)
        options["limit_mm_per_prompt"] = {
            "image": MAX_IMAGES_PER_PROMPT,
            "video": 0,
            **options.get("limit_mm_per_prompt", {}),
        }
        self._max_images = int(options["limit_mm_per_prompt"]["image"])
        self._policy: PolicyVersion | None = None
        self._llm = _start(model, dtype, options, _pixel_bounds(min_pixels, max_pixels))
        self._llm.collective_rpc("narrow_to_logical_vocabulary", args=(self._prompting.vocab_size,))

    @property
    def policy(self) -> PolicyVersion | None:
        return self._policy

    def load_policy(self, policy: PolicyVersion) -> None:
        verify_snapshot(policy)
        self._policy = None
        self._llm.collective_rpc("load_snapshot", args=(policy.path,))
        # Keys, values and image features of the old weights must not be met again. The encoder cache has two halves:
        # the runner's is emptied by reload_weights, the scheduler's is not, and would promise features that are gone.
        self._llm.llm_engine.reset_encoder_cache()
        if not self._llm.reset_prefix_cache():
            raise VaopdError("vLLM did not reset its prefix cache, since requests still run; start the worker anew")
        self._policy = policy

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Outcome]:
        policy = self._policy
        if policy is None:
            raise Mismatch("no policy is loaded; call load_policy first")
        start = time.monotonic()
        outcomes: dict[int, Outcome] = {}
        accepted: list[int] = []
        for index, request in enumerate(requests):
            try:
                self._enqueue(request, policy)
                accepted.append(index)
            except RefusedRequest as error:
                outcomes[index] = error
        # In the order of their arrival; the ids that enqueue returns are internal ones, which outputs don't bear.
        finished = self._llm.wait_for_completion(use_tqdm=False)
        generation_s = time.monotonic() - start
        if len(finished) != len(accepted):
            raise VaopdError(f"vLLM answered {len(finished)} of {len(accepted)} requests; its log says why")
        for index, output in zip(accepted, finished, strict=True):
            request = requests[index]
            outcomes[index] = make_group(
                request,
                policy,
                prompt_token_ids=output.prompt_token_ids,
                rollouts=_rollouts(request, output),
                worker=self._worker,
                generation_s=generation_s,
            )
        return [outcomes[index] for index in range(len(requests))]

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()
        if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":
            # The engine's process group is this process's own.
            from vllm.distributed import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()

    def _enqueue(self, request: RolloutRequest, policy: PolicyVersion) -> None:
        check_version(request, policy)
        token_ids, images = self._prompting.read(request)
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
            # One at a time, so that a refused request does not take the others with it.
            self._llm.enqueue(prompt, self._sampling(request), use_tqdm=False)
        except (VLLMClientError, ValueError) as error:
            raise InvalidInput(f"vLLM refuses group {request.group_id!r}: {error}") from None

    def _sampling(self, request: RolloutRequest) -> Any:
        from vllm import SamplingParams

        sampling = request.sampling
        greedy = sampling.temperature == 0
        return SamplingParams(
            # Greedy siblings are equal, and vLLM refuses to compute them K times.
            n=1 if greedy else request.num_rollouts,
            temperature=sampling.temperature,
            top_p=1.0 if greedy else sampling.top_p,
            top_k=0,
            max_tokens=sampling.max_new_tokens,
            seed=None if greedy else sibling_seed(request),
            logprobs=0,  # the sampled token's own, nothing else
            logit_bias={token_id: float("-inf") for token_id in self._prompting.vision_token_ids},
            # Exactly the EOS ids that the model declares; vLLM's own idea of EOS is switched off.
            ignore_eos=True,
            stop_token_ids=list(self._prompting.eos_ids),
            detokenize=False,
        )


def _prepare_process(options: dict[str, Any]) -> None:
    """What must be settled before vLLM is imported. Values that the user has set in the environment stay."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_DO_NOT_TRACK", "1")
    ensure_torchvision()
    if not _on_cpu():
        return
    options.setdefault("enforce_eager", True)  # compiling takes longer than a CPU run is likely to last
    if options["enforce_eager"]:
        # Covers the helpers of vLLM's sampler, which are compiled even in eager mode: 13 s at the first request.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if "VLLM_CPU_KVCACHE_SPACE" not in os.environ and "gpu_memory_utilization" not in options:
        options.setdefault("kv_cache_memory_bytes", CPU_KV_CACHE_BYTES)
    if options.get("tensor_parallel_size", 1) == options.get("pipeline_parallel_size", 1) == 1:
        # The engine in this process: no second and third import of vLLM, and the torchvision shim holds by itself.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def _on_cpu() -> bool:
    import torch

    return not torch.accelerator.is_available()


def _pixel_bounds(min_pixels: int | None, max_pixels: int | None) -> dict[str, int]:
    bounds = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    return {key: value for key, value in bounds.items() if value is not None}


def _start(model: str, dtype: Any, options: Mapping[str, Any], pixel_bounds: Mapping[str, int]) -> Any:
    try:
        import vllm
    except ImportError as error:
        raise ConfigError(
            f'vLLM can\'t be imported ({error}); install the extra "cpu" or "gpu", or '
            'set rollout.engine = "transformers"'
        ) from error
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":
        _register_in_process(model)
    llm = vllm.LLM(
        model=model,
        dtype=dtype,
        generation_config="vllm",  # the model's own top_k and the like must not be mixed in
        logprobs_mode="raw_logprobs",  # before temperature, bias and top-p: the student's own at temperature 1
        worker_extension_cls="services.rollout.vllm_extension.RolloutExtension",
        mm_processor_kwargs=dict(pixel_bounds) or None,
        **options,
    )
    # On a CPU it warns at every image that threads were not set, which is how it is meant to be. (Set before, the level
    # would be lost: starting the engine configures vLLM's loggers anew.)
    logging.getLogger("vllm.v1.worker.cpu_worker").setLevel(logging.ERROR)
    return llm


def _register_in_process(model: str) -> None:
    """Has vLLM look at the model's class here, not in a subprocess (7 s), which would lack the torchvision shim."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    for name in AutoConfig.from_pretrained(model).architectures or ():
        if name in ModelRegistry.models:
            ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def _rollouts(request: RolloutRequest, output: Any) -> list[Rollout]:
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
