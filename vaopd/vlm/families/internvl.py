"""InternVL (2.5, 3, 3.5 in transformers' own format): tiles of one size, marks around an image's tokens, plain RoPE."""

from __future__ import annotations

from typing import Any

import PIL.Image

from vaopd.vlm.families.base import PreparedImage, TiledFamily


class InternVL(TiledFamily):
    """Adapter for InternVL. `PreparedImage.grid` is (tiles, height, width), in pixels of a tile."""

    tower = "vision_tower"

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

    def make_image_tokens(self, processor: Any, config: Any, image: PreparedImage) -> list[int]:
        """Returns the placeholders between the start and end marks."""
        inside = [self.image_token_id(config)] * image.num_tokens
        return [processor.start_image_token_id, *inside, processor.end_image_token_id]

    def vision_token_ids(self, processor: Any, config: Any) -> frozenset[int]:
        """Returns the ids of the image's placeholder and marks, and the video's."""
        video = processor.tokenizer.get_vocab().get(processor.video_token)
        return frozenset(processor.image_token_ids) | (frozenset() if video is None else {video})
