"""Builds the rollout engine of a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vaopd.config import Config

if TYPE_CHECKING:
    from vaopd.sampling.engine import RolloutEngine


def build_engine(config: Config, *, worker: str) -> RolloutEngine:
    """Builds the engine of `rollout.engine` for `student.model`; `worker` names it in its rollouts."""
    student, data = config.student, config.data
    settings: dict[str, Any] = {
        "worker": worker,
        "dtype": student.dtype,
        "min_pixels": data.min_pixels,
        "max_pixels": data.max_pixels,
        "lora": student.lora,
        "vision_tower": student.train_vision_tower,
    }
    if config.rollout.engine == "transformers":
        from vaopd.sampling.transformers_engine import TransformersEngine

        return TransformersEngine(student.model, **settings)
    from vaopd.sampling.vllm_engine import VllmEngine

    return VllmEngine(student.model, options=config.rollout.engine_options, **settings)
