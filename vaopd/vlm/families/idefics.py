"""SmolVLM and Idefics3: an image is cut into tiles, each with its own run of placeholders; plain RoPE."""

from __future__ import annotations

from typing import Any

import PIL.Image
import torch

from vaopd.vlm.families.base import PreparedImage, TiledFamily


class Idefics3(TiledFamily):
    """Adapter for SmolVLM and Idefics3.

    `PreparedImage.grid` is (tiles, rows, columns): rows × columns tiles, and one that shows the whole picture.
    """

    tower, text_model = "vision_model", "text_model"

    def prepare_image(self, processor: Any, image: PIL.Image.Image) -> PreparedImage:
        """Cuts the image into tiles and normalises them."""
        features = processor.image_processor(images=[image], return_row_col_info=True, return_tensors="pt")
        tiles = features["pixel_values"][0]
        return PreparedImage(
            pixel_values=tiles,
            grid=(len(tiles), int(features["rows"][0][0]), int(features["cols"][0][0])),
            num_tokens=len(tiles) * processor.image_seq_len,
        )

    def pack_tiles(self, tiles: torch.Tensor) -> torch.Tensor:
        """Adds an axis for the prompts: (1, tiles, 3, H, W)."""
        return tiles[None]

    def make_image_tokens(self, processor: Any, config: Any, image: PreparedImage) -> list[int]:
        """Returns the tiles' placeholders with the marks of rows and columns between them."""
        _, rows, columns = image.grid
        text = processor.replace_image_token({"rows": [[rows]], "cols": [[columns]]}, 0)
        ids: list[int] = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def runs(self, image: PreparedImage) -> list[int]:
        """Returns one run for each tile, all of the same length."""
        tiles = image.grid[0]
        return [image.num_tokens // tiles] * tiles

    def vision_token_ids(self, processor: Any, config: Any) -> frozenset[int]:
        """Returns the ids of the image's placeholders and marks."""
        names = ("<image>", "<video>", "<fake_token_around_image>", "<global-img>")
        vocabulary = processor.tokenizer.get_vocab()
        return frozenset(id for token, id in vocabulary.items() if token in names or token.startswith("<row_"))
