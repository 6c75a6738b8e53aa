"""Starts and stops vLLM, for rollouts as for a teacher; what each of them needs beyond that is in its own engine."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from vaopd.errors import ConfigError
from vaopd.vlm.torchvision_compat import ensure_torchvision

MAX_IMAGES_PER_PROMPT = 8
"""The default; the option limit_mm_per_prompt overrides it. On a GPU, vLLM reserves memory for so many."""
CPU_KV_CACHE_BYTES = 2**30


def start(
    model: str,
    *,
    dtype: Any,  # of vLLM's own literals
    options: Mapping[str, Any],
    min_pixels: int | None,
    max_pixels: int | None,
    extension: str,
    **ours: Any,
) -> Any:
    """A `vllm.LLM`. `options`: the user's, of vLLM's own names; `extension`: the class that joins vLLM's workers.

    Raises ConfigError where there is no vLLM.
    """
    options = dict(options)
    _prepare_process(options)
    try:
        import vllm
    except ImportError as error:
        raise ConfigError(f'vLLM can\'t be imported ({error}); install the extra "cpu" or "gpu"') from error
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":
        _register_in_process(model)
    images = {"image": MAX_IMAGES_PER_PROMPT, "video": 0, **options.pop("limit_mm_per_prompt", {})}
    bounds = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    llm = vllm.LLM(
        model=model,
        dtype=dtype,
        generation_config="vllm",  # the model's own top_k and the like must not be mixed in
        worker_extension_cls=extension,
        mm_processor_kwargs={name: value for name, value in bounds.items() if value is not None} or None,
        limit_mm_per_prompt=images,
        **options,
        **ours,
    )
    # On a CPU it warns at every image that threads were not set, which is how it is meant to be. (Set before, the level
    # would be lost: starting the engine configures vLLM's loggers anew.)
    logging.getLogger("vllm.v1.worker.cpu_worker").setLevel(logging.ERROR)
    return llm


def max_images(llm: Any) -> int:
    """How many images a prompt may have."""
    return int(llm.llm_engine.model_config.multimodal_config.get_limit_per_prompt("image"))


def stop(llm: Any) -> None:
    llm.llm_engine.engine_core.shutdown()
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":
        # The engine's process group is this process's own.
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()


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


def _register_in_process(model: str) -> None:
    """Has vLLM look at the model's class here, not in a subprocess (7 s), which would lack the torchvision shim."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    for name in AutoConfig.from_pretrained(model).architectures or ():
        if name in ModelRegistry.models:
            ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())
