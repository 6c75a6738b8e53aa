"""SmolVLM and Idefics3: an image is cut into tiles, each with its own run of placeholders; plain RoPE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import PIL.Image
import torch

from vaopd.vlm.families.base import ImageFeatures, PreparedImage, TpPlan, compute_packed_hidden
from vaopd.vlm.shared_attention import Layout
from vaopd.vlm.transfer import upload_rows


class Idefics3:
    """Adapter for SmolVLM and Idefics3.

    `PreparedImage.grid` is (tiles, rows, columns): rows × columns tiles, and one that shows the whole picture.
    """

    tp_plan: TpPlan = "auto"

    def prepare_image(self, processor: Any, image: PIL.Image.Image) -> PreparedImage:
        """Cuts the image into tiles and normalises them."""
        features = processor.image_processor(images=[image], return_row_col_info=True, return_tensors="pt")
        tiles = features["pixel_values"][0]
        return PreparedImage(
            pixel_values=tiles,
            grid=(len(tiles), int(features["rows"][0][0]), int(features["cols"][0][0])),
            num_tokens=len(tiles) * processor.image_seq_len,
        )

    def pixel_bounds(self, processor: Any) -> tuple[int, int] | None:
        """Returns None: the tiles have one size for every picture."""
        return None

    def image_token_id(self, config: Any) -> int:
        """Returns the id of `<image>`."""
        return int(config.image_token_id)

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

    def vision_tower(self, model: Any) -> torch.nn.Module:
        """Returns the SigLIP encoder."""
        return model.model.vision_model

    def language_model(self, model: Any) -> torch.nn.Module:
        """Returns the text model."""
        return model.model.text_model

    def adapt(self, model: Any) -> None:
        """Leaves the model as it is."""

    def encode_images(self, model: Any, images: Sequence[PreparedImage]) -> list[ImageFeatures]:
        """Encodes the tiles of all images in one call."""
        tower = model.model.vision_model
        pixels = upload_rows([image.pixel_values for image in images], tower.device, tower.dtype)[None]
        tiles = model.model.get_image_features(pixels, return_dict=True).pooler_output
        return [(part.flatten(0, 1),) for part in tiles.split([image.grid[0] for image in images])]

    def make_generation_inputs(
        self, model: Any, input_ids: torch.Tensor, images: Sequence[PreparedImage]
    ) -> dict[str, Any]:
        """Returns all tiles as (1, tiles, 3, H, W), empty without images."""
        if not images:
            return {}
        return {"pixel_values": torch.cat([image.pixel_values for image in images])[None].to(input_ids.device)}

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
