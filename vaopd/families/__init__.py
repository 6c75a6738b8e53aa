"""Everything that is specific to a model family sits in one adapter per family; `vaopd.vlm` is the same for all.

To add a family: write a module beside `qwen3_vl.py` that satisfies `Family` and name it in `_FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import PIL.Image
import torch

from vaopd.errors import ConfigError
from vaopd.families.base import PreparedImage
from vaopd.families.qwen3_vl import Qwen3VL

__all__ = ["Family", "PreparedImage", "family_for"]


class Family(Protocol):
    """What `vaopd.vlm` needs to know about a family of vision-language models."""

    def prepare_image(self, processor: Any, image: PIL.Image.Image) -> PreparedImage:
        """Pixel values and the number of placeholder tokens of one RGB image."""
        ...

    def image_token_id(self, config: Any) -> int:
        """The placeholder that a prompt repeats once per image token."""
        ...

    def vision_token_ids(self, config: Any) -> frozenset[int]:
        """Every id that announces vision input; none of them may stand inside a response."""
        ...

    def vision_tower(self, model: Any) -> torch.nn.Module:
        """The part that `student.train_vision_tower = false` freezes."""
        ...

    def final_hidden(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        row_images: Sequence[Sequence[PreparedImage]],
    ) -> torch.Tensor:
        """(rows, length, D): what the LM head reads; an image object shared by rows is encoded once."""
        ...


_FAMILIES: dict[str, Family] = {"qwen3_vl": Qwen3VL()}


def family_for(model_type: str) -> Family:
    """The adapter for a configuration's `model_type`; raises ConfigError for a family that has none."""
    if model_type not in _FAMILIES:
        known = ", ".join(sorted(_FAMILIES))
        raise ConfigError(f"model family {model_type!r} has no adapter; known: {known}. Add one in vaopd/families")
    return _FAMILIES[model_type]
