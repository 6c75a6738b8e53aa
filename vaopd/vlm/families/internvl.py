"""InternVL (2.5, 3, 3.5 in transformers' own format): tiles of one size, marks around an image's tokens, plain RoPE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import PIL.Image
import torch

from vaopd.vlm.families.base import ImageFeatures, PreparedImage, TpPlan, compute_packed_hidden
from vaopd.vlm.shared_attention import Layout
from vaopd.vlm.transfer import upload_rows


class InternVL:
    """Adapter for InternVL. `PreparedImage.grid` is (tiles, height, width), in pixels of a tile."""

    tp_plan: TpPlan = "auto"

    def prepare_image(self, processor: Any, image: PIL.Image.Image) -> PreparedImage:
        """Cuts the image into tiles of one size and normalises them."""
        features = processor.image_processor(images=[image], crop_to_patches=True, return_tensors="pt")
        tiles = int(features["num_patches"][0])
        height, width = features["pixel_values"].shape[-2:]
        return PreparedImage(
            pixel_values=features["pixel_values"],
            grid=(tiles, height, width),
            num_tokens=tiles * processor.image_seq_length,
        )

    def pixel_bounds(self, processor: Any) -> tuple[int, int] | None:
        """Returns None: the tiles have one size for every picture."""
        return None

    def image_token_id(self, config: Any) -> int:
        """Returns the id of `<IMG_CONTEXT>`."""
        return int(config.image_token_id)

    def make_image_tokens(self, processor: Any, config: Any, image: PreparedImage) -> list[int]:
        """Returns the placeholders between the start and end marks."""
        inside = [self.image_token_id(config)] * image.num_tokens
        return [processor.start_image_token_id, *inside, processor.end_image_token_id]

    def runs(self, image: PreparedImage) -> list[int]:
        """Returns one run for the whole image."""
        return [image.num_tokens]

    def vision_token_ids(self, processor: Any, config: Any) -> frozenset[int]:
        """Returns the ids of the image's placeholder and marks, and the video's."""
        video = processor.tokenizer.get_vocab().get(processor.video_token)
        return frozenset(processor.image_token_ids) | (frozenset() if video is None else {video})

    def vision_tower(self, model: Any) -> torch.nn.Module:
        """Returns the vision encoder."""
        return model.model.vision_tower

    def language_model(self, model: Any) -> torch.nn.Module:
        """Returns the text model."""
        return model.model.language_model

    def adapt(self, model: Any) -> None:
        """Leaves the model as it is."""

    def encode_images(self, model: Any, images: Sequence[PreparedImage]) -> list[ImageFeatures]:
        """Encodes the tiles of all images in one call."""
        tower = model.model.vision_tower
        pixels = upload_rows([image.pixel_values for image in images], tower.device, tower.dtype)
        tiles = model.model.get_image_features(pixels, return_dict=True).pooler_output
        return [(part.flatten(0, 1),) for part in tiles.split([image.grid[0] for image in images])]

    def make_generation_inputs(
        self, model: Any, input_ids: torch.Tensor, images: Sequence[PreparedImage]
    ) -> dict[str, Any]:
        """Returns all tiles as (tiles, 3, H, W), empty without images."""
        if not images:
            return {}
        return {"pixel_values": torch.cat([image.pixel_values for image in images]).to(input_ids.device)}

    def compute_positions(self, model: Any, token_ids: torch.Tensor, images: Sequence[PreparedImage]) -> torch.Tensor:
        """Counts from 0: (1, P)."""
        return torch.arange(len(token_ids))[None]

    def compute_hidden(
        self,
        model: Any,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        features: Sequence[ImageFeatures],
        layout: Layout,
    ) -> torch.Tensor:
        """Computes the hidden states with the images at their placeholders."""
        embeddings = [part for (part,) in features]
        return compute_packed_hidden(self, model, input_ids, positions, embeddings, layout)
