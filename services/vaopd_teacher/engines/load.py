"""Loads the backend that a configuration asks for."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial

import torch

from vaopd import payloads
from vaopd.config import Config, TeacherServiceConfig
from vaopd.vlm import vllm_start
from vaopd.vlm.model import Vlm
from vaopd.vlm.revision import compute_revision
from vaopd_teacher.engines.backend import Backend
from vaopd_teacher.engines.columns import COMPUTED
from vaopd_teacher.engines.engine import Engine
from vaopd_teacher.engines.transformers_engine import GroupEngine
from vaopd_teacher.engines.vision_cache import VisionCache


def make_backend(vlm: Vlm, *, batch_tokens: int, vision_bytes: int, engine: Engine | None = None) -> Backend:
    """Makes the transformers backend over a loaded model; `vision_bytes`: the budget for the vision tower's outputs."""
    cache = VisionCache(vlm, capacity_bytes=vision_bytes)
    return Backend(
        reader=vlm,
        engine=engine or GroupEngine(vlm, batch_tokens=batch_tokens, vision_cache=cache),
        revision=compute_revision(vlm.model),
        dtype=str(vlm.head.dtype).removeprefix("torch."),
        payloads=payloads.PAYLOADS,
        columns=tuple(COMPUTED),
        head=vlm.head,
        vision_cache=cache,
    )


def load(config: Config, service: TeacherServiceConfig) -> Backend:
    """Loads the teacher of a configuration, with the data section's pixel bounds, as the trainer's processor has them.

    Raises ConfigError when the configuration's backend can't run here.
    """
    engine = service.engine
    if engine.backend == "vllm":
        vllm_start.set_environment()
    if os.environ.get("OMP_NUM_THREADS") is None and not torch.cuda.is_available():
        # Several processes share the host's cores; two threads each under contention ran up to ten times slower.
        torch.set_num_threads(1)
    if engine.backend == "vllm":
        from vaopd_teacher.engines.vllm_engine import load as load_vllm

        return load_vllm(config, engine.options)
    backend_of = partial(
        make_backend, batch_tokens=config.teacher.batch_tokens, vision_bytes=service.images.vision_bytes
    )
    if (processes := service.count_ranks(config.teacher.processes)) > 1:
        from vaopd_teacher.engines.tensor_parallel import lead

        leading = lead(config, processes=processes)
        return replace(backend_of(leading), close=leading.end_followers)
    vlm = Vlm.load(
        config.teacher.model,
        dtype=config.teacher.dtype,
        device_map=config.teacher.device_map,
        min_pixels=config.data.min_pixels,
        max_pixels=config.data.max_pixels,
    )
    return backend_of(vlm)
