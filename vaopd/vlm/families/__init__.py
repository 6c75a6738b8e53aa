"""Adapters, one for each model family, with all code that is specific to it; `vaopd.vlm.model` is the same for all.

To add a family, write a module beside `internvl.py` that satisfies `Family`, and name it in `_FAMILIES`.
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

__all__ = ["Family", "ImageFeatures", "PreparedImage", "TpPlan", "find_family"]


class Family(Protocol):
    """The methods that `vaopd.vlm` needs for a family of vision-language models.

    `processor`, `config` and `model` (a …ForConditionalGeneration) are transformers' own.
    """

    tp_plan: TpPlan

    def prepare_image(self, processor: Any, image: PIL.Image.Image) -> PreparedImage:
        """Computes the pixel values, grid and number of placeholder tokens of one RGB image."""
        ...

    def pixel_bounds(self, processor: Any) -> tuple[int, int] | None:
        """Returns the fewest and the most pixels that the processor scales an image to; None without such bounds."""
        ...

    def image_token_id(self, config: Any) -> int:
        """Returns the placeholder's id: one per image in a rendered prompt, one per image token after expansion."""
        ...

    def make_image_tokens(self, processor: Any, config: Any, image: PreparedImage) -> list[int]:
        """Returns the ids that replace an image's placeholder: its image tokens and any marks around them."""
        ...

    def runs(self, image: PreparedImage) -> list[int]:
        """Returns the lengths of the image's runs of placeholders, in order: one run, or one for each tile."""
        ...

    def vision_token_ids(self, processor: Any, config: Any) -> frozenset[int]:
        """Returns every id that announces vision input; a response must not contain any."""
        ...

    def vision_tower(self, model: Any) -> torch.nn.Module:
        """Returns the module that `student.train_vision_tower = false` freezes."""
        ...

    def language_model(self, model: Any) -> torch.nn.Module:
        """Returns the text model without its LM head; it takes `inputs_embeds`, `position_ids` and `layout`."""
        ...

    def adapt(self, model: Any) -> None:
        """Replaces parts of transformers' model, in place, by equal ones that are faster on GPUs; may be repeated."""
        ...

    def encode_images(self, model: Any, images: Sequence[PreparedImage]) -> list[ImageFeatures]:
        """Runs the vision tower over the images, distinct and at least one; returns each one's features."""
        ...

    def make_generation_inputs(
        self, model: Any, input_ids: torch.Tensor, images: Sequence[PreparedImage]
    ) -> dict[str, Any]:
        """Returns the arguments of `model.generate` besides the prompt's input_ids (1, P)."""
        ...

    def compute_positions(self, model: Any, token_ids: torch.Tensor, images: Sequence[PreparedImage]) -> torch.Tensor:
        """Computes the position ids (A, P) of a prompt (P,) on A axes.

        A response continues with the largest plus 1, on every axis.
        """
        ...

    def compute_hidden(
        self,
        model: Any,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        features: Sequence[ImageFeatures],
        layout: Layout,
    ) -> torch.Tensor:
        """Computes the LM head's input (length, D) for a packed row (length,) with positions (A, length).

        input_ids, positions: on the host.
        """
        ...


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
