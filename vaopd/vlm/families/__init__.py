"""Everything that is specific to a model family sits in one adapter per family; `vaopd.vlm.model` is the same for all.

To add a family: write a module beside `internvl.py` that satisfies `Family` and name it in `_FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import PIL.Image
import torch

from vaopd.errors import ConfigError
from vaopd.vlm.families.base import ImageFeatures, PreparedImage, TpPlan
from vaopd.vlm.families.idefics import Idefics3
from vaopd.vlm.families.internvl import InternVL
from vaopd.vlm.families.qwen_vl import Qwen3VL, Qwen25VL
from vaopd.vlm.shared_attention import Layout

__all__ = ["Family", "ImageFeatures", "PreparedImage", "TpPlan", "family_for"]


class Family(Protocol):
    """What `vaopd.vlm.model` needs to know about a family of vision-language models.

    `processor` and `config` are transformers' own; so is `model`, a …ForConditionalGeneration.
    """

    tp_plan: TpPlan

    def prepare_image(self, processor: Any, image: PIL.Image.Image) -> PreparedImage:
        """Pixel values and the number of placeholder tokens of one RGB image."""
        ...

    def image_token_id(self, config: Any) -> int:
        """The placeholder: once per image in a rendered prompt, once per image token where the model reads it."""
        ...

    def image_tokens(self, processor: Any, config: Any, image: PreparedImage) -> list[int]:
        """What stands for an image in the tokens that the model reads: its placeholders and any marks around them."""
        ...

    def runs(self, image: PreparedImage) -> list[int]:
        """The lengths of the image's runs of placeholders, in order: one run, or one for each tile."""
        ...

    def vision_token_ids(self, processor: Any, config: Any) -> frozenset[int]:
        """Every id that announces vision input; none of them may stand inside a response."""
        ...

    def vision_tower(self, model: Any) -> torch.nn.Module:
        """The part that `student.train_vision_tower = false` freezes."""
        ...

    def language_model(self, model: Any) -> torch.nn.Module:
        """The text model without its LM head; takes `inputs_embeds`, `position_ids` and the attention's `layout`."""
        ...

    def encode_images(self, model: Any, images: Sequence[PreparedImage]) -> list[ImageFeatures]:
        """The vision tower's output for each of the images, which are distinct and at least one."""
        ...

    def generation_inputs(self, model: Any, input_ids: torch.Tensor, images: Sequence[PreparedImage]) -> dict[str, Any]:
        """What `model.generate` takes beside the prompt's input_ids (1, P)."""
        ...

    def prompt_positions(self, model: Any, token_ids: torch.Tensor, images: Sequence[PreparedImage]) -> torch.Tensor:
        """(A, P) position ids of a prompt (P,), A axes; a response goes on at the largest plus 1, on every axis."""
        ...

    def hidden(
        self,
        model: Any,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        features: Sequence[ImageFeatures],
        layout: Layout,
    ) -> torch.Tensor:
        """(length, D): what the LM head reads, for a packed row (length,) with positions (A, length)."""
        ...


_FAMILIES: dict[str, Family] = {
    "idefics3": Idefics3(),
    "internvl": InternVL(),
    "qwen2_5_vl": Qwen25VL(),
    "qwen3_vl": Qwen3VL(),
    "smolvlm": Idefics3(),
}


def family_for(model_type: str) -> Family:
    """The adapter for a configuration's `model_type`; raises ConfigError for a family that has none."""
    if model_type not in _FAMILIES:
        known = ", ".join(sorted(_FAMILIES))
        raise ConfigError(f"model family {model_type!r} has no adapter; known: {known}. Add one in vaopd/vlm/families")
    return _FAMILIES[model_type]
