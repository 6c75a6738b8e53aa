"""A loaded teacher as the server sees it, whichever backend holds the weights: transformers in this process, or vLLM.

The server reads prompts with `reader`, hands prepared groups to `engine`, and tells its clients the rest.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from services.teacher.engine import Engine, GroupEngine
from services.teacher.revision import revision_of
from services.teacher.vision_cache import VisionCache
from vaopd import payloads
from vaopd.config import Config
from vaopd.prompts import PromptReader
from vaopd.service_config import ServiceConfig
from vaopd.types import PayloadKind
from vaopd.vlm import Vlm


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Backend:
    """`payloads`: what it can send. `head` (V, D): None where the weights are out of reach, as under vLLM."""

    reader: PromptReader
    engine: Engine
    revision: str
    dtype: str
    payloads: tuple[PayloadKind, ...]
    head: torch.Tensor | None = None
    vision_cache: VisionCache | None = None
    close: Callable[[], None] = lambda: None


def over(vlm: Vlm, *, batch_tokens: int, vision_bytes: int, engine: Engine | None = None) -> Backend:
    """The transformers backend over a loaded model."""
    cache = VisionCache(vlm, capacity_bytes=vision_bytes)
    return Backend(
        reader=vlm,
        engine=engine or GroupEngine(vlm, batch_tokens=batch_tokens, vision_cache=cache),
        revision=revision_of(vlm.model),
        dtype=str(vlm.head.dtype).removeprefix("torch."),
        payloads=payloads.PAYLOADS,
        head=vlm.head,
        vision_cache=cache,
    )


def load(config: Config, service: ServiceConfig) -> Backend:
    """The teacher of a configuration, with the data section's pixel bounds, as the trainer's processor has them."""
    if os.environ.get("OMP_NUM_THREADS") is None and not torch.cuda.is_available():
        # Several processes share the host's cores; two threads each under contention ran up to ten times slower.
        torch.set_num_threads(1)
    if service.engine.backend == "vllm":
        from services.teacher.vllm_engine import load as load_vllm

        return load_vllm(config, service.engine.options)
    if service.engine.processes > 1:
        from services.teacher.ranks import lead

        leading = lead(config, processes=service.engine.processes)
        shared = over(leading, batch_tokens=config.teacher.batch_tokens, vision_bytes=service.images.vision_bytes)
        return replace(shared, close=leading.let_go)
    vlm = Vlm.load(
        config.teacher.model,
        dtype=config.teacher.dtype,
        device_map=config.teacher.device_map,
        min_pixels=config.data.min_pixels,
        max_pixels=config.data.max_pixels,
    )
    return over(vlm, batch_tokens=config.teacher.batch_tokens, vision_bytes=service.images.vision_bytes)
