"""Qwen3-VL: patches and grids, multimodal RoPE, deepstack features injected into the first text layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import PIL.Image
import torch

from vaopd.families.base import PreparedImage


class Qwen3VL:
    def prepare_image(self, processor: Any, image: PIL.Image.Image) -> PreparedImage:
        features = processor.image_processor(images=[image], return_tensors="pt")
        grid = tuple(int(n) for n in features["image_grid_thw"][0])
        merge = processor.image_processor.merge_size
        return PreparedImage(
            pixel_values=features["pixel_values"],
            grid=grid,  # type: ignore[arg-type]
            num_tokens=grid[0] * grid[1] * grid[2] // merge**2,
        )

    def image_token_id(self, config: Any) -> int:
        return int(config.image_token_id)

    def vision_token_ids(self, config: Any) -> frozenset[int]:
        # <|vision_pad|> has no field in the configuration; `vaopd.vlm` adds it from the tokenizer by name.
        return frozenset(
            (config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id)
        )

    def vision_tower(self, model: Any) -> torch.nn.Module:
        return model.model.visual

    def final_hidden(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        row_images: Sequence[Sequence[PreparedImage]],
    ) -> torch.Tensor:
        images = [image for row in row_images for image in row]
        if not images:
            return model.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        grids = torch.tensor([image.grid for image in images], device=input_ids.device)
        return model.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            mm_token_type_ids=(input_ids == model.config.image_token_id).int(),
            image_grid_thw=grids,
            mm_encoder_outputs={"image": self._encode(model, images)},
            use_cache=False,
        ).last_hidden_state

    @staticmethod
    def _encode(model: Any, images: list[PreparedImage]) -> Any:
        """The vision tower's output for `images`, one run per distinct object: siblings share their prompt's image."""
        distinct = list({id(image): image for image in images}.values())
        place = {id(image): index for index, image in enumerate(distinct)}
        device = model.model.visual.device
        features = model.model.get_image_features(
            torch.cat([image.pixel_values for image in distinct]).to(device),
            torch.tensor([image.grid for image in distinct], device=device),
            return_dict=True,
        )
        order = [place[id(image)] for image in images]
        features.pooler_output = [features.pooler_output[i] for i in order]
        features.deepstack_features = [[layer[i] for i in order] for layer in features.deepstack_features]
        return features
