"""Adapters, one for each model family, with all code that is specific to it; `vaopd.vlm.model` is the same for all.

To add a family, write a module beside `internvl.py` with a subclass of `Family`, and name it in `_FAMILIES`.
"""

from __future__ import annotations

from vaopd.errors import ConfigError
from vaopd.vlm.families.base import Family, ImageFeatures, PreparedImage, TpPlan
from vaopd.vlm.families.idefics import Idefics3
from vaopd.vlm.families.internvl import InternVL
from vaopd.vlm.families.qwen_vl import Qwen3VL, Qwen25VL

__all__ = ["Family", "ImageFeatures", "PreparedImage", "TpPlan", "find_family"]


_FAMILIES: dict[str, Family] = {
    "idefics3": Idefics3(),
    "internvl": InternVL(),
    "qwen2_5_vl": Qwen25VL(),
    "qwen3_vl": Qwen3VL(),
    "smolvlm": Idefics3(),
}


def find_family(model_type: str) -> Family:
    """Returns the adapter for a configuration's `model_type`. Raises ConfigError for a family without one."""
    if model_type not in _FAMILIES:
        known = ", ".join(sorted(_FAMILIES))
        raise ConfigError(f"model family {model_type!r} has no adapter; known: {known}. Add one in vaopd/vlm/families")
    return _FAMILIES[model_type]
