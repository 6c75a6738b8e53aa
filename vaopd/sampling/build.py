"""Builds the rollout engine of a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vaopd.config import Config

if TYPE_CHECKING:
    from vaopd.sampling.engine import RolloutEngine


def build_engine(config: Config, *, worker: str) -> RolloutEngine:
    """Builds the engine of `rollout.engine` for `student.model`; `worker` names it in its rollouts."""
    model, dtype = config.student.model, config.student.dtype
    min_pixels, max_pixels = config.data.min_pixels, config.data.max_pixels
    if config.rollout.engine == "transformers":
        from vaopd.sampling.transformers_engine import TransformersEngine

        return TransformersEngine(model, worker=worker, dtype=dtype, min_pixels=min_pixels, max_pixels=max_pixels)
    from vaopd.sampling.vllm_engine import VllmEngine

    options = config.rollout.engine_options
    return VllmEngine(model, worker=worker, dtype=dtype, min_pixels=min_pixels, max_pixels=max_pixels, options=options)
